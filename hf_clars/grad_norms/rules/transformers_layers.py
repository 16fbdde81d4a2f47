"""Rule for transformers' `Conv1D` (GPT, GPT-2): a Linear layer whose weight is stored transposed, [in, out].

transformers is not imported: the class is known by its name.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from hf_clars.grad_norms.registry import register_rule
from hf_clars.grad_norms.rules.linear import LinearRule


@register_rule("transformers.pytorch_utils.Conv1D")
class TransposedLinearRule(LinearRule):
    """y = x W + b. The norms are those of a Linear layer: they do not mind the transposition."""

    is_dense_weight = False  # the tables of `tied_tables.py` are not transposed

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        grads = super().per_sample_grads(module, saved, g, wanted)
        return {name: t.mT if name == "weight" else t for name, t in grads.items()}

    def input_grad(self, module: nn.Module, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        """See `LayerRule`."""
        return g @ weight.mT
