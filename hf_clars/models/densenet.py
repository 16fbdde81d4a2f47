"""DenseNet-BC for images of 28 to 32 pixels (Huang, Liu, van der Maaten and Weinberger 2017, section 4.2)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from hf_clars.errors import ConfigError
from hf_clars.models.base import NormName, SmallNetConfig, SmallNetForImageClassification, convolution, make_norm

BLOCKS = 3
BOTTLENECK = 4
"""A layer's 1x1 convolution has so many times its growth rate as channels."""


class DenseNetBCConfig(SmallNetConfig):
    """Configuration of `DenseNetBCForImageClassification`.

    Args:
        depth: Layers with weights: 6n + 4 (100 by default, the published small one).
        growth_rate: Channels that each layer adds; 12 by default.
        norm: "batch" (as published) or "group" (samples stay uncoupled).
        image_size: Side of the square images, in pixels. Any side works; kept for whoever prepares the images.
        num_channels: Channels of the images.
        **kwargs: As in `SmallNetConfig`.

    Raises:
        ConfigError: The depth is not 6n + 4, or another value cannot work.
    """

    model_type = "clars_densenet_bc"

    def __init__(
        self,
        *,
        depth: int = 100,
        growth_rate: int = 12,
        norm: Literal["batch", "group"] = "batch",
        image_size: int = 32,
        num_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        self.depth = depth
        self.growth_rate = growth_rate
        self.norm = norm
        super().__init__(image_size=image_size, num_channels=num_channels, **kwargs)

    def check(self) -> None:
        """Raise `ConfigError` where a value cannot work."""
        super().check()
        self._whole("depth", at_least=10)
        self._whole("growth_rate")
        self._choice("norm", ("batch", "group"))
        if self.depth % 6 != 4:
            raise ConfigError(
                f"{type(self).__name__}: depth is {self.depth}, and these networks have depth 6n + 4 (three blocks of "
                "n layers of two convolutions, a first convolution, two transitions and a classifier); choose for "
                "example 40 or 100."
            )


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution; the result joins the channels that came in.

    Args:
        inputs: Channels that come in.
        growth_rate: Channels that join them.
        norm: Kind of normalisation.
    """

    def __init__(self, inputs: int, growth_rate: int, norm: NormName) -> None:
        super().__init__()
        between = BOTTLENECK * growth_rate
        self.norm1 = make_norm(norm, inputs)
        self.conv1 = nn.Conv2d(inputs, between, 1, bias=False)
        self.norm2 = make_norm(norm, between)
        self.conv2 = convolution(between, growth_rate)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, inputs, H, W]` to `[B, inputs + growth_rate, H, W]`."""
        y = self.conv1(self.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu(self.norm2(y)))], dim=1)


class DenseNetBCForImageClassification(SmallNetForImageClassification):
    """A convolution, three dense blocks with transitions that halve channels and side, average pooling, a classifier.

    With 3 channels, 10 classes, depth 100 and growth rate 12 it has 0.8 million parameters, as published. There is
    no stride before the first transition, which is what library DenseNets for large images cannot be configured to do.

    Args:
        config: Depth, growth rate, normalisation, channels and classes.
    """

    config_class = DenseNetBCConfig
    _no_split_modules = ["DenseLayer"]  # noqa: RUF012 - transformers reads a list

    def __init__(self, config: DenseNetBCConfig) -> None:
        super().__init__(config)
        channels = 2 * config.growth_rate
        layers: list[nn.Module] = [convolution(config.num_channels, channels)]
        for block in range(BLOCKS):
            for _ in range((config.depth - 4) // (2 * BLOCKS)):
                layers.append(DenseLayer(channels, config.growth_rate, config.norm))
                channels += config.growth_rate
            layers += [make_norm(config.norm, channels), nn.ReLU()]
            if block < BLOCKS - 1:
                layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2, ceil_mode=True)]
                channels //= 2
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = self.make_classifier(channels)
        self.post_init()
