"""Promise: what is made of parameters alone is known as such in every pass, also with as many rows as the batch.

No shape tells its rows from the samples' there. Later passes meet operations that the first did not: layers thaw, a
branch is taken, a checkpointed block makes its graph in the backward pass only.
"""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

B = 4
one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Base(nn.Module):
    """Weights of B rows, and functions of them."""

    step = 0

    def __init__(self):
        super().__init__()
        self.scale, self.gain = nn.Parameter(torch.randn(B)), nn.Parameter(torch.randn(B))
        self.weight, self.linear = nn.Parameter(torch.randn(B, B)), nn.Linear(B, B)


class Thaws(Base):
    def forward(self, x):
        return self.linear((x * self.scale) @ (self.weight * self.gain.sigmoid()) + self.gain)

    def before(self, step):
        for i, p in enumerate(self.parameters()):
            p.requires_grad_((i + step) % 3 != 0)


class ThawsMagnitude(Thaws):
    """DoRA's direction and magnitude."""

    def forward(self, x):
        weight = self.linear.weight + self.weight
        return (x * self.scale) @ (self.gain[:, None] * weight / weight.norm(dim=1, keepdim=True)).T


class Branches(Base):
    def forward(self, x):
        if self.step < 1:
            return self.linear(x)
        return (self.linear(x) * (1 + self.scale)) @ (self.weight * 2).T.exp() * self.gain

    def before(self, step):
        self.step = step


class HasBuffer(Base):
    """Somebody else's optimizer trains a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(B, dtype=torch.float64).requires_grad_())

    def forward(self, x):
        return self.linear(x * self.shift) * self.scale + self.shift * self.gain + x @ self.weight


class CastBlock(Base):
    def forward(self, x):
        weight, scale = (p.float().double() for p in (self.weight, self.scale))
        return (self.linear(x @ weight) * (1 + scale)).tanh() * self.gain


class Casts(nn.Module):
    """As under autocast each weight is cast, in a graph that is made in the backward pass."""

    reentrant = True

    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(B, B), CastBlock()

    def forward(self, x):
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


class Scaled(Base):
    """The layer computes with what is made of its weights."""

    def forward(self, x):
        made = {name: p * (1 + self.scale.mean()) for name, p in self.linear.named_parameters()}
        return functional_call(self.linear, made, (x @ self.weight,)) * self.gain


class Maps(Base):
    def forward(self, x):
        return self.linear(torch.vmap(lambda row: (row @ self.weight).tanh() * self.gain)(x)) * self.scale


class StepsFirst(Base):
    """As many steps as samples: a layer's rows are steps."""

    def forward(self, x):
        steps = (x[:, None] * torch.linspace(-1, 1, B, dtype=x.dtype)[:, None]).transpose(0, 1)
        return (self.linear(steps) @ self.weight * self.gain + self.scale).tanh().transpose(0, 1).sum(1)


@pytest.mark.parametrize("kind", [Thaws, ThawsMagnitude, Branches, HasBuffer, Casts, Scaled, Maps, StepsFirst])
def test_it_is_exact(kind):
    torch.manual_seed(0)
    model = kind().double()
    rtol, atol = (1e-5, 1e-6) if kind is Casts else (1e-9, 1e-12)  # gradients of what was cast come in float32
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step, size in enumerate((B, B, 6, B, B)):
            if hasattr(model, "before"):
                model.before(step)
            torch.manual_seed(step)
            x = torch.randn(size, B, dtype=torch.float64)
            twin = copy.deepcopy(model)
            twin.reentrant = False  # which `torch.autograd.grad` cannot do
            want = one_by_one(twin, lambda m, i, x=x: loss_of(m, x)[i], size)
            model.zero_grad()
            loss_of(model, x).mean().backward()
            for layer in norms.layers:
                name = layer.name
                expected = layer_norms(want, [layer])[name] if name in want else torch.zeros(size).double()
                got = norms.per_sample[name].double()
                torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def loss_of(model, x):
    return (model(x) * torch.linspace(-1, 2, B, dtype=torch.float64)).sin().sum(1)


class GivenPositions(nn.Module):
    """Numbers of positions are given; a bare table, or one with a rule, is looked up by them."""

    def __init__(self, bare):
        super().__init__()
        self.bare, self.table = bare, nn.Embedding(8, 4)
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, positions):
        rows = self.table.weight[positions] if self.bare else self.table(positions)
        return self.last(self.inner(x + rows).tanh()).mean(1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("shape", [(4,), (8,), (7,), (1, 7), (4, 4)])
def test_positions_that_are_given(shape, bare):
    """They may be as many as the samples, and need no pass for each."""
    torch.manual_seed(0)
    model = GivenPositions(bare).double()
    positions = torch.arange(shape[-1]).expand(shape)

    def loss_of(m, x):
        return (m(x, positions) * torch.tensor([1.0, -2.0], dtype=x.dtype)).sin().sum(1)

    with PerSampleGradNorms(model) as norms:
        for _ in range(4):
            x = torch.randn(4, shape[-1], 4, dtype=torch.float64)
            want = one_by_one(model, lambda m, i, x=x: loss_of(m, x)[i], 4)
            model.zero_grad()
            loss_of(model, x).mean().backward()
            for name, expected in layer_norms(want, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], expected, rtol=1e-9, atol=1e-12)


class Blocks(nn.Module):
    """A weight of B equal blocks, as OFT shares them; nothing that is trained comes before it."""

    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Embedding(9, B * B).requires_grad_(False), nn.Parameter(torch.randn(1, B, B))

    def forward(self, x):
        return (self.first(x).tanh() @ torch.block_diag(*self.block.repeat(B, 1, 1).unbind())).sin()


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_parameter_repeated_as_often_as_there_are_samples(shape):
    torch.manual_seed(0)
    model = Blocks().double()

    def loss_of(m, x):
        out = m(x).flatten(1)
        return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sum(1)

    with PerSampleGradNorms(model) as norms:
        for _ in range(3):
            x = torch.randint(0, 9, (B, *shape))
            want = one_by_one(model, lambda m, i, x=x: loss_of(m, x)[i], B)
            model.zero_grad()
            loss_of(model, x).mean().backward()
            for name, expected in layer_norms(want, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], expected, rtol=1e-9, atol=1e-12)
