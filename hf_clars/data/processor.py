"""The image processor saved beside a model: the evaluation transform in transformers' own terms."""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image
from torchvision.transforms.v2 import functional as F
from transformers import AutoImageProcessor, BitImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from hf_clars.data.pixel_settings import PixelSettings


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
