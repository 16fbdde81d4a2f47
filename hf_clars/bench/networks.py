"""The networks that are measured, and their copies with GroupNorm, which methods that refuse BatchNorm can run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from hf_clars.bench import transformer_networks as transformers_of
from hf_clars.layers import BATCH_NORM_MODULES
from hf_clars.models import build_model

GROUP_NORM_SUFFIX = "-gn"
MAX_GROUPS = 32
QUICK_SIZE, QUICK_BATCH = 32, 2
TOKENS = 100
"""Texts are of the first so many tokens."""


@dataclass(frozen=True)
class Network:
    """A network and the batch that it is measured with.

    Attributes:
        name: Its name in tables.
        make: Makes the model for inputs of a given size and a number of classes.
        image_size: Side of the images, in pixels; of texts, how many tokens each has.
        batch: Samples a step.
        num_labels: Classes; of a language model, its tokens.
        texts: Whether it takes texts: "" (images), "whole" (a class for each), "tokens" (one for each token).
        tiny: Makes a small model of the same kind, to see that everything runs; None: `make` is small enough.
        smallest: The smallest size of inputs that it takes.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    image_size: int
    batch: int
    num_labels: int
    texts: Literal["", "whole", "tokens"] = ""
    tiny: Callable[[int, int], nn.Module] | None = None
    smallest: int = 32

    def build(self) -> nn.Module:
        """The model in train mode and float32 on the device, with the same first weights every time."""
        torch.manual_seed(0)
        return self.make(self.image_size, self.num_labels).float().train().to(device())

    def data(self) -> tuple[Tensor, Tensor]:
        """Random inputs and class numbers; the same every time.

        Returns:
            Images [batch, 3, image_size, image_size], or tokens [batch, image_size]; and class numbers [batch], or
            [batch, image_size] for each token.
        """
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.image_size)
        if self.texts:
            x = torch.randint(1, TOKENS, shape, generator=generator)
        else:
            x = torch.randn(self.batch, 3, self.image_size, self.image_size, generator=generator)
        y = torch.randint(self.num_labels, shape if self.texts == "tokens" else shape[:1], generator=generator)
        return x.to(device()), y.to(device())

    def resized(self, *, image_size: int, batch: int) -> Network:
        """The same network with other images."""
        return replace(self, image_size=image_size, batch=batch)

    def quick(self) -> Network:
        """A small one of the same kind, and two small samples."""
        labels = min(self.num_labels, TOKENS)
        small = replace(self, make=self.tiny, num_labels=labels) if self.tiny is not None else self
        return small.resized(image_size=8 if self.texts else QUICK_SIZE, batch=QUICK_BATCH)

    def with_group_norm(self) -> Network:
        """The same network with GroupNorm for BatchNorm."""
        make = self.make
        return replace(
            self, name=self.name + GROUP_NORM_SUFFIX, make=lambda side, labels: with_group_norm(make(side, labels))
        )


def device() -> torch.device:
    """Where everything is measured: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def logits(output: Any) -> Tensor:
    """The scores [B, classes] in what a model returns: a tensor, or an output object of transformers."""
    return output if torch.is_tensor(output) else output.logits


def mean_loss(output: Any, y: Tensor) -> Tensor:
    """Cross-entropy, a mean over samples (and over tokens, of which all samples have the same number).

    Args:
        output: What a model returned.
        y: Class numbers [B], or [B, T].
    """
    scores = logits(output)
    return functional.cross_entropy(scores.flatten(0, -2), y.flatten())


def has_batch_norm(model: nn.Module) -> bool:
    """Whether samples are coupled through batch statistics."""
    return any(isinstance(module, BATCH_NORM_MODULES) for module in model.modules())


def with_group_norm(model: nn.Module) -> nn.Module:
    """A copy in which each BatchNorm2d, or module of a subclass, is a GroupNorm; all else is as it was.

    Args:
        model: Left as it is.

    Returns:
        The copy. At most 32 groups, and of at least two channels, since a group of one channel of one pixel is always
        zero.
    """
    changed = copy.deepcopy(model)
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _group_norm_like(child))
    return _group_norm_like(changed) if isinstance(changed, nn.BatchNorm2d) else changed


def _group_norm_like(norm: nn.BatchNorm2d) -> nn.GroupNorm:
    channels = norm.num_features
    groups = math.gcd(MAX_GROUPS, channels)
    if groups == channels:
        groups = max(1, channels // 2)
    new = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        new.weight, new.bias = norm.weight, norm.bias
    return new.train(norm.training)


def _vit_tiny(image_size: int, num_labels: int) -> nn.Module:
    labels: Any = {"num_labels": num_labels}  # known to the base class, which type checkers do not see
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=image_size,
        patch_size=16,
        **labels,
    )
    return ViTForImageClassification(config)


def _named(name: str, **model_kwargs: Any) -> Callable[[int, int], nn.Module]:
    def make(image_size: int, num_labels: int) -> nn.Module:
        return build_model(name, num_labels=num_labels, image_size=image_size, model_kwargs=model_kwargs)

    return make


_BASE = (
    Network("resnet20", _named("resnet20"), image_size=32, batch=128, num_labels=10),
    Network("resnet-50", _named("resnet-50"), image_size=128, batch=16, num_labels=1000),
    # Without dropout: else two ways of computing one gradient would see two networks.
    Network(
        "mobilenet_v2", _named("mobilenet_v2", classifier_dropout_prob=0.0), image_size=128, batch=16, num_labels=1000
    ),
)


def _transformer(
    name: str,
    make: Callable[..., nn.Module],
    size: int,
    batch: int,
    labels: int,
    texts: Literal["", "whole", "tokens"],
    smallest: int = 32,
) -> Network:
    def of(tiny: bool) -> Callable[[int, int], nn.Module]:
        if texts:
            return lambda size, labels: make(labels, tiny=tiny)
        return lambda size, labels: make(size, labels, tiny=tiny)

    return Network(name, of(False), size, batch, labels, texts, of(True), smallest)


_TRANSFORMERS = (
    _transformer("gpt2", transformers_of.gpt2, 256, 4, 50_257, "tokens"),
    _transformer("llama-100m", transformers_of.llama, 256, 4, 16_384, "tokens"),
    _transformer("bert-base", transformers_of.bert, 128, 8, 2, "whole"),
    _transformer("vit-b16", transformers_of.vit, 224, 4, 1000, ""),
    _transformer("convnext-t", transformers_of.convnext, 224, 4, 1000, ""),
    _transformer("swin-t", transformers_of.swin, 224, 4, 1000, "", 224),  # its windows of 7 halve three times
)

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        *(variant for base in _BASE for variant in (base, base.with_group_norm())),
        Network("vit-tiny", _vit_tiny, image_size=224, batch=8, num_labels=1000),
        *_TRANSFORMERS,
    )
}
"""By name; `-gn` marks the copies with GroupNorm."""

LARGE = tuple(network.name for network in _TRANSFORMERS)
"""Networks that take minutes each, and that a page measures only if they are named."""
