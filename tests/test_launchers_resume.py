"""Promise: a checkpoint made under one launcher resumes under another where the engine allows it, or is refused.

One process and plain data parallelism read each other's; ZeRO and FSDP2 their own.
"""

import numpy as np
import pytest

from hf_clars.trainer.resuming import CheckpointMisfitError, check_engine
from tests.launchers import started
from tests.launchers.cases import CHECKPOINTED, MIDDLE, Case, floor_of, outcome, run, save_weights
from tests.launchers.started import GROUP

CASE, SIGNAL = (Case(*given) for given in CHECKPOINTED)
pytestmark = [GROUP, pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One process from start to end, with a checkpoint in the middle."""
    return started.uninterrupted(tmp_path_factory)


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    return started.launched("ddp", tmp_path_factory)


def assert_second_half(found, uninterrupted):
    """The steps after the checkpoint, and the final weights, are those of the run without a stop."""
    (arrays, _), (wanted, _) = outcome(found), outcome(uninterrupted)
    assert arrays["log steps"].tolist() == list(range(MIDDLE + 1, wanted["log steps"][-1] + 1))
    for name, value in wanted.items():
        value = value[MIDDLE:] if name.startswith("log ") else value
        np.testing.assert_allclose(arrays[name], value, rtol=1e-5, atol=floor_of(name), err_msg=name)


def test_two_processes_go_on_from_the_checkpoint_of_one(under_ddp, uninterrupted):
    assert_second_half(under_ddp / "from_one", uninterrupted)


def test_one_process_goes_on_from_the_checkpoint_of_two(under_ddp, uninterrupted, tmp_path):
    trainer = run(CASE, tmp_path, 1, resume=under_ddp / CASE.name / f"checkpoint-{MIDDLE}")
    save_weights(trainer.model.state_dict(), tmp_path)
    assert_second_half(tmp_path, uninterrupted)


@pytest.mark.parametrize("case", [CASE, SIGNAL], ids=lambda case: case.name)
def test_two_processes_go_on_from_their_own_checkpoint_bit_for_bit(case, under_ddp):
    """The running moments of SignalLARS among the rest."""
    (resumed, _), (whole, _) = outcome(under_ddp / f"{case.name}_resumed"), outcome(under_ddp / case.name)
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value[MIDDLE:] if name.startswith("log ") else value, name)
    if case is SIGNAL:
        assert 0 < np.nanmedian(whole["log signal"]) < 1


@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp2"])
def test_a_sharded_engine_goes_on_from_its_own_and_no_other_reads_it(kind, uninterrupted, tmp_path, tmp_path_factory):
    out = started.launched(kind, tmp_path_factory)
    assert_second_half(out / f"{CASE.name}_resumed", uninterrupted)
    wrote = "FSDP" if kind == "fsdp2" else "DeepSpeed"
    with pytest.raises(CheckpointMisfitError, match=f"written under {wrote}.*Resume under the launcher"):
        run(CASE, tmp_path / "other", 1, resume=out / CASE.name / f"checkpoint-{MIDDLE}")
    with pytest.raises(CheckpointMisfitError, match="one process or plain data parallelism"):
        check_engine(uninterrupted / f"checkpoint-{MIDDLE}", wrote)


def test_both_processes_hear_that_the_first_cannot_write_a_checkpoint(under_ddp):
    """Neither waits for the other: each leaves with the same sentence, and nothing half written stays."""
    first, second = (under_ddp.joinpath(f"full_disk.{rank}").read_text() for rank in range(2))
    assert first == second
    assert "checkpoint-2 could not be written (No space left on device" in first
    assert "Earlier checkpoints are unchanged. Free some space" in first
    assert not list(under_ddp.joinpath("full_disk").glob("checkpoint-*"))
    assert not (under_ddp / "full_disk" / ".partial").exists()
