"""Promise: a disk that is full or read-only costs at most the checkpoint being written, and the run does as chosen."""

import contextlib
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_clars.records import LayerRateLog, RecordError, checkpoints
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.disk import disk_failures_explained
from hf_clars.trainer.preflight import OutputError, claim_output_dir
from tests.trainer_kit import Images, Plain, clars_args

SETTINGS = {
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_train_batch_size": 8,
    "log_layer_rates": True,
}


@contextlib.contextmanager
def files_of_at_most(size):
    """No file may grow beyond `size` bytes: what a write then raises is like that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullFrom:
    """A callback that lets the disk be full during some steps."""

    def __new__(cls, first, last, size=1000):
        from transformers import TrainerCallback

        class Full(TrainerCallback):
            limit = contextlib.ExitStack()

            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step + 1 == first:
                    self.limit.enter_context(files_of_at_most(size))

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == last:
                    self.limit.close()

        return Full()


@pytest.fixture(autouse=True)
def no_limit_left():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def trainer_of(folder, callback, **changes):
    args = clars_args(folder, **{**SETTINGS, **changes})
    return ClarsTrainer(Plain(), args, train_dataset=Images(), callbacks=[callback])


def names(folder):
    return sorted(p.name for p in folder.glob("checkpoint-*"))


def test_by_default_the_run_stops_and_the_last_checkpoint_is_valid(tmp_path):
    with pytest.raises(
        RecordError, match=r"checkpoint-6 could not be written.*Earlier checkpoints are unchanged.*true"
    ):
        trainer_of(tmp_path, FullFrom(6, 9, size=4000)).train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert names(tmp_path) == ["checkpoint-3"]
    assert not (tmp_path / ".partial").exists()
    trainer_of(tmp_path, FullFrom(0, 0)).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    assert LayerRateLog.open(tmp_path).steps.tolist() == list(range(1, 10))


def test_or_it_goes_on_and_saves_again_when_there_is_room(tmp_path, caplog):
    trainer_of(tmp_path, FullFrom(6, 7), on_save_error="continue", save_total_limit=1).train()
    assert "checkpoint-6 could not be written" in caplog.text
    assert names(tmp_path) == ["checkpoint-9"]
    assert LayerRateLog.open(tmp_path).steps.tolist() == list(range(1, 10))


def test_a_log_that_cannot_be_written_stops_the_checkpoint_too(tmp_path, monkeypatch, caplog):
    """A checkpoint ahead of its log would leave a gap after a kill."""
    real, full = LayerRateLog.flush, [True]

    def flush(self):
        if full[0] and self.last_step == 6:
            raise RecordError("Could not write the log: No space left on device.")
        real(self)

    monkeypatch.setattr(LayerRateLog, "flush", flush)
    trainer_of(tmp_path, FullFrom(0, 0), on_save_error="continue").train()
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-9"]
    assert LayerRateLog.open(tmp_path).steps.tolist() == list(range(1, 10))


def test_half_a_file_of_torch_s_is_not_left_and_its_own_words_are_not_shown(tmp_path):
    """Room for the weights, and not for the pickle that Trainer writes after them."""
    trainer = trainer_of(tmp_path, FullFrom(0, 0), save_strategy="no")
    trainer.train()
    with files_of_at_most(4000), pytest.raises(RecordError, match=r"MB free.*free some space") as caught:
        trainer.save_model()
    assert "inline_container" not in str(caught.value)
    assert not (tmp_path / "training_args.bin").exists()


class Tied(Plain):
    """A weight under two names, in a module that transformers does not know."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(4 * 36, 3)
        self.again.weight = self.classifier.weight

    def forward(self, pixel_values, labels=None):
        hidden = torch.relu(self.norm(self.conv(pixel_values))).flatten(1)
        logits = self.classifier(hidden) + self.again(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_tied_weight_is_stored_once_and_comes_back(tmp_path):
    args = clars_args(tmp_path, **SETTINGS)
    whole = ClarsTrainer(Tied(), args, train_dataset=Images())
    whole.train()
    resumed = ClarsTrainer(Tied(), args, train_dataset=Images())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.model.again.weight is resumed.model.classifier.weight
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_what_is_no_fault_of_the_disk_is_not_blamed_on_it(tmp_path, monkeypatch):
    """Tensors that overlap in part cannot be stored, however much room there is: on_save_error is for disks."""

    class Overlapping(Plain):
        def __init__(self):
            super().__init__()
            store = torch.zeros(6)
            self.register_buffer("first", store[:4])
            self.register_buffer("second", store[2:])

    trainer = ClarsTrainer(
        Overlapping(), clars_args(tmp_path, **SETTINGS, on_save_error="continue"), train_dataset=Images()
    )
    with pytest.raises(RecordError, match=r"share memory.*The disk is not at fault") as caught:
        trainer.train()
    assert "Free some space" not in str(caught.value)
    with pytest.raises(RuntimeError, match="share memory"):
        trainer.save_model()


def test_every_process_hears_of_a_problem_of_the_first_s(tmp_path, monkeypatch):
    """What rank 0 cannot write is noted, and raised only where all processes have met."""
    trainer = trainer_of(tmp_path, FullFrom(0, 0))
    met, write = [], Path.write_text

    def full(path, *args, **kwargs):
        if path.name == "training_args.json":
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    agree = trainer._agree_on_problem
    monkeypatch.setattr(trainer, "_agree_on_problem", lambda: (met.append(trainer._save_problem), agree()))
    with pytest.raises(RecordError, match="No space left on device"):
        trainer.train()
    assert met
    assert met[0] is not None


def test_what_a_run_writes_after_its_last_step_is_guarded_too(tmp_path):
    with (
        pytest.raises(RecordError, match=r"No space left on device.*Checkpoints are unchanged"),
        disk_failures_explained(tmp_path),
    ):
        raise OSError(28, "No space left on device", "all_results.json")
    with pytest.raises(FileNotFoundError), disk_failures_explained(tmp_path):
        open(tmp_path / "no" / "such").close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True
    )
    if not done or done.returncode:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, caplog):
    """Room for about five checkpoints of this model: the sixth fails, is passed over, and nothing is left of it."""
    trainer_of(small_disk, FullFrom(0, 0), on_save_error="continue", save_steps=1, max_steps=12).train()
    found = names(small_disk)
    assert 3 <= len(found) < 12
    assert "No space left on device" in caplog.text
    assert all(checkpoints.what_is_missing(small_disk / name) is None for name in found)


def test_a_folder_that_became_read_only(small_disk, tmp_path):
    claim_output_dir(small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="cannot be written to: Read-only file system"):
        claim_output_dir(small_disk / "other")
    with pytest.raises(RecordError, match=r"could not be written|Cannot keep a layer-rate log"):
        trainer_of(small_disk / "run", FullFrom(0, 0)).train()
