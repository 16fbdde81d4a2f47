"""The stages. Each measures one thing and gives plain values for the JSON."""

from __future__ import annotations

import copy
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_clars.bench.gpu.measuring import Figures, Step, busy, device, in_turn, peak, so_far, sync, wall_ms
from hf_clars.bench.gpu.networks import NETWORKS, GpuNetwork, Loss
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.choice import form_choices

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


def exactness(tiny: bool) -> Figures:
    """The project's GPU tests, where its tests are at hand, and beside them some kernels against their references."""
    if not (ROOT / "tests" / "kernels").is_dir():
        return {"skipped": "the tests are not beside the package"}
    figures: Figures = {}
    compare = None
    if device().type == "cuda":
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
    model, loss = spec.prepare(device(), tiny=tiny)
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
    figures: Figures = {"first ms": wall_ms(norms_step), "layers": len(norms.layers)}
    for step in (plain_step, norms_step):
        step()
        step()
    figures |= in_turn(plain_step, norms_step, seconds=0.5 if tiny else seconds)
    so_far(figures)
    for key, step in (("plain", plain_step), ("norms", norms_step)):
        figures |= {f"{key} {k}": v for k, v in busy(step).items()}
        figures[f"{key} GiB"] = peak(step)
    if figures["plain busy ms"]:
        figures["busy ratio"] = figures["norms busy ms"] / figures["plain busy ms"]
    for step in (plain_step, norms_step):
        torch.manual_seed(0)  # the same dropout
        step()
    return figures | {"gradients differ by": _difference(model, measured)}


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
        model, loss = NETWORKS[name].prepare(device(), tiny=tiny)
        # The sum check reads values, which a graph cannot; the model is learned in the steps before it.
        norms = PerSampleGradNorms(model, check=False) if key == "norms" else None

        def step(model: nn.Module = model, norms: Any = norms, loss: Any = loss) -> Any:
            model.zero_grad(set_to_none=True)
            if norms is not None:
                norms.reset()
            loss(model).backward()
            return None if norms is None else norms.totals()

        graph = capture(step)
        figures[f"{key} ms"] = statistics.median(wall_ms(graph.replay) for _ in range(10))
        del model, norms, graph
        gc.collect()
        torch.cuda.empty_cache()
    return figures | {"ratio": figures["norms ms"] / figures["plain ms"]}


def subset(tiny: bool) -> Figures:
    """512 of 16,384 samples by accumulation, ResNet-8: the whole update's time over the plain one's."""
    passes, batch = (4, 4) if tiny else (32, 512)
    model, loss = NETWORKS["resnet8 B2048"].prepare(device(), tiny=tiny, batch=batch)
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
    return in_turn(plain, with_norms, seconds=0.5 if tiny else 10.0)


def forms(tiny: bool) -> Figures:
    """Which form each layer of the networks takes, measured anew: for `scripts/fit_forms.py`, and kept on disk."""
    form_choices.measure_anew(seconds=45.0)
    for spec in NETWORKS.values():
        model, loss = spec.prepare(device(), tiny=tiny)
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
    """`step()` alone on ResNet-50's 161 tensors, against torch's own, timm's and pytorch_optimizer's.

    CLARS measures its norms in a backward pass, and steps once for each: it has one before each step, which is not
    timed. The others step with the same gradients again.
    """
    from hf_clars.bench.check import refusal

    figures: Figures = {}
    steps: dict[str, Step] = {}
    passes: dict[str, Step] = {}
    for name, make in _optimizers().items():
        try:
            model, loss = NETWORKS["resnet50 B64"].prepare(device(), tiny=tiny, batch=2)
            optimizer = make(model)
            backward = partial(_backward, model, loss)
            backward()
            optimizer.step()
        except Exception as error:  # another library that lacks, or refuses
            figures[name] = {"skipped": refusal(error)}
            continue
        steps[name] = optimizer.step
        if name == "CLARS":
            passes[name] = backward
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(3 if tiny else 30):
        for name, step in steps.items():
            passes.get(name, sync)()
            times[name].append(wall_ms(step))
    middle = {name: statistics.median(t) for name, t in times.items()}
    return figures | {name: {"ms": ms, "of SGD foreach": ms / middle["SGD foreach"]} for name, ms in middle.items()}


def _backward(model: nn.Module, loss: Loss) -> None:
    model.zero_grad(set_to_none=True)
    loss(model).backward()


def _optimizers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """All with Nesterov's momentum; torch's foreach SGD is what the others are compared with."""
    from hf_clars.bench.optimizer_step import LEARNING_RATE, MOMENTUM, OPTIMIZERS
    from hf_clars.optim import NAG

    def sgd(model: nn.Module, **how: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, nesterov=True, **how)

    ways: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {"SGD foreach": partial(sgd, foreach=True)}
    if torch.cuda.is_available():
        ways["SGD fused"] = partial(sgd, fused=True)
    ways["NAG"] = lambda model: NAG(model, LEARNING_RATE, momentum=MOMENTUM)
    ways |= {"LARS": OPTIMIZERS["hf_clars LARS"], "CLARS": OPTIMIZERS["hf_clars CLARS"]}
    return ways | {name: OPTIMIZERS[name] for name in ("timm Lars", "pytorch_optimizer LARS")}


def peers(tiny: bool) -> Figures:
    """Other libraries beside ours, see `hf_clars.bench.gpu.peers`."""
    from hf_clars.bench.gpu.peers import peers as run  # it imports what other stages would wait for

    return run(tiny)


def trainer(tiny: bool) -> Figures:
    """`ClarsTrainer` beside Trainer, see `hf_clars.bench.gpu.trainer`; skipped where a package of theirs lacks."""
    try:
        import accelerate  # noqa: F401 - transformers asks for it only when a Trainer is made

        from hf_clars.bench.gpu.trainer import trainer as run
    except ImportError as error:
        return {"skipped": f"needs the package {error.name}"}
    return run(tiny)


STAGES: dict[str, tuple[float, Callable[[bool], Figures]]] = {
    "exactness": (1.2, exactness),
    **{name: (1.0, partial(network, name)) for name in NETWORKS},
    "forms": (0.6, forms),
    "optimizer step": (0.3, optimizer_step),
    "512 of 16,384 samples": (0.4, subset),
    "captured: resnet50 B64": (0.5, partial(captured, "resnet50 B64")),
    "captured: vit-b B128": (0.5, partial(captured, "vit-b B128")),
    "captured: resnet8 B2048": (0.4, partial(captured, "resnet8 B2048")),
    "peers": (0.8, peers),
    "trainer": (1.0, trainer),
}
"""In order of importance: (share of the time, what measures)."""
