"""The image processor saved beside a model: the evaluation transform in transformers' own terms."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torchvision.transforms.v2 import functional as F
from transformers import AutoImageProcessor, BitImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from hf_clars.data.pixel_settings import PixelSettings

logger = logging.getLogger(__name__)


class GreyImageProcessor(BitImageProcessor):
    """`BitImageProcessor` for models that take one grey channel: colour images are converted."""

    do_convert_rgb = False

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Convert to grey, then as usual.

        Args:
            image: PIL image, array or tensor.
            args: As in `BitImageProcessor`.
            kwargs: Likewise.

        Returns:
            Tensor [1, H, W].
        """
        pixels = super().process_image(image.convert("L") if isinstance(image, Image) else image, *args, **kwargs)
        return F.rgb_to_grayscale(pixels) if pixels.shape[0] == 3 else pixels


class GreyImageConfig(PreTrainedConfig):
    """A name under which `AutoImageProcessor` finds `GreyImageProcessor`; no model uses it."""

    model_type = "hf_clars_grey_image"


@dataclass(frozen=True)
class CheckpointPixels:
    """What a checkpoint's image processor says of the pixels that its weights were trained on.

    Attributes:
        size: Height and width; None where it names no square.
        mean: Per channel, of values in [0, 1]; None where it does not normalise by one.
        std: Likewise.
    """

    size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read_checkpoint_pixels(name_or_path: str) -> CheckpointPixels | None:
    """Read the image processor that lies beside a checkpoint's weights.

    Args:
        name_or_path: Local folder, or name on the Hub.

    Returns:
        What it says; None where there is none that transformers can read.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # no file, an unknown class, a damaged file, no network
        logger.debug("No image processor of %s: %s", name_or_path, error)
        return None
    if getattr(processor, "do_flip_channel_order", False):
        logger.warning(
            "%s was trained on channels in the order blue, green, red; here they are red first.", name_or_path
        )
    mean, std = _normalisation(processor)
    return CheckpointPixels(_side(processor), mean, std)


def _side(processor: BaseImageProcessor) -> int | None:
    """Height and width of the images that it gives; None where they differ or are not said."""
    of_timm = (getattr(processor, "data_config", None) or {}).get("input_size")
    if of_timm:
        return int(of_timm[-1]) if of_timm[-1] == of_timm[-2] else None
    crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = dict(crops or getattr(processor, "size", None) or {})
    height, width = size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge")
    return int(height) if height and height == width else None


def _normalisation(processor: BaseImageProcessor) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation of values in [0, 1], whatever the processor scales them to first."""
    of_timm = getattr(processor, "data_config", None) or {}
    if of_timm.get("mean") and of_timm.get("std"):
        return tuple(of_timm["mean"]), tuple(of_timm["std"])
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None or not getattr(processor, "do_rescale", True):
        return None, None
    if not getattr(processor, "do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    scale = 255 * float(getattr(processor, "rescale_factor", 1 / 255))
    scale = 1.0 if abs(scale - 1) < 1e-9 else scale
    return tuple(float(value) / scale for value in mean), tuple(float(value) / scale for value in std)


AutoImageProcessor.register(GreyImageConfig, image_processor_classes={"torchvision": GreyImageProcessor}, exist_ok=True)


def build_image_processor(settings: PixelSettings) -> BaseImageProcessor:
    """The processor that gives the evaluation transform's `pixel_values`.

    Args:
        settings: Of the run.

    Returns:
        transformers' `BitImageProcessor` for RGB, `GreyImageProcessor` for grey.
    """
    processor_type = BitImageProcessor if settings.num_channels == 3 else GreyImageProcessor
    return processor_type(
        size={"shortest_edge": settings.resize_to},
        crop_size={"height": settings.image_size, "width": settings.image_size},
        resample=PILImageResampling.BILINEAR,
        image_mean=list(settings.channel_mean),
        image_std=list(settings.channel_std),
    )
