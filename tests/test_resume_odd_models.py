"""Promise: models that load in ways of their own resume bit for bit too, and another model's checkpoint is refused."""

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageClassification,
)

from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.resuming import CheckpointMisfitError
from tests.resume_kit import SETTINGS, TRANSFORMER, check_resume_and_best, make_images, same, state
from tests.trainer_kit import Images, Plain, clars_args


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
