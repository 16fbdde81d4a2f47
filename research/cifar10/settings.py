"""What defines a run of the study on CIFAR-10."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_clars.optim import schedules

METHODS = ("signal_lars", "lars", "clars", "nag", "lamb", "tvlars", "adascale", "vr_lars", "lars_times_ratio")
SCHEDULES = ("poly-2", "constant", "cosine", "steps", "tvlars")
STEPS = (0.3, 0.6, 0.75)  # shares of the run: the paper's Figure 3 has epochs 60, 120 and 150 of 200
BASE_BATCH = 128  # what AdaScale's scale and n = B / 128 refer to


@dataclass(frozen=True)
class Settings:
    """What defines a run.

    Attributes:
        method: One of `METHODS`.
        rate: The peak rate a: gamma_scale * eta.
        network: "resnet8" or "resnet20".
        batch: B.
        n: Of SignalLARS.
        decay: Of the running moments of SignalLARS and AdaScale.
        form: Of SignalLARS' factor: "gain" (the product's) or "sum", [1 + (n - 1) s]^-power.
        power: Of the factor; 1 is the product's. Of R_k, for "lars_times_ratio".
        share: "layer" (the product's), or "network": one share of signal for all layers.
        momentum: b.
        warmup: Epochs of gradual warmup.
        schedule: One of `SCHEDULES`.
        seed: Of weights and order.
        epochs: Passes over the training images.
        width: Of the network.
        chunk: Samples a pass: BatchNorm's batch.
        weight_decay: Coupled.
    """

    method: str
    rate: float
    network: str = "resnet8"
    batch: int = 2048
    n: float = 16.0
    decay: float = 0.9
    form: str = "gain"
    power: float = 1.0
    share: str = "layer"
    momentum: float = 0.9
    warmup: float = 0.0
    schedule: str = "poly-2"
    seed: int = 0
    epochs: int = 12
    width: int = 16
    chunk: int = 512
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        """Refuse what no run can have.

        Raises:
            ValueError: A word is unknown.
        """
        known = {"method": METHODS, "schedule": SCHEDULES, "form": ("gain", "sum"), "share": ("layer", "network")}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(words)}.")

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Settings:
        """Those of a kept run; what the row lacks is at its default."""
        return cls(**{f.name: row[f.name] for f in fields(cls) if f.name in row})


#: What tells one method from another: everything but rate and seed.
KIND = tuple(f.name for f in fields(Settings) if f.name not in ("rate", "seed"))


def kind(row: Mapping[str, Any] | Settings) -> tuple[Any, ...]:
    """What a run shares with those at other rates and seeds."""
    values = vars(row) if isinstance(row, Settings) else row
    return tuple(values[name] for name in KIND)


def rate_at(s: Settings, step: int, total: int, warmup_steps: int) -> float:
    """The scheduled rate: gradual warmup times the decay.

    Args:
        s: Settings.
        step: Of the run, from 0.
        total: Steps of the run.
        warmup_steps: The first step of a warmup has one part of so many of the rate, not none.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return s.rate * _decay(s.schedule, step, total) * warm


def _decay(schedule: str, step: int, total: int) -> float:
    if schedule == "poly-2":
        return (1 - step / total) ** 2
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / total))
    if schedule == "steps":
        return schedules.steps_down(step, boundaries=[share * total for share in STEPS])
    if schedule == "tvlars":  # as long and as steep, in shares of the run, as in the study on Fashion-MNIST
        return schedules.time_varying(step, delay_steps=total / 4, steepness=10 / total, minimum=0.01)
    return 1.0
