"""Promise: models that no rule was written for are measured exactly."""

import pytest
import torch
import transformers

from tests.three_passes import SIDE, B, check, on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)


VISION = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 12, "intermediate_size": 24}
TEXT = {"vocab_size": 30, "num_labels": 3}
MODELS = {
    "beit, one bias for all layers": lambda: transformers.BeitForImageClassification(
        transformers.BeitConfig(
            **VISION, image_size=SIDE, patch_size=8, use_shared_relative_position_bias=True, drop_path_rate=0.0
        )
    ),
    "poolformer": lambda: transformers.PoolFormerForImageClassification(
        transformers.PoolFormerConfig(depths=[1] * 4, hidden_sizes=[4, 8, 8, 12], drop_path_rate=0.0)
    ),
    "segformer": lambda: transformers.SegformerForImageClassification(
        transformers.SegformerConfig(
            depths=[1] * 4, hidden_sizes=[4, 8, 8, 12], num_attention_heads=[1, 2, 2, 2], drop_path_rate=0.0
        )
    ),
    "perceiver": lambda: transformers.PerceiverForImageClassificationLearned(
        transformers.PerceiverConfig(
            num_latents=4,
            d_latents=8,
            num_self_attends_per_block=1,
            num_self_attention_heads=2,
            num_cross_attention_heads=1,
            image_size=8,
        )
    ),
    "swinv2": lambda: transformers.Swinv2ForImageClassification(
        transformers.Swinv2Config(
            image_size=SIDE, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0
        )
    ),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(**TEXT, n_positions=16, n_embd=8, n_layer=2, n_head=2, pad_token_id=0)
    ),
    "gpt2, its table is its last layer": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    ),
    "t5, one bias for all layers": lambda: transformers.T5ForTokenClassification(
        transformers.T5Config(
            **TEXT, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0, classifier_dropout=0.0
        )
    ),
    "gemma, norms with one plus": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            intermediate_size=16,
        )
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=SIDE, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0
        )
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(depths=[1, 1], hidden_sizes=[4, 8], num_stages=2, patch_size=4, drop_path_rate=0)
    ),
    "masked bert, whose head shares a bias": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ),
    "deberta_v2, a table used without a call": lambda: transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(
            **TEXT,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            pos_att_type="p2c|c2p",
        )
    ),
}


def data_for(name):
    if name.startswith(("gpt2", "deberta", "masked", "t5", "gemma")):
        return torch.randint(2, 30, (B, 9))
    side = 8 if name == "perceiver" else SIDE
    return torch.randn(B, 3, side, side)


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    torch.manual_seed(0)
    # Some compute their norms in float32 whatever they are given: that precision is the model's own.
    check(MODELS[name]().train(), data_for(name), rtol=1e-6 if name.startswith(("t5", "gemma")) else 1e-9)
