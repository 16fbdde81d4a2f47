"""Promise: a run of any architecture resumes bit for bit, and ends with its best model bit for bit.

transformers saves many of these under other names than the model has; the plain Trainer then resumes only what happens
to have the same name, and says so in a warning at best.
"""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from tests.resume_kit import IMAGES, check_resume_and_best, make_images
from tests.trainer_kit import Images

TEXT = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
TEXTS = {
    "bert": (AutoModelForSequenceClassification, TEXT),
    "roberta": (AutoModelForSequenceClassification, TEXT),
    "gpt2": (AutoModelForCausalLM, {"vocab_size": 40, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "llama": (AutoModelForCausalLM, TEXT),
    "gemma": (AutoModelForCausalLM, TEXT | {"head_dim": 4}),
    "mixtral": (AutoModelForCausalLM, TEXT | {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


class Words(torch.utils.data.Dataset):
    def __init__(self, causal):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 40, (32, 6), generator=generator)
        self.labels = self.ids if causal else torch.randint(0, 3, (32,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def make_text(name):
    torch.manual_seed(0)
    kind, settings = TEXTS[name]
    labels = {"num_labels": 3} if kind is AutoModelForSequenceClassification else {}
    return kind.from_config(CONFIG_MAPPING[name](**settings, **labels))


@pytest.mark.parametrize("name", IMAGES)
def test_image_models(tmp_path, name):
    side = 64 if name == "levit" else 32
    check_resume_and_best(tmp_path, lambda: make_images(name), Images(32, side, 3))


@pytest.mark.parametrize("name", TEXTS)
def test_text_models(tmp_path, name):
    check_resume_and_best(tmp_path, lambda: make_text(name), Words(TEXTS[name][0] is AutoModelForCausalLM))
