"""Rule for timm's `BatchNormAct2d` (DenseNet, EfficientNet, RegNet, ...): BatchNorm and activation in one module.

The gradient that arrives is that of the activation's output; the rule takes it back through the activation, which is
elementwise, and goes on as for BatchNorm. timm is not imported: the class is known by its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.registry import register_rule
from hf_clars.grad_norms.rules.normalization import BatchNormRule


@register_rule("timm.layers.norm_act.BatchNormAct2d")
class BatchNormActRule(BatchNormRule):
    """act(x_hat * w + b)."""

    reads_tensors = True

    def applies(self, module: nn.Module) -> bool:
        """Only without dropout between the two, whose random numbers are gone."""
        return isinstance(getattr(module, "drop", None), nn.Identity) and isinstance(module.act, nn.Module)

    def supplies_backward(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """As for BatchNorm, and only without an activation: the gradient that arrives is that of its output."""
        plain = isinstance(module.get_submodule("act"), nn.Identity)
        return plain and super().supplies_backward(module, x, output)

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        assert isinstance(module, nn.BatchNorm2d)
        activation = module.get_submodule("act")
        if isinstance(activation, nn.Identity):
            return super().per_sample_grads(module, saved, g, wanted)
        x, mean, rstd = saved
        x_hat = (x - mean[..., None, None]) * rstd[..., None, None]
        before = (x_hat * module.weight[:, None, None] + module.bias[:, None, None]).detach()
        # Of a clone: activations may work in place. A compiler can follow this, and not torch.autograd.grad.
        (g,) = torch.func.vjp(lambda t: activation(t.clone()), before)[1](g)
        return super().per_sample_grads(module, saved, g, wanted)

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """The input and its statistics: the activation's derivative needs them for the bias too."""
        return super().save(module, args, kwargs, output, {"weight", *wanted})
