"""`RunSettings`: everything that decides what a run computes, and the key that its result is kept under."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hf_clars.data import PixelSettings
from hf_clars.errors import ConfigError
from hf_clars.records.files import nearest

SCHEDULES = ("polynomial", "steps", "constant", "tvlars")
PRECISIONS = ("float32", "bfloat16")
FORMAT = 1
"""Part of every key: raise it when the same settings come to mean another computation."""
LATER = {"precision": "float32"}
"""Settings that joined after results had been kept: at these values they are no part of the key."""


@dataclass(frozen=True)
class RunSettings:
    """One training run.

    Attributes:
        dataset: Name of the data set, on the Hub or of its folder (never a path: results keep under any location).
        image_size: Side of the images that the model sees.
        num_channels: 1 or 3.
        augment: "none", "cifar" or "imagenet".
        in_memory: Hold the set as tensors (small sets); False: a data loader.
        held_out: So many training images are held out and evaluated on; 0: train on all, evaluate on the test images.
        model: A name of `hf_clars.models.model_names()`.
        model_kwargs: Settings of the model's configuration.
        method: A name of `research.study.methods.METHODS`.
        method_kwargs: Further arguments of the method's optimizer.
        batch_size: B, samples an update; the last part of an epoch that does not fill a batch is dropped.
        micro_batch: Samples a forward and backward pass; passes are accumulated to B. BatchNorm sees these.
        epochs: Epochs of B * floor(N / B) samples.
        learning_rate: gamma_scale; None: gamma_base * B / base_batch_size (linear scaling).
        gamma_base: Rate at the base batch size.
        base_batch_size: Batch size that gamma_base belongs to.
        eta: Trust coefficient; None: the method's default.
        momentum: beta.
        weight_decay: Coupled weight decay.
        norm_samples: How many samples of a batch CLARS measures; 0: all.
        schedule: "polynomial" (to 0), "steps", "constant" or "tvlars".
        schedule_kwargs: Arguments of the schedule, see `hf_clars.optim.schedules`; epochs instead of steps.
        warmup_epochs: Gradual warmup.
        freeze_epochs: FC freeze: epochs for which the fully connected layers are held.
        layer_rate_epochs: Epochs after which layers lose their own rates and train at gamma_scale; None: never.
        seed: Of first weights, order of the samples, and augmentation.
        precision: "float32", or "bfloat16" for autocast in the forward pass.
    """

    dataset: str
    model: str
    method: str
    batch_size: int
    epochs: int
    image_size: int = 28
    num_channels: int = 1
    augment: str = "none"
    in_memory: bool = True
    held_out: int = 0
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    method_kwargs: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 512
    learning_rate: float | None = None
    gamma_base: float = 0.1
    base_batch_size: int = 128
    eta: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    norm_samples: int = 0
    schedule: str = "polynomial"
    schedule_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_epochs: float = 0.0
    freeze_epochs: float = 0.0
    layer_rate_epochs: float | None = None
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision!r} is unknown: choose one of {', '.join(PRECISIONS)}.")
        if self.micro_batch < self.batch_size and self.batch_size % self.micro_batch:
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch={self.micro_batch}: passes of one size "
                "are accumulated."
            )
        for name in ("batch_size", "micro_batch", "epochs", "image_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        self.pixels()

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> RunSettings:
        """Settings from a mapping.

        Args:
            values: {name: value}.
            where: For messages: the file, and the place in it.

        Returns:
            The settings.

        Raises:
            ConfigError: For a name that is no setting, or one that is missing.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ConfigError(f"{where} has an unknown setting, {name!r}.{nearest(name, fields)}")
        missing = [n for n, f in fields.items() if _required(f) and n not in values]
        if missing:
            raise ConfigError(f"{where} lacks {', '.join(missing)}: set it under common, networks or arms.")
        return cls(**values)

    def replace(self, **changes: Any) -> RunSettings:
        """The same settings with changes."""
        return dataclasses.replace(self, **changes)

    def pixels(self) -> PixelSettings:
        """How images become tensors."""
        return PixelSettings(image_size=self.image_size, num_channels=self.num_channels, augment=self.augment)

    @property
    def rate(self) -> float:
        """gamma_scale."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.gamma_base * self.batch_size / self.base_batch_size

    @property
    def pass_size(self) -> int:
        """Samples of a forward and backward pass."""
        return min(self.micro_batch, self.batch_size)

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that are the same for the same settings, on every machine."""
        values = {n: v for n, v in dataclasses.asdict(self).items() if n not in LATER or v != LATER[n]}
        text = json.dumps({"format": FORMAT, **values}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
