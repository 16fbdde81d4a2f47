"""Promise: where the weight gradient comes from the per-sample gradients, all around it works as without hooks."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms, SecondBackwardError, norm_math
from hf_clars.grad_norms.rules import convolution, linear
from hf_clars.grad_norms.rules.convolution import ConvolutionRule
from hf_clars.grad_norms.rules.linear import LinearRule
from tests.oracle import layer_norms, per_sample_grads

B = 6


@pytest.fixture
def always(monkeypatch):
    """Small layers take the product whatever the cost model says of them."""
    for module in (convolution, linear):
        monkeypatch.setattr(module, "cheapest_form", lambda *args, **kwargs: "product")


def network(inplace=False):
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(4, 4, 1, stride=2), nn.ReLU(inplace))
    return nn.Sequential(*layers, nn.Flatten(2), nn.Linear(9, 3), nn.Flatten(), nn.Linear(12, 2))


def images():
    torch.manual_seed(1)
    return torch.randn(B, 2, 6, 6)


def loss_of(model):
    out = model(images().to(next(model.parameters()).dtype))
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1).mean()


def check(norms, model, tolerance=1e-4):
    expected = layer_norms(per_sample_grads(model, loss_of, B), norms.layers)
    for name, want in expected.items():
        torch.testing.assert_close(norms.per_sample[name].double(), B * want, rtol=tolerance, atol=1e-6)


def close_grads(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_it_is_really_taken(always, monkeypatch):
    taken = []
    for rule in (ConvolutionRule, LinearRule):
        real = rule.input_grad
        monkeypatch.setattr(rule, "input_grad", lambda self, m, *rest, f=real: taken.append(m) or f(self, m, *rest))
    model = network()
    with PerSampleGradNorms(model) as norms:
        loss_of(model).backward()
    assert taken == [model[7], model[5], model[2]]  # the first layer's input needs no gradient
    check(norms, model)


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_in_place(always, inplace):
    model, plain = network(inplace), network(inplace)
    with PerSampleGradNorms(model) as norms:
        loss_of(model).backward()
    loss_of(plain).backward()
    close_grads(model, plain)
    check(norms, model)


def test_a_layer_too_large_for_memory_goes_through_in_slices(always, monkeypatch):
    monkeypatch.setattr(norm_math, "MAX_ELEMENTS", 100)
    model, plain = network(), network()
    with PerSampleGradNorms(model) as norms:
        loss_of(model).backward()
    loss_of(plain).backward()
    close_grads(model, plain)
    check(norms, model)


def test_a_graph_of_the_gradient_may_be_made_but_not_used(always):
    """A gradient penalty reaches each layer twice: a sample's gradient would be that of both, so it is refused."""
    model, plain = network(), network()
    loss_of(plain).backward()
    with PerSampleGradNorms(model) as norms:
        loss_of(model).backward(create_graph=True)
        close_grads(model, plain)
        check(norms, model)
        penalty = sum(p.grad.square().sum() for p in model.parameters())
        with pytest.raises(SecondBackwardError):
            penalty.backward()
    for p in model.parameters():
        p.grad = None  # it holds its own graph


def test_hooks_of_the_user_see_outputs_and_gradients(always):
    model, plain = network(), network()
    seen = {}
    for name, m in (("with", model), ("without", plain)):
        found = seen[name] = []
        m[2].register_forward_hook(lambda mod, x, out, f=found: out.register_hook(f.append) and None)
        m[2].register_full_backward_hook(lambda mod, gx, gy, f=found: f.extend([*gx, *gy]))
        m[2].weight.register_hook(found.append)
        m[0].weight.register_post_accumulate_grad_hook(lambda p, f=found: f.append(p.grad.clone()))
    norms = PerSampleGradNorms(model)
    for m in (model, plain):
        loss_of(m).backward()
    norms.remove()
    assert len(seen["with"]) == len(seen["without"]) == 5
    for a, b in zip(seen["with"], seen["without"], strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_of_the_input(always):
    model, x = network(), images().requires_grad_()
    model(x).square().sum().backward()
    want, x.grad = x.grad, None
    with PerSampleGradNorms(model):
        model(x).square().sum().backward()
    torch.testing.assert_close(x.grad, want)


def test_a_weight_used_twice(always):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.tanh(self.conv(x))).flatten(1)

    model = Twice()
    with PerSampleGradNorms(model) as norms:
        loss_of(model).backward()
    check(norms, model)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_autocast_and_channels_last(always, layout, dtype):
    model, plain = network().to(memory_format=layout), network()
    x = images().to(memory_format=layout)
    with PerSampleGradNorms(model) as norms:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            out = model(x)
            loss = (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1).mean()
        loss.backward()
    with PerSampleGradNorms(plain) as exact:
        loss_of(plain).backward()
    tolerance = 1e-4 if dtype is None else 0.1
    for name, values in norms.per_sample.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, exact.per_sample[name], rtol=tolerance, atol=tolerance)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_bfloat16_weights(always):
    model, plain = network().bfloat16(), network()
    with PerSampleGradNorms(model) as norms, PerSampleGradNorms(plain) as exact:
        loss_of(model).backward()
        loss_of(plain).backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    for name, values in norms.per_sample.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, exact.per_sample[name], rtol=0.1, atol=0.1)


class _Watched(torch.autograd.Function):
    """Says whether a tensor of the forward pass is still there when the gradient comes by."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.alive = alive
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.alive.append(ctx.alive[0]() is not None)
        return g, None


class Watching(nn.Module):
    """Two layers around a large tensor, which ordinary training lets go of when the second one's backward is done."""

    def __init__(self, second, checkpointed):
        super().__init__()
        self.first, self.second, self.checkpointed = nn.Conv2d(2, 4, 1), second, checkpointed
        self.alive = []

    def body(self, x):
        middle = self.first(x)
        self.alive[:1] = [weakref.ref(middle)]
        return self.second(middle)

    def forward(self, x):
        x = _Watched.apply(x.requires_grad_(), self.alive)
        return (checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)).flatten(1)


@pytest.mark.parametrize("second", [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
def test_nothing_is_held_longer_than_by_autograd(always, second):
    model = Watching(second, checkpointed=False)
    model.alive.append(None)
    with PerSampleGradNorms(model):
        loss_of(model).backward()
        assert model.alive[1:] == [False]


@pytest.mark.parametrize("second", [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
def test_activation_checkpointing_saves_memory_still(always, second):
    model = Watching(second, checkpointed=True)
    model.alive.append(None)
    with PerSampleGradNorms(model) as norms:
        loss = loss_of(model)
        gc.collect()
        assert model.alive[0]() is None, "the hooks hold what checkpointing let go"
        loss.backward()
    model.checkpointed = False
    check(norms, model)


def test_an_input_that_is_overwritten_is_refused_not_measured_wrong():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)

        def forward(self, tokens):
            out = self.embed(tokens)
            tokens.zero_()  # autograd would refuse this too, but its check comes after ours
            return out.sum(1)

    model = Overwrites()
    with PerSampleGradNorms(model):
        loss = model(torch.randint(1, 5, (1, 4))).sum()
        with pytest.raises(RuntimeError, match="in-place"):
            loss.backward()


def test_offloaded_activations(always):
    model = network()
    with PerSampleGradNorms(model) as norms:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model)
        loss.backward()
    check(norms, model)


def test_frozen_parts(always):
    model = network()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model) as norms:
        loss_of(model).backward()
    loss_of(plain).backward()
    assert model[0].weight.grad is None
    assert model[2].bias.grad is None
    for name in ("0.bias", "2.weight", "7.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad)
    check(norms, model)
