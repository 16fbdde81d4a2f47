"""From an image to `pixel_values`: random crops for training, resize and centre crop for evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from hf_clars.data.device_pixels import DevicePixels
from hf_clars.data.jpeg import Box, decode_crop, is_upright, read_jpeg_header
from hf_clars.data.pixel_settings import PixelSettings

_STRIP = 4_000_000  # pixels; nearly all photographs are smaller


def to_uint8(image: Image.Image, num_channels: int) -> Tensor:
    """A decoded image of any mode as uint8 [num_channels, H, W].

    16-bit greys keep their upper 8 bits. Greys of 32 bits, whole or fractional, do not say what white is: it is taken
    to be the smallest of 1 (fractions only), 255, 65,535 and 2^32 - 1 that no pixel is above.

    Args:
        image: As PIL opens it: grey, RGB, palette, CMYK, with alpha, 16-bit.
        num_channels: 1 or 3.

    Returns:
        The tensor.

    Raises:
        ValueError: Pixels are not finite, or brighter than all that.
    """
    white = _white(image)
    # Large images go strip by strip: converting one as a whole would hold it several times.
    rows = max(1, _STRIP // max(1, image.width))
    if image.height <= rows:
        pixels = _converted(image, num_channels, white)
    else:
        pixels = np.empty((image.height, image.width, num_channels), np.uint8)
        for top in range(0, image.height, rows):
            bottom = min(image.height, top + rows)
            pixels[top:bottom] = _converted(image.crop((0, top, image.width, bottom)), num_channels, white)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _white(image: Image.Image) -> int | None:
    """The value of white in an image of more than 8 bits; None for other images."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65_535
    if image.mode not in ("I", "F"):
        return None
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("some pixels are not finite numbers")
    brightest = max(float(value) for value in image.getextrema())  # type: ignore[arg-type]
    for white in (1, 255, 65_535, 2**32 - 1):
        if brightest <= white and (white > 1 or image.mode == "F"):
            return white
    raise ValueError(f"its brightest pixel is {brightest:g}")


def _converted(image: Image.Image, num_channels: int, white: int | None) -> np.ndarray:
    """uint8 [H, W, num_channels]."""
    if white is not None and image.mode != "F":
        eight = np.asarray(image).astype(np.int64).clip(0) >> (white.bit_length() - 8)
        image = Image.fromarray(eight.clip(0, 255).astype(np.uint8))
    elif white is not None:
        image = Image.fromarray((np.asarray(image) * (255 / white)).clip(0, 255).round().astype(np.uint8))
    array = np.array(image.convert("L" if num_channels == 1 else "RGB"))
    return array[:, :, None] if num_channels == 1 else array


class PixelTransform:
    """The transform of one split: picklable, so that data-loader workers can have it.

    Geometry runs on uint8, which is quick; scaling and normalisation come last.

    Args:
        settings: See `PixelSettings`.
        train: Whether to augment.
    """

    def __init__(self, settings: PixelSettings, *, train: bool) -> None:
        self.settings = settings
        self.train = train
        self.flips = train and settings.augment != "none"
        self.geometry = v2.Compose(_geometry(settings, train))
        self.finish = DevicePixels(settings)

    @property
    def random(self) -> bool:
        """Whether two calls on one image can differ."""
        return self.train and self.settings.augment != "none"

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Transform one image.

        Args:
            image: PIL image, or uint8 tensor [C, H, W].

        Returns:
            float32 [C, image_size, image_size].
        """
        pixels = image if isinstance(image, Tensor) else to_uint8(image, self.settings.num_channels)
        cropped = self.geometry(pixels)
        return self.finish(cropped[None], torch.tensor([self.draw_flip()]))[0]

    def crop_file(self, content: bytes) -> Tensor | None:
        """A random crop straight from a JPEG file, where only the rows of the crop are decoded; see `decode_crop`.

        The crop is the one that `geometry` would have drawn from the same random numbers.

        Args:
            content: An image file.

        Returns:
            uint8 [C, image_size, image_size]; None where the whole image must be decoded: the split has no random
            resized crops, the model sees one channel, or the file is no baseline JPEG that stands upright.
        """
        crop = self.geometry.transforms[0]
        if not isinstance(crop, v2.RandomResizedCrop) or self.settings.num_channels != 3:
            return None
        header = read_jpeg_header(content)
        if header is None or not is_upright(content, header):
            return None
        drawn = crop.make_params([torch.empty(3, header.height, header.width, device="meta")])
        box = Box(drawn["top"], drawn["left"], drawn["height"], drawn["width"])
        try:
            return decode_crop(content, header, box, self.settings.image_size)
        except ValueError:  # damaged: whoever decodes the whole image says how
            return None

    def draw_flip(self) -> bool:
        """Whether to mirror one image: with probability 1/2 in training, never in evaluation."""
        return self.flips and torch.rand(()).item() < 0.5


def _geometry(settings: PixelSettings, train: bool) -> list[Any]:
    """What happens to a uint8 image before it may be mirrored."""
    size = settings.image_size
    if train and settings.augment == "imagenet":
        return [v2.RandomResizedCrop(size, antialias=True)]
    evaluation: list[Any] = [v2.Resize(settings.resize_to, antialias=True), v2.CenterCrop(size)]
    if train and settings.augment == "cifar":
        return [*evaluation, v2.RandomCrop(size, padding=4)]
    return evaluation
