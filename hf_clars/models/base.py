"""What the paper's small networks share: checked configurations, one forward, one way to draw the first weights."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_clars.errors import ConfigError

NormName = Literal["batch", "group", "none"]

MAX_GROUPS = 8
"""Most groups that a group normalisation of these networks uses; fewer where the channels do not divide."""


class SmallNetConfig(PreTrainedConfig):
    """What every small network is told: the shape of its images and the number of its classes.

    Args:
        image_size: Side of the square images, in pixels.
        num_channels: Channels of the images.
        **kwargs: Everything that `transformers.PreTrainedConfig` takes, such as `num_labels` (2 by default) or
            `id2label`.

    Raises:
        ConfigError: A value is not a whole number of at least 1.
    """

    # A plain `__init__` and no annotated class attribute, here and below: transformers turns annotated attributes into
    # dataclass fields from 5.3 on and ignores them before, and this package supports both.
    def __init__(self, *, image_size: int = 28, num_channels: int = 1, **kwargs: Any) -> None:
        self.image_size = image_size
        self.num_channels = num_channels
        # No default of our own for num_labels: a config.json leaves two classes out, and would come back with ours.
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where a value cannot work; models call it too, for a value may be set after loading."""
        self._whole("image_size")
        self._whole("num_channels")
        self._whole("num_labels")

    def _whole(self, name: str, *, at_least: int = 1) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ConfigError(
                f"{type(self).__name__}: {name} is {value!r}; it must be a whole number of at least {at_least}."
            )

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError(f"{type(self).__name__}: {name} is {value!r}; it must be a number above 0.")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{type(self).__name__}: {name} is {value!r}; choose one of {', '.join(choices)}.")


class SmallNetForImageClassification(PreTrainedModel):
    """An image classifier made of `features` (images to a flat vector each) and one linear `classifier`.

    Subclasses set the two modules in `__init__` and then call `post_init()`.

    Attributes:
        features: Module from `[B, C, H, W]` to `[B, D]`.
        classifier: Linear layer from `[B, D]` to `[B, num_labels]`.
    """

    config_class = SmallNetConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"
    weight_scheme: ClassVar[Literal["he", "xavier"]] = "he"
    fixed_image_size: ClassVar[bool] = False

    features: nn.Module
    classifier: nn.Linear

    def __init__(self, config: SmallNetConfig) -> None:
        config.check()
        super().__init__(config)

    def make_classifier(self, inputs: int) -> nn.Linear:
        """The linear layer from `inputs` features to the configured classes."""
        return nn.Linear(inputs, int(self.config.num_labels or 0))  # `check` has seen that it is a number

    # No **kwargs: transformers' Trainer reads them as "this model divides its loss by num_items_in_batch itself", and
    # then no longer averages over the micro-batches of a step.
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
        """Classify a batch of images.

        Args:
            pixel_values: Images `[B, C, H, W]`.
            labels: Class numbers `[B]`; with them the mean cross-entropy over the batch is computed.
            return_dict: False returns a tuple; None follows `config.return_dict` (True by default).

        Returns:
            `loss` (a scalar, None without labels) and `logits` `[B, num_labels]`; as a tuple `(loss, logits)`, or
            `(logits,)` without labels.

        Raises:
            ConfigError: The images' channels, or the side where the network depends on it, are not the configuration's.
        """
        self._check_images(pixel_values)
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        if return_dict is None:
            return_dict = self.config.return_dict
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _check_images(self, pixel_values: torch.Tensor) -> None:
        channels, side = self.config.num_channels, self.config.image_size
        want = (
            f"[batch, {channels}, {side}, {side}]" if self.fixed_image_size else f"[batch, {channels}, height, width]"
        )
        shape = tuple(pixel_values.shape)
        good = len(shape) == 4 and shape[1] == channels
        if not good or (self.fixed_image_size and shape[2:] != (side, side)):
            raise ConfigError(
                f"{type(self).__name__} was built for pixel_values of shape {want} and was given {list(shape)}. "
                "Prepare the images accordingly, or build the model with image_size and num_channels of the data."
            )

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module without loaded weights, with torch.nn.init guarded so that a loaded
        # tensor is left alone. Only functions of torch.nn.init may write here.
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if self.weight_scheme == "he" and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif self.weight_scheme == "he":
                nn.init.xavier_normal_(module.weight)  # the classifier: no ReLU follows it
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                nn.init.zeros_(module.running_mean)
                nn.init.ones_(module.running_var)  # type: ignore[arg-type]
                nn.init.zeros_(module.num_batches_tracked)  # type: ignore[arg-type]


def make_norm(kind: NormName, channels: int) -> nn.Module:
    """Make the normalisation that follows a convolution.

    Args:
        kind: "batch", "group" (at most 8 groups, each of the same number of channels; samples stay uncoupled, so
            per-sample gradients are well defined) or "none".
        channels: Channels to normalise.

    Returns:
        The module, from `[B, channels, H, W]` to the same shape.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(channels, MAX_GROUPS), channels)
    return nn.Identity()


def convolution(inputs: int, outputs: int, *, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution with one pixel of padding; without bias, since a normalisation that follows would cancel it."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def side_after(side: int, strides: tuple[int, ...]) -> int:
    """The side of square feature maps after layers of these strides that round up: padded convolutions and poolings."""
    for stride in strides:
        side = -(-side // stride)
    return side
