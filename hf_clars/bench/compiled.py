"""The cost of norms in a model that torch.compile has compiled as a whole, against the compiled plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_clars.bench.networks import NETWORKS, device, logits
from hf_clars.bench.timing import Ratio, alternate, ratios
from hf_clars.grad_norms import PerSampleGradNorms


@dataclass(frozen=True)
class CompiledRow:
    """One network.

    Attributes:
        network: Its name.
        shape: Of its input.
        plain_seconds: Of each round of the compiled plain step.
        seconds: The same with norms.
        ratio: Between them.
        largest_error: Of a norm against the uncompiled one, relative to the layer's largest norm.
    """

    network: str
    shape: tuple[int, ...]
    plain_seconds: list[float]
    seconds: list[float]
    ratio: Ratio
    largest_error: float


Made = tuple[nn.Module, Tensor]


def _images(name: str) -> Callable[[bool], Made]:
    def make(quick: bool) -> Made:
        network = NETWORKS[name]
        network = network.resized(image_size=32, batch=2) if quick else network
        return network.build(), network.data()[0]

    return make


def _tokens(build: Callable[[bool], nn.Module], batch: int, length: int) -> Callable[[bool], Made]:
    def make(quick: bool) -> Made:
        torch.manual_seed(0)
        shape = (2, 8) if quick else (batch, length)
        return build(quick).train().to(device()), torch.randint(1, 100, shape, device=device())

    return make


def _bert(quick: bool) -> nn.Module:
    none: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return BertForSequenceClassification(BertConfig(**none, **(small if quick else {})))


def _gpt2(quick: bool) -> nn.Module:
    none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    small: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 100,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return GPT2LMHeadModel(GPT2Config(**none, **(small if quick else {})))


def _llama(quick: bool) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 768,
        "num_hidden_layers": 10,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
    }
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=16_384, use_cache=False, **(small if quick else sizes)))


COMPILED: dict[str, Callable[[bool], Made]] = {
    "resnet20": _images("resnet20"),
    "resnet-50": _images("resnet-50"),
    "vit-tiny": _images("vit-tiny"),
    "bert-base": _tokens(_bert, 8, 128),
    "gpt2": _tokens(_gpt2, 4, 256),
    "llama-100m": _tokens(_llama, 4, 256),
}
"""What is measured, by name."""


def measure_compiled(name: str, rounds: int, *, quick: bool = False) -> CompiledRow:
    """Compile a network twice, with norms and without, and time both in turn.

    Args:
        name: Of `COMPILED`.
        rounds: How often each is timed.
        quick: Tiny sizes.
    """
    torch.compiler.reset()  # compiled code of the network before would be kept
    plain, x = COMPILED[name](quick)
    measured, reference = copy.deepcopy(plain), copy.deepcopy(plain)
    norms = PerSampleGradNorms(measured, check=False)
    calls = {model: torch.compile(model, fullgraph=True) for model in (plain, measured)}

    def step(model: nn.Module) -> None:
        model.zero_grad()
        scores = logits(calls.get(model, model)(x))
        labels = torch.zeros_like(scores[..., 0], dtype=torch.long)
        nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten()).backward()
        if model is measured:
            norms.totals()

    with PerSampleGradNorms(reference) as expected:
        step(reference)
        step(measured)
        right, found = expected.per_sample, norms.per_sample
    error = max(float((found[n] - t).abs().max() / t.abs().max().clamp(min=1e-12)) for n, t in right.items())
    del reference
    seconds = alternate({"plain": lambda: step(plain), "norms": lambda: step(measured)}, rounds, label=name)
    ratio = ratios(seconds, "plain")["norms"]
    norms.remove()
    return CompiledRow(name, tuple(x.shape), seconds["plain"], seconds["norms"], ratio, error)
