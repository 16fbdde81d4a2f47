"""Promise: an operation that no pass showed before is measured, also where it takes the data without a gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

B, LATE = 4, 4
one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Late(nn.Module):
    """From the fifth pass on another parameter is used, in another way."""

    def __init__(self, way, *, before=False):
        super().__init__()
        self.way, self.before = way, before
        self.usual, self.other, self.layer = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4)), nn.Linear(4, 4)
        self.passes = -1

    def forward(self, x):
        self.passes += 1
        if self.passes < LATE:
            return self.layer(x * (self.usual + self.other if self.before else self.usual))
        return self.way(x, self.other, self.layer)


WAYS = {
    "a product": lambda x, w, layer: x * w,
    "a product in a sum": lambda x, w, layer: (x * w).sin() + 1,
    "a power": lambda x, w, layer: x.abs() ** w,
    "a choice": lambda x, w, layer: torch.where(x > 0, w, 2 * w),
    "a matrix as wide as the batch": lambda x, w, layer: functional.linear(x, torch.diag(w)),
    "before a layer": lambda x, w, layer: layer(x.abs() ** w),
    "a layer on a table as long as the batch": lambda x, w, layer: x + layer(w.outer(w)).exp(),
    "beside what is known": lambda x, w, layer: layer(x * w) + x.exp() * w,
}


class Memory(nn.Module):
    """Keys of what is learned, before those of the data."""

    def __init__(self):
        super().__init__()
        self.memory, self.q, self.k = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        keys = torch.cat([self.memory.expand(len(x), -1, -1), x[:, None]], 1)
        return (self.q(x)[:, None] * self.k(keys)).tanh().sum(1)


def loss_of(model, x):
    return (model(x) * torch.linspace(-1, 2, 4, dtype=x.dtype)).sin().sum(1)


def check(make, sizes):
    """Passes against one backward pass for every sample."""
    torch.manual_seed(0)
    model = make().double()
    with PerSampleGradNorms(model) as norms:
        for step, size in enumerate(sizes):
            x = torch.randn(size, 4, dtype=torch.float64)
            model.zero_grad()
            loss_of(model, x).mean().backward()
            got = norms.per_sample
            norms.paused = True
            model.passes = step - 1  # the oracle calls a copy for each sample
            want = layer_norms(one_by_one(model, lambda m, i, x=x, s=step: at(m, s, x)[i], size), norms.layers)
            model.passes = step
            norms.paused = False
            for name, expected in want.items():
                torch.testing.assert_close(
                    got[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )


def at(model, step, x):
    model.passes = step - 1
    return loss_of(model, x)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_another_operation(way, before):
    check(lambda: Late(WAYS[way], before=before), [B] * 6)


@pytest.mark.parametrize("sizes", [[3, 3, 3, 1, 1, 3], [1, 1, 3, 3, 1]])
def test_a_batch_of_one(sizes):
    check(Memory, sizes)
