"""Promise: a checkpoint holds no pickle, resumes exactly in the middle of an epoch, and plain ones still load."""

import inspect
import random

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.safe_checkpoints import random_states, set_random_states
from tests.trainer_kit import Images, Plain, clars_args, plain_args


def test_transformers_still_has_the_methods_that_are_overridden():
    for name, parameters in {
        "_save_optimizer_and_scheduler": ["self", "output_dir"],
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
        "_save_rng_state": ["self", "output_dir"],
        "_load_rng_state": ["self", "checkpoint"],
        "_save_scaler": ["self", "output_dir"],
        "_load_scaler": ["self", "checkpoint"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_get_output_dir": ["self", "trial"],
        "_push_from_checkpoint": ["self", "checkpoint_folder"],
    }.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters


def test_random_states_come_back():
    states = random_states()
    first = (random.random(), np.random.rand(), np.random.randn(), torch.rand(3))
    set_random_states(states)
    second = (random.random(), np.random.rand(), np.random.randn(), torch.rand(3))
    assert first[:3] == second[:3]
    assert torch.equal(first[3], second[3])


def test_transformers_still_saves_where_it_is_told_to(tmp_path, monkeypatch):
    """Every part of a checkpoint goes to the folder that `_get_output_dir` names, and nothing to another."""
    seen = []
    monkeypatch.setattr("hf_clars.records.checkpoints.commit", lambda partial, final: seen.extend(partial.iterdir()))
    ClarsTrainer(Plain(), clars_args(tmp_path, **{**SETTINGS, "max_steps": 3}), train_dataset=Images()).train()
    assert {p.name for p in seen} == FILES
    assert not (tmp_path / "checkpoint-3").exists()


def test_the_state_of_an_fp16_loss_scale_comes_back_without_pickle(tmp_path):
    def trainer():
        made = ClarsTrainer(Plain(), clars_args(tmp_path), train_dataset=Images())
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
        return made

    first, second = trainer(), trainer()
    first.accelerator.scaler.load_state_dict(
        {**first.accelerator.scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 5}
    )
    first._save_scaler(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["scaler.safetensors"]
    second._load_scaler(str(tmp_path))
    assert second.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()
    torch.save(first.accelerator.scaler.state_dict(), tmp_path / "scaler.pt")  # as the plain Trainer has it
    (tmp_path / "scaler.safetensors").unlink()
    third = trainer()
    third._load_scaler(str(tmp_path))
    assert third.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()


FILES = {
    "model.safetensors",
    "optimizer.safetensors",
    "scheduler.safetensors",
    "rng_state_0.safetensors",
    "trainer_state.json",
    "training_args.json",
    "checkpoint.json",
}

SETTINGS = {
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "random",
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0},
    "log_layer_rates": True,
}


@pytest.mark.parametrize("schedule", [{}, {"lr_step_epochs": [0.5, 1.0], "warmup_epochs": 0.5}])
def test_a_checkpoint_has_no_pickle_and_resumes_exactly(tmp_path, schedule):
    settings = {**SETTINGS, **schedule}
    whole = ClarsTrainer(Plain(), clars_args(tmp_path / "whole", **settings), train_dataset=Images())
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    names = {p.name for p in checkpoint.iterdir()}
    assert names == FILES

    resumed = ClarsTrainer(Plain(), clars_args(tmp_path / "resumed", **settings), train_dataset=Images())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e][-4:] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ][-4:]


def test_a_checkpoint_of_the_plain_trainer_still_loads(tmp_path):
    from hf_clars.optim import CLARS

    settings = {k: v for k, v in SETTINGS.items() if k != "log_layer_rates"}
    model = Plain()
    plain = Trainer(
        model,
        plain_args(tmp_path / "plain", **settings),
        train_dataset=Images(),
        optimizers=(CLARS(model, 1.0), None),
    )
    plain.train()
    resumed = ClarsTrainer(Plain(), clars_args(tmp_path / "resumed", **settings), train_dataset=Images())
    resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))
    for p, q in zip(plain.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
