"""Promise: under DeepSpeed's ZeRO the callback measures what one process does, and says what cannot be had there."""

import pytest
import torch

from tests.launchers.started import launch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'hf_clars[deepspeed]'")
from tests.launchers.per_sample import measures

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def ranks(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    launch(request.param, "tests.launchers.per_sample", out, request.param[-1])
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_norms_and_the_hardest_samples_are_those_of_one_process(ranks, tmp_path):
    one = measures(tmp_path, 1, noise_scale=False, strict=True)["last"]
    for found in ranks:
        last = found["norms"]["last"]
        assert last.samples == 16
        assert torch.equal(last.top_index, one.top_index)
        for name in ("sample_square", "sample_norm", "top_norm", "quantiles"):
            torch.testing.assert_close(getattr(last, name), getattr(one, name), rtol=1e-3, atol=1e-7)


def test_the_noise_scale_is_refused_in_one_sentence_and_training_goes_on(ranks):
    for found in ranks:
        assert found["noise"]["steps"] == 3
        assert found["noise"]["last"] is None
        said = [line for line in found["noise"]["said"] if "noise_scale=False" in line]
        assert len(said) == 1


def test_in_fp16_the_loss_scale_is_out_of_the_norms_also_where_it_changes_with_every_step(ranks, tmp_path):
    one = measures(tmp_path, 1, noise_scale=False, strict=True)["last"]
    for found in ranks:
        assert found["fp16"]["scale"] == 2.0**9  # of the third step: doubled by the second, and again as it ends
        last = found["fp16"]["last"]
        for name in ("sample_square", "sample_norm", "top_norm", "quantiles"):
            torch.testing.assert_close(getattr(last, name), getattr(one, name), rtol=2e-2, atol=1e-4)
