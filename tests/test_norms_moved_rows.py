"""Promise: rows of the batch that a model gives other places are measured as their own sample's, or refused.

A sort, a shuffle, or a way to experts may leave as many rows as the batch has samples, and of no look can be told that
they are others. Every pass draws new data, so that rows take other ways in each.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import BatchAxisError
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

B = 4
one_thread = pytest.fixture(autouse=True)(on_one_thread)


def loss_of(model, x):
    out = model(x).flatten(1)
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1)


def check(model, *shape, sizes=(B, B, 6, B, B, B), grad=False, change=lambda x, step: x):
    """Passes on new data, each against one backward pass for every sample. In the last ones nothing is followed."""
    model = model.double()
    with PerSampleGradNorms(model) as norms:
        for step, size in enumerate(sizes):
            torch.manual_seed(step)
            x = change(torch.randn(size, *shape, dtype=torch.float64), step).requires_grad_(grad)
            want = one_by_one(model, lambda m, i, x=x: loss_of(m, x)[i], size)
            model.zero_grad()
            loss_of(model, x).mean().backward()
            for name, expected in layer_norms(want, norms.layers).items():
                got = norms.per_sample[name]
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        return norms._finder


class Moves(nn.Module):
    """A layer, rows in another order, a layer or a bare weight, and back."""

    def __init__(self, order, *, first=True, bare=False):
        super().__init__()
        self.order = order
        self.first, self.last = nn.Linear(4, 4) if first else nn.Identity(), nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4)) if bare else None

    def forward(self, x):
        h = self.first(x)
        order = self.order(h.detach())
        moved = h[order]
        moved = self.last(moved) if self.weight is None else moved @ self.weight
        return moved.tanh()[order.argsort()]


def by_value(h):
    return h.flatten(1)[:, 0].argsort()


def by_chance(h):
    return torch.randperm(len(h), generator=torch.Generator().manual_seed(int(h.abs().sum() * 1e6)))


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h, k = self.first(x), len(x) // 2
        moved = self.last(torch.cat([h[k:], h[:k]])).tanh()
        return torch.cat([moved[-k:], moved[:-k]]) * h


class Flips(nn.Module):
    def __init__(self, name="flip"):
        super().__init__()
        self.name = name
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        if self.name == "flip":
            return self.last(h.flip(0)).flip(0)
        if self.name == "roll":
            return self.last(h.roll(1, 0)).roll(-1, 0)
        if self.name == "index_select":
            order = by_value(h)
            return self.last(h.index_select(0, order)).index_select(0, order.argsort())
        order = torch.eye(len(h), dtype=h.dtype)[by_value(h)] * (1 + 0 * x.sum(1)).detach()
        return order.T @ self.last(order @ h)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.net = nn.Linear(4, 4), nn.GRU(4, 3)

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        return self.net(self.first(x).transpose(0, 1)[:, order])[0][:, order.argsort()].transpose(0, 1)


class Packed(nn.Module):
    def __init__(self, kind=nn.LSTM, **settings):
        super().__init__()
        self.first, self.net = nn.Linear(4, 3), kind(3, 4, batch_first=True, **settings)

    def forward(self, x):
        lengths = 1 + (x[:, :, 0] > 0).sum(1).clamp(max=x.shape[1] - 1)
        packed = pack_padded_sequence(self.first(x), lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.net(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Shrinking(nn.Module):
    """Sorted by length, each step runs on the samples that are not over."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        lengths = 1 + (x[:, :, 0] > 0).sum(1).clamp(max=x.shape[1] - 1)
        order = lengths.argsort(descending=True)
        h = c = x.new_zeros(len(x), 4)
        for t in range(int(lengths.max())):
            left = int((lengths > t).sum())
            hidden, cell = self.cell(x[order][:left, t], (h[:left], c[:left]))
            h, c = torch.cat([hidden, h[left:]]), torch.cat([cell, c[left:]])
        return self.head(h[order.argsort()])


class Experts(nn.Module):
    """Each row goes to its experts; `place` says how rows are taken and brought back."""

    def __init__(self, place="index_add", *, bare=False, again=None):
        super().__init__()
        self.place, self.again = place, again
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)) for _ in range(3))
        self.weights = nn.Parameter(torch.randn(3, 4, 4)) if bare else None

    def run(self, x):
        rows = x.flatten(0, -2)
        scores = self.gate(rows).softmax(-1)
        chosen, out = scores.argmax(-1), torch.zeros_like(rows)
        for k, expert in enumerate(self.experts):
            where = (chosen == k).nonzero()[:, 0]
            found = expert(rows[where]) if self.weights is None else rows[where] @ self.weights[k]
            found = found * scores[where, k, None]
            if self.place == "index_add":
                out = out.index_add(0, where, found)
            else:
                out[chosen == k] = found
        return out.view_as(x)

    def forward(self, x):
        return self.run(x) if self.again is None else checkpoint(self.run, x, use_reentrant=self.again)


class OneByOne(nn.Module):
    """One sample after the other; its tokens may be as many as the samples."""

    def __init__(self, take, first=None):
        super().__init__()
        self.take, self.first = take, first or nn.Identity()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x):
        samples = self.take(self.first(x))
        return torch.stack([self.last((self.inner(t) * self.gain).tanh()).sum(0) for t in samples])


def projected(x):
    """Three projections of three samples: what is taken apart is not the batch."""
    q, k, v = x.view(*x.shape[:2], 3, -1).permute(2, 0, 1, 3).unbind(0)
    return q * k.sigmoid() + v


class Projects(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(projected(self.first(x)).tanh())


def experts(**settings):
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Experts(**settings), nn.Linear(4, 2))


MODELS = {
    "sorted by value": lambda: Moves(by_value),
    "sorted by value, a bare weight": lambda: Moves(by_value, bare=True),
    "sorted inputs": lambda: Moves(by_value, first=False),
    "shuffled": lambda: Moves(by_chance),
    "halves exchanged": Halves,
    "flipped": Flips,
    "rolled": lambda: Flips("roll"),
    "index_select": lambda: Flips("index_select"),
    "a matrix of ones": lambda: Flips("matrix"),
    "experts of samples": experts,
    "experts of samples, by assignment": lambda: experts(place="mask"),
    "experts of samples, bare weights": lambda: experts(bare=True),
}

OF_TOKENS = {
    "time first": TimeFirst,
    "a packed LSTM": Packed,
    "a packed GRU in both directions": lambda: Packed(nn.GRU, bidirectional=True, num_layers=2),
    "a packed LSTM with a projection": lambda: Packed(proj_size=2),
    "steps of a cell, shorter samples drop out": Shrinking,
    "a sample at a time, by number": lambda: OneByOne(lambda x: [x[i] for i in range(len(x))]),
    "a sample at a time, by a slice": lambda: OneByOne(lambda x: [x[i : i + 1][0] for i in range(len(x))]),
    "a sample at a time, of a layer": lambda: OneByOne(lambda x: list(x), nn.Linear(4, 4)),
    "a sample at a time, unbound": lambda: OneByOne(lambda x: x.unbind(), nn.Linear(4, 4)),
    "a sample at a time, split": lambda: OneByOne(lambda x: [t[0] for t in x.split(1)], nn.Linear(4, 4)),
    "experts of tokens": experts,
    "experts of tokens, bare weights": lambda: experts(bare=True),
    "experts of tokens, checkpointed": lambda: experts(again=False),
}


@pytest.mark.filterwarnings("ignore:.*every sample")
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_samples(name):
    torch.manual_seed(0)
    check(MODELS[name](), 4)


@pytest.mark.filterwarnings("ignore:.*every sample")
@pytest.mark.parametrize("name", OF_TOKENS)
def test_rows_of_tokens(name):
    torch.manual_seed(0)
    check(OF_TOKENS[name](), 5, 4, sizes=(B, 5, 6, B, B, 5))  # at times as many tokens as samples


@pytest.mark.filterwarnings("ignore:.*every sample")
@pytest.mark.parametrize("name", ["sorted by value", "sorted by value, a bare weight", "sorted inputs", "index_select"])
def test_batches_that_are_in_order_at_first(name):
    """What was proven of the first passes is no law."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for layer in (m for n, m in model.named_modules() if n == "first" and isinstance(m, nn.Linear)):
        layer.weight.data.copy_(torch.eye(4))  # so that sorted samples stay sorted
    check(model, 4, sizes=[B] * 8, change=lambda x, step: x[x[:, 0].argsort()] if step < 5 else x)


@pytest.mark.filterwarnings("ignore:.*every sample")
@pytest.mark.parametrize("bare", [False, True])
def test_an_expert_that_is_chosen_late(bare):
    torch.manual_seed(0)
    model = nn.Sequential(Experts(bare=bare), nn.Linear(4, 2))
    model[0].gate.weight.data.copy_(torch.eye(3, 4) * 9)

    def few(x, step):
        return x if step > 5 else torch.cat([x[..., :2].abs() + 1, -x[..., 2:].abs()], -1)

    check(model, 5, 4, sizes=[B] * 9, change=few)


@pytest.mark.filterwarnings("ignore:.*every sample")
def test_rows_that_came_back_are_proven_of_all_samples_at_once():
    torch.manual_seed(0)
    finder = check(nn.Sequential(Moves(by_value), nn.Linear(4, 3)), 4, sizes=(20, 20, 20, 17, 40))
    assert finder.moves_rows
    assert not finder.asks_for_data
    assert finder._proofs._all_at_once


def test_projections_as_many_as_the_samples_are_no_samples():
    torch.manual_seed(0)
    model = Projects()
    check(model, 5, 4, sizes=(3, 3, 4, 3))
    with PerSampleGradNorms(model) as norms:
        for _ in range(2):
            norms.reset()
            loss_of(model, torch.randn(3, 5, 4, dtype=torch.float64)).mean().backward()
        assert not norms._finder.moves_rows


def test_experts_that_get_as_many_rows_as_the_batch_has_samples():
    """Under reentrant checkpointing nothing can be proven of them."""
    torch.manual_seed(0)
    model = experts(again=True).double()
    with PerSampleGradNorms(model) as norms:
        for step in range(3):
            torch.manual_seed(step)
            model.zero_grad()
            loss_of(model, torch.randn(B, 4, dtype=torch.float64)).mean().backward()
            with pytest.raises(BatchAxisError, match=r"2\.(gate|experts).*use_reentrant=False"):
                norms.per_sample  # noqa: B018
            norms.reset()


class Pools(nn.Module):
    """The last token of each sample, or the one that is marked: rows stay in order, and nothing gets slow."""

    def __init__(self, marked):
        super().__init__()
        self.marked, self.first, self.head = marked, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h, last = self.first(x), x[:, :, 0].argmax(1)
        if self.marked:
            return self.head(h[functional.one_hot(last, x.shape[1]).bool()])
        return self.head(h[torch.arange(len(x)), last])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("marked", [False, True])
def test_rows_that_stay_in_order_are_a_rules(marked):
    torch.manual_seed(0)
    model = Pools(marked)
    check(model, 5, 4)
    with PerSampleGradNorms(model) as norms:
        for _ in range(3):
            norms.reset()
            loss_of(model, torch.randn(B, 5, 4, dtype=torch.float64)).mean().backward()
            norms.per_sample  # noqa: B018
        assert "LinearRule of head" in str(norms.explain())
        assert norms._finder.moves_rows == marked


def test_compiled_code_refuses_them_once_a_pass_has_shown_them():
    torch.manual_seed(0)
    model = Flips().double()
    with PerSampleGradNorms(model):
        loss_of(model, torch.randn(5, 4, dtype=torch.float64)).mean().backward()
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(Exception, match=r"last( \(Linear\)|\.weight)"):
            loss_of(compiled, torch.randn(5, 4, dtype=torch.float64))
