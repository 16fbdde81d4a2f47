"""Promise: where calls of the model feed each other before one backward pass, each call's rows are samples, exactly."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms

B, T, WIDTH = 4, 3, 6


class Cell(nn.Module):
    """One step in time; no rule serves its cell, one serves its head."""

    state = None

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, h):
        h = self.cell(x * self.scale, h)
        return self.head(h), h


class KeepsItsState(Cell):
    """The state is no argument: nothing that it is called with tells of the call before."""

    def forward(self, x, h):
        out, self.state = super().forward(x, h if self.state is None else self.state)
        return out, self.state


def steps(model, x):
    """A state is handed on."""
    h, outs = torch.zeros_like(x[:, 0]), []
    for t in range(T):
        out, h = model(x[:, t], h)
        outs.append(out)
    return outs


def steps_with_ends(model, x):
    """Episodes end, so that the state goes through an operation between two calls."""
    h, outs = torch.zeros_like(x[:, 0]), []
    for t in range(T):
        out, h = model(x[:, t], h)
        h = h * (torch.arange(len(x)) != t).to(x).unsqueeze(1)
        outs.append(out)
    return outs


def fed_back(model, x):
    """What it said is what it hears next."""
    h, out = torch.zeros_like(x[:, 0]), x[:, 0]
    for _ in range(T):
        out, h = model(out, h)
    return [out]


def two_samples_in_one_call(model, x):
    """The second call has fewer rows."""
    out, h = model(x[:, 0], torch.zeros_like(x[:, 0]))
    return [out, model(x[:2, 1], h[:2])[0]]


LOOPS = {
    "a state is handed on": (Cell, steps),
    "a state goes through an operation": (Cell, steps_with_ends),
    "results are fed back": (Cell, fed_back),
    "a model keeps its state": (KeepsItsState, steps),
    "the next call has fewer rows": (Cell, two_samples_in_one_call),
}


class OwnCopies:
    """The model with a copy of its parameters for each row of each call."""

    def __init__(self, model):
        self.model, self.calls = copy.deepcopy(model), []

    def __call__(self, x, h):
        named = dict(self.model.named_parameters())
        own = [{n: p.detach().clone().requires_grad_() for n, p in named.items()} for _ in x]
        self.calls.append(own)
        state, rows = self.model.state, []
        for i, params in enumerate(own):
            self.model.state = state
            rows.append([t[i] for t in functional_call(self.model, params, (x, h))])
        out = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        self.model.state = out[1]
        return out

    def norms(self, layers):
        """Of all rows, one call after the other, for losses that are means over a call's rows."""
        rows = [(params, len(own)) for own in self.calls for params in own]
        names = [n for layer in layers for n in layer.param_names]
        zero = {n: torch.zeros_like(p) for n, p in rows[0][0].items()}
        grads = {n: torch.stack([B * (zero[n] if r[n].grad is None else r[n].grad) for r, B in rows]) for n in names}
        return layer_norms(grads, layers)


@pytest.mark.parametrize("name", LOOPS)
def test_calls_that_feed_each_other_are_exact(name):
    torch.manual_seed(0)
    make, loop = LOOPS[name]
    model = make().double()

    with PerSampleGradNorms(model) as norms:
        for batch in (B, B, B, B - 1):
            x = torch.randn(batch, T, WIDTH, dtype=torch.float64)
            model.zero_grad()
            model.state = None
            right = OwnCopies(model)
            sum((out**2).sum(1).mean() for out in loop(right, x)).backward()
            sum((out**2).sum(1).mean() for out in loop(model, x)).backward()
            found = norms.per_sample
            for layer, want in right.norms(norms.layers).items():
                torch.testing.assert_close(found[layer], want, rtol=1e-9, atol=1e-12)
