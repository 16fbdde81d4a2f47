"""Rule for `nn.Embedding`: tokens [B] or [B, ...]."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.registry import LayerRule, register_rule


@register_rule(nn.Embedding)
class EmbeddingRule(LayerRule):
    """A table lookup: a row's gradient is the sum of g over the places where its token stands."""

    parameters = frozenset({"weight"})
    positions_in_the_middle = True
    batch_axis_is_certain = False

    def save(self, module: nn.Module, x: Tensor, output: Tensor, wanted: Collection[str]) -> tuple[Tensor, ...]:
        """Tokens [B, T], and with `scale_grad_by_freq` each token's count in the whole batch."""
        assert isinstance(module, nn.Embedding)
        tokens = x.reshape(x.shape[0], -1)
        if not module.scale_grad_by_freq:
            return (tokens,)
        counts = tokens.new_zeros(module.num_embeddings)
        counts.scatter_add_(0, tokens.flatten(), tokens.new_ones(()).expand(tokens.numel()))
        return tokens, counts[tokens]

    def row_grads(self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor) -> Tensor:
        """What each lookup adds to its row, [B, T, width]."""
        assert isinstance(module, nn.Embedding)
        tokens, *counts = saved
        g = g.reshape(*tokens.shape, module.embedding_dim)
        if module.padding_idx is not None:
            g = g * (tokens != module.padding_idx).unsqueeze(-1)
        return g / counts[0].unsqueeze(-1) if counts else g

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        assert isinstance(module, nn.Embedding)
        rows = self.row_grads(module, saved, g)
        return {"weight": norm_math.embedding_weight_grads(saved[0], rows, module.num_embeddings)}

    def squared_norms(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        rows = self.row_grads(module, saved, g)
        return {"weight": norm_math.embedding_weight_squared_norm(saved[0], rows)}
