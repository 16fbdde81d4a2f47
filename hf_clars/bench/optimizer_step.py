"""What an optimizer's `step()` costs by itself, and what it keeps for each weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

from hf_clars.bench.check import refusal
from hf_clars.bench.networks import Network, logits
from hf_clars.bench.timing import Ratio, alternate, ratios
from hf_clars.optim import CLARS, LARS

LEARNING_RATE, MOMENTUM = 1e-4, 0.9
"""A small rate: the weights shall stay ordinary numbers, since others could take another time."""


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer.

    Attributes:
        optimizer: Its name.
        tensors: Parameters that it stepped.
        seconds: Of each timed step; empty if it could not be run.
        ratio: To SGD; None if it could not be run.
        numbers_per_weight: Numbers that it keeps from step to step, divided by those of the parameters.
        note: Why it could not be run.
    """

    optimizer: str
    tensors: int
    seconds: list[float] = field(default_factory=list)
    ratio: Ratio | None = None
    numbers_per_weight: float | None = None
    note: str = ""


def _sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, nesterov=True, foreach=True)


def _lars(model: nn.Module) -> Optimizer:
    return LARS(model, LEARNING_RATE, momentum=MOMENTUM)


def _clars(model: nn.Module) -> Optimizer:
    return CLARS(model, LEARNING_RATE, momentum=MOMENTUM)


def _timm_lars(model: nn.Module) -> Optimizer:
    from timm.optim import Lars

    # Without always_adapt it is plain SGD where there is no weight decay.
    return Lars(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, nesterov=True, always_adapt=True)


def _pytorch_optimizer_lars(model: nn.Module) -> Optimizer:
    from pytorch_optimizer import LARS as TheirLARS

    # It adapts tensors of two and more axes; vectors get plain SGD.
    return TheirLARS(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, nesterov=True)


BASELINE = "torch SGD"
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    BASELINE: _sgd,
    "hf_clars LARS": _lars,
    "hf_clars CLARS": _clars,
    "timm Lars": _timm_lars,
    "pytorch_optimizer LARS": _pytorch_optimizer_lars,
}
"""All with Nesterov's momentum and without weight decay.

SGD is on its multi-tensor path, as ours are; timm and pytorch_optimizer choose for themselves, by the device.
"""


class _Contender:
    """An optimizer with a model of its own."""

    def __init__(self, network: Network, make: Callable[[nn.Module], Optimizer]) -> None:
        self.model = network.build()
        self.x, self.y = network.data()
        self.optimizer = make(self.model)

    def prepare(self) -> None:
        """Make gradients ready, by a real backward pass: CLARS measures its norms there, and steps once for each.

        All contenders do the same, so that each timed step finds the processor's caches in the same state.
        """
        self.optimizer.zero_grad()
        functional.cross_entropy(logits(self.model(self.x)), self.y).backward()

    def numbers_per_weight(self) -> float:
        kept = [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return _numbers(kept) / _numbers(list(self.model.parameters()))


def measure_optimizers(network: Network, rounds: int) -> list[OptimizerRow]:
    """Time the steps alone, in turn; forward and backward passes are not in it.

    Args:
        network: Whose parameters are stepped; small images will do, the step does not depend on them.
        rounds: How often each is timed.

    Returns:
        One row an optimizer.
    """
    running: dict[str, _Contender] = {}
    notes = dict.fromkeys(OPTIMIZERS, "")
    for name, make in OPTIMIZERS.items():
        try:
            contender = _Contender(network, make)
            contender.prepare()
            contender.optimizer.step()
            running[name] = contender
        except Exception as error:  # whatever another library refuses with
            notes[name] = refusal(error)
    seconds = alternate(
        {name: contender.optimizer.step for name, contender in running.items()},
        rounds,
        prepare={name: contender.prepare for name, contender in running.items()},
        label="optimizer step",
    )
    found = ratios(seconds, BASELINE)
    tensors = len(list(running[BASELINE].model.parameters()))
    return [
        OptimizerRow(
            name,
            tensors,
            seconds.get(name, []),
            found.get(name),
            running[name].numbers_per_weight() if name in running else None,
            notes[name],
        )
        for name in OPTIMIZERS
    ]


def _numbers(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
