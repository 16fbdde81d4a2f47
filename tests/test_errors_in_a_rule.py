"""Promise: a rule that fails in a training that is only watched ends the measuring, and no gradient is wrong for it."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.compiled.passes import CompiledPasses
from hf_clars.grad_norms.registry import LayerRule, registered_rules
from hf_clars.grad_norms.rules import convolution, linear, normalization
from hf_clars.grad_norms.sum_check import SumCheck
from hf_clars.per_sample import NormMonitor, PerSampleNormsCallback
from tests.callback_kit import LOGGER, hooks_on, train
from tests.trainer_kit import Plain

METHODS = ["per_sample_grads", "squared_norms", "whole_backward", "input_grad", "summed_grad", "save"]
CHECKPOINTS = [None, False, True]


class Blocks(nn.Module):
    """Two blocks of layers that a rule serves; `reentrant` says how they are checkpointed, None: not at all."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.table = nn.Embedding(9, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU(inplace=True), nn.Linear(16, 16))
            for _ in range(2)
        )
        self.convolution = nn.Conv1d(16, 16, 3, padding=1, bias=False)  # it would be rounding alone
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def mix(self, h):
        return self.norm(self.convolution(h.mT)).mT

    def forward(self, tokens):
        h = self.table(tokens)
        for block in (*self.blocks, self.mix):
            h = block(h) if self.reentrant is None else checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h).mean(1)


def train_on(model, around, *, before=lambda number: None, autocast=False):
    """Six steps of two passes each; the gradients of every step."""
    generator, found = torch.Generator().manual_seed(1), []
    for number in range(1, 7):
        before(number)
        for last in (False, True):
            tokens = torch.randint(0, 9, (4, 5), generator=generator)
            labels = torch.randint(0, 3, (4,), generator=generator)
            with around(last):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = nn.functional.cross_entropy(model(tokens), labels)
                (loss / 2).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    return found


class Breaks:
    """Makes a method of every rule raise while `now` is true, or return something else."""

    def __init__(self, monkeypatch, method, instead=None):
        self.now, self.times = False, 0
        owners = {cls for rule in registered_rules().values() for cls in type(rule).__mro__ if method in vars(cls)}
        for owner in owners - {LayerRule} if len(owners) > 1 else owners:
            original = vars(owner)[method]

            def broken(rule, *args, _original=original, **kwargs):
                if not self.now:
                    return _original(rule, *args, **kwargs)
                self.times += 1
                if instead is None:
                    raise ZeroDivisionError
                return instead

            monkeypatch.setattr(owner, method, broken)


@pytest.fixture(params=["watched", "taken over", "whole backward"])
def way(request, monkeypatch):
    """How weight gradients come: from autograd, from the samples' gradients, or from a rule's backward pass."""
    if request.param == "taken over":
        for rule in (linear.LinearRule, convolution.ConvolutionRule):
            monkeypatch.setattr(rule, "fuses_weight_grad", lambda *args: True)
    if request.param == "whole backward":
        for module in (linear, convolution, normalization):
            monkeypatch.setattr(module, "kernels_fit", lambda output: True)
    return request.param


def told(caplog):
    return [r.getMessage() for r in caplog.records if "no longer measured" in r.getMessage()]


def no_monitor(last):
    return torch.enable_grad()


@pytest.fixture(scope="module")
def without():
    made = {}

    def gradients(reentrant, autocast=False):
        if (reentrant, autocast) not in made:
            model = Blocks(reentrant)
            made[reentrant, autocast] = (
                train_on(model, no_monitor, autocast=autocast),
                copy.deepcopy(model.state_dict()),
            )
        return made[reentrant, autocast]

    return gradients


def assert_same(model, found, expected, *, wide=None):
    """`wide`: gradients in float32 of a run in bfloat16. As far as that is from these, another order of sums may be."""
    gradients, state = expected
    rtol = 2e-4 if wide is None else 0.02
    for step, (mine, theirs) in enumerate(zip(found, gradients, strict=True)):
        own = 0.0 if wide is None else max(float((grad - wide[step][n]).norm()) for n, grad in theirs.items())
        for name, grad in theirs.items():
            if wide is None:
                torch.testing.assert_close(mine[name], grad, rtol=rtol, atol=rtol * float(grad.abs().max()) + 1e-7)
            else:
                assert float((mine[name] - grad).norm()) < 1.5 * own, name
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer.float(), state[name].float(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("reentrant", CHECKPOINTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [1, 5])
def test_gradients_are_those_of_a_run_without_and_the_error_is_told_once(
    caplog, monkeypatch, way, method, step, reentrant, without
):
    model, breaks = Blocks(reentrant), Breaks(monkeypatch, method)

    def before(number):
        breaks.now = number == step

    with caplog.at_level(logging.WARNING, LOGGER), NormMonitor(model, every=1, noise_scale=False) as monitor:
        found = train_on(model, lambda last: monitor.batch(last=last), before=before)
    assert_same(model, found, without(reentrant))
    assert len(told(caplog)) == bool(breaks.times)
    assert all("ZeroDivisionError" in line for line in told(caplog))
    assert (monitor.ended is None) == (not breaks.times)
    assert hooks_on(model) == 0


def test_every_way_and_method_is_reached(monkeypatch, way):
    """Or the test above would be of nothing."""
    reached = set()
    for method in METHODS:
        with monkeypatch.context() as patch:
            breaks, model = Breaks(patch, method), Blocks(None)
            breaks.now = True
            with NormMonitor(model, every=1, noise_scale=False) as monitor:
                train_on(model, lambda last, m=monitor: m.batch(last=last))
            reached |= {method} if breaks.times else set()
    sometimes = {"taken over": {"input_grad", "per_sample_grads"}, "whole backward": {"whole_backward"}}
    assert reached >= {"summed_grad", "squared_norms", "save"} | sometimes.get(way, {"per_sample_grads"})


@pytest.mark.parametrize("way", ["taken over", "whole backward"], indirect=True)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_another_shape_are_noticed(caplog, monkeypatch, way, autocast, without):
    model = Blocks(None)
    breaks = Breaks(monkeypatch, "input_grad" if way == "taken over" else "whole_backward", torch.zeros(3))
    with caplog.at_level(logging.WARNING, LOGGER), NormMonitor(model, every=1, noise_scale=False) as monitor:
        found = train_on(
            model,
            lambda last: monitor.batch(last=last),
            before=lambda number: setattr(breaks, "now", number == 3),
            autocast=autocast,
        )
    assert breaks.times
    assert_same(model, found, without(None, autocast), wide=without(None)[0] if autocast else None)
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("way", ["taken over"], indirect=True)
def test_a_gradient_of_gradients_is_right_although_a_rule_fails(monkeypatch, way):
    """A penalty on the input's gradient: the second backward pass goes through what took the rule's place."""

    def gradients(model):
        x = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(model(x)).sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [p.grad for p in model.parameters()]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    plain = gradients(copy.deepcopy(model))
    with NormMonitor(model, every=1, noise_scale=False) as monitor:
        for number in range(2):
            Breaks(monkeypatch, "per_sample_grads").now = number == 1
            with monitor.batch():
                found = gradients(model)
            for one, other in zip(found, plain, strict=True):
                torch.testing.assert_close(one, other)
            model.zero_grad()
    assert monitor.ended is not None


@pytest.mark.parametrize("reentrant", CHECKPOINTS)
def test_checkpointing_is_measured_where_an_error_would_not_end_the_run(reentrant):
    """What ends a recomputation early is an exception too, and none of the measuring's."""
    model, norms = Blocks(reentrant), []
    for strict in (False, True):
        model = Blocks(reentrant)
        with NormMonitor(model, every=1, noise_scale=False, strict=strict) as monitor:
            train_on(model, lambda last, m=monitor: m.batch(last=last))
        assert monitor.ended is None
        norms.append(monitor.last.top_norm)
    torch.testing.assert_close(*norms, equal_nan=True)


@pytest.mark.parametrize("compiled", ["whole", "in parts"])
@pytest.mark.parametrize(
    "broken",
    [
        (linear.LinearRule, "squared_norms"),
        (linear.LinearRule, "save"),
        (PerSampleGradNorms, "_open"),
        (CompiledPasses, "_used_twice"),
        (SumCheck, "add"),
    ],
    ids=lambda pair: pair[1],
)
def test_compiled_code_goes_on_too(monkeypatch, compiled, broken):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    plain, x = copy.deepcopy(model), torch.randn(3, 4)

    def gradients(call, of):
        call(x).square().sum(1).mean().backward()
        found = [p.grad for p in of.parameters()]
        of.zero_grad()
        return found

    expected = gradients(plain, plain)
    with NormMonitor(model, every=1, noise_scale=False) as monitor:
        monitor.begin()
        call = torch.compile(model, backend="eager") if compiled == "whole" else model
        for part in (model[0], model[2]) if compiled == "in parts" else ():
            part.compile(backend="eager")
        for number in range(1, 5):
            if number == 3:
                torch.compiler.reset()  # or the rule is in code that was made before
                monkeypatch.setattr(*broken, lambda *args, **kwargs: 1 / 0)
            with monitor.batch():
                found = gradients(call, model)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
    assert (monitor.ended is not None) or broken[0] is SumCheck
    torch.compiler.reset()


@pytest.mark.parametrize("step", [1, 5])
def test_in_a_trainer_too(tmp_path, caplog, monkeypatch, step):
    monkeypatch.setattr(linear.LinearRule, "fuses_weight_grad", lambda *args: True)
    without = train(tmp_path / "without", []).model.state_dict()
    breaks, callback = Breaks(monkeypatch, "per_sample_grads"), PerSampleNormsCallback(every=1)
    begin = callback.on_step_begin

    def on_step_begin(args, state, control, **kwargs):
        breaks.now = state.global_step + 1 == step
        return begin(args, state, control, **kwargs)

    callback.on_step_begin = on_step_begin
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = train(tmp_path / "with", callback, model=Plain())
    assert trainer.state.global_step == 6
    assert len(told(caplog)) == 1
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, without[name], rtol=1e-4, atol=1e-6)
