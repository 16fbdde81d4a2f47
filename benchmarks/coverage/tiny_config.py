"""Makes a tiny configuration out of any configuration class of transformers, by the names of its fields.

Nothing here knows a model. Widths become small multiples of 8, counts of layers, heads and experts become small, every
probability of dropping something becomes 0, and configurations inside are made small in the same way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, cast

from transformers import PretrainedConfig

WIDTH, HEADS, HEAD_DIM, VOCAB, IMAGE, PATCH = 32, 4, 8, 64, 32, 8
SPECIAL = 4  # the last words of the vocabulary, for marks of images and the like

# The first pattern that a field's whole name matches decides; the value says what becomes of a number under it.
_Shrink = Callable[[int], int]
_RULES: list[tuple[str, _Shrink]] = [
    (
        r".*(dropout|drop_path|drop_rate|layerdrop|jitter|pdrop|drop_prob|classifier_drop|masking_ratio|mask_(time|feature)_prob).*",
        lambda v: 0,
    ),
    (r".*(eps|epsilon|theta|factor|scale|scaling|ratio|rate|coef|std|range|momentum)$", lambda v: v),
    (r"vocab_size_per_layer_input|.*vocab_size|n_vocab|vocab_size_.*|.*codebook_size", lambda v: min(v, VOCAB)),
    (r".*(num_key_value_heads|kv_heads|num_kv_heads|n_head_kv|num_groups|n_groups|n_group)", lambda v: min(v, 2)),
    (r"(.*_)?(num_|n_)?.*heads?", lambda v: min(v, HEADS) if v % 2 == 0 else min(v, 2)),
    (
        r".*(head_dim|d_kv|d_head|dim_head|kv_channels|head_size|qk_nope_head_dim|qk_rope_head_dim).*",
        lambda v: HEAD_DIM,
    ),
    (r".*(experts_per_tok|top_k|topk|experts_per_token|num_selects|topk_group)", lambda v: min(v, 2)),
    (
        r".*(num_(local_|routed_|shared_|zero_)?experts|n_routed_experts|n_shared_experts|moe_num_.*experts)",
        lambda v: min(v, 4),
    ),
    (r".*(first_k_dense_replace|num_dense_layers|num_nextn.*|num_hash_layers)", lambda v: min(v, 1)),
    (
        r".*(layers|n_layer|depth|num_blocks|n_layers|num_stages_in_block|blocks_per.*|num_hidden_groups|mlp_depth)",
        lambda v: min(v, 2),
    ),
    (r".*(image_size|input_size|img_size|crop_size)", lambda v: IMAGE),
    (r".*num_queries|num_denoising", lambda v: min(v, 6)),
    (r"hidden_size_global|(text|out|lm)_hidden_size|.*upsample_groups", lambda v: WIDTH),
    (r".*patch_size", lambda v: min(v, PATCH)),
    (
        r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len.*|max_source_positions|max_target_positions|seq_length)",
        lambda v: min(v, 64),
    ),
    (r".*(rank|lora_dim|_lora)", lambda v: min(v, 8)),
    (
        r".*(sliding_window|window_size|attention_window|local_attention|chunk_size|block_size|chunk_length|conv_l_cache)",
        lambda v: min(v, 8) if v > 8 else v,
    ),
    (r".*token_(id|index)", lambda v: v if 0 <= v < VOCAB - SPECIAL else VOCAB - SPECIAL + v % SPECIAL),
    (
        r".*(num_labels|num_channels|n_channels|in_channels|.*_id|.*_index|.*kernel.*|.*stride.*|.*padding.*|.*type_vocab_size)",
        lambda v: v,
    ),
]
_WIDE = (
    r".*(hidden_size|d_model|d_ff|ffn_dim|n_embd|n_inner|embed_dim|hidden_dim|intermediate_size|dim|d_inner|width"
    r"|embedding_size|filter_size|proj_size|channels|features|ffn_hidden_size|hidden_sizes|latents|d_.*|.*_dim|.*_size"
    r"|.*_sizes|dims|.*_channels|.*_width|size_per_layer_input)"
)


# What a class leaves to be computed, and some forget to.
_SIZES_LEFT_OPEN = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "vocab_size": VOCAB,
}
# What configurations take without a field of that name.
_TAKEN_ANYWAY = ("num_labels", "out_indices", "rope_theta", "yes_token_index", "no_token_index", "max_length")


def narrow(value: int, wide: int) -> int:
    """A width in a model whose main width was `wide`: its part of `WIDTH`, in multiples of 8; small ones stay."""
    return value if value <= 8 else max(8, 8 * round(value * WIDTH / wide / 8))


def shrink(name: str, value: Any, wide: int) -> Any:
    """The tiny value of one field.

    Args:
        name: The field's name.
        value: Its default.
        wide: The configuration's main width.

    Returns:
        The same kind of value; what no rule knows is returned as it is.
    """
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float)) for v in value):
        if name.endswith(("depths", "num_blocks", "layers")) and not any(v == 0 for v in value):
            return type(value)(1 for _ in value)
        return type(value)(shrink(name.removesuffix("s"), v, wide) for v in value)
    if not isinstance(value, (int, float)):
        return value
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, name):
            small = rule(cast(Any, value))
            return type(value)(small) if small != value else value
    if isinstance(value, int) and re.fullmatch(_WIDE, name):
        return narrow(value, wide)
    return value


def main_width(fields: dict[str, Any]) -> int:
    """The width that the others are set in relation to."""
    for name in ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "d_latents", "num_filters"):
        value = fields.get(name)
        if isinstance(value, int) and value > WIDTH:
            return value
    sizes = [v for k, v in fields.items() if k.endswith(("sizes", "dims", "channels")) and isinstance(v, (list, tuple))]
    widest = [max(v) for v in sizes if v and all(isinstance(x, int) for x in v)]
    return max(widest) if widest else 4 * WIDTH


def tiny_config(config_class: type[PretrainedConfig], keep_widths: bool = False, **settings: Any) -> PretrainedConfig:
    """A tiny configuration.

    Args:
        config_class: The class.
        keep_widths: Shrink only what repeats (layers, experts, words); for models whose widths depend on each other.
        **settings: Fields set by hand; those that the class does not have are left out. A configuration inside takes
            them too, and those under its own name; where these name its type, they are all of it.

    Returns:
        The configuration.
    """
    base = {f.name for f in dataclasses.fields(PretrainedConfig)}
    subs = getattr(config_class, "sub_configs", None) or {}
    fields = {f.name: _default(f) for f in dataclasses.fields(config_class) if f.init and f.name not in base}
    wide = 0 if keep_widths else main_width(fields)
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in subs:
            continue
        repeats = re.fullmatch(r".*(layers?|depths?|experts|vocab_size|drop.*|.*pdrop|layerdrop)", name)
        if keep_widths and not repeats:
            continue
        small = _SIZES_LEFT_OPEN.get(name) if value is None else shrink(name, value, wide or 1)
        if isinstance(value, dict) and "mrope_section" in value:  # half of a head's width, in three parts
            small = value | {"mrope_section": [HEAD_DIM // 4, HEAD_DIM // 8, HEAD_DIM // 8]}
        if small != value:
            found[name] = small
    heads = fields.get("num_attention_heads")
    if heads is not None and heads == fields.get("num_key_value_heads") and not keep_widths:
        found["num_key_value_heads"] = found.get("num_attention_heads", heads)
    for name, sub in subs.items():
        if "model_type" in settings.get(name, {}):
            found[name] = settings[name]
            continue
        if not dataclasses.is_dataclass(sub):  # any configuration will do: take what is there by default
            sub = type(getattr(config_class(), name, None))
        if dataclasses.is_dataclass(sub) and sub is not PretrainedConfig:
            own = {k: v for k, v in settings.items() if k != "num_labels"} | settings.get(name, {})
            inner = tiny_config(cast(Any, sub), keep_widths, **own)
            found[name] = inner.to_dict()
    found.update({k: v for k, v in settings.items() if (k in fields and k not in subs) or k in _TAKEN_ANYWAY})
    return config_class(**found)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
