"""Promise: under DeepSpeed's ZeRO the callback measures what one process does, the noise scale included."""

import pytest
import torch

from tests.launchers.started import launch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'hf_clars[deepspeed]'")
from tests.launchers.per_sample import CLIPPED, loop, measures

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]
SQUARES = ("batch_square", "sample_square")


@pytest.fixture(scope="module", params=["zero1", "zero2", "zero3"])
def ranks(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    launch(request.param, "tests.launchers.per_sample", out, request.param[-1], fork=True)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return measures(tmp_path_factory.mktemp("one"), 1, strict=True)


def test_all_steps_are_measured_as_one_process_measures_them(ranks, one):
    for name in (*SQUARES, "sample_norm", "top_norm", "quantiles", "loss"):
        torch.testing.assert_close(ranks[0]["norms"]["log"][name], one["log"][name], rtol=1e-5, atol=1e-9)
    for found in ranks:
        last = found["norms"]["last"]
        assert last.samples == 16
        assert torch.equal(last.top_index, one["last"].top_index)
        torch.testing.assert_close(last.batch_square, one["last"].batch_square, rtol=1e-5, atol=1e-9)


def test_so_does_the_monitor_in_a_loop_of_accelerate(ranks):
    one = loop(1, strict=True, optimizer=True)
    for found in (rank["loop"] for rank in ranks):
        assert found["steps"] == one["steps"] == 3
        torch.testing.assert_close(found["last"].batch_square, one["last"].batch_square, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found["noise"], one["noise"], rtol=1e-4, atol=0)


def test_without_the_optimizer_such_a_loop_is_right_too_or_ends_the_measuring_in_one_sentence(ranks):
    for found in ranks:
        without = found["loop without"]
        assert without["steps"] == 3
        if without["ended"] is None:
            assert torch.equal(without["noise"], found["loop"]["noise"])
        else:
            assert "give NormMonitor optimizer=" in without["ended"]


def test_in_fp16_the_loss_scale_is_out_of_the_norms_also_where_it_changes_with_every_step(ranks, tmp_path):
    one = measures(tmp_path, 1, settings=CLIPPED, strict=True)["last"]
    for found in ranks:
        assert found["fp16"]["scale"] == 2.0**9  # of the third step: doubled by the second, and again as it ends
        last = found["fp16"]["last"]
        for name in (*SQUARES, "sample_norm", "top_norm", "quantiles"):
            torch.testing.assert_close(getattr(last, name), getattr(one, name), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("ranks", ["zero1"], indirect=True)
def test_without_zero_the_noise_scale_is_refused_by_name_and_the_norms_alone_are_right(ranks, one):
    for found in ranks:
        refused, alone = found["without zero"], found["norms alone"]
        assert refused["last"] is None
        assert refused["steps"] == 3
        said = [line for line in refused["said"] if "not measured" in line]
        assert len(said) == 1
        assert "DeepSpeed without ZeRO steps inside backward()" in said[0]
        assert "noise_scale=False" in said[0]
        assert alone["said"] == []
        for name in ("sample_square", "sample_norm", "top_norm", "quantiles"):
            torch.testing.assert_close(getattr(alone["last"], name), getattr(one["last"], name), rtol=1e-5, atol=1e-9)
        assert torch.equal(alone["last"].top_index, one["last"].top_index)
