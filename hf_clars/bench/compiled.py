"""The cost of norms in a model that torch.compile has compiled as a whole, against the compiled plain model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from hf_clars.bench.networks import Network, mean_loss
from hf_clars.bench.timing import Ratio, alternate, ratios
from hf_clars.grad_norms import PerSampleGradNorms


@dataclass(frozen=True)
class CompiledRow:
    """One network.

    Attributes:
        network: Its name.
        shape: Of its input.
        plain_seconds: Of each round of the compiled plain step.
        seconds: The same with norms.
        ratio: Between them.
        largest_error: Of a norm against the uncompiled one, relative to the layer's largest norm.
        gradient_error: Of the network's batch gradient against the uncompiled one, relative to it: what float32 and the
            compiler make of the same network, with norms or without.
    """

    network: str
    shape: tuple[int, ...]
    plain_seconds: list[float]
    seconds: list[float]
    ratio: Ratio
    largest_error: float
    gradient_error: float = float("nan")


COMPILED = ("resnet20", "resnet-50", "vit-tiny", "bert-base", "gpt2", "llama-100m")
"""What is measured if nothing is named."""


def measure_compiled(network: Network, rounds: int) -> CompiledRow:
    """Compile a network twice, with norms and without, and time both in turn.

    Args:
        network: With the batch to measure.
        rounds: How often each is timed.
    """
    torch.compiler.reset()  # compiled code of the network before would be kept
    plain, (x, y) = network.build(), network.data()
    measured, reference = copy.deepcopy(plain), copy.deepcopy(plain)
    norms = PerSampleGradNorms(measured, check=False)
    calls = {model: torch.compile(model, fullgraph=True) for model in (plain, measured)}

    def step(model: nn.Module) -> None:
        model.zero_grad()
        mean_loss(calls.get(model, model)(x), y).backward()
        if model is measured:
            norms.totals()

    with PerSampleGradNorms(reference) as expected:
        step(reference)
        step(measured)
        right, found = expected.per_sample, norms.per_sample
    error = max(float((found[n] - t).abs().max() / t.abs().max().clamp(min=1e-12)) for n, t in right.items())
    made, plain_made = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (measured, reference)
    )
    of_gradient = float((made - plain_made).norm() / plain_made.norm())
    del reference, made, plain_made
    seconds = alternate({"plain": lambda: step(plain), "norms": lambda: step(measured)}, rounds, label=network.name)
    ratio = ratios(seconds, "plain")["norms"]
    norms.remove()
    return CompiledRow(network.name, tuple(x.shape), seconds["plain"], seconds["norms"], ratio, error, of_gradient)
