"""Rules for modules that multiply each number by one of a vector: LayerScale of timm and transformers, PReLU.

LayerScale's classes are known by their names, and by a trial: many have a copy of it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from hf_clars.distributed import is_split
from hf_clars.grad_norms.registry import LayerRule, register_rule
from hf_clars.grad_norms.rules.linear import positions
from hf_clars.grad_norms.rules.trials import are_close, trial_numbers


@register_rule("*LayerScale")
class ScaleRule(LayerRule):
    """y = x * w over the last axis: a sample's gradient is the sum of g * x over its positions."""

    weight_sharing_axes = True

    def applies(self, module: nn.Module) -> bool:
        """With one parameter, where a trial with random numbers gives the formula, and leaves its input as it was."""
        ((name, weight), *others) = [*module.named_parameters(recurse=False), ("", None)]
        if weight is None or len(others) > 1 or weight.is_meta or is_split(weight) or not weight.numel():
            return False
        w, x = trial_numbers(weight.device, weight.shape, (2, *self.trial_shape(weight.numel())))
        before, trial = x.clone(), copy.copy(module)
        trial.__dict__["_parameters"] = {name: nn.Parameter(w)}
        try:
            with torch.no_grad():
                y = type(module).forward(trial, x)
        except Exception:
            return False
        right = before * w.flatten().view(self.trial_shape(weight.numel(), 1))
        return torch.equal(x, before) and are_close(y, right)

    @staticmethod
    def trial_shape(width: int, other: int = 3) -> tuple[int, ...]:
        """Of one sample with `width` numbers along the weight's axis, and `other` along the rest."""
        return other, width

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.dim() > 1

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        (name,) = wanted
        return {name: positions(saved[0] * g).sum(1).view(len(g), *getattr(module, name).shape)}


@register_rule("*LayerScale2d")
class ChannelScaleRule(ScaleRule):
    """The same over the channels of images [B, C, H, W]."""

    weight_sharing_axes = False

    @staticmethod
    def trial_shape(width: int, other: int = 3) -> tuple[int, ...]:
        """See `ScaleRule`."""
        return width, other, other

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.dim() == 4

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        (name,) = wanted
        return {name: (saved[0] * g).flatten(2).sum(2).view(len(g), *getattr(module, name).shape)}


@register_rule(nn.PReLU)
class SlopeRule(LayerRule):
    """y = x above 0, and x * w below it; one w for all, or one for each channel, on axis 1."""

    parameters = frozenset({"weight"})

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.dim() > 1

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        (x,), width = saved, module.get_parameter("weight").numel()
        return {"weight": (x.clamp(max=0) * g).reshape(len(g), width, -1).sum(2)}
