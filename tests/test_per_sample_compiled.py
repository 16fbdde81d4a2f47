"""Promise: a model that is compiled, before the run or in its course, is measured as it is uncompiled."""

import pytest
import torch

from hf_clars.per_sample import NormMonitor
from tests.callback_kit import brute_force
from tests.trainer_kit import Images, Plain


def steps_of(model, *, compile_after=None, in_place=False, steps=6):
    """Measured squares by step, of every third step and the first; the backend runs the captured code as it is."""
    torch._dynamo.reset()
    data, called, found = Images(8), model, {}
    with NormMonitor(model, every=3, top_k=8, strict=True) as monitor:
        for number in range(1, steps + 1):
            if compile_after == number - 1:
                if in_place:
                    model.compile(backend="eager")
                else:
                    called = torch.compile(model, backend="eager")
            with monitor.batch():
                called(data.x, data.y)["loss"].backward()
            if monitor.last.step == number:
                found[number] = monitor.last
            with torch.no_grad():
                for param in model.parameters():
                    param -= 0.1 * param.grad
            model.zero_grad()
    return found


@pytest.mark.parametrize("compile_after", [0, 1, 4])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_at_any_time_is_measured_right(compile_after, in_place):
    plain, compiled = steps_of(Plain()), steps_of(Plain(), compile_after=compile_after, in_place=in_place)
    assert list(compiled) == [1, 3, 6]
    for number, expected in plain.items():
        for name in ("sample_square", "batch_square", "top_norm"):
            torch.testing.assert_close(getattr(compiled[number], name), getattr(expected, name), rtol=1e-4, atol=1e-8)
    norms, _ = brute_force(Plain(), Images(8).x, Images(8).y)
    torch.testing.assert_close(compiled[1].top_norm.float(), norms.sort(descending=True).values, rtol=1e-4, atol=0)
