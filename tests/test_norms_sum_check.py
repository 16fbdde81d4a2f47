"""Promise: a use that was missed or counted twice cannot stay silent, because the samples' gradients must add up."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms, SumCheckError
from hf_clars.grad_norms.graph import nodes
from hf_clars.grad_norms.rules.linear import LinearRule
from hf_clars.grad_norms.sum_check import sketch
from tests.twin import batch, loss_on, small_model


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gain = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.inner(x) * self.gain


def backward(model, norms, x):
    model.zero_grad()
    model(x).square().sum(1).mean().backward()
    return norms.per_sample


@pytest.fixture
def wrong(monkeypatch):
    """From now on a use is counted twice."""

    def start():
        real = nodes._summed_over_broadcast
        monkeypatch.setattr(nodes, "_summed_over_broadcast", lambda *a: 2 * real(*a))

    return start


def test_a_use_that_is_counted_twice_is_found_in_the_first_pass(wrong):
    wrong()
    model = Scaled()
    with PerSampleGradNorms(model) as norms, pytest.raises(SumCheckError, match=r"gain: .* do not add up .* norm is"):
        backward(model, norms, torch.randn(3, 4))


def test_a_use_outside_the_model_is_found():
    model, x = Scaled(), torch.randn(3, 4)
    with PerSampleGradNorms(model) as norms:
        (model(x) * model.gain).square().sum(1).mean().backward()
        with pytest.raises(SumCheckError, match="gain"):
            norms.per_sample  # noqa: B018


@pytest.mark.parametrize(("check", "found"), [(True, 5), (4, 6), (1000, None), (False, None)])
def test_how_often_it_is_made(check, found, wrong):
    model, x = Scaled(), torch.randn(3, 4)
    norms = PerSampleGradNorms(model, check=check)
    for step in range(9):
        if step == 5:
            wrong()
        if step == found:
            with pytest.raises(SumCheckError):
                backward(model, norms, x)
            break
        backward(model, norms, x)
    norms.remove()


def test_it_knows_accumulation_several_forward_passes_and_subsets():
    model, (x, y) = small_model().eval(), batch(0)
    norms = PerSampleGradNorms(model, check=True)
    for _ in range(2):
        model.zero_grad()
        for _ in range(3):
            loss_on(x, y)(model).backward()
        assert len(norms.per_sample["0"]) == 24
    model.zero_grad()
    (loss_on(x, y)(model) + loss_on(x, y)(model)).backward()  # two forward passes, one backward pass
    assert len(norms.per_sample["0"]) == 16
    model.zero_grad()
    torch.autograd.grad(loss_on(x, y)(model), list(model.parameters()))
    norms.per_sample  # noqa: B018
    norms.remove()
    with PerSampleGradNorms(model, samples=3, check=True) as some:
        loss_on(x, y)(model).backward()
        assert len(some.per_sample["0"]) == 3


def test_gradients_that_the_user_changes_are_not_compared():
    model, x = Scaled(), torch.randn(3, 4)
    model.gain.register_hook(lambda g: 3 * g)
    with PerSampleGradNorms(model, check=True) as norms:
        for _ in range(3):
            backward(model, norms, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_fault(dtype):
    torch.manual_seed(0)
    model, (x, y) = small_model(), batch(0)
    with PerSampleGradNorms(model, check=True) as norms:
        for _ in range(3):
            model.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_on(x, y)(model)
            loss.backward()
            norms.per_sample  # noqa: B018


class Table(nn.Module):
    """A small network on fixed coordinates makes a table, in float32 at last, that is added to the data (Swin v2)."""

    def __init__(self):
        super().__init__()
        self.inner, self.table = nn.Linear(16, 16), nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
        self.places = torch.randn(16, 2)

    def forward(self, x):
        return self.inner(x) + 16 * self.table(self.places).float().sigmoid()[:, 0]


def test_low_precision_in_a_table_that_ends_in_full_precision_is_no_fault():
    torch.manual_seed(0)
    model = Table()
    with PerSampleGradNorms(model, check=True) as norms:
        for _ in range(10):
            x = torch.randn(3, 16)
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).float().square().sum(1).mean()
            loss.backward()
            norms.per_sample  # noqa: B018


def test_low_precision_inside_a_recurrent_layer_is_no_fault():
    torch.manual_seed(0)
    model = nn.GRU(8, 8, 2, batch_first=True)
    with PerSampleGradNorms(model, check=True) as norms:
        for _ in range(10):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(torch.randn(3, 5, 8))[0]
            out.float().sin().sum((1, 2)).mean().backward()
            norms.per_sample  # noqa: B018


def test_nothing_is_left_on_the_parameters():
    model = Scaled()
    norms = PerSampleGradNorms(model)
    model(torch.randn(3, 4))
    norms.remove()
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_penalty_on_weights_is_named_and_may_be_allowed():
    model, x = Scaled(), torch.randn(3, 4)
    with PerSampleGradNorms(model) as norms:
        (model(x).square().sum(1).mean() + model.gain.square().sum()).backward()
        with pytest.raises(SumCheckError, match=r"penalty on weights.*check_every = 0"):
            norms.per_sample  # noqa: B018
        norms.check_every = 0
        for _ in range(3):
            model.zero_grad()
            (model(x).square().sum(1).mean() + model.gain.square().sum()).backward()
            assert (norms.per_sample["Scaled"] > 0).all()


def big():
    """A layer whose gradient is many times as large as what is kept of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 2048)), torch.randn(2, 3, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fault_in_a_large_layer_is_found(monkeypatch, dtype):
    model, x = big()
    model, x = model.to(dtype), x.to(dtype)
    real = LinearRule.per_sample_grads

    def without_one_row(rule, module, saved, g, wanted):
        grads = real(rule, module, saved, g, wanted)
        if "weight" in grads:
            grads["weight"][:, 1000] = 0
        return grads

    with PerSampleGradNorms(model) as norms:
        for _ in range(3):
            backward(model, norms, x)
    monkeypatch.setattr(LinearRule, "per_sample_grads", without_one_row)
    with PerSampleGradNorms(model) as norms, pytest.raises(SumCheckError, match=r"0\.weight: .* do not add up"):
        backward(model, norms, x)


def test_no_gradient_is_held_once_more():
    model, x = big()
    with PerSampleGradNorms(model) as norms:
        model(x).square().sum().backward()
        held = norms._check._balance[model[0].weight]
        assert 5 * held.numel() < model[0].weight.numel()
        norms.per_sample  # noqa: B018


@pytest.mark.parametrize("kind", ["random", "alike", "one row"])
def test_a_sketch_adds_up_and_has_about_the_norm(kind):
    torch.manual_seed(0)
    t = torch.randn(300, 1000)
    t = torch.randn(1, 1000).expand(300, -1) if kind == "alike" else t
    t = t * (torch.arange(300) == 7)[:, None] if kind == "one row" else t
    assert 0.3 < sketch(t).norm() / t.norm() < 2
    other = torch.randn(300, 1000)
    torch.testing.assert_close(sketch(t + other), sketch(t) + sketch(other), rtol=1e-4, atol=1e-4)
    state = torch.get_rng_state()
    sketch(t)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "words"), [(torch.bfloat16, "in half precision. If float32"), (torch.float32, None)])
def test_a_gradient_that_torch_rounds_away_is_said_to_be_off(kind, words):
    """Thousands of gradients of one sign, summed in bfloat16: torch's sum of LayerNorm's bias stops growing."""
    model = nn.LayerNorm(8)
    x = torch.randn(3, 3000, 8).to(kind)
    with PerSampleGradNorms(model) as norms:
        model(x).float().sum((1, 2)).mean().backward()
        if words is None:
            assert norms.totals().total == 3
            return
        with pytest.raises(SumCheckError, match=words):
            norms.per_sample  # noqa: B018
