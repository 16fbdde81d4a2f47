"""Promise: DeepSpeed's fp16 loss scale, static or dynamic, is out of the norms, and a step that it skips is forgotten.

Two real CPU processes train under ZeRO 1, 2 and 3 in DeepSpeed's own loop: `tests/launchers/deepspeed_fp16.py`.
"""

import pytest
import torch

from tests.launchers.started import GROUP, launched

deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'hf_clars[deepspeed]'")
from tests.launchers import deepspeed_fp16  # noqa: E402

pytestmark = [GROUP, pytest.mark.distributed, pytest.mark.timeout(600)]
RATE, WEIGHT_NORM, GRAD_NORM, SAMPLE_NORM, RATIO = range(5)
FP16 = {"rtol": 2e-2, "atol": 0}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = launched("zero2", tmp_path_factory)
    return [torch.load(out / f"fp16.{rank}.pt") for rank in range(2)]


@pytest.fixture(params=["static", "dynamic"])
def scale(request):
    return request.param


@pytest.fixture(params=["group norm", "vit"])
def model(request):
    return request.param


@pytest.fixture(params=[1, 2, 3], ids="zero{}".format)
def found(request, ranks, model, scale):
    first, second = (results[request.param, model, scale] for results in ranks)
    for one, other in zip(first["measures"], second["measures"], strict=True):
        assert torch.equal(one, other)
    return first


@pytest.fixture(scope="module")
def float32():
    made = {}

    def reference(model, scale):
        if (model, scale) not in made:
            made[model, scale] = deepspeed_fp16.reference(model, deepspeed_fp16.SPOILED[scale])
        return made[model, scale]

    return reference


def test_the_first_step_has_the_norms_and_rates_of_float32(found, float32, model, scale):
    measures, _ = float32(model, scale)
    assert found["scale"][0] == 1024
    torch.testing.assert_close(found["measures"][0], measures[0], **FP16)


def test_a_skipped_step_changes_no_weight_and_the_next_ones_know_nothing_of_it(found, float32, model, scale):
    spoiled = deepspeed_fp16.SPOILED[scale]
    measures, _ = float32(model, scale)
    for number in spoiled:
        assert found["skipped"][number] == found["skipped"][number - 1] + 1
        assert torch.equal(found["weights"][number], found["weights"][number - 1])
        assert torch.equal(found["measures"][number], found["measures"][number - 1])
    after = max(spoiled) + 1
    assert found["skipped"][-1] == len(spoiled)
    for quantity in (RATE, SAMPLE_NORM):
        torch.testing.assert_close(found["measures"][after][quantity], measures[after][quantity], **FP16)


def test_weights_are_those_of_float32_also_where_the_scale_changes(found, float32, model, scale):
    """Numbers near 1 have steps of 0.001 in fp16; the six updates move weights by 0.003 to 0.016 each."""
    measures, weights = float32(model, scale)
    for mine, expected in zip(found["weights"], weights, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-3)
    if scale == "dynamic":
        # Halved at each skipped step, doubled after two good ones, in the middle of the last step: DeepSpeed then
        # divides the gradient by the new scale, and the rate makes up for it.
        assert found["scale"] == [1024, 1024, 512, 256, 256, 256]
        expected = measures[-1] * torch.tensor([2, 1, 0.5, 0.5, 1])[:, None]
        torch.testing.assert_close(found["measures"][-1], expected, **FP16)
