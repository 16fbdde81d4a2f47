"""Promise: layers that transformers' models have of their own are measured by rules: exact, also compiled and tied."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.registry import find_rule
from hf_clars.layers import param_layers
from tests.oracle import layer_norms, one_by_one

transformers = pytest.importorskip("transformers")

B, T, WORDS = 3, 5, 17
WIDE: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NAMED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
DEEP = {**WIDE, **NAMED, "intermediate_size": 24, "num_key_value_heads": 1}


def of(name, settings, config=""):
    made = getattr(transformers, f"{config or name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")(made)


def opt():
    sizes = {"word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 12, "dropout": 0.0}
    return of("OPT", {**WIDE, **NAMED, **sizes})


MODELS = {
    "gemma": (lambda: of("Gemma", {**DEEP, "head_dim": 8}), "model.embed_tokens.weight", "ScaledEmbeddingRule"),
    "gemma 3": (
        lambda: of("Gemma3", {**DEEP, "head_dim": 8, "layer_types": ["full_attention"]}, "Gemma3Text"),
        "model.embed_tokens.weight",
        "ScaledEmbeddingRule",
    ),
    "falcon": (
        lambda: of("Falcon", {**WIDE, **NAMED}),
        "transformer.h.0.self_attention.query_key_value.weight",
        "LinearRule",
    ),
    "cohere": (lambda: of("Cohere", DEEP), "model.norm.weight", "CentredRule"),
    "nemotron": (lambda: of("Nemotron", DEEP), "model.norm.weight", "ShiftedLayerNormRule"),
    "opt": (opt, "model.decoder.embed_positions.weight", "CountedPositionRule"),
}


def batch():
    tokens = torch.randint(1, WORDS, (B, T))
    tokens[1, 3:] = 0  # padding
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


def loss_of(call, inputs):
    return (call(**inputs).logits * inputs["attention_mask"].unsqueeze(-1)).square().sum((1, 2)).sum()


def expected(model, inputs):
    def of_sample(twin, i):
        return loss_of(twin, {name: t[i : i + 1] for name, t in inputs.items()})

    return layer_norms(one_by_one(copy.deepcopy(model), of_sample, B), param_layers(model))


def agree(norms, right):
    for name, found in norms.per_sample.items():
        torch.testing.assert_close(found.double(), right[name], rtol=1e-6, atol=1e-9)


def small_steps(model):
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01 * p.grad.sign())


def three_passes_agree(model, call, norms):
    for _ in range(3):
        inputs = batch()
        right = expected(model, inputs)
        model.zero_grad()
        loss_of(call, inputs).backward()
        agree(norms, right)
        small_steps(model)


@pytest.mark.parametrize("kind", MODELS)
def test_three_passes_are_exact_and_taken_by_the_rule(kind):
    torch.manual_seed(0)
    make, parameter, rule = MODELS[kind]
    model = make().double()
    nn.init.normal_(model.get_parameter(parameter))
    with PerSampleGradNorms(model, loss_reduction="sum", check=True) as norms:
        three_passes_agree(model, model, norms)
        (way,) = [p for p in norms.explain().parameters if p.parameter == parameter]
    assert any(words.startswith(rule) for words in way.ways), way.ways


@pytest.mark.parametrize("kind", ["gemma 3", "opt"])
def test_models_compiled_as_a_whole_are_exact(kind):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = MODELS[kind][0]().double()
    with PerSampleGradNorms(model, loss_reduction="sum", check=False) as norms:
        loss_of(model, batch()).backward()  # OPT folds samples and positions into one axis: an uncompiled pass shows it
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        three_passes_agree(model, compiled, norms)
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_token_that_clips_images_begin_with(compiled):
    torch.manual_seed(0)
    torch.compiler.reset()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=8, patch_size=4, **sizes)).double()
    with PerSampleGradNorms(model, loss_reduction="sum", check=False) as norms:
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for _ in range(3):
            x = torch.randn(B, 3, 8, 8, dtype=torch.float64)

            def of_sample(twin, i, x=x):
                return twin(x[i : i + 1]).pooler_output.square().sum()

            right = layer_norms(one_by_one(copy.deepcopy(model), of_sample, B), param_layers(model))
            model.zero_grad()
            call(x).pooler_output.square().sum().backward()
            agree(norms, right)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_is_rounded_as_the_module_rounds_it(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    module = Gemma3TextScaledWordEmbedding(WORDS, 6, padding_idx=0, embed_scale=7.3).to(dtype)
    rule = find_rule(module)
    tokens, g = torch.arange(B * T).view(B, T), torch.randn(B, T, 6).to(dtype)
    module(tokens).backward(g)
    found = rule.per_sample_grads(module, rule.save(module, (tokens,), {}, None, {"weight"}), g.float(), {"weight"})
    rounding = 1e-6 if dtype is torch.float32 else 5e-3
    torch.testing.assert_close(found["weight"].sum(0), module.weight.grad.float(), rtol=rounding, atol=rounding)


def test_a_layer_with_such_a_name_and_another_formula_has_no_rule():
    class OtherScaledWordEmbedding(nn.Embedding):
        embed_scale = 3.0

        def forward(self, tokens):
            return super().forward(tokens) * self.embed_scale + 1e-2 * super().forward(tokens).square()

    class OtherCohereLayerNorm(nn.Module):
        variance_epsilon = 1e-5

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.weight

    assert find_rule(OtherScaledWordEmbedding(5, 4)) is None
    assert find_rule(OtherCohereLayerNorm()) is None
