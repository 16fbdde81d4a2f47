"""Transformers of the sizes that people train, with random weights and without dropout; and tiny ones of the same kind.

Without dropout, as two ways of computing one gradient would else see two networks.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(labels: int, *, tiny: bool) -> nn.Module:
    """BERT-base."""
    settings: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": labels}
    return BertForSequenceClassification(BertConfig(**settings, **(TINY if tiny else {})))


def gpt2(labels: int, *, tiny: bool) -> nn.Module:
    """GPT-2 small; its last layer's weight is its table of tokens."""
    settings: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=labels, **settings, **(sizes if tiny else {})))


def llama(labels: int, *, tiny: bool) -> nn.Module:
    """A Llama of 100 million parameters."""
    sizes: dict[str, Any] = {
        "hidden_size": 768,
        "num_hidden_layers": 10,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=labels, use_cache=False, **(TINY if tiny else sizes)))


def vit(side: int, labels: int, *, tiny: bool) -> nn.Module:
    """ViT-B/16."""
    settings: dict[str, Any] = {"num_labels": labels, "image_size": side, **(TINY if tiny else {})}
    return ViTForImageClassification(ViTConfig(patch_size=16, **settings))


def convnext(side: int, labels: int, *, tiny: bool) -> nn.Module:
    """ConvNeXt-T."""
    sizes: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]} if tiny else {}
    settings: dict[str, Any] = {"num_labels": labels, "image_size": side, **sizes}
    return ConvNextForImageClassification(ConvNextConfig(**settings))


def swin(side: int, labels: int, *, tiny: bool) -> nn.Module:
    """Swin-T."""
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4} if tiny else {}
    settings: dict[str, Any] = {"num_labels": labels, "drop_path_rate": 0.0, **sizes}
    return SwinForImageClassification(SwinConfig(image_size=side, **settings))
