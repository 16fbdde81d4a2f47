"""Stronger augmentation than the paper's, all of it torchvision's: RandAugment, random erasing, mixup and cutmix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.data
from torch import Tensor
from torchvision.transforms import v2

from hf_clars.data.augmenting import SharedEpoch, random_numbers_from, sample_seed
from hf_clars.data.device_pixels import FLIP, IMAGES, DevicePixels
from hf_clars.data.loading import collate_images
from hf_clars.data.pixel_settings import PixelSettings
from hf_clars.data.pixels import PixelTransform
from hf_clars.errors import ConfigError

STRENGTHS = 31  # of RandAugment, from 0; torchvision's number of bins


@dataclass(frozen=True)
class StrongAugment:
    """What happens to training images beside crops and flips; everything is off by default.

    Attributes:
        randaugment: Strength of RandAugment's two random operations an image, 1 to 30; 0: off.
        random_erasing: Probability that a random rectangle of an image is set to the mean colour; 0: off.
        mixup: alpha of mixup: two images of a pass are blended with weights drawn from Beta(alpha, alpha); 0: off.
        cutmix: alpha of cutmix: a rectangle of one image is put into another; 0: off. With both, each pass takes one
            of the two by chance.

    Raises:
        ConfigError: A number is out of its range.
    """

    randaugment: int = 0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what torchvision cannot do."""
        if not 0 <= self.randaugment < STRENGTHS:
            raise ConfigError(f"randaugment={self.randaugment} must be a strength from 1 to 30, or 0 for none.")
        if not 0 <= self.random_erasing <= 1:
            raise ConfigError(f"random_erasing={self.random_erasing} must be a probability from 0 to 1.")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} must be above 0, or 0 for none.")

    @property
    def mixes(self) -> bool:
        """Whether images, and so labels, are mixed within a pass."""
        return bool(self.mixup or self.cutmix)


class StrongPixelTransform(PixelTransform):
    """The transform of the training split with RandAugment and random erasing after the crop, on uint8.

    Args:
        settings: See `PixelSettings`.
        strong: What to add.
    """

    def __init__(self, settings: PixelSettings, strong: StrongAugment) -> None:
        super().__init__(settings, train=True)
        added: list[Any] = []
        if strong.randaugment:
            added.append(v2.RandAugment(magnitude=strong.randaugment, num_magnitude_bins=STRENGTHS))
        if strong.random_erasing:
            # On uint8 as this is, the mean colour is what normalisation turns into 0, nearly.
            colour = [round(255 * mean) for mean in settings.channel_mean]
            added.append(v2.RandomErasing(p=strong.random_erasing, value=colour))
        self._added = v2.Compose(added) if added else None
        if self._added is not None:
            self.geometry = v2.Compose([*self.geometry.transforms, *added])

    @property
    def random(self) -> bool:
        """Whether two calls on one image can differ."""
        return super().random or self._added is not None

    def crop_file(self, content: bytes) -> Tensor | None:
        """As of `PixelTransform`, and then what is added.

        Args:
            content: An image file.

        Returns:
            uint8 [C, image_size, image_size], or None where the whole image must be decoded.
        """
        cropped = super().crop_file(content)
        return cropped if cropped is None or self._added is None else self._added(cropped)


class MixedImages(torch.utils.data.Dataset):
    """A map-style training set whose passes are mixed by mixup or cutmix as they are read.

    A sample of a pass is then a mixed image with mixed labels, and its gradient norm is that of this sample. What is
    mixed with what depends on seed, epoch and the images of the pass alone, so a resumed run sees the same.

    Args:
        images: What `trainable` gives, with uint8 pixels (`on_device=True`) of a map-style split.
        strong: alpha of mixup and cutmix.
        settings: Of the pixels: mixing needs them normalised.
        classes: How many there are.
        seed: Of the mixing.

    Raises:
        ConfigError: The set is a stream, whose passes are put together elsewhere.
    """

    def __init__(self, images: Any, strong: StrongAugment, settings: PixelSettings, *, classes: int, seed: int) -> None:
        if isinstance(images, torch.utils.data.IterableDataset):
            raise ConfigError("mixup and cutmix need data that are no stream: leave out streaming, or the mixing.")
        made = {v2.MixUp: strong.mixup, v2.CutMix: strong.cutmix}
        self._mix = v2.RandomChoice([kind(alpha=alpha, num_classes=classes) for kind, alpha in made.items() if alpha])
        self._images, self._seed = images, seed
        self._finish = DevicePixels(settings)
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A pass: float32 pixels [C, H, W] and labels [classes] that add up to 1; torch's data loader calls this."""
        read = getattr(self._images, "__getitems__", None)
        rows = [self._images[index] for index in indices] if read is None else read(indices)
        batch = collate_images(rows)
        pixels = self._finish(batch[IMAGES], batch.get(FLIP))
        with random_numbers_from(sample_seed(self._seed, self._epoch.get(), *indices)):
            mixed, labels = self._mix(pixels, batch["labels"])
        return [{IMAGES: image, "labels": label} for image, label in zip(mixed, labels, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: each has its own augmentation and mixing.

        Args:
            epoch: From 0.
        """
        self._epoch.set(epoch)
        self._images.set_epoch(epoch)

    @property
    def skipped_images(self) -> int:
        """How many bad images were passed over."""
        return self._images.skipped_images


def collate_mixed(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows to a batch, whose labels may be mixed.

    Args:
        rows: Of `MixedImages`, or as `collate_images` takes them.

    Returns:
        As `collate_images`; labels float32 [B, classes] where they are mixed.
    """
    label = rows[0]["labels"]
    if not isinstance(label, Tensor) or label.dim() == 0:
        return collate_images(rows)
    return {name: torch.stack([row[name] for row in rows]) for name in (IMAGES, "labels")}
