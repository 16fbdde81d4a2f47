"""Promise: a checkpoint folder is complete or absent, the newest complete one is resumed, and misfits are named."""

import json
import os
import shutil

import pytest
import torch
from torch import nn

from hf_clars.errors import ConfigError
from hf_clars.records import RecordError, checkpoints
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.resuming import CheckpointMisfitError, check_checkpoint
from tests.trainer_kit import Images, Plain, clars_args, tiny_resnet

SETTINGS = {
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
}


def trainer_of(folder, model=None, data=None, **changes):
    args = clars_args(folder, **{**SETTINGS, **changes})
    model = Plain() if model is None else model
    return ClarsTrainer(model, args, train_dataset=data or Images(), eval_dataset=Images())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer_of(folder).train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def names(folder):
    return sorted(p.name for p in folder.glob("checkpoint-*"))


# ---- complete or absent --------------------------------------------------------------------------------------------


def spoil(folder, how):
    if how == "no state":
        (folder / "trainer_state.json").unlink()
    elif how == "half a state":
        state = folder / "trainer_state.json"
        state.write_text(state.read_text()[:100])
    elif how == "cut weights":
        os.truncate(folder / "model.safetensors", 100)
    elif how == "no optimizer":
        (folder / "optimizer.safetensors").unlink()
    elif how == "half a manifest":
        (folder / "checkpoint.json").write_text('{"format":')
    else:
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    "how", ["no state", "half a state", "cut weights", "no optimizer", "half a manifest", "nothing in it"]
)
def test_an_incomplete_folder_is_never_picked(run, how, caplog):
    spoil(run / "checkpoint-9", how)
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-6"
    assert "Passed over" in caplog.text
    assert "checkpoint-9" in caplog.text
    with pytest.raises(RecordError, match="is not complete"):
        check_checkpoint(run / "checkpoint-9", Plain(), {})
    trainer = trainer_of(run)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 9
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-9"
    assert not (run / ".partial").exists()


def test_names_that_only_look_like_checkpoints_are_none(run):
    for name in ("checkpoint-12-old", "checkpoint-", "checkpoint-1e9", "my-checkpoint-99", "checkpoint-٣"):
        shutil.copytree(run / "checkpoint-3", run / name)
    (run / "checkpoint-100").write_text("a file")
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-9"


def test_none_to_resume_from_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_old_ones_are_deleted_by_step_whatever_the_clock_said(tmp_path):
    """A clock that was set back would make the newest look oldest, and the plain Trainer delete it."""
    trainer = trainer_of(tmp_path, save_total_limit=2)
    seen = []

    class Clock(trainer.callback_handler.callbacks[0].__class__.__mro__[1]):
        def on_save(self, args, state, control, **kwargs):
            path = tmp_path / f"checkpoint-{state.global_step}"
            os.utime(path, (10**9 - 10**6 * state.global_step,) * 2)
            seen.append(names(tmp_path))

    trainer.add_callback(Clock())
    trainer.train()
    assert seen == [["checkpoint-3"], ["checkpoint-3", "checkpoint-6"], ["checkpoint-6", "checkpoint-9"]]


def test_the_old_one_is_deleted_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    real, seen = checkpoints.rotate, []

    def watched(run, keep, protected):
        seen.append((names(run), checkpoints.what_is_missing(max(protected))))
        real(run, keep, protected)

    monkeypatch.setattr(checkpoints, "rotate", watched)
    trainer_of(tmp_path, save_total_limit=1).train()
    assert seen == [
        (["checkpoint-3"], None),
        (["checkpoint-3", "checkpoint-6"], None),
        (["checkpoint-6", "checkpoint-9"], None),
    ]
    assert names(tmp_path) == ["checkpoint-9"]


def test_a_run_that_was_killed_before_it_cleaned_up_does_so_when_it_is_resumed(tmp_path):
    trainer_of(tmp_path).train()
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    trainer_of(tmp_path, save_total_limit=2).train(resume_from_checkpoint=True)  # nothing is left to train
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-9"]


def test_the_best_checkpoint_is_kept_and_loaded_under_its_own_name(tmp_path):
    trainer = trainer_of(
        tmp_path,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # rising loss is not training's aim: the first is best
        learning_rate=0.05,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-3")
    assert json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-9"]


def test_a_run_resumed_after_its_last_step_takes_no_other(run):
    before = (run / "checkpoint-9" / "model.safetensors").read_bytes()
    trainer = trainer_of(run)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert trainer.state.global_step == 9
    assert (run / "model.safetensors").read_bytes() == before


# ---- misfits -------------------------------------------------------------------------------------------------------


class Wider(Plain):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(4 * 36, 4)


class Renamed(Plain):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)


MISFITS = {
    "other shapes": (
        Wider,
        {},
        r"'classifier.weight' is F32 \[3, 144\] in the checkpoint, F32 \[4, 144\] in the model",
    ),
    "more layers": (Renamed, {}, r"'head.weight' is only in the model; 'head.bias' is only in the model"),
    "another network": (tiny_resnet, {}, r"only in the model; .* and \d+ more"),
    "another type": (lambda: Plain().double(), {}, r"'conv.weight' is F32 \[4, 1, 3, 3\] in the checkpoint, F64"),
    "another partition": (Plain, {"layers": "tensor"}, r"layer 'conv' has 2 tensors in the checkpoint, no tensor here"),
    "another batch": (Plain, {"gradient_accumulation_steps": 1}, "global_batch was 16 and is 8"),
    "other data": (Plain, {"data": Images(48)}, "train_samples was 64 and is 48"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_checkpoint_of_something_else_is_refused_with_the_difference(run, case):
    model, changes, message = MISFITS[case]
    with pytest.raises(CheckpointMisfitError, match=message):
        trainer_of(run, model(), **changes).train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


def test_other_settings_are_named_in_a_warning(run, caplog):
    trainer_of(run, per_device_train_batch_size=4, gradient_accumulation_steps=4, learning_rate=2.0).train(
        resume_from_checkpoint=str(run / "checkpoint-6")
    )
    assert "micro_batch was 8 and is 4; accumulation was 2 and is 4; gamma_scale was 1.0 and is 2.0" in caplog.text


def test_another_number_of_processes_is_named_in_a_warning(run, caplog):
    manifest = json.loads((run / "checkpoint-6" / "checkpoint.json").read_text())
    manifest["settings"]["processes"] = 2
    (run / "checkpoint-6" / "checkpoint.json").write_text(json.dumps(manifest))
    trainer_of(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert "processes was 2 and is 1" in caplog.text


def test_another_format_version_is_refused(run):
    manifest = json.loads((run / "checkpoint-9" / "checkpoint.json").read_text())
    (run / "checkpoint-9" / "checkpoint.json").write_text(json.dumps({**manifest, "version": "7"}))
    with pytest.raises(RecordError, match=r"version '7'; this hf_clars reads .* version '1'"):
        trainer_of(run).train(resume_from_checkpoint=str(run / "checkpoint-9"))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "nul\0byte"])
def test_a_manifest_cannot_name_files_elsewhere(run, name):
    manifest = json.loads((run / "checkpoint-9" / "checkpoint.json").read_text())
    manifest["files"][name] = 1
    (run / "checkpoint-9" / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(RecordError, match="is no file of this checkpoint"):
        checkpoints.read_manifest(run / "checkpoint-9")


def test_a_weight_index_cannot_name_files_elsewhere(run):
    folder = run / "checkpoint-9"
    (folder / "checkpoint.json").unlink()
    (folder / "model.safetensors").rename(run / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"conv.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RecordError, match="is no file of this checkpoint"):
        check_checkpoint(folder, Plain(), {})


def test_random_states_that_are_none_are_refused():
    from hf_clars.trainer.safe_checkpoints import set_random_states

    before = torch.get_rng_state()
    for states in ({}, {"python": 3}, {"python": (3, (1,), None)}):
        with pytest.raises(RecordError, match="random generators do not fit"):
            set_random_states(states)
    assert torch.equal(before, torch.get_rng_state())
