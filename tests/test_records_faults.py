"""The layer-rate log loses no step that was flushed, whenever a run is killed and wherever it resumes."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from hf_clars.records import LayerRateLog, RecordError, pieces
from tests.test_records_log import LAYERS, check, values_of, write


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the library may catch it."""


def kill_at(monkeypatch, operation: int) -> None:
    """Let the process die just before its `operation`-th change of a folder (a rename or a deletion)."""
    count = 0

    def dying(original):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count > operation:
                raise KilledError
            return original(*arguments, **options)

        return call

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))


def flush_and_join(folder: Path) -> None:
    log = LayerRateLog.resume(folder, 60, flush_every=4)
    for step in range(61, 65):
        log.append(step, values_of(step))


def cut(folder: Path) -> None:
    LayerRateLog.resume(folder, 42)


def close(folder: Path) -> None:
    LayerRateLog.resume(folder, 60).close()


@pytest.mark.parametrize(("action", "least"), [(flush_and_join, 60), (cut, 42), (close, 60)])
def test_a_kill_between_any_two_file_operations_leaves_a_beginning_of_the_log(tmp_path, action, least):
    killed, operation = True, 0
    while killed:
        killed, operation = False, operation + 1
        folder = tmp_path / str(operation)
        write(folder, range(1, 61)).flush()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, operation - 1)
            try:
                action(folder)
            except KilledError:
                killed = True
        log = LayerRateLog.open(folder)
        assert log.last_step >= least
        check(log, list(range(1, log.last_step + 1)))
        # ... from which the run goes on, and ends with every step once.
        log = LayerRateLog.resume(folder, least)
        for step in range(least + 1, 71):
            log.append(step, values_of(step))
        log.close()
        check(LayerRateLog.open(folder), list(range(1, 71)))
        assert [path.name for path in folder.iterdir()] == ["layer_rates.safetensors"]
    assert operation > 3


def keep_writing(folder: Path, last: int, written) -> None:
    log = LayerRateLog.resume(folder, last, flush_every=3)
    for step in range(last + 1, last + 100_000):
        log.append(step, values_of(step))
        written.value = step - last


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_sigkill_at_random_moments_loses_no_flushed_step_and_doubles_none(tmp_path):
    write(tmp_path, range(1, 3)).flush()
    fork, chance = multiprocessing.get_context("fork"), random.Random(7)
    last = 2
    for _ in range(8):
        written = fork.Value("i", 0)
        process = fork.Process(target=keep_writing, args=(tmp_path, last, written))
        process.start()
        while written.value < 30 and process.is_alive():  # however busy the machine is
            time.sleep(0.005)
        time.sleep(0.05 + 0.15 * chance.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        log = LayerRateLog.open(tmp_path)
        assert log.last_step >= last
        last = chance.randint(max(2, log.last_step - 20), log.last_step)  # the checkpoint to resume from
    LayerRateLog.resume(tmp_path, last).close()
    assert last > 50
    check(LayerRateLog.open(tmp_path), list(range(1, last + 1)))


@pytest.mark.parametrize("size", [0, 1, 7, 40, 300, -1])
def test_a_cut_off_last_piece_is_left_out_with_a_warning_and_resume_goes_on(tmp_path, caplog, size):
    write(tmp_path, range(1, 41), flush_every=8)
    piece = tmp_path / "layer_rates" / "part-00000033.safetensors"
    piece.write_bytes(piece.read_bytes()[:size])
    check(LayerRateLog.open(tmp_path), list(range(1, 33)))
    assert "part-00000033" in caplog.text
    log = LayerRateLog.resume(tmp_path, 32)
    log.append(33, values_of(33))
    log.close()
    check(LayerRateLog.open(tmp_path), list(range(1, 34)))


def test_a_damaged_piece_before_the_last_is_an_error_that_names_it(tmp_path):
    write(tmp_path, range(1, 41), flush_every=8)
    (tmp_path / "layer_rates" / "part-00000017.safetensors").write_bytes(b"")
    with pytest.raises(RecordError, match=r"part-00000017.*Delete this piece"):
        LayerRateLog.open(tmp_path)


@pytest.mark.parametrize("from_step", [0, 1, 8, 9, 35, 40, 90])
@pytest.mark.parametrize("merged", [False, True])
def test_resume_drops_every_step_after_the_checkpoint_and_no_other(tmp_path, from_step, merged):
    log = write(tmp_path, range(1, 41), flush_every=8)
    log.flush()
    if merged:
        log.close()
    log = LayerRateLog.resume(tmp_path, from_step, layers=LAYERS, flush_every=8)
    kept = list(range(1, min(from_step, 40) + 1))
    check(log, kept)
    for step in range(100, 130):
        log.append(step, values_of(step))
    log.close()
    check(LayerRateLog.open(tmp_path), [*kept, *range(100, 130)])


def test_resume_past_the_end_of_the_log_warns_of_the_gap(tmp_path, caplog):
    write(tmp_path, range(1, 9)).flush()
    LayerRateLog.resume(tmp_path, 8)
    assert not caplog.records
    LayerRateLog.resume(tmp_path, 11)
    assert "ends at step 8, but the run goes on from step 11" in caplog.text


def test_resume_with_another_model_says_which_layers_differ(tmp_path):
    write(tmp_path, range(1, 9)).flush()
    with pytest.raises(RecordError, match=r"only in the log: \['fc'\], only in the model: \['head'\]"):
        LayerRateLog.resume(tmp_path, 4, layers=["conv1", "stages.0.conv2", "head"])
    check(LayerRateLog.open(tmp_path), list(range(1, 9)))


def refuse(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_steps_in_memory_for_the_next_flush(tmp_path, monkeypatch):
    log = write(tmp_path, range(1, 4), flush_every=100)
    monkeypatch.setattr("hf_clars.records.log_file.save_file", refuse)
    with pytest.raises(RecordError, match=r"Could not write .*No space left.*free some space"):
        log.flush()
    monkeypatch.undo()
    log.append(4, values_of(4))
    log.close()
    check(LayerRateLog.open(tmp_path), [1, 2, 3, 4])


def test_a_failed_merge_keeps_the_pieces_and_can_be_tried_again(tmp_path, monkeypatch):
    log = write(tmp_path, range(1, 9))
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(RecordError, match="No space left"):
        log.close()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["layer_rates"]
    check(LayerRateLog.open(tmp_path), list(range(1, 9)))
    log.close()
    check(LayerRateLog.open(tmp_path), list(range(1, 9)))


def test_a_full_disk_while_joining_pieces_costs_no_step(tmp_path, monkeypatch, caplog):
    log = write(tmp_path, range(1, 16), flush_every=1)
    monkeypatch.setattr(pieces, "_join", refuse)
    log.append(16, values_of(16))
    monkeypatch.undo()
    assert "were not joined" in caplog.text
    for step in range(17, 60):
        log.append(step, values_of(step))
    log.close()
    check(LayerRateLog.open(tmp_path), list(range(1, 60)))


def test_someone_elses_file_in_the_pieces_folder_is_left_alone(tmp_path):
    log = write(tmp_path, range(1, 9))
    stranger = tmp_path / "layer_rates" / "notes.txt"
    stranger.write_text("mine")
    log.close()
    assert stranger.read_text() == "mine"
    check(LayerRateLog.open(tmp_path), list(range(1, 9)))
