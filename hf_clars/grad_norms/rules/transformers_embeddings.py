"""Rules for embeddings of transformers, which is not imported: its classes are known by their names.

- Some 30 classes called ...ScaledWordEmbedding (Gemma, BART): a table whose rows are multiplied by one number.
- The learned positions of OPT and BioGPT, which are counted from the attention mask, and those of BART and its kin.
- The embeddings of ViT, CLIP and their kin: tokens that every sample begins with, and ViT's table of positions.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import is_split
from hf_clars.grad_norms.registry import LayerRule, register_rule
from hf_clars.grad_norms.rules.embedding import EmbeddingRule
from hf_clars.grad_norms.rules.trials import are_close, trial_numbers


@register_rule("*ScaledWordEmbedding")
class ScaledEmbeddingRule(EmbeddingRule):
    """y = table[token] * scale."""

    reads_tensors = True

    def applies(self, module: nn.Module) -> bool:
        """Where a trial with a small table gives what the formula says."""
        weight, scale = module._parameters.get("weight"), getattr(module, "embed_scale", None)
        if not isinstance(module, nn.Embedding) or not isinstance(scale, int | float | Tensor):
            return False
        if weight is None or weight.is_meta or is_split(weight):
            return False
        (table,) = trial_numbers(weight.device, (4, weight.shape[1]))
        tokens = torch.tensor([[0, 3, 1], [2, 3, 3]], device=weight.device)
        trial = copy.copy(module)
        trial.__dict__.update(_parameters={"weight": nn.Parameter(table)}, padding_idx=None, num_embeddings=4)
        try:
            with torch.no_grad():
                y = type(module).forward(trial, tokens)
        except Exception:
            return False
        return are_close(y, table[tokens] * scale)

    def row_grads(self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor) -> Tensor:
        """See `LayerRule`."""
        assert isinstance(module, nn.Embedding)
        scale: Any = module.embed_scale
        if isinstance(scale, Tensor):  # rounded as the module rounds it
            scale = scale.to(module.weight.dtype)
        return super().row_grads(module, saved, g) * scale


@register_rule("*OPTLearnedPositionalEmbedding", "*BioGptLearnedPositionalEmbedding")
class CountedPositionRule(EmbeddingRule):
    """y = table[position + offset]; positions are given, or counted from the attention mask [B, T]."""

    def applies(self, module: nn.Module) -> bool:
        """Where the module has an offset."""
        return isinstance(module, nn.Embedding) and isinstance(getattr(module, "offset", None), int)

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """Row numbers [B, T]."""
        given = {**_by_name(("attention_mask", "length", "position_ids"), args), **kwargs}
        places = given.get("position_ids")
        if places is None:
            mask = given["attention_mask"]
            places = (mask.cumsum(1) * mask - 1).long()[:, -output.shape[1] :]
        offset: Any = module.offset
        return super().save(module, (places + offset,), {}, output, wanted)


@register_rule("*BartLearnedPositionalEmbedding", "*MvpLearnedPositionalEmbedding", "*TrOCRLearnedPositionalEmbedding")
class StartingPositionRule(CountedPositionRule):
    """y = table[position + offset], for every sample the positions from the cache's length on."""

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """For what it is called with by the models: tokens [B, T], or as many other numbers."""
        return x.dim() == 2

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """Row numbers [B, T]."""
        given = {**_by_name(("input_ids", "cache_length", "position_ids"), args), **kwargs}
        places = given.get("position_ids")
        if places is None:
            begin = next((n for n in (given.get("cache_length"), given.get("past_key_values_length")) if n), 0)
            places = torch.arange(begin, begin + output.shape[1], device=output.device)
        places = places.expand(output.shape[0], -1)
        return super().save(module, (), {"position_ids": places}, output, wanted)


@register_rule("*CLIPVisionEmbeddings", "*MetaClip2VisionEmbeddings", "*MLCDVisionEmbeddings")
class FirstTokenRule(LayerRule):
    """One token [width] that every image begins with; patches and positions are modules of their own."""

    def applies(self, module: nn.Module) -> bool:
        """Where the token is all that the module has itself."""
        return {name for name, _ in module.named_parameters(recurse=False)} == {"class_embedding"}

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """For images."""
        return x.dim() == 4

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`; g [B, T, width]."""
        return {"class_embedding": g[:, 0]}


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


def _by_name(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names[: len(args)], args, strict=True))  # torch 2.8 traces no zip of other lengths
