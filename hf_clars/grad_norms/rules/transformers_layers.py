"""Rules for layers of transformers, which is not imported: its classes are known by their names.

- `Conv1D` (GPT, GPT-2): a Linear layer whose weight is stored transposed, [in, out].
- Some 150 classes called ...RMSNorm, T5's LayerNorm, and Cohere's: copies of one formula, which a trial recognises.
- Nemotron's LayerNorm, whose weight has 1 added to it.
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
from hf_clars.grad_norms.rules.normalization import LayerNormRule, weighted_rows
from hf_clars.grad_norms.rules.trials import are_close, trial_numbers
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

    @staticmethod
    def statistics(x: Tensor, eps: float) -> tuple[Tensor, ...]:
        """1 / the root mean square, or the mean and 1 / the deviation from it: [..., 1] each."""
        return ((x.square().mean(-1, keepdim=True) + eps).rsqrt(),)

    parameters = frozenset({"weight"})
    weight_sharing_axes = True

    def applies(self, module: nn.Module) -> bool:
        """Where a trial with random weights gives what the formula says."""
        weight = module._parameters.get("weight")
        eps = _epsilon(module)
        if weight is None or eps is None or weight.dim() != 1 or weight.is_meta or is_split(weight) or not len(weight):
            return False
        w, x = trial_numbers(weight.device, (len(weight),), (2, 3, len(weight)))
        trial = copy.copy(module)
        trial.__dict__["_parameters"] = {"weight": nn.Parameter(w)}
        *mean, scale = self.statistics(x, eps)
        x_hat = (x - mean[0] if mean else x) * scale
        try:
            with torch.no_grad():
                y = type(module).forward(trial, x)
        except Exception:
            return False
        return any(are_close(y, x_hat * factor, rtol=1e-4, atol=1e-5) for factor in (w, 1 + w))

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.dim() > 1

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """The input and its statistics."""
        x = first_tensor(args, kwargs)
        eps = _epsilon(module)
        assert eps is not None
        return x, *self.statistics(at_least_float32(x), eps)

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        x, *mean, scale = (positions(t) for t in saved)
        return {"weight": weighted_rows(x, positions(g), mean[0] if mean else None, scale)}


@register_rule("*CohereLayerNorm", "*Cohere2LayerNorm", "*Cohere2MoeLayerNorm", "*CohereCompassLayerNorm")
class CentredRule(RootMeanSquareRule):
    """y = x_hat * w as LayerNorm has it, without a bias."""

    @staticmethod
    def statistics(x: Tensor, eps: float) -> tuple[Tensor, ...]:
        """The mean and 1 / the deviation from it."""
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return mean, (var + eps).rsqrt()


@register_rule("transformers.models.nemotron.modeling_nemotron.NemotronLayerNorm1P")
class ShiftedLayerNormRule(LayerNormRule):
    """y = x_hat * (1 + w) + b: the gradients are LayerNorm's, but the input's is not."""


def _epsilon(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None
