"""Promise: the norms of a compiled model are right, or what is wrong is said."""

import copy

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms, UncoveredParameterError
from hf_clars.optim import CLARS


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    return nn.Sequential(*layers, nn.Flatten(2), nn.LayerNorm(36), nn.Flatten(), nn.Linear(144, 5))


def loss_of(model):
    torch.manual_seed(1)
    return nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.randint(0, 5, (8,)))


def compiled_whole(model, backend):
    return torch.compile(model, backend=backend)


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_before_the_first_call_are_exact(backend, compiled):
    model, plain = network(), network()
    with PerSampleGradNorms(plain) as expected:
        loss_of(plain).backward()
    with PerSampleGradNorms(model) as norms:
        call = compiled(model, backend)
        for _ in range(3):
            model.zero_grad()
            norms.reset()
            loss_of(call).backward()
    for name, values in norms.per_sample.items():
        torch.testing.assert_close(values, expected.per_sample[name], rtol=1e-4, atol=1e-6)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_a_compiled_module_can_be_given_too():
    """Layers have the names that they have in the model."""
    model = torch.compile(network(), backend="eager")
    with PerSampleGradNorms(model) as norms:
        loss_of(model).backward()
    assert norms.per_sample["0"].shape == (8,)


@pytest.mark.parametrize("use", ["norms", "optimizer"])
def test_hooks_after_the_first_call_are_refused(use):
    """The compiler does not look for hooks again: they would see nothing."""
    model = network()
    call = torch.compile(model, backend="eager")
    loss_of(call).backward()
    if use == "norms":
        norms = PerSampleGradNorms(model)
        model.zero_grad()
        loss_of(call).backward()
        with pytest.raises(UncoveredParameterError, match=r"before the first \(compiled\) call"):
            _ = norms.per_sample
        norms.remove()
    else:
        optimizer = CLARS(model, 1.0)
        model.zero_grad()
        loss_of(call).backward()
        with pytest.raises(RuntimeError, match=r"before the first \(compiled\) call|no forward"):
            optimizer.step()


def test_gradients_from_before_the_hooks_are_no_ones_fault():
    model = network()
    loss_of(model).backward()
    with PerSampleGradNorms(model) as norms:
        assert norms.per_sample == {}


def test_training_a_compiled_model_is_training_the_model():
    model = network()
    plain = copy.deepcopy(model)
    losses = {}
    for name, m in (("compiled", model), ("plain", plain)):
        optimizer = CLARS(m, 1.0, eta=0.02)
        call = torch.compile(m, backend="aot_eager") if name == "compiled" else m
        losses[name] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of(call)
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        optimizer.remove_hooks()
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["plain"][-1] < losses["plain"][0]
