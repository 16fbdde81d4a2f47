"""Promise: a backward function that runs its modules again, as a neural ODE's adjoint, is measured once and exactly."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from tests.three_passes import assert_exact, on_one_thread

STEPS = 3
one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Field(nn.Module):
    """What the state's change is: a layer, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return torch.tanh(self.layer(x)) * self.gain


class Adjoint(torch.autograd.Function):
    """Steps of Euler's; the states are kept, and the graph is made again in the backward pass."""

    @staticmethod
    def forward(ctx, field, x, *params):
        states = [x]
        for _ in range(STEPS):
            states.append(states[-1] + field(states[-1]) / STEPS)
        ctx.field, ctx.flat = field, len(params) == 1
        ctx.save_for_backward(*states)
        return states[-1]

    @staticmethod
    def backward(ctx, g):
        params = list(ctx.field.parameters())
        sums = [torch.zeros_like(p) for p in params]
        for state in ctx.saved_tensors[-2::-1]:
            with torch.enable_grad():
                x = state.detach().requires_grad_()
                g, *found = torch.autograd.grad(x + ctx.field(x) / STEPS, [x, *params], g)
            sums = [before + more for before, more in zip(sums, found, strict=True)]
        if ctx.flat:
            sums = [torch.cat([t.flatten() for t in sums])]
        return None, g, *sums


class Ode(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.field, self.head = nn.Linear(4, 4), Field(), nn.Linear(4, 2)

    def solve(self, x):
        return Adjoint.apply(self.field, self.first(x), *self.field.parameters())

    def forward(self, x):
        return self.head(self.solve(x))


class AsOneVector(Ode):
    """As torchdiffeq gives them."""

    def solve(self, x):
        return Adjoint.apply(self.field, self.first(x), torch.cat([p.flatten() for p in self.field.parameters()]))


class UsedBesides(Ode):
    def solve(self, x):
        return super().solve(x) + self.field(x)


class Twice(Ode):
    def solve(self, x):
        return Adjoint.apply(self.field, super().solve(x), *self.field.parameters())


class Checkpointed(Ode):
    """What the function saved can be read once a backward pass."""

    def forward(self, x):
        return self.head(checkpoint(self.solve, x, use_reentrant=False))


@pytest.mark.parametrize("kind", [Ode, AsOneVector, UsedBesides, Twice, Checkpointed])
def test_every_pass_is_exact(kind):
    model = kind().double()
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for size in (3, 5, 3, 2):
            model.zero_grad()
            x = torch.randn(size, 4, dtype=torch.float64)
            model(x).sin().sum(1).mean().backward()
            assert_exact(norms, plain, x)
