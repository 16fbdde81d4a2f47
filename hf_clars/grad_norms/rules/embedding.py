"""Rule for `nn.Embedding`: tokens [B] or [B, ...]."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.pytree import first_tensor
from hf_clars.grad_norms.registry import LayerRule, register_rule


@register_rule(nn.Embedding)
class EmbeddingRule(LayerRule):
    """A table lookup: a row's gradient is the sum of g over the places where its token stands."""

    parameters = frozenset({"weight"})
    weight_sharing_axes = True

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """Tokens [B, T], and with `scale_grad_by_freq` each token's count in the whole batch."""
        assert isinstance(module, nn.Embedding)
        x = first_tensor(args, kwargs)
        tokens = x.reshape(x.shape[0], -1)
        if not module.scale_grad_by_freq:
            return (tokens,)
        counts = tokens.new_zeros(module.num_embeddings)
        counts.scatter_add_(0, tokens.flatten(), tokens.new_ones(()).expand(tokens.numel()))
        return tokens, counts[tokens]

    def lookup_tokens(self, saved: tuple[Tensor, ...]) -> Tensor | None:
        """See `LayerRule`."""
        return saved[0]

    def row_grads(self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor) -> Tensor:
        """See `LayerRule`."""
        assert isinstance(module, nn.Embedding)
        tokens, *counts = (t.flatten(1) for t in saved)  # [B, rows, T] where a sample has several
        g = g.reshape(*tokens.shape, module.embedding_dim)
        if module.padding_idx is not None:
            g = g * (tokens != module.padding_idx).unsqueeze(-1)
        return g / counts[0].unsqueeze(-1) if counts else g

    def summed_grad(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, name: str, *, elements: int
    ) -> Tensor:
        """See `LayerRule`; without a table for each sample."""
        assert isinstance(module, nn.Embedding)
        rows = self.row_grads(module, saved, g).reshape(-1, module.embedding_dim)
        return rows.new_zeros(module.num_embeddings, rows.shape[1]).index_add_(0, saved[0].flatten(), rows)

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        assert isinstance(module, nn.Embedding)
        rows = self.row_grads(module, saved, g)
        return {"weight": norm_math.embedding_weight_grads(saved[0].flatten(1), rows, module.num_embeddings)}

    def squared_norms(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        rows = self.row_grads(module, saved, g)
        return {"weight": norm_math.embedding_weight_squared_norm(saved[0].flatten(1), rows)}
