"""Images from `datasets` to `pixel_values`."""

from hf_clars.extras import needing_an_extra

with needing_an_extra("Reading images"):
    from hf_clars.data.device_pixels import DevicePixels
    from hf_clars.data.in_memory import ImageTensors, decode_images
    from hf_clars.data.loading import InMemoryImages, collate_images, trainable
    from hf_clars.data.pixel_settings import PixelSettings
    from hf_clars.data.pixels import PixelTransform
    from hf_clars.data.processor import (
        CheckpointPixels,
        GreyImageProcessor,
        build_image_processor,
        read_checkpoint_pixels,
    )
    from hf_clars.data.sources import ImageData, load_image_data

__all__ = [
    "CheckpointPixels",
    "DevicePixels",
    "GreyImageProcessor",
    "ImageData",
    "ImageTensors",
    "InMemoryImages",
    "PixelSettings",
    "PixelTransform",
    "build_image_processor",
    "collate_images",
    "decode_images",
    "load_image_data",
    "read_checkpoint_pixels",
    "trainable",
]
