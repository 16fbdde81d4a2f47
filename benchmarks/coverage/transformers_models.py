"""Every model class of transformers that its Auto classes know, made tiny from its own configuration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.subject import B, NotRunnable, Subject, stir, tensors_of
from benchmarks.coverage.tiny_config import VOCAB, tiny_config
from benchmarks.coverage.transformers_batches import Batches, run

HEADS = ("ForImageClassification", "ForSequenceClassification", "ForCausalLM", "ForSemanticSegmentation")
_BASES = [
    f"MODEL_{k}MAPPING_NAMES" for k in ("", "FOR_PRETRAINING_", "FOR_TEXT_ENCODING_", "FOR_BACKBONE_", "FOR_IMAGE_")
]
MOST = 40_000_000  # parameters
# What a model returns that couples the samples, or is an input of another output that is here too.
_NO_OUTPUTS = ("loss", "hidden_states", "attentions", "past_key_values", "logits_per", "similarity", "pred_logits_per")

# What the names of fields do not tell: settings that depend on each other. The key begins the class's name.
_WINDOWS = {"image_size": 64, "window_size": 4, "depths": [1, 1], "num_heads": [2, 2]}
_VISION_LANGUAGE: dict[str, Any] = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "vision_config": {
        "embed_dim": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 32,
        "deepstack_visual_indexes": [0],
    },
}
_BACKBONE: dict[str, Any] = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "use_timm_backbone": False,
    "encoder_in_channels": [8, 16, 16],
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
    "image_size": 64,
}
_DETR = _BACKBONE | {"backbone_config": _BACKBONE["backbone_config"] | {"out_features": ["stage4"]}}
_DEPTH: dict[str, Any] = {
    "backbone_config": {
        "model_type": "dinov2",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": False,
        "apply_layernorm": True,
    },
    "reassemble_hidden_size": 32,
    "patch_size": 8,
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
}
_SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
BY_HAND: dict[str, dict[str, Any]] = {
    "AST": {"max_length": 64},
    "Autoformer": _SERIES,
    "Blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "BeitForSem": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "Blip2For": {"image_token_index": VOCAB - 1},
    "InstructBlip": {"image_token_index": VOCAB - 1, "video_token_index": VOCAB - 1},
    "Chameleon": {
        "vocabulary_map": {"<image>": VOCAB - 1},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1]},
    },
    "Cosmos3Edge": {"text_config": {"rope_parameters": _ROPE}},
    "CohereCompass": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "Cvt": {"depth": [1, 1, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "DPT": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "Data2VecVisionForSem": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "ConditionalDetr": _DETR,
    "DabDetr": _DETR,
    "DetrFor": _DETR,
    "TableTransformer": _DETR,
    "DeformableDetr": _BACKBONE,
    "DFine": _BACKBONE,
    "Deimv2": _BACKBONE,
    "RTDetr": _BACKBONE,
    "GroundingDino": _BACKBONE,
    "MMGroundingDino": _BACKBONE,
    "PPDocLayoutV2": _BACKBONE,
    "PPDocLayoutV3": _BACKBONE,
    "PPDocLayoutV4": _BACKBONE,
    "OmDetTurbo": _BACKBONE,
    "Dbrx": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DonutSwin": _WINDOWS,
    "DepthAnything": _DEPTH,
    "Dots3Note": {"per_layer_config": {}},
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "Ernie4_5_Moe": {"moe_k": 2},
    "GPTNeoFor": {"attention_types": [[["global", "local"], 1]]},
    "Glm4vMoe": {"text_config": {"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}}},
    "Glm5Next": {"index_kpool": 2},
    "HieraForPre": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "HunYuanVL": {"text_config": {"rope_parameters": _ROPE}},
    "Emu3": {
        "vocabulary_map": {"<image>": VOCAB - 1},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]},
    },
    "PerceiverForImageClassificationC": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationF": {"num_cross_attention_heads": 1},
    "Gemma3n": {"num_kv_shared_layers": 0, "num_hidden_layers": 5},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"]},
    "LayoutLMv3": {"coordinate_size": 4, "shape_size": 8},
    "Informer": _SERIES,
    "Lilt": {"hidden_size": 48},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"]},
    "Mamba2": {"num_heads": 8, "head_dim": 8},
    "Molmo2For": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "MoonshineStreaming": {"num_key_value_heads": 4},
    "Musicgen": {"num_codebooks": 1},
    "PromptDepthAnything": _DEPTH,
    "Qwen2VL": _VISION_LANGUAGE | {"vision_config": {"embed_dim": 32, "num_heads": 2, "hidden_size": 32}},
    "Qwen2_5_VL": _VISION_LANGUAGE,
    "Qwen3VL": _VISION_LANGUAGE,
    "Glm4v": _VISION_LANGUAGE,
    "Glm46V": _VISION_LANGUAGE,
    "GlmOcr": _VISION_LANGUAGE,
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
    "TimeSeries": _SERIES,
    "Tipsv2Dpt": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
    "UperNet": {"out_indices": [1, 2, 3, 4]},
    "Xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "Zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}


def _by_hand(name: str) -> dict[str, Any]:
    found = {k: v for start, settings in BY_HAND.items() if name.startswith(start) for k, v in settings.items()}
    return found | ({"is_decoder": False} if name.startswith(("ReformerForSeq", "ReformerForMasked")) else {})


def names() -> list[str]:
    """The classes' names, in order: all heads, and the base models of families that have none."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {n for n in dir(transformers) if n.endswith(HEADS) and not n.startswith(("Auto", "TF", "Flax"))}
    bases = set()
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("MAPPING_NAMES") and not name.startswith("CONFIG"):
            classes = {c for value in mapping.values() for c in ([value] if isinstance(value, str) else value)}
            found.update(c for c in classes if "For" in c or name not in _BASES)
            bases |= classes
    found, bases = ({n for n in classes if hasattr(transformers, n)} for classes in (found, bases))
    with_head = {_family(n) for n in found}
    return sorted(found | {n for n in bases if _family(n) not in with_head})


def _family(name: str) -> str:
    import transformers

    return str(getattr(transformers, name).__module__)


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
    outputs = _logits if name.endswith(HEADS) else _outputs
    for note, config in _configs(model_class, name, failures):
        try:
            model = _make(model_class, config)
        except Exception as error:
            failures.append(f"{note}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        for batch in Batches(model, name, config):
            subject = Subject(model, batch, outputs, note)
            try:
                out = run(model, batch, config)
                for t in outputs(out):
                    if t.dim() == 0 or t.shape[0] != B:
                        raise NotRunnable(f"outputs of shape {tuple(t.shape)}")
                if not any(t.requires_grad for t in outputs(out)):
                    raise NotRunnable(f"no outputs in {type(out).__name__}")
                return subject
            except Exception as error:
                failures.append(f"{note}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise NotRunnable(failures[0])


def _logits(out: Any) -> list[Tensor]:
    found = out.get("logits") if hasattr(out, "get") else getattr(out, "logits", None)
    return tensors_of(out if found is None else found)


def _outputs(out: Any) -> list[Tensor]:
    """All that the model returns with the samples first; a dual encoder's embeddings, not its products of samples."""
    if isinstance(out, Mapping):
        out = [_outputs(v) for k, v in out.items() if not any(no in k for no in _NO_OUTPUTS)]
    elif isinstance(out, (list, tuple)):
        out = [_outputs(v) for v in out]
    return [t for t in tensors_of(out) if t.shape[:1] == (B,)]


def _configs(model_class: Any, name: str, failures: list[str]) -> Iterator[tuple[str, Any]]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 5}
    ids["num_labels"] -= 3 * ("ForQuestionAnswering" in name)  # a start and an end
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
