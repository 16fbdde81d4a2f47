"""Small image sets held as uint8 tensors: decoded once, normalised (and augmented) a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional

from hf_clars.data.pixels import PixelSettings, PixelTransform, to_uint8
from hf_clars.errors import DataError

CROP_PADDING = 4


@dataclass(frozen=True)
class ImageTensors:
    """Images and labels of one split.

    Attributes:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
        settings: How pixels become the model's input.
    """

    pixels: Tensor
    labels: Tensor
    settings: PixelSettings

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageTensors:
        """The images of these indices [M], in this order."""
        return ImageTensors(self.pixels[indices], self.labels[indices], self.settings)

    def to(self, device: torch.device | str) -> ImageTensors:
        """The same on another device."""
        return ImageTensors(self.pixels.to(device), self.labels.to(device), self.settings)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images and labels of some indices.

        Args:
            indices: [B].
            generator: Draws the padded crops and flips of `augment="cifar"`, on the CPU; None: no augmentation.

        Returns:
            (float32 [B, C, H, W], int64 [B]).
        """
        pixels = self.pixels[indices]
        if generator is not None and self.settings.augment == "cifar":
            pixels = crop_and_flip(pixels, generator)
        mean, std = (
            torch.tensor(values, device=pixels.device).view(-1, 1, 1)
            for values in (self.settings.channel_mean, self.settings.channel_std)
        )
        return pixels.float().sub_(255 * mean).div_(255 * std), self.labels[indices]


def decode_images(split: Dataset, settings: PixelSettings, *, image_column: str, label_column: str) -> ImageTensors:
    """Decode a split, resized and cropped as for evaluation.

    Args:
        split: Map-style split of images.
        settings: Of the pixels. `augment="imagenet"` has crops of the whole images, which are not kept here.
        image_column: Column of images.
        label_column: Column of labels.

    Returns:
        The images as tensors.

    Raises:
        DataError: If the augmentation needs the whole images.
    """
    if settings.augment == "imagenet":
        raise DataError(
            "augment='imagenet' crops each image anew from its full size, which is not held in memory: set in_memory "
            "to false, or augment to cifar or none."
        )
    geometry = PixelTransform(settings, train=False).geometry
    images = [to_uint8(row[image_column], settings.num_channels) for row in split.select_columns([image_column])]
    one_size = len({image.shape for image in images}) == 1
    pixels = geometry(torch.stack(images)) if one_size else torch.stack([geometry(image) for image in images])
    return ImageTensors(pixels, torch.tensor(split[label_column][:]), settings)


def crop_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4 pixels, crop at random, and mirror every second image: He et al.'s augmentation of CIFAR, by batches.

    Args:
        pixels: [B, C, H, W], any type.
        generator: On the CPU.

    Returns:
        The same shape.
    """
    count, _, height, width = pixels.shape
    top, left = torch.randint(2 * CROP_PADDING + 1, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = left + torch.where(flip, columns.flip(1), columns)
    padded = functional.pad(pixels, (CROP_PADDING,) * 4)
    images = torch.arange(count)[:, None, None]
    places = (part.to(pixels.device) for part in (images, rows[:, :, None], columns[:, None, :]))
    image, row, column = places
    return padded[image, :, row, column].permute(0, 3, 1, 2).contiguous()
