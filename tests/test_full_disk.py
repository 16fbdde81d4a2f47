"""Promise: a disk that is full or read-only costs at most the checkpoint being written, and the run does as chosen."""

import contextlib
import resource
import shutil
import subprocess

import pytest

from hf_clars.records import LayerRateLog, RecordError, checkpoints
from hf_clars.trainer import ClarsTrainer
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
