"""The last part of the transform, on the model's device: mirror, scale to [0, 1], normalise.

A batch crosses to the device as uint8, a quarter of its size in float32, and the workers are spared the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_clars.data.pixel_settings import PixelSettings

IMAGES, FLIP = "pixel_values", "flip"
"""Names in a batch: uint8 [B, C, H, W], and bool [B], which images to mirror."""


class DevicePixels:
    """Turns uint8 images into what a model takes. It waits for nothing and copies nothing to the host.

    Args:
        settings: Mean and deviation per channel.
        channels_last: Give the result in the memory order batch, height, width, channel. Default False: batch, channel,
            height, width.
    """

    def __init__(self, settings: PixelSettings, *, channels_last: bool = False) -> None:
        self._mean = torch.tensor(settings.channel_mean).view(-1, 1, 1)
        self._std = torch.tensor(settings.channel_std).view(-1, 1, 1)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor, flip: Tensor | None = None) -> Tensor:
        """Mirror, scale and normalise.

        Args:
            images: uint8 [B, C, H, W].
            flip: bool [B]: which to mirror; None: none.

        Returns:
            float32 [B, C, H, W].
        """
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        mean, std = self._constants(images.device)
        scaled = images.to(torch.float32, memory_format=self._layout).mul_(1.0 / 255)  # as torchvision rounds
        return scaled.sub_(mean).div_(std)

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Let a model take uint8 images by keyword: `model(pixel_values=..., flip=...)`. Float images pass unchanged.

        The model's weights, its `forward` and what it saves stay as they are.

        Args:
            model: The module that is called, before a launcher wraps it.

        Returns:
            A handle; its `remove()` undoes this.
        """
        return model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        flip, images = kwargs.pop(FLIP, None), kwargs.get(IMAGES)
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            kwargs[IMAGES] = self(images, flip).to(first)
        return args, kwargs

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation, sent to a device once."""
        if device not in self._on:
            self._on[device] = (self._mean.to(device), self._std.to(device))
        return self._on[device]
