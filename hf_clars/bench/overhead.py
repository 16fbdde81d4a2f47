"""What the engine's own Python costs: microseconds a layer and pass, on tensors so small that arithmetic costs nothing.

On a GPU a step of a small batch waits for Python, so this decides there; on a CPU it is what remains of tiny models.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_clars.bench.networks import device
from hf_clars.bench.timing import alternate
from hf_clars.grad_norms import PerSampleGradNorms

SAMPLES, WIDTH, DEPTH = 4, 4, 40


@dataclass(frozen=True)
class OverheadRow:
    """Layers of one kind, one after another.

    Attributes:
        layers: What they are.
        depth: How many.
        plain: Microseconds a layer of a forward and backward pass, the median.
        with_norms: The same with every sample's norms; the sum check is off, as it is in most passes.
    """

    layers: str
    depth: int
    plain: float
    with_norms: float

    @property
    def overhead(self) -> float:
        """Microseconds a layer that the norms cost."""
        return self.with_norms - self.plain


def _stack(*kinds: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(kinds[i % len(kinds)]() for i in range(DEPTH)))


TOKENS, IMAGES = (SAMPLES, 3, WIDTH), (SAMPLES, WIDTH, 4, 4)
STACKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: _stack(lambda: nn.Linear(WIDTH, WIDTH)), (SAMPLES, WIDTH)),
    "Linear over 3 tokens": (lambda: _stack(lambda: nn.Linear(WIDTH, WIDTH)), TOKENS),
    "LayerNorm over 3 tokens": (lambda: _stack(lambda: nn.LayerNorm(WIDTH)), TOKENS),
    "BatchNorm": (lambda: _stack(lambda: nn.BatchNorm2d(WIDTH)), IMAGES),
    "convolution 1x1": (lambda: _stack(lambda: nn.Conv2d(WIDTH, WIDTH, 1)), IMAGES),
    "convolution 3x3": (lambda: _stack(lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1)), IMAGES),
}
"""By what is printed: the layers, and the shape of their input."""


def measure_overhead(name: str, rounds: int) -> OverheadRow:
    """Time one kind of layer.

    Args:
        name: In `STACKS`.
        rounds: How often a pass is timed, times ten: a pass takes milliseconds.
    """
    make, shape = STACKS[name]
    plain, measured = make().to(device()), make().to(device())
    x = torch.randn(shape, device=device())
    norms = PerSampleGradNorms(measured, keep_per_sample=False, check=False)

    def with_norms() -> None:
        _step(measured, x)
        norms.totals()

    steps = {"plain": lambda: _step(plain, x), "norms": with_norms}
    seconds = alternate(steps, 10 * rounds, warmup=5, label=name)
    norms.remove()
    medians = {way: 1e6 * statistics.median(taken) / DEPTH for way, taken in seconds.items()}
    return OverheadRow(name, DEPTH, medians["plain"], medians["norms"])


def _step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(x).sum().backward()
