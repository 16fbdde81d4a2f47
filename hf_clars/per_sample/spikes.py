"""Spikes: when a step counts as one, and what carries it.

The rule: a value is a spike when it lies above the median of the measured steps before it by more than `WIDTH` times
their spread (1.4826 times the median absolute deviation, the standard deviation of a normal distribution), and is at
least `FACTOR` times the median. The last `MEMORY` measured steps count, and at least `LEAST` of them are needed.
A value that is not a number is a spike always.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_clars.per_sample.measures import StepMeasures

WIDTH, FACTOR, MEMORY, LEAST = 6.0, 1.5, 50, 8
NAMED = 5
"""Samples that a spike names."""


@dataclass(frozen=True)
class Carrier:
    """A sample that carries a spike.

    Attributes:
        norm: Its whole-network gradient norm.
        share: Its part of the sum of the samples' squared norms.
        index: Its index in the data set; -1 where unknown.
        rank: The process.
        micro_batch: The pass on that process, from 0.
        row: Its place in the pass.
    """

    norm: float
    share: float
    index: int
    rank: int
    micro_batch: int
    row: int


@dataclass(frozen=True)
class Spike:
    """A measured step that stands out.

    Attributes:
        step: Its number.
        what: `"gradient norm"` or `"loss"`.
        value: The step's.
        usual: The median of the measured steps before it.
        samples: Those that carry it, the largest first.
        layers: (name, part of the batch's squared gradient, usual part) of the layers whose part grew most.
    """

    step: int
    what: str
    value: float
    usual: float
    samples: tuple[Carrier, ...]
    layers: tuple[tuple[str, float, float], ...]

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def sentence(self) -> str:
        """One sentence for a log or an alert."""
        samples = ", ".join(
            f"{'index ' + str(c.index) if c.index >= 0 else f'row {c.row}'} (rank {c.rank}, micro-batch "
            f"{c.micro_batch}, {c.share:.0%})"
            for c in self.samples
        )
        layers = ", ".join(f"{name} ({part:.0%}, usually {usual:.0%})" for name, part, usual in self.layers)
        return (
            f"Step {self.step}: the {self.what} is {self.value:.4g}, usually {self.usual:.4g}. Samples that carry it: "
            f"{samples or 'none measured'}. Layers: {layers or 'not known'}."
        )


class SpikeRule:
    """Applies the rule to one step after the other.

    Args:
        layers: The K layers' names.
        width: Default 6 spreads.
        factor: Default 1.5 medians.
        samples: How many carriers to name. Default 5.
    """

    def __init__(
        self, layers: Sequence[str], *, width: float = WIDTH, factor: float = FACTOR, samples: int = NAMED
    ) -> None:
        self.layers = list(layers)
        self.width, self.factor, self.samples = width, factor, samples
        self._norms: deque[float] = deque(maxlen=MEMORY)
        self._losses: deque[float] = deque(maxlen=MEMORY)
        self._parts: deque[Tensor] = deque(maxlen=MEMORY)

    def look(self, step: StepMeasures) -> list[Spike]:
        """The spikes of a step, whose measures are on the host; none, one or two."""
        norm, loss = float(gradient_norm(step)), float(step.loss)
        found = []
        for what, value, before in (("gradient norm", norm, self._norms), ("loss", loss, self._losses)):
            known_loss = what != "loss" or not math.isnan(value)  # a loss that was never told is no spike
            if known_loss and self._stands_out(value, before):
                found.append(
                    Spike(step.step, what, value, _median(before), carriers(step)[: self.samples], self._grown(step))
                )
            elif math.isfinite(value):
                before.append(value)
        if step.finite and not found:
            self._parts.append(_parts(step))
        return found

    def _stands_out(self, value: float, before: Sequence[float]) -> bool:
        if len(before) < LEAST:
            return False
        if not math.isfinite(value):
            return True
        middle = _median(before)
        spread = 1.4826 * _median([abs(x - middle) for x in before])
        return value > middle + self.width * spread and value > self.factor * middle

    def _grown(self, step: StepMeasures) -> tuple[tuple[str, float, float], ...]:
        parts = _parts(step)
        if not self._parts or not torch.isfinite(parts).all():
            return ()
        usual = torch.stack(list(self._parts)).median(dim=0).values
        order = (parts - usual).argsort(descending=True)[:3].tolist()
        return tuple((self.layers[k], float(parts[k]), float(usual[k])) for k in order)


def carriers(step: StepMeasures) -> tuple[Carrier, ...]:
    """The samples with the largest norms of a step, the largest first."""
    columns = (step.top_norm, step.top_share, step.top_index, step.top_rank, step.top_micro_batch, step.top_row)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return tuple(Carrier(*row) for row in rows if row[3] >= 0)


def gradient_norm(step: StepMeasures) -> Tensor:
    """The batch gradient's norm; the root mean square of the samples' where it was not read."""
    squares = step.batch_square if not torch.isnan(step.batch_square).all() else step.sample_square
    return squares.sum().sqrt()


def _parts(step: StepMeasures) -> Tensor:
    squares = step.batch_square if not torch.isnan(step.batch_square).all() else step.sample_square
    return squares / squares.sum()


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
