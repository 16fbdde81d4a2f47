"""Promise: a run of any architecture resumes bit for bit, and ends with its best model bit for bit.

transformers saves many of these under other names than the model has; the plain Trainer then resumes only what happens
to have the same name, and says so in a warning at best.
"""

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DeiTForImageClassification,
    LevitForImageClassification,
)

from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.resuming import CheckpointMisfitError
from tests.trainer_kit import Images, Plain, clars_args

TRANSFORMER = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 16,
}
STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32, "patch_size": 4}
CONVNEXT = {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2}

IMAGES = {
    "vit": TRANSFORMER,
    "deit": TRANSFORMER,
    "beit": TRANSFORMER | {"use_relative_position_bias": True},
    "data2vec-vision": TRANSFORMER,
    "dinov2": TRANSFORMER | {"mlp_ratio": 2},
    "dinov2_with_registers": TRANSFORMER | {"mlp_ratio": 2},
    "vit_msn": TRANSFORMER,
    "ijepa": TRANSFORMER,
    "swin": STAGES,
    "swinv2": STAGES,
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
    "regnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "groups_width": 4},
    "mobilenet_v1": {"depth_multiplier": 0.125, "image_size": 32},
    "mobilenet_v2": {"depth_multiplier": 0.125, "image_size": 32},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 128},
    "segformer": {
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "num_attention_heads": [1, 2],
        "sr_ratios": [2, 1],
        "patch_sizes": [3, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8,
    },
    "poolformer": {
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
        "mlp_ratio": 2.0,
    },
    "pvt": {
        "hidden_sizes": [4, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 1, 1],
        "image_size": 32,
    },
    "bit": {"embedding_size": 32, "hidden_sizes": [128, 128], "depths": [1, 1]},
    "focalnet": {
        "embed_dim": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
        "image_size": 32,
    },
    "levit": {
        "hidden_sizes": [16, 16, 16],
        "num_attention_heads": [1, 1, 1],
        "depths": [1, 1, 1],
        "key_dim": [4, 4, 4],
        "image_size": 64,
        "mlp_ratio": [2, 2, 2],
        "attention_ratio": [2, 2, 2],
    },
    "hiera": {
        "embed_dim": 8,
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "patch_stride": [4, 4],
        "patch_padding": [3, 3],
        "masked_unit_size": [4, 4],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "query_stride": [2, 2],
        "num_query_pool": 1,
    },
}
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


def make_images(name):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](num_labels=3, **IMAGES[name])
    of_two = {
        "deit": DeiTForImageClassification,
        "levit": LevitForImageClassification,
    }  # whose Auto class cannot choose
    return of_two[name](config) if name in of_two else AutoModelForImageClassification.from_config(config)


def make_text(name):
    torch.manual_seed(0)
    kind, settings = TEXTS[name]
    labels = {"num_labels": 3} if kind is AutoModelForSequenceClassification else {}
    return kind.from_config(CONFIG_MAPPING[name](**settings, **labels))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert first.keys() == second.keys()
    assert different == []


SETTINGS = {
    "method": "lars",  # checkpoints are the same for all methods, and this one costs no norms of samples
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0},
}


class Worse(ClarsTrainer):
    """Finds the model best after its second step."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": abs(self.state.global_step - 2.0)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def check_resume_and_best(tmp_path, make, data):
    states = {}

    class Watched(Worse):
        def _save_checkpoint(self, model, trial):
            states[self.state.global_step] = state(self.model)
            super()._save_checkpoint(model, trial)

    args = clars_args(
        tmp_path / "whole",
        **SETTINGS,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    whole = Watched(make(), args, train_dataset=data, eval_dataset=data)
    whole.train()
    assert not all(torch.equal(states[2][name], states[4][name]) for name in states[2])
    same(state(whole.model), states[2])

    resumed = ClarsTrainer(make(), clars_args(tmp_path / "resumed", **SETTINGS), train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    same(state(resumed.model), states[4])


@pytest.mark.parametrize("name", IMAGES)
def test_image_models(tmp_path, name):
    side = 64 if name == "levit" else 32
    check_resume_and_best(tmp_path, lambda: make_images(name), Images(32, side, 3))


@pytest.mark.parametrize("name", TEXTS)
def test_text_models(tmp_path, name):
    check_resume_and_best(tmp_path, lambda: make_text(name), Words(TEXTS[name][0] is AutoModelForCausalLM))


def test_a_model_that_was_read_by_from_pretrained_and_whose_head_the_user_replaced(tmp_path):
    make_images("vit").save_pretrained(tmp_path / "pretrained")

    def make():
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "pretrained")
        torch.manual_seed(1)
        model.classifier = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
        return model

    check_resume_and_best(tmp_path, make, Images(32, 32, 3))


def test_a_checkpoint_in_several_files(tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    whole = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel,
        "save_pretrained",
        lambda self, *args, **kwargs: whole(self, *args, max_shard_size=2000, **kwargs),
    )
    check_resume_and_best(tmp_path, lambda: make_images("vit"), Images(32, 32, 3))
    assert len(list((tmp_path / "whole" / "checkpoint-2").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 1}, {"num_labels": 4}])
def test_a_checkpoint_of_another_model_is_still_refused(tmp_path, change):
    data = Images(32, 32, 3)
    ClarsTrainer(make_images("vit"), clars_args(tmp_path, **SETTINGS), train_dataset=data).train()
    config = CONFIG_MAPPING["vit"](**{**TRANSFORMER, "num_labels": 3, **change})
    other = ClarsTrainer(
        AutoModelForImageClassification.from_config(config), clars_args(tmp_path, **SETTINGS), train_dataset=data
    )
    before = state(other.model)
    with pytest.raises(CheckpointMisfitError, match=r"of another model: '.*' is "):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(before, state(other.model))


class Grows(nn.Module):
    """Makes room for a buffer when it loads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = Plain()
        self.register_buffer("seen", torch.empty(0))

    def load_state_dict(self, state_dict, strict=True):
        self.seen = torch.empty_like(state_dict["seen"])
        return super().load_state_dict(state_dict, strict)

    def forward(self, pixel_values, labels=None):
        if self.training:
            self.seen = torch.cat([self.seen, pixel_values[:, 0, 0, 0].detach()])
        return self.inner(pixel_values, labels)


class GrowsInside(nn.Module):
    """The same in a module inside, by torch's method for modules."""

    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.empty(0))

        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.seen = torch.empty_like(state_dict[prefix + "seen"])
            super()._load_from_state_dict(state_dict, prefix, *args)

    def __init__(self):
        super().__init__()
        self.inner, self.memory = Plain(), self.Memory()

    def forward(self, pixel_values, labels=None):
        if self.training:
            self.memory.seen = torch.cat([self.memory.seen, pixel_values[:, 0, 0, 0].detach()])
        return self.inner(pixel_values, labels)


@pytest.mark.parametrize("make", [Grows, GrowsInside])
def test_a_model_that_makes_room_for_a_buffer_when_it_loads(tmp_path, make):
    check_resume_and_best(tmp_path, make, Images(32))


@pytest.mark.parametrize("make", [Grows, GrowsInside])
def test_a_model_with_a_loading_of_its_own_still_needs_its_parameters(tmp_path, make):
    ClarsTrainer(make(), clars_args(tmp_path, **SETTINGS), train_dataset=Images(32)).train()
    model = make()
    model.inner.more = nn.Linear(2, 2)
    other = ClarsTrainer(model, clars_args(tmp_path, **SETTINGS), train_dataset=Images(32))
    with pytest.raises(CheckpointMisfitError, match=r"inner\.more"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def with_lora(kind):
    import peft

    model = make_images("vit")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "query", "value"], modules_to_save=["classifier"])
    if kind == "peft":
        return peft.get_peft_model(model, config)
    try:
        model.add_adapter(config)
    except ValueError as error:
        pytest.skip(str(error))  # transformers takes newer versions of peft only
    return model


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_folders_that_hold_an_adapter_only(tmp_path, kind):
    pytest.importorskip("peft")
    check_resume_and_best(tmp_path, lambda: with_lora(kind), Images(32, 32, 3))
    assert not list(tmp_path.glob("*/checkpoint-*/model*.safetensors"))


def test_an_adapter_of_another_shape_or_none_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    data = Images(32, 32, 3)
    ClarsTrainer(with_lora("peft"), clars_args(tmp_path, **SETTINGS), train_dataset=data).train()
    wider = peft.get_peft_model(make_images("vit"), peft.LoraConfig(r=3, target_modules=["q_proj", "query"]))
    for model, words in ((wider, "lora_A"), (make_images("vit"), "no adapter")):
        other = ClarsTrainer(model, clars_args(tmp_path, **SETTINGS), train_dataset=data)
        with pytest.raises(CheckpointMisfitError, match=words):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
