"""Every model class of transformers with one of four heads, made tiny from its own configuration."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.subject import B, NotRunnable, Subject, stir, tensors_of
from benchmarks.coverage.tiny_config import IMAGE, SPECIAL, VOCAB, tiny_config

HEADS = ("ForImageClassification", "ForSequenceClassification", "ForCausalLM", "ForSemanticSegmentation")
MOST = 40_000_000  # parameters
TOKENS = 11

# What the names of fields do not tell: settings that depend on each other. The key begins the class's name.
_WINDOWS = {"image_size": 64, "window_size": 4, "depths": [1, 1], "num_heads": [2, 2]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
BY_HAND: dict[str, dict[str, Any]] = {
    "Blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "BeitForSem": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "CohereCompass": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "Cvt": {"depth": [1, 1, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "DPT": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "Data2VecVisionForSem": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "Dbrx": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DonutSwin": _WINDOWS,
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "Ernie4_5_Moe": {"moe_k": 2},
    "GPTNeoFor": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3n": {"num_kv_shared_layers": 0, "num_hidden_layers": 5},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"]},
    "LayoutLMv3": {"coordinate_size": 4, "shape_size": 8},
    "Lilt": {"hidden_size": 48},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"]},
    "Mamba2": {"num_heads": 8, "head_dim": 8},
    "Musicgen": {"num_codebooks": 1},
    "Qwen3_5": {"layer_types": ["linear_attention", "full_attention"]},
    "Reformer": {"is_decoder": True, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16]},
    "Sapiens2": {
        "head_config": {
            "upsample_out_channels": [8],
            "upsample_kernel_sizes": [4],
            "conv_out_channels": [8],
            "conv_kernel_sizes": [1],
        }
    },
    "ShieldGemma2": {"yes_token_index": 5, "no_token_index": 6},
    "SwinFor": _WINDOWS,
    "Swinv2": _WINDOWS,
    "Tipsv2Dpt": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
    "UperNet": {"out_indices": [1, 2, 3, 4]},
    "Xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "Zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}


def _by_hand(name: str) -> dict[str, Any]:
    found = {k: v for start, settings in BY_HAND.items() if name.startswith(start) for k, v in settings.items()}
    return found | ({"is_decoder": False} if name.startswith("ReformerForSeq") else {})


def names() -> list[str]:
    """The classes' names, in order."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {n for n in dir(transformers) if n.endswith(HEADS) and not n.startswith(("Auto", "TF", "Flax"))}
    mapped = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for value in mapped:  # those with a head of this kind and an older name
        found.update(value if isinstance(value, (tuple, list)) else [value])
    return sorted(n for n in found if hasattr(transformers, n))


def build(name: str) -> Subject:
    """A tiny model of one class and a batch for it.

    Args:
        name: The class's name in transformers.

    Raises:
        NotRunnable: If no attempt runs; with the words of the first.
    """
    import transformers

    warnings.simplefilter("ignore")
    model_class = getattr(transformers, name)
    failures: list[str] = []
    for note, config in _configs(model_class, name, failures):
        try:
            model = _make(model_class, config)
        except Exception as error:
            failures.append(f"{note}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        for batch in _batches(model, name, config):
            subject = Subject(model, batch, _logits, note)
            try:
                with torch.no_grad():
                    out = model(**batch)
                for t in _logits(out):
                    if t.dim() == 0 or t.shape[0] != B:
                        raise NotRunnable(f"logits of shape {tuple(t.shape)}")
                if not _logits(out):
                    raise NotRunnable(f"no logits in {type(out).__name__}")
                return subject
            except Exception as error:
                failures.append(f"{note}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise NotRunnable(failures[0])


def _logits(out: Any) -> list[Tensor]:
    found = out.get("logits") if hasattr(out, "get") else getattr(out, "logits", None)
    return tensors_of(out if found is None else found)


def _configs(model_class: Any, name: str, failures: list[str]) -> Iterator[tuple[str, Any]]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 5}
    by_hand = _by_hand(name)
    attempts: list[tuple[str, Callable[[], Any]]] = [
        ("tiny", lambda: tiny_config(model_class.config_class, **(ids | by_hand))),
        (
            "tiny, four layers",
            lambda: tiny_config(model_class.config_class, **({"num_hidden_layers": 4} | ids | by_hand)),
        ),
        ("few layers", lambda: tiny_config(model_class.config_class, keep_widths=True, **(ids | by_hand))),
        ("default", lambda: model_class.config_class(num_labels=5, **by_hand)),
        ("default, two layers", lambda: model_class.config_class(num_hidden_layers=2)),
    ]
    for note, attempt in attempts:
        try:
            yield note, attempt()
        except Exception as error:
            failures.append(f"{note}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _make(model_class: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > MOST:
        raise NotRunnable(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model: nn.Module = model_class(config).float().train()
    stir(model)
    if not hasattr(config, "decoder_start_token_id"):
        config.decoder_start_token_id = 1
    return model


def _batches(model: nn.Module, name: str, config: Any) -> Iterator[dict[str, Any]]:
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> Tensor:
        words = min(_find(config, "vocab_size", VOCAB), VOCAB) - SPECIAL
        found = torch.randint(3, words, (B, length), generator=generator)
        end = _find(config, "eos_token_id", 2)
        found[:, -1] = end if isinstance(end, int) and end < words else 2
        return found

    def pixels(side: int) -> Tensor:
        return torch.randn(B, _find(config, "num_channels", 3), side, side, generator=generator)

    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if name.endswith(("ForImageClassification", "ForSemanticSegmentation")):
        key = getattr(model, "main_input_name", "pixel_values")
        for side in dict.fromkeys((_side(config), IMAGE, 64, 224)):
            yield {(key if key in takes else "pixel_values"): pixels(side)}
        yield from _patches(takes, config, tokens, pixels)
        return
    if "input_values" in takes:
        yield {"input_values": torch.randn(B, 2000, generator=generator)}
    if "input_features" in takes and "input_ids" not in takes:
        yield {
            "input_features": torch.randn(B, 64, _find(config, "feature_projection_input_dim", 80), generator=generator)
        }
    key = next((k for k in ("input_ids", "inputs") if k in takes), "input_ids")
    for length in (TOKENS, 16, 64):
        yield {key: tokens(length), **extra}
    yield {key: tokens(16), "attention_mask": torch.ones(B, 16, dtype=torch.long), **extra}
    boxes = torch.randint(0, 30, (B, TOKENS, 4), generator=generator).sort(-1)[0]
    yield {key: tokens(TOKENS), "bbox": boxes, **extra}
    yield {key: tokens(TOKENS), "bbox": boxes, "image": pixels(_side(config)), **extra}
    yield {key: tokens(TOKENS), "pixel_values": pixels(_side(config)), **extra}


def _patches(takes: Any, config: Any, tokens: Any, pixels: Any) -> Iterator[dict[str, Any]]:
    side = _side(config)
    yield {"input_ids": tokens(side * side // 16)}
    patch = _find(config, "patch_size", 8)
    generator = torch.Generator().manual_seed(3)
    yield {
        "pixel_values": torch.randn(B, 16, 3 * patch * patch, generator=generator),
        "pixel_attention_mask": torch.ones(B, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * B),
    }


def _side(config: Any) -> int:
    size = _find(config, "image_size", IMAGE)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _find(config: Any, name: str, default: Any) -> Any:
    for c in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        value = getattr(c, name, None)
        if value is not None:
            return value
    return default
