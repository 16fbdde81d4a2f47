"""What the stages measure with: wall time, busy GPU, peak memory; and how they say what they have found."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Figures = dict[str, Any]
Step = Callable[[], object]


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sync() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def so_far(figures: Figures) -> None:
    """Say what a stage has found by now: it is kept if the stage's time is up before it ends."""
    print(json.dumps(figures), flush=True)


def wall_ms(step: Step) -> float:
    """Milliseconds of a step, from an idle GPU to an idle GPU."""
    sync()
    start = time.perf_counter()
    step()
    sync()
    return 1e3 * (time.perf_counter() - start)


def in_turn(plain: Step, norms: Step, *, seconds: float) -> Figures:
    """Wall time of two steps in turn, three of each a round, and how long Python takes to issue them.

    Args:
        plain: The step that is compared with.
        norms: The measured one.
        seconds: How long; at least 3 rounds, at most 25.
    """
    times: dict[str, list[float]] = {"plain": [], "norms": []}
    cpu: dict[str, list[float]] = {"plain": [], "norms": []}
    end = time.perf_counter() + seconds
    while len(times["plain"]) < 3 or (time.perf_counter() < end and len(times["plain"]) < 25):
        for name, step in (("plain", plain), ("norms", norms)):
            sync()
            start = time.perf_counter()
            for _ in range(3):
                step()
            issued = time.perf_counter()
            sync()
            times[name].append((time.perf_counter() - start) / 3)
            cpu[name].append((issued - start) / 3)
    ratios = [n / p for p, n in zip(times["plain"], times["norms"], strict=True)]
    figures: Figures = {"ratio": statistics.median(ratios), "rounds": len(ratios)}
    figures |= {"ratio low": min(ratios), "ratio high": max(ratios)}
    for name in times:
        figures[f"{name} ms"] = 1e3 * statistics.median(times[name])
        figures[f"{name} issue ms"] = 1e3 * statistics.median(cpu[name])
    return figures


def busy(step: Step) -> Figures:
    """Milliseconds that the GPU works in a step, by the profiler, and the dearest kernels; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {"busy ms": None, "kernels": []}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(2):
            step()
        sync()
    rows = [(e.key, e.self_device_time_total / 2e3, e.count / 2) for e in trace.key_averages()]
    rows.sort(key=lambda row: -row[1])
    dearest = [{"kernel": key[:90], "ms": round(ms, 3), "calls": count} for key, ms, count in rows[:10]]
    return {"busy ms": sum(ms for _, ms, _ in rows), "kernels": dearest}


def peak(step: Step) -> float | None:
    """GiB that a step holds at its highest beyond what was held before it; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    sync()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
