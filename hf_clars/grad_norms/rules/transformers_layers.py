"""Rules for layers of transformers, which is not imported: its classes are known by their names.

- `Conv1D` (GPT, GPT-2): a Linear layer whose weight is stored transposed, [in, out].
- Some 150 classes called ...RMSNorm, and T5's LayerNorm: copies of one formula, which a trial recognises.
- The embeddings of ViT and its kin: a table of positions, and tokens that every sample begins with.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import is_split
from hf_clars.grad_norms.norm_math import at_least_float32, linear_weight_grads
from hf_clars.grad_norms.pytree import first_tensor
from hf_clars.grad_norms.registry import LayerRule, WholeBackward, register_rule
from hf_clars.grad_norms.rules.linear import LinearRule, positions
from hf_clars.grad_norms.rules.normalization import weighted_rows
from hf_clars.grad_norms.torch_internals import weight_of


@register_rule("transformers.pytorch_utils.Conv1D")
class TransposedLinearRule(LinearRule):
    """y = x W + b. The norms are those of a Linear layer: they do not mind the transposition."""

    is_dense_weight = False  # the tables of `tied_tables.py` are not transposed

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        x, g = positions(saved[0]), positions(g)
        grads = {"weight": linear_weight_grads(g, x)} if "weight" in wanted else {}
        return {**grads, "bias": g.sum(1)} if "bias" in wanted else grads

    def whole_backward(
        self,
        module: nn.Module,
        saved: tuple[Tensor, ...],
        weight: Tensor,
        g: Tensor,
        *,
        input_wanted: bool,
        measured: int | None = None,
    ) -> WholeBackward:
        """See `LayerRule`."""
        done = super().whole_backward(module, saved, weight.mT, g, input_wanted=input_wanted, measured=measured)
        return replace(done, grads={**done.grads, "weight": done.grads["weight"].mT})

    def weight_as_used(self, module: nn.Module, weight: Tensor, output: Tensor) -> Tensor:
        """See `LayerRule`."""
        return weight_of(output, weight)

    def input_grad(self, module: nn.Module, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        """See `LayerRule`."""
        return g @ weight.mT


@register_rule("*RMSNorm", "*T5LayerNorm")
class RootMeanSquareRule(LayerRule):
    """y = x_hat * w, or x_hat * (1 + w), with x_hat = x / sqrt(mean of x^2 + eps) over the last axis.

    Gemma's has the 1; the gradient is the same, sum_t g_t x_hat_t.
    """

    parameters = frozenset({"weight"})
    weight_sharing_axes = True

    def applies(self, module: nn.Module) -> bool:
        """Where a trial with random weights gives what the formula says."""
        weight = module._parameters.get("weight")
        eps = _epsilon(module)
        if weight is None or eps is None or weight.dim() != 1 or weight.is_meta or is_split(weight) or not len(weight):
            return False
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(len(weight), generator=generator).to(weight.device)
        x = torch.randn(2, 3, len(weight), generator=generator).to(weight.device)
        trial = copy.copy(module)
        trial.__dict__["_parameters"] = {"weight": nn.Parameter(w)}
        x_hat = x * _inverse_root_mean_square(x, eps)
        try:
            with torch.no_grad():
                y = type(module).forward(trial, x)
        except Exception:
            return False
        return isinstance(y, Tensor) and any(_close(y, x_hat * factor) for factor in (w, 1 + w))

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.dim() > 1

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """The input and 1 / its root mean square."""
        x = first_tensor(args, kwargs)
        eps = _epsilon(module)
        assert eps is not None
        return x, _inverse_root_mean_square(at_least_float32(x), eps)

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        x, scale = positions(saved[0]), positions(saved[1])
        return {"weight": weighted_rows(x, positions(g), None, scale)}


def _epsilon(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a.float(), b, rtol=1e-4, atol=1e-5))


@register_rule(
    "transformers.models.vit.modeling_vit.ViTEmbeddings",
    "transformers.models.deit.modeling_deit.DeiTEmbeddings",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNEmbeddings",
)
class TokenAndPositionRule(LayerRule):
    """Tokens that every sample begins with, and a table of positions that is added to the whole."""

    _tokens = ("cls_token", "distillation_token")

    def applies(self, module: nn.Module) -> bool:
        """Without dropout after the sum, whose random numbers are gone, and where no mask is learned."""
        dropout = getattr(module, "dropout", None)
        own = {name for name, _ in module.named_parameters(recurse=False)}
        known = own <= {"position_embeddings", *self._tokens} and "position_embeddings" in own
        return known and isinstance(dropout, nn.Dropout) and dropout.p == 0

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """For images of the size that the table was made for: for others it is interpolated."""
        return x.dim() == 4 and tuple(x.shape[2:]) == tuple(getattr(module, "image_size", ()))

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`; g [B, T, width]."""
        first = [name for name in self._tokens if name in module._parameters]
        grads = {name: g[:, None, i : i + 1] for i, name in enumerate(first) if name in wanted}
        if "position_embeddings" in wanted:
            grads["position_embeddings"] = g.unsqueeze(1)
        return grads
