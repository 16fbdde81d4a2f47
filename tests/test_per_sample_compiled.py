"""Promise: a model that is compiled, before the run or in its course, is measured as it is uncompiled."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from hf_clars import PerSampleGradNorms
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


class Scaled(nn.Module):
    """A parameter without a rule's module, between two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return self.last(self.first(x) * self.gain)


def three_passes(model, called, norms):
    """What each of three passes measured; the second is of another size."""
    torch.manual_seed(1)
    x, y, found = torch.randn(6, 5), torch.randint(3, (6,)), []
    for batch in (6, 4, 6):
        model.zero_grad()
        nn.functional.cross_entropy(called(x[:batch]), y[:batch]).backward()
        found.append(dict(norms.per_sample))
    return found


def test_what_torch_compile_returned_may_be_given_in_the_place_of_the_model():
    torch._dynamo.reset()
    plain, compiled = Scaled(), torch.compile(Scaled(), backend="aot_eager")
    with PerSampleGradNorms(plain) as norms:
        expected = three_passes(plain, plain, norms)
    with PerSampleGradNorms(compiled) as norms:
        found = three_passes(compiled, compiled, norms)
    assert [list(f) for f in found] == [["Scaled", "first", "last"]] * 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    with NormMonitor(compiled, strict=True) as monitor:
        assert [layer.name for layer in monitor.layers] == ["Scaled", "first", "last"]


def test_a_compiled_part_that_cannot_be_measured_ends_the_measuring_and_not_the_training(caplog):
    torch._dynamo.reset()
    plain, model = (nn.Sequential(Scaled(), nn.Linear(3, 3)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    model[0].compile(backend="aot_eager")
    with NormMonitor(model, every=1) as monitor:
        for _ in range(3):
            grads = []
            for net in (plain, model):
                torch.manual_seed(1)
                net.zero_grad()
                with monitor.batch() if net is model else nullcontext():
                    net(torch.randn(6, 5)).square().mean().backward()
                grads.append([p.grad for p in net.parameters()])
            torch.testing.assert_close(*grads)
            assert not _get_current_function_mode_stack()
    assert "0.gain: no layer rule measures this in compiled code. Compile the whole model" in monitor.ended
    whole = torch.compile(nn.Sequential(Scaled(), nn.Linear(3, 3)), backend="aot_eager")  # as the message says
    with PerSampleGradNorms(whole) as norms:
        assert [len(found["0"]) for found in three_passes(whole, whole, norms)] == [6, 4, 6]
