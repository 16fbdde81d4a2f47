"""Promise: a checkpoint made under one launcher resumes under another where the engine allows it, or is refused.

One process and plain data parallelism read each other's; ZeRO and FSDP2 their own.
"""

import numpy as np
import pytest

from hf_clars.trainer.resuming import CheckpointMisfitError, check_engine
from tests.launchers.cases import MIDDLE, Case, floor_of, outcome, run, save_weights
from tests.test_launchers_agree import launch

CASE = Case("group norm", "clars", 1)
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One process from start to end, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("single")
    trainer = run(CASE, folder, 1, save_strategy="steps", save_steps=MIDDLE)
    save_weights(trainer.model.state_dict(), folder)
    return folder


@pytest.fixture(scope="module")
def under_ddp(uninterrupted, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    launch("ddp", "tests.launchers.resume", out, "ddp", uninterrupted / f"checkpoint-{MIDDLE}")
    return out


def assert_second_half(found, uninterrupted):
    """The steps after the checkpoint, and the final weights, are those of the run without a stop."""
    (arrays, _), (wanted, _) = outcome(found), outcome(uninterrupted)
    assert arrays["log steps"].tolist() == list(range(MIDDLE + 1, wanted["log steps"][-1] + 1))
    for name, value in wanted.items():
        value = value[MIDDLE:] if name.startswith("log ") else value
        np.testing.assert_allclose(arrays[name], value, rtol=1e-5, atol=floor_of(name), err_msg=name)


def test_two_processes_go_on_from_the_checkpoint_of_one(under_ddp, uninterrupted):
    assert_second_half(under_ddp / "resumed", uninterrupted)


def test_one_process_goes_on_from_the_checkpoint_of_two(under_ddp, uninterrupted, tmp_path):
    trainer = run(CASE, tmp_path, 1, resume=under_ddp / "own" / f"checkpoint-{MIDDLE}")
    save_weights(trainer.model.state_dict(), tmp_path)
    assert_second_half(tmp_path, uninterrupted)


@pytest.mark.parametrize("method", ["clars", "signal_lars"])
def test_two_processes_go_on_from_their_own_checkpoint_bit_for_bit(method, tmp_path):
    """The running moments of SignalLARS among the rest."""
    launch("ddp", "tests.launchers.resume", tmp_path, "ddp", "own", method)
    (resumed, _), (whole, _) = outcome(tmp_path / "resumed"), outcome(tmp_path / "own")
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value[MIDDLE:] if name.startswith("log ") else value, name)
    if method == "signal_lars":
        assert 0 < np.nanmedian(whole["log signal"]) < 1


@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp2"])
def test_a_sharded_engine_goes_on_from_its_own_and_no_other_reads_it(kind, uninterrupted, tmp_path):
    out = tmp_path / kind
    launch(kind, "tests.launchers.resume", out, kind)
    assert_second_half(out / "resumed", uninterrupted)
    wrote = "FSDP" if kind == "fsdp2" else "DeepSpeed"
    with pytest.raises(CheckpointMisfitError, match=f"written under {wrote}.*Resume under the launcher"):
        run(CASE, tmp_path / "other", 1, resume=out / "own" / f"checkpoint-{MIDDLE}")
    with pytest.raises(CheckpointMisfitError, match="one process or plain data parallelism"):
        check_engine(uninterrupted / f"checkpoint-{MIDDLE}", wrote)
