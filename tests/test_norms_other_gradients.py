"""Promise: gradients of the input alone add no samples, and no hook of the model's own is run for the norms."""

import copy

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import SecondBackwardError
from tests.three_passes import assert_exact, on_one_thread

SIZES = (3, 5, 3, 2)
one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Layer(nn.Module):
    """A rule's module, and a parameter that the graph shows."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain, self.head = nn.Linear(4, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)) * self.gain)


def made(kind):
    torch.manual_seed(0)
    return kind().double()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("clears", [True, False])
def test_an_image_may_be_changed_against_the_model_before_it_trains(clears, compiled):
    """PGD and TRADES: passes whose backward goes to the image alone, also while gradients are accumulated."""
    torch.compiler.reset()
    model = made(Layer)
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, layers="tensor", loss_reduction="sum") as norms:
        called = torch.compile(model, backend="aot_eager") if compiled else model
        for size in SIZES:
            if clears:
                model.zero_grad()
            else:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
            given = []
            for x in torch.randn(2, size, 4, dtype=torch.float64):
                for _ in range(2):
                    x = x.detach().requires_grad_()
                    x = x + 0.1 * torch.autograd.grad(called(x).sin().sum(), x)[0].sign()
                given.append(x.detach())
                called(given[-1]).sin().sum().backward()
            assert_exact(norms, plain, torch.cat(given))


def test_the_same_graph_may_give_the_gradient_of_its_input_first():
    model = made(Layer)
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for size in SIZES:
            model.zero_grad()
            x = torch.randn(size, 4, dtype=torch.float64, requires_grad=True)
            loss = model(x).sin().sum(1).mean()
            torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward()
            assert_exact(norms, plain, x.detach())


def test_what_is_asked_for_between_backward_and_reading_is_no_sample():
    model = made(Layer)
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for size in SIZES:
            model.zero_grad()
            x = torch.randn(size, 4, dtype=torch.float64)
            model(x).sin().sum(1).mean().backward()
            image = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
            torch.autograd.grad(model(image).sum(), image)  # a saliency map
            assert_exact(norms, plain, x)


@pytest.mark.parametrize("part", ["layer", "gain"])
def test_a_penalty_on_the_gradient_of_the_input_is_refused(part):
    model = made(Layer)
    for name, p in model.named_parameters():
        p.requires_grad_(part in name)
    norms = PerSampleGradNorms(model, layers="tensor", check=False)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)[0]
    with pytest.raises(SecondBackwardError, match="gradient penalty"):
        slope.square().sum().backward()
    norms.remove()


class Equilibrium(Layer):
    """A deep equilibrium model: a hook solves for the gradient, by gradients of one more step."""

    def step(self, z, x):
        return torch.tanh(self.layer(z) * self.gain / 4 + x)

    def equilibrium(self, x):
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = self.step(z, x)
        return z

    def forward(self, x):
        z = self.step(self.equilibrium(x), x)
        before = z.detach().requires_grad_()
        again = self.step(before, x)
        if z.requires_grad:
            z.register_hook(lambda g: solve(again, before, g))
        return self.head(z)


class TakesItsHookOff(Equilibrium):
    """As the first such models do it: the hook's own gradients come to the hook's place again."""

    def forward(self, x):
        before = self.equilibrium(x).requires_grad_()
        z = self.step(before, x)

        def hook(g):
            handle.remove()
            return solve(z, before, g)

        handle = z.register_hook(hook)
        return self.head(z)


def solve(after, before, g):
    found = g
    for _ in range(60):
        found = torch.autograd.grad(after, before, found, retain_graph=True)[0] + g
    return found


@pytest.mark.parametrize("kind", [Equilibrium, TakesItsHookOff])
def test_an_equilibrium_is_exact_and_its_gradients_are_the_plain_ones(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for size in SIZES:
            model.zero_grad()
            plain.zero_grad()
            x = torch.randn(size, 4, dtype=torch.float64)
            for m in (model, plain):
                m(x).sin().sum(1).mean().backward()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
            assert_exact(norms, plain, x)
