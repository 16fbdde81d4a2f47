"""How images become tensors: sizes, augmentation, normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_clars.errors import ConfigError

Augment = Literal["imagenet", "cifar", "none"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PixelSettings:
    """How images become tensors.

    Attributes:
        image_size: Height and width of `pixel_values`.
        num_channels: 3 (RGB, default) or 1 (grey).
        augment: In training: `"imagenet"` (random resized crop of 8 to 100 % of the area, and flip; default), `"cifar"`
            (4 pixels of padding, random crop, flip) or `"none"` (as in evaluation).
        crop_ratio: In evaluation the shorter side is resized to image_size / crop_ratio before the centre crop.
            Default:
            0.875 with `"imagenet"`, otherwise 1.
        mean: Per channel, of values in [0, 1]. Default: ImageNet's for RGB, 0.5 for grey.
        std: Likewise. Default: ImageNet's, or 0.5.
    """

    image_size: int = 224
    num_channels: int = 3
    augment: str = "imagenet"
    crop_ratio: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.augment not in ("imagenet", "cifar", "none"):
            raise ConfigError(f"augment={self.augment!r} is unknown: use imagenet, cifar or none.")
        if self.num_channels not in (1, 3):
            raise ConfigError(f"num_channels={self.num_channels}: images have 1 (grey) or 3 (RGB) channels.")
        if self.image_size < 1 or not 0 < (self.crop_ratio or 1.0) <= 1:
            raise ConfigError(
                f"image_size={self.image_size}, crop_ratio={self.crop_ratio}: use a size above 0, a ratio in (0, 1]."
            )

    @property
    def resize_to(self) -> int:
        """The shorter side before the centre crop of evaluation."""
        ratio = self.crop_ratio or (0.875 if self.augment == "imagenet" else 1.0)
        return round(self.image_size / ratio)

    @property
    def channel_mean(self) -> tuple[float, ...]:
        """The mean in use."""
        return self.mean or (IMAGENET_MEAN if self.num_channels == 3 else (0.5,))

    @property
    def channel_std(self) -> tuple[float, ...]:
        """The standard deviation in use."""
        return self.std or (IMAGENET_STD if self.num_channels == 3 else (0.5,))
