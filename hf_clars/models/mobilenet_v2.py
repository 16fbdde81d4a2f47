"""MobileNetV2 for images of 28 to 32 pixels (Sandler et al. 2018, table 2, with two strides fewer)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from hf_clars.models.base import NormName, SmallNetConfig, SmallNetForImageClassification, make_norm

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks and stride of the first block; published with stride 2 in the second stage too."""
STEM, LAST, DIVISOR = 32, 1280, 8


class MobileNetV2SmallConfig(SmallNetConfig):
    """Configuration of `MobileNetV2SmallForImageClassification`.

    Args:
        multiplier: Factor of all channels but the last convolution's, which are then rounded to multiples of 8.
        norm: "batch" (as published) or "group" (samples stay uncoupled).
        image_size: Side of the square images, in pixels. Any side works; kept for whoever prepares the images.
        num_channels: Channels of the images.
        **kwargs: As in `SmallNetConfig`.

    Raises:
        ConfigError: A value cannot work.
    """

    model_type = "clars_mobilenet_v2_small"

    def __init__(
        self,
        *,
        multiplier: float = 1.0,
        norm: Literal["batch", "group"] = "batch",
        image_size: int = 32,
        num_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        self.multiplier = multiplier
        self.norm = norm
        super().__init__(image_size=image_size, num_channels=num_channels, **kwargs)

    def check(self) -> None:
        """Raise `ConfigError` where a value cannot work."""
        super().check()
        self._choice("norm", ("batch", "group"))
        self._positive("multiplier")


class InvertedResidual(nn.Module):
    """1x1 convolution that expands, 3x3 depthwise, 1x1 that projects; added to the input where shapes agree.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the depthwise convolution.
        expansion: Factor of the channels between; 1: the first convolution is left out.
        norm: Kind of normalisation.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int, norm: NormName) -> None:
        super().__init__()
        between = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, between, 1, bias=False), make_norm(norm, between), nn.ReLU6()]
        layers += [
            nn.Conv2d(between, between, 3, stride=stride, padding=1, groups=between, bias=False),
            make_norm(norm, between),
            nn.ReLU6(),
            nn.Conv2d(between, outputs, 1, bias=False),
            make_norm(norm, outputs),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, ceil(H / stride), ceil(W / stride)]`."""
        y = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2SmallForImageClassification(SmallNetForImageClassification):
    """The published layers without the strides of the stem and of the second stage: 32 pixels end as 4 x 4.

    Strides have no parameters: with 3 channels and 1,000 classes it has 3.5 million, as published. transformers'
    MobileNetV2 can shrink its last strides (by dilation), but not these.

    Args:
        config: Multiplier, normalisation, channels and classes.
    """

    config_class = MobileNetV2SmallConfig
    _no_split_modules = ["InvertedResidual"]  # noqa: RUF012 - transformers reads a list

    def __init__(self, config: MobileNetV2SmallConfig) -> None:
        super().__init__(config)
        inputs = _channels(STEM, config.multiplier)
        stem = nn.Conv2d(config.num_channels, inputs, 3, padding=1, bias=False)
        layers: list[nn.Module] = [stem, make_norm(config.norm, inputs), nn.ReLU6()]
        for expansion, channels, blocks, first_stride in STAGES:
            outputs = _channels(channels, config.multiplier)
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, stride=stride, expansion=expansion, norm=config.norm))
                inputs = outputs
        layers += [nn.Conv2d(inputs, LAST, 1, bias=False), make_norm(config.norm, LAST), nn.ReLU6()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = self.make_classifier(LAST)
        self.post_init()


def _channels(published: int, multiplier: float) -> int:
    """A multiple of 8, at least 8, that is not more than 10 % below the product."""
    wanted = published * multiplier
    rounded = max(DIVISOR, int(wanted + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * wanted else rounded
