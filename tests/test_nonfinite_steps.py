"""Promise: a step with NaN or infinity in it is not taken and changes nothing, on the host's and the device's path."""

import copy

import pytest
import torch
from torch import nn

from hf_clars.optim import CLARS, LARS, NAG
from tests.twin import batch, loss_on

METHODS = {
    "CLARS": (CLARS, {}),
    "CLARS, rms": (CLARS, {"norm": "rms"}),
    "CLARS, the authors' code": (CLARS.reference_code, {"eta": 1e-2}),
    "LARS, decay": (LARS, {"weight_decay": 1e-2}),
    "NAG": (NAG, {"measure": True, "weight_decay": 1e-2}),
    "NAG, no weight norms": (NAG, {"weight_decay": 1e-2}),
    "NAG, parameters": (lambda model, lr, **settings: NAG(model.parameters(), lr, **settings), {}),
}
PATHS = {"host": None, "multi-tensor": True, "single-tensor": False}
POISONS = {
    "NaN input": lambda x, y, model: (x.index_fill(0, torch.tensor([1]), float("nan")), y),
    "infinite input": lambda x, y, model: (x.index_fill(0, torch.tensor([1]), float("inf")), y),
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 3))


def state_of(model, optimizer):
    return copy.deepcopy([model.state_dict(), [dict(s) for s in optimizer.state.values()]])


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss_on(x, y)(model).backward()
    optimizer.step()


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_a_poisoned_step_changes_nothing_and_the_next_is_as_if_it_had_not_been(method, path, poison):
    cls, settings = METHODS[method]
    poisoned, clean = make_model(), make_model()
    optimizers = [cls(m, 0.5, foreach=PATHS[path], **settings) for m in (poisoned, clean)]
    for model, optimizer in zip((poisoned, clean), optimizers, strict=True):
        for n in range(2):
            step(model, optimizer, *batch(n, 8))
    before = state_of(poisoned, optimizers[0])
    x, y = POISONS[poison](*batch(2, 8), poisoned)
    step(poisoned, optimizers[0], x, y)
    assert same(before, state_of(poisoned, optimizers[0]))
    assert not optimizers[0].last_step.applied
    assert not optimizers[0].last_step.finite.all()
    assert torch.equal(optimizers[0].last_step.rate, torch.zeros_like(optimizers[0].last_step.rate))
    for model, optimizer in zip((poisoned, clean), optimizers, strict=True):
        step(model, optimizer, *batch(3, 8))
        assert optimizer.last_step.applied
        assert optimizer.last_step.finite.all()
    assert same(state_of(poisoned, optimizers[0]), state_of(clean, optimizers[1]))


def test_only_the_layers_that_are_not_finite_are_named():
    model = make_model()
    optimizer = LARS(model, 0.5)
    step(model, optimizer, *batch(0, 8))
    optimizer.zero_grad()
    loss_on(*batch(1, 8))(model).backward()
    model[1].weight.grad[0] = float("inf")
    optimizer.step()
    assert optimizer.last_step.finite.tolist() == [True, False, True]


def test_a_gradient_whose_norm_overflows_is_held_too():
    model = make_model()
    optimizer = LARS(model, 0.5)
    loss_on(*batch(0, 8))(model).backward()
    model[3].weight.grad.fill_(1e38)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert same(before, model.state_dict())
    assert not optimizer.last_step.applied


def test_nag_knows_which_layer_was_not_finite_without_measuring_weights():
    model = make_model()
    optimizer = NAG(model, 0.1)
    for t in range(3):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        loss_on(*batch(t, 8))(model).backward()
        if t == 1:
            model[3].bias.grad[0] = float("nan")
        optimizer.step()
        assert optimizer.last_step.finite.tolist() == [True, True, t != 1]
        assert optimizer.last_step.weight_norm.isnan().all()
        assert same(before, model.state_dict()) == (t == 1)


@pytest.mark.parametrize("path", PATHS)
def test_double_precision_momentum_is_not_rounded(path):
    models = [make_model().double() for _ in range(2)]
    guarded, plain = (
        NAG(m, 0.1, measure=measure, foreach=PATHS[path]) for m, measure in zip(models, (True, False), strict=True)
    )
    for n in range(4):
        x, y = batch(n, 8)
        for model, optimizer in zip(models, (guarded, plain), strict=True):
            step(model, optimizer, x.double(), y)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)
