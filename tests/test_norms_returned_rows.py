"""Promise: what a model returns in other rows than the batch's is followed by itself, or refused by name."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import BatchAxisError
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

B = 4
one_thread = pytest.fixture(autouse=True)(on_one_thread)


WAYS = {
    "view after view": lambda z, head: head(z.transpose(0, 1).flatten(0, 1)),
    "views together": lambda z, head: head(z.flatten(0, 1)),
    "a loss of time first": lambda z, head: head(z.transpose(0, 1).flatten(0, 1)).sin().sum() / len(z),
    "joined": lambda z, head: head(torch.cat([z[:, 0], z[:, 1]])),
}


class Beside(nn.Module):
    """Each sample's own outputs, and something else of which no row is one sample's."""

    def __init__(self, way):
        super().__init__()
        self.way, self.body, self.own, self.head = way, nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        z = self.body(x).tanh()
        return self.own(z.mean(1)), self.way(z, self.head)


def loss_of(model, x):
    own, other = model(x)
    return own.sin().sum() / len(x) + (other if other.dim() == 0 else (other * other.detach().cos()).sum() / len(x))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_returned_beside_the_samples_is_exact(way):
    torch.manual_seed(0)
    model = Beside(WAYS[way]).double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for size in (B, B, B, 6):
            x = torch.randn(size, 2, 3, dtype=torch.float64)
            model.zero_grad()
            loss_of(model, x).backward()
            got = norms.per_sample
            norms.paused = True
            want = layer_norms(one_by_one(model, lambda m, i, x=x: loss_of(m, x[i : i + 1]), size), norms.layers)
            norms.paused = False
            for name, expected in want.items():
                torch.testing.assert_close(
                    got[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )


class Picks(nn.Module):
    """Returns what a head makes of some rows, or of all in another order."""

    def __init__(self, pick, *, alone):
        super().__init__()
        self.pick, self.alone = pick, alone
        self.table, self.head, self.own = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, tokens):
        h = self.table(tokens)
        h = h + h.mean(1, keepdim=True).tanh()
        picked = self.head(self.pick(h, tokens))
        return picked if self.alone else (picked, self.own(h.mean(1)))


def marked(places):
    def pick(h, tokens):
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        mask[tuple(torch.tensor(places).T)] = True
        return h[mask]

    return pick


PICKS = {
    "as many tokens as samples": marked([(0, 0), (0, 1), (2, 0), (3, 0)]),
    "all of the last sample": marked([(3, 0), (3, 1), (3, 2), (3, 3)]),
    "twice as many": marked([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 1), (3, 0), (3, 2)]),
    "another order": lambda h, tokens: h.mean(1)[torch.arange(B).flip(0)],
    "sorted": lambda h, tokens: h.mean(1)[tokens[:, 0].argsort()],
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("pick", PICKS)
def test_rows_that_are_returned_in_an_order_of_their_own_are_refused(pick, alone):
    torch.manual_seed(0)
    model = Picks(PICKS[pick], alone=alone)
    tokens = torch.tensor([[5, 1, 2, 3], [2, 2, 4, 5], [8, 1, 1, 1], [3, 0, 7, 7]])
    with PerSampleGradNorms(model), pytest.raises(BatchAxisError, match="head"):
        model(tokens)


@pytest.mark.parametrize("alone", [True, False])
def test_rows_that_are_picked_in_order_are_exact(alone):
    torch.manual_seed(0)
    model = Picks(lambda h, tokens: h[torch.arange(len(h)), tokens.argmax(1)], alone=alone).double()

    def losses(m, rows):
        found = m(tokens[rows])
        return sum((t * t.detach().cos()).sum() for t in ((found,) if alone else found))

    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for _ in range(3):
            tokens = torch.randint(9, (B, 5))
            model.zero_grad()
            losses(model, slice(None)).backward()
            got = norms.per_sample
            norms.paused = True
            want = layer_norms(one_by_one(model, lambda m, i: losses(m, slice(i, i + 1)), B), norms.layers)
            norms.paused = False
            for name, expected in want.items():
                torch.testing.assert_close(
                    got[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )


class Neighbours(nn.Module):
    """Each sample is a node of one graph."""

    def __init__(self):
        super().__init__()
        self.edges, self.first, self.last = None, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, edges=None):
        edges = self.edges if edges is None else edges
        h = (edges @ self.first(x)).tanh()
        self.between = h
        return edges @ self.last(h)


@pytest.mark.parametrize("loops", [0.0, 1.0])
@pytest.mark.parametrize("given", [True, False])
def test_nodes_that_depend_on_their_neighbours_keep_their_own_use_of_a_layer(given, loops):
    """The definition for samples that depend on each other: what reaches the weights through a node's own row."""
    torch.manual_seed(0)
    model = Neighbours().double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for size in (6, 6, 6, 5):
            x, ring = torch.randn(size, 3, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
            model.edges = edges = ring.roll(1, 0) + ring.roll(2, 0) / 2 + loops * ring
            model.zero_grad()
            (model(x, *[edges] * given).sin().sum() / size).backward()
            got, h = norms.per_sample, model.between.detach()
            out = (edges @ model.last(h)).detach()
            g = edges.T @ out.cos()
            torch.testing.assert_close(got["last.weight"], g.norm(dim=1) * h.norm(dim=1), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(got["last.bias"], g.norm(dim=1), rtol=1e-9, atol=1e-12)


class Waves(nn.Module):
    """Complex from end to end."""

    def __init__(self):
        super().__init__()
        self.conv, self.layer = nn.Conv1d(2, 3, 3, dtype=torch.cdouble), nn.Linear(6, 4, dtype=torch.cdouble)
        self.gain = nn.Parameter(torch.randn(4, dtype=torch.cdouble))

    def forward(self, x):
        return self.layer(self.conv(x)) * self.gain


@pytest.mark.parametrize("size", [3, 4, 5])
def test_complex_values_are_followed_too(size):
    torch.manual_seed(0)
    model = Waves()

    with PerSampleGradNorms(model, layers="tensor", loss_reduction="sum") as norms:
        for _ in range(3):
            x = torch.randn(size, 2, 8, dtype=torch.cdouble)
            model.zero_grad()
            torch.view_as_real(model(x)).sin().sum().backward()
            got = norms.per_sample
            norms.paused = True
            for name, p in model.named_parameters():
                losses = torch.view_as_real(model(x)).sin().flatten(1).sum(1)
                want = [torch.autograd.grad(loss, p, retain_graph=True)[0].abs().norm() for loss in losses]
                torch.testing.assert_close(got[name], torch.stack(want), rtol=1e-9, atol=1e-12)
            norms.paused = False
