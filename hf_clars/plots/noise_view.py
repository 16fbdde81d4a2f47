"""A log of per-sample norms as the interactive page takes it: quantities by layer, and the model's curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_clars.per_sample.log import PerSampleLog
from hf_clars.plots.columns import Values

Curve = Sequence[tuple[int, float | None, float | None, float | None, int]]
"""(step, noise scale, its lower and upper end, batch size); None: not known, or without an upper end."""


@dataclass(frozen=True)
class NoiseView:
    """What the page reads of a log: the names are those of a layer-rate log.

    Attributes:
        layers: Names, K of them.
        steps: The measured ones, [T].
        settings: Of the measuring.
        quantities: Which there are.
        curve: The whole model's noise scale.
    """

    layers: list[str]
    steps: NDArray[np.int64]
    settings: Mapping[str, Any]
    quantities: tuple[str, ...]
    curve: Curve
    values: Mapping[str, Values]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, quantity: str) -> Values:
        """[T, K]; NaN all over for what was not measured."""
        found = self.values.get(quantity)
        return np.full((len(self), len(self.layers)), np.nan) if found is None else found


def noise_view(log: PerSampleLog) -> NoiseView:
    """Read a log.

    Args:
        log: The log.

    Raises:
        RecordError: If it is damaged.
    """
    arrays = log.read()
    steps, read = log.noise_scale()
    grad_norm, mean_norm = arrays["batch_square"].double().sqrt(), arrays["sample_norm"].double()
    measured = {
        "noise_scale": read.value[:, :-1],
        "signal": read.share[:, :-1],
        "ratio": grad_norm / mean_norm,
        "grad_norm": grad_norm,
        "mean_sample_norm": mean_norm,
    }
    values = {name: value.double().numpy() for name, value in measured.items() if not bool(value.isnan().all())}
    curve = [
        (int(step), _number(value), _number(low), _number(high), int(size))
        for step, value, low, high, size in zip(
            steps.tolist(),
            *(x[:, -1].tolist() for x in (read.value, read.low, read.high)),
            arrays["samples"].tolist(),
            strict=True,
        )
    ]
    known = curve if any(point[1] is not None for point in curve) else []
    return NoiseView(list(log.layers), steps.numpy(), dict(log.settings), tuple(values), known, values)


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None
