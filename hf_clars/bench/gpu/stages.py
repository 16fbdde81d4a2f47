"""The stages. Each measures one thing and gives plain values for the JSON."""

from __future__ import annotations

import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hf_clars.bench.gpu.networks import NETWORKS, GpuNetwork
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.choice import form_choices

Figures = dict[str, Any]
Step = Callable[[], object]
ROOT = Path(__file__).parents[3]
EVERY = 9
"""Of so many kernels' cases one is compared."""


def machine() -> Figures:
    """What it was measured on."""
    cuda = torch.cuda.is_available()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "card": torch.cuda.get_device_name() if cuda else "none (CPU): not a measurement",
        "torch": torch.__version__,
        "triton": triton_version,
        "units": "milliseconds and GiB; ratio: median over alternating rounds of wall time with norms over plain",
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def so_far(figures: Figures) -> None:
    """Say what a stage has found by now: it is kept if the stage's time is up before it ends."""
    print(json.dumps(figures), flush=True)


def exactness(tiny: bool) -> Figures:
    """The project's GPU tests, where its tests are at hand, and beside them some kernels against their references."""
    if not (ROOT / "tests" / "kernels").is_dir():
        return {"skipped": "the tests are not beside the package"}
    figures: Figures = {}
    compare = None
    if _device().type == "cuda":
        # Each shape is compiled for anew: all of them would take longer than all other stages.
        command = [sys.executable, "-m", "tests.kernels.compare", "cuda", "0", str(EVERY)]
        compare = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_on_a_gpu.py", "-p", "no:cacheprovider"]
    tests += ["-k", "autocast"] if tiny else []
    run = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False)
    figures["tests"] = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))][:40]
    figures["tests summary"] = (run.stdout.strip().splitlines() or [run.stderr[-300:]])[-1]
    so_far(figures)
    if compare is not None:
        lines = compare.communicate()[0].splitlines()
        found = [line for line in lines if line.startswith(("ok ", "WRONG "))]
        wrong = [line for line in found if line.startswith("WRONG ")][:20]
        error = "\n".join(lines)[-600:] if compare.returncode else ""
        figures["kernels"] = {"cases": len(found), "wrong": wrong, "error": error}
    return figures


def network(name: str, tiny: bool, *, seconds: float = 25.0) -> Figures:
    """Plain and measured steps of one network in turn: wall time, busy GPU, processor time, memory, dearest kernels."""
    spec: GpuNetwork = NETWORKS[name]
    device = _device()
    model, loss = spec.prepare(device, tiny=tiny)
    measured = copy.deepcopy(model)
    norms = PerSampleGradNorms(measured)

    def plain_step() -> None:
        model.zero_grad(set_to_none=True)
        loss(model).backward()

    def norms_step() -> None:
        measured.zero_grad(set_to_none=True)
        norms.reset()
        loss(measured).backward()
        norms.totals()

    plain_step()
    _sync()
    start = time.perf_counter()
    norms_step()
    _sync()
    figures: Figures = {"first ms": 1e3 * (time.perf_counter() - start), "layers": len(norms.layers)}
    for step in (plain_step, norms_step):
        step()
        step()
    figures |= _in_turn(plain_step, norms_step, seconds=0.5 if tiny else seconds)
    so_far(figures)
    for key, step in (("plain", plain_step), ("norms", norms_step)):
        figures |= {f"{key} {k}": v for k, v in _busy(step).items()}
        figures[f"{key} GiB"] = _peak(step)
    if figures["plain busy ms"]:
        figures["busy ratio"] = figures["norms busy ms"] / figures["plain busy ms"]
    for step in (plain_step, norms_step):
        torch.manual_seed(0)  # the same dropout
        step()
    return figures | {"gradients differ by": _difference(model, measured)}


def _in_turn(plain: Step, norms: Step, *, seconds: float) -> Figures:
    times: dict[str, list[float]] = {"plain": [], "norms": []}
    cpu: dict[str, list[float]] = {"plain": [], "norms": []}
    end = time.perf_counter() + seconds
    while len(times["plain"]) < 3 or (time.perf_counter() < end and len(times["plain"]) < 25):
        for name, step in (("plain", plain), ("norms", norms)):
            _sync()
            start = time.perf_counter()
            for _ in range(3):
                step()
            issued = time.perf_counter()
            _sync()
            times[name].append((time.perf_counter() - start) / 3)
            cpu[name].append((issued - start) / 3)
    ratios = [n / p for p, n in zip(times["plain"], times["norms"], strict=True)]
    figures: Figures = {"ratio": statistics.median(ratios), "rounds": len(ratios)}
    figures |= {"ratio low": min(ratios), "ratio high": max(ratios)}
    for name in times:
        figures[f"{name} ms"] = 1e3 * statistics.median(times[name])
        figures[f"{name} issue ms"] = 1e3 * statistics.median(cpu[name])
    return figures


def _busy(step: Step) -> Figures:
    """Milliseconds that the GPU works in a step, by the profiler, and the dearest kernels; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {"busy ms": None, "kernels": []}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(2):
            step()
        _sync()
    rows = [(e.key, e.self_device_time_total / 2e3, e.count / 2) for e in trace.key_averages()]
    rows.sort(key=lambda row: -row[1])
    dearest = [{"kernel": key[:90], "ms": round(ms, 3), "calls": count} for key, ms, count in rows[:10]]
    return {"busy ms": sum(ms for _, ms, _ in rows), "kernels": dearest}


def _peak(step: Step) -> float | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    _sync()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _difference(model: nn.Module, measured: nn.Module) -> float:
    """Norm of the gradients' difference over their norm."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), measured.parameters(), strict=True)]
    off = sum(float((p - q).float().square().sum()) for p, q in pairs if p is not None and q is not None)
    whole = sum(float(p.float().square().sum()) for p, _ in pairs if p is not None)
    return float((off / whole) ** 0.5)


def capture(step: Step) -> torch.cuda.CUDAGraph:
    """A step as a CUDA graph, after five that are run: the first passes learn the model."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def captured(name: str, tiny: bool) -> Figures:
    """A whole measured step as a CUDA graph, beside a plain one."""
    if not torch.cuda.is_available():
        return {"skipped": "needs a CUDA device"}
    figures: Figures = {}
    for key in ("plain", "norms"):
        model, loss = NETWORKS[name].prepare(_device(), tiny=tiny)
        # The sum check reads values, which a graph cannot; the model is learned in the steps before it.
        norms = PerSampleGradNorms(model, check=False) if key == "norms" else None

        def step(model: nn.Module = model, norms: Any = norms, loss: Any = loss) -> Any:
            model.zero_grad(set_to_none=True)
            if norms is not None:
                norms.reset()
            loss(model).backward()
            return None if norms is None else norms.totals()

        graph = capture(step)
        times = []
        for _ in range(10):
            _sync()
            start = time.perf_counter()
            graph.replay()
            _sync()
            times.append(time.perf_counter() - start)
        figures[f"{key} ms"] = 1e3 * statistics.median(times)
        del model, norms, graph
        gc.collect()
        torch.cuda.empty_cache()
    return figures | {"ratio": figures["norms ms"] / figures["plain ms"]}


def subset(tiny: bool) -> Figures:
    """512 of 16,384 samples by accumulation, ResNet-8: the whole update's time over the plain one's."""
    passes, batch = (4, 4) if tiny else (32, 512)
    device = _device()
    model, loss = NETWORKS["resnet8 B2048"].prepare(device, tiny=tiny, batch=batch)
    measured = copy.deepcopy(model)
    norms = PerSampleGradNorms(measured, samples=batch, keep_per_sample=False)

    def update(which: nn.Module, tracked: bool) -> None:
        which.zero_grad(set_to_none=True)
        if tracked:
            norms.reset()
        for _ in range(passes):
            loss(which).backward()
        if tracked:
            norms.totals()

    plain, with_norms = partial(update, model, False), partial(update, measured, True)
    plain()
    with_norms()
    return _in_turn(plain, with_norms, seconds=0.5 if tiny else 10.0)


def forms(tiny: bool) -> Figures:
    """Which form each layer of the networks takes, measured anew: for `scripts/fit_forms.py`, and kept on disk."""
    form_choices.measure_anew(seconds=45.0)
    for spec in NETWORKS.values():
        model, loss = spec.prepare(_device(), tiny=tiny)
        with PerSampleGradNorms(model, keep_per_sample=False):
            loss(model).backward()
        del model, loss
        gc.collect()
        so_far(_measured_forms())
    return _measured_forms()


def _measured_forms() -> Figures:
    times: dict[str, Figures] = {}
    for kind, use, choice in form_choices:
        if choice.why == "measured":
            times.setdefault(kind, {})[str(use)] = dict(choice.measured)
    return {"times": times, "seconds left": form_choices.seconds}


def optimizer_step(tiny: bool) -> Figures:
    """`step()` alone on ResNet-50's 161 tensors, against torch's own and timm's."""
    from hf_clars.optim import LARS, NAG

    def sgd(params: Any, **how: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, 1e-4, momentum=0.9, nesterov=True, **how)

    ways: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "SGD foreach": lambda m: sgd(m.parameters(), foreach=True),
        "LARS": lambda m: LARS(m, 1e-4),
        "NAG": lambda m: NAG(m, 1e-4),
    }
    if torch.cuda.is_available():
        ways["SGD fused"] = lambda m: sgd(m.parameters(), fused=True)
    try:
        from timm.optim import Lars

        ways["timm Lars"] = lambda m: Lars(m.parameters(), 1e-4, momentum=0.9, nesterov=True, always_adapt=True)
    except ImportError:
        pass
    steps: dict[str, Callable[[], object]] = {}
    for name, make in ways.items():
        model, _ = NETWORKS["resnet50 B64"].prepare(_device(), tiny=tiny, batch=1)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        steps[name] = make(model).step
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(3 if tiny else 30):
        for name, step in steps.items():
            _sync()
            start = time.perf_counter()
            step()
            _sync()
            times[name].append(1e3 * (time.perf_counter() - start))
    middle = {name: statistics.median(t) for name, t in times.items()}
    return {name: {"ms": ms, "of SGD foreach": ms / middle["SGD foreach"]} for name, ms in middle.items()}


STAGES: dict[str, tuple[float, Callable[[bool], Figures]]] = {
    "exactness": (1.2, exactness),
    **{name: (1.0, partial(network, name)) for name in NETWORKS},
    "forms": (0.6, forms),
    "optimizer step": (0.3, optimizer_step),
    "512 of 16,384 samples": (0.4, subset),
    "captured: resnet50 B64": (0.5, partial(captured, "resnet50 B64")),
    "captured: vit-b B128": (0.5, partial(captured, "vit-b B128")),
}
"""In order of importance: (share of the time, what measures)."""
