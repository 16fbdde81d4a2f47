"""Promise: where samples have different numbers of rows in one tensor, each row is its own sample's in every pass.

All graphs of a batch lie in one tensor of nodes, packed texts in one of tokens. They may be as many for each sample in
the first passes, and others later, and be as many altogether.
"""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import BatchAxisError, PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)
EVEN, UNEVEN = [2, 2, 2, 2], [3, 1, 1, 3]
LENGTHS = {"at first": [EVEN, UNEVEN, UNEVEN[::-1], EVEN, [1, 3, 2, 2]], "for long": [EVEN] * 4 + [UNEVEN] * 2}


def owners(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


class Ragged(nn.Module):
    """Rows [N, 4] of samples with so many rows each: a layer, or a bare weight, and a mean a sample."""

    def __init__(self, pool, bare=False):
        super().__init__()
        self.pool = pool
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(4, 4)) if bare else None

    def forward(self, lengths, x):
        x = self.inner(x) if self.weight is None else x @ self.weight
        return self.last(self.pool(x.tanh(), lengths))


def by_split(x, lengths):
    return torch.stack([t.mean(0) for t in x.split(lengths.tolist())])


def by_index_add(x, lengths):
    return x.new_zeros(len(lengths), 4).index_add(0, owners(lengths), x)


def by_segment(x, lengths):
    return torch.segment_reduce(x, "mean", lengths=lengths)


class Graphs(Ragged):
    """Nodes, and messages along a ring of each sample's nodes."""

    def forward(self, lengths, x):
        begin = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        after = begin + (torch.arange(len(x)) - begin + 1) % lengths[owners(lengths)]
        messages = self.inner(x[after]).relu()
        return super().forward(lengths, torch.zeros_like(x).index_add(0, after, messages) + x)


class Tokens(Ragged):
    """Packed tokens that attend within their own text."""

    def __init__(self, pool):
        super().__init__(pool)
        self.table = nn.Embedding(9, 4)

    def forward(self, lengths, x):
        mine = owners(lengths)
        return super().forward(lengths, (mine[:, None] == mine).double() @ self.table(x.abs().sum(1).long() % 9))


class Repeated(Ragged):
    """A row for each sample, repeated as often as the sample has rows."""

    def __init__(self, pool):
        super().__init__(pool)
        self.first = nn.Linear(4, 4)

    def forward(self, lengths, x):
        rows = torch.repeat_interleave(self.first(x[: len(lengths)]), lengths, dim=0)
        return super().forward(lengths, rows * torch.arange(1, len(rows) + 1)[:, None])


class Weighted(nn.Module):
    """Bags of tokens, each with a weight that is learned."""

    def __init__(self):
        super().__init__()
        self.bag, self.weight = nn.EmbeddingBag(9, 4, mode="sum"), nn.Embedding(9, 1)

    def forward(self, lengths, x):
        tokens = x.abs().sum(1).mul(3).long() % 9
        return self.bag(tokens, lengths.cumsum(0) - lengths, per_sample_weights=self.weight(tokens).squeeze(1))


MODELS = {
    "split": lambda: Ragged(by_split),
    "split, a bare weight": lambda: Ragged(by_split, bare=True),
    "summed by index": lambda: Ragged(by_index_add),
    "reduced by segments": lambda: Ragged(by_segment),
    "graphs": lambda: Graphs(by_index_add),
    "packed tokens": lambda: Tokens(by_split),
    "repeated": lambda: Repeated(by_index_add),
    "bags with learned weights": Weighted,
}


def loss_of(model, lengths, x):
    out = model(lengths, x)
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1)


def batch_of(lengths, step):
    torch.manual_seed(step)
    return torch.tensor(lengths), torch.randn(sum(lengths), 4, dtype=torch.float64)


def check(model, batches, rtol=1e-9):
    """Passes against one backward pass for every sample."""
    with PerSampleGradNorms(model) as norms:
        for batch in batches:
            want = one_by_one(model, lambda m, i, batch=batch: loss_of(m, *batch)[i], len(batch[0]))
            model.zero_grad()
            loss_of(model, *batch).mean().backward()
            for name, expected in layer_norms(want, norms.layers).items():
                got = norms.per_sample[name]
                torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:.*every sample")
@pytest.mark.parametrize("when", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_as_many_a_sample_only(name, when):
    torch.manual_seed(0)
    check(MODELS[name]().double(), [batch_of(lengths, i) for i, lengths in enumerate(LENGTHS[when])])


@pytest.mark.filterwarnings("ignore:.*every sample")
def test_as_many_rows_as_samples_at_first():
    torch.manual_seed(0)
    lengths = [[1, 1, 1, 1]] * 4 + [[2, 1, 3, 2], [1, 1, 1, 1], [0, 2, 1, 1], [2, 0, 1, 1]]
    check(Ragged(by_index_add).double(), [batch_of(each, i) for i, each in enumerate(lengths)])


class NodesFirst(Graphs):
    """The nodes as first tensor, as torch_geometric calls its models."""

    def forward(self, x, lengths):
        return super().forward(lengths, x)


def test_nodes_alone_are_no_samples_and_the_error_names_what_the_others_do():
    torch.manual_seed(0)
    lengths, x = batch_of(UNEVEN, 0)
    with (
        PerSampleGradNorms(NodesFirst(by_index_add).double()) as norms,
        pytest.raises(BatchAxisError, match=r"of all samples together.*a tensor of one row a sample before it"),
    ):
        norms.model(x, lengths)
