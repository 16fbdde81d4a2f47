"""A short measurement of the forms of one layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from hf_clars.grad_norms.rules.costs import Form

ROUNDS, CALLS = 3, 5


def milliseconds(runs: Mapping[Form, Callable[[], object]]) -> tuple[dict[Form, float], float]:
    """The time of each form, and the seconds that all this took. A form that finds no memory is left out.

    Args:
        runs: What each form runs.
    """
    start = time.perf_counter()
    times: dict[Form, float] = {}
    for form, run in runs.items():
        try:
            times[form] = _clock(run)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return times, time.perf_counter() - start


def _clock(run: Callable[[], object]) -> float:
    """Milliseconds of a call: the best of a few rounds, after one that compiles."""
    run()
    return min(_round(run) for _ in range(ROUNDS)) / CALLS


def _round(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
