"""Rule for `nn.Bilinear`: y = x1^T W x2 + b, a rule with two inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.pytree import tensors_in
from hf_clars.grad_norms.registry import LayerRule, register_rule
from hf_clars.grad_norms.rules.linear import positions


@register_rule(nn.Bilinear)
class BilinearRule(LayerRule):
    """Saved: both inputs [B, ..., in1] and [B, ..., in2]."""

    parameters = frozenset({"weight", "bias"})
    weight_sharing_axes = True

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.dim() > 1

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """See the class."""
        return tuple(tensors_in((args, kwargs)))

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        first, second, g = positions(saved[0]), positions(saved[1]), positions(g)
        grads = {}
        if "weight" in wanted:
            grads["weight"] = torch.einsum("bto,bti,btj->boij", g, first, second)
        if "bias" in wanted:
            grads["bias"] = g.sum(1)
        return grads
