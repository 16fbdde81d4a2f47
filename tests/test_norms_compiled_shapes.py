"""Promise: compiled code takes no other axis for the batch: it follows the samples through what is done with axes."""

import copy

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import (
    LayerRule,
    PerSampleGradNorms,
    UncoveredParameterError,
    register_rule,
    unregister_rule,
)
from tests.test_norms_compiled_whole import compare, in_place, traced


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


class Net(nn.Module):
    """A layer, what a test does between, and a head."""

    def __init__(self):
        super().__init__()
        self.table, self.linear, self.head = nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)


class BatchSecond(Net):
    def forward(self, x):
        return self.head(self.linear(x)[None])[0] + self.table.weight.sum() * 0


class Column(Net):
    """Tokens of all samples are looked up as if they were one sample's."""

    def forward(self, tokens):
        return self.head(self.linear(self.table(tokens[:, 0][None])))[0]


class TableAsLongAsTheBatch(Net):
    def forward(self, x):
        return self.head(self.linear(x + self.table(torch.arange(x.shape[1])))).sum(1)


class FrozenTableAsLongAsTheBatch(Net):
    def forward(self, x):
        return self.head(x + self.linear(self.table.weight.detach())).sum(1)


class TimeFirst(Net):
    def forward(self, x):
        return self.head(torch.relu(self.linear(x.transpose(0, 1)))).mean(0)


class TimeFolded(Net):
    """[T * B, ...], and windows [B * 2, ...] of it later."""

    def forward(self, x):
        y = self.linear(x.transpose(0, 1).reshape(-1, 6)).view(4, -1, 6).transpose(0, 1)
        return self.head(y.reshape(-1, 2, 6).tanh()).view(-1, 4, 3).mean(1)


class Halves(Net):
    """Every sample's steps in two parts; the second one turned round."""

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        y = torch.stack([first, second.flip(1)])  # [2, B, T / 2, 6]
        return self.head(self.linear(y).sum(2, keepdim=True).squeeze(2)).permute(1, 0, 2)


class Pooled(Net):
    """One step of each sample, by a number that the data make."""

    def forward(self, x):
        chosen = x.sum(2).argmax(1)
        return self.head(self.linear(x)[torch.arange(len(x)), chosen].sort(1).values)


@pytest.mark.parametrize(
    "make",
    [Pooled, BatchSecond, Column, TableAsLongAsTheBatch, FrozenTableAsLongAsTheBatch, TimeFirst, TimeFolded, Halves],
)
def test_another_axis_is_not_taken_for_the_batch(make):
    """There are as many steps as samples. Taken for the batch, the first axis gave wrong norms."""

    def inputs(batch):
        shape = {BatchSecond: (batch, 6), Column: (batch, 2)}.get(make, (batch, 4, 6))
        return (torch.randint(4, shape) if make is Column else torch.randn(shape),)

    compare(make(), traced, inputs, (4, 4, 4))


class Sorted(Net):
    """Samples change places by what they are, and are as many as before."""

    def forward(self, x):
        order = x.sum(1).argsort()
        return self.head(self.linear(x[order]) + x)


def test_rows_that_change_places_are_refused():
    model, x = Sorted(), torch.randn(4, 6)
    with PerSampleGradNorms(model, check=False) as norms:
        with pytest.raises(UncoveredParameterError, match=r"linear\.weight.*nobody knows which rows belong to which"):
            traced(model)(x)
        norms.reset()


class Filled(Net):
    """A blank that the data are written into."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x):
        blank = x.new_zeros(len(x), 6)
        blank[:, :3] = self.head(x)
        return blank * self.gain


def test_a_blank_that_data_are_written_into_is_no_constant():
    compare(Filled(), traced, lambda batch: (torch.randn(batch, 6),), (4, 4, 4, 5))


class Mixed(Net):
    """Samples change places by what they are: nothing says where they went."""

    def forward(self, x):
        order = x.sum(1).argsort()
        return self.head(self.linear(x[order].view(2, -1, 6))).flatten(0, 1)


def test_where_samples_are_cannot_be_followed_is_said():
    model = Mixed()
    norms = PerSampleGradNorms(model)
    with pytest.raises(UncoveredParameterError, match=r"linear\.weight.*nobody knows which rows belong to which"):
        traced(model)(torch.randn(4, 6))
    norms.remove()


class Positions(Net):
    def forward(self, x):
        return self.head(self.linear(x + self.table(torch.arange(x.shape[1])[None]))).sum(1)


def test_positions_may_be_as_many_as_samples_where_they_are_looked_up_for_every_sample():
    compare(Positions(), traced, lambda batch: (torch.randn(batch, 4, 6),), (4, 4, 4))


class OwnBartLearnedPositionalEmbedding(nn.Embedding):
    """Called on tokens, as BART's decoder calls it: what it looks up is one row of positions beside them."""

    offset = 2

    def forward(self, input_ids, cache_length=0, position_ids=None):
        return super().forward(position_ids[None] + self.offset)


class Decoder(Net):
    def __init__(self):
        super().__init__()
        self.positions = OwnBartLearnedPositionalEmbedding(9, 6)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.linear(self.table(tokens) + self.positions(tokens, 0, position_ids=places)))


def test_one_row_of_positions_beside_the_tokens_is_every_samples():
    compare(Decoder(), traced, lambda batch: (torch.randint(4, (batch, 5)),), (4, 4, 4))


class Head(nn.Module):
    """Like the heads of BERT and RoBERTa: it owns its last layer's bias."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.bias = self.head.bias

    def forward(self, x):
        return self.head(self.linear(x))


class HeadAndBias(Head):
    def forward(self, x):
        return self.head(self.linear(x)) + self.bias


def test_a_bias_may_have_another_owner_who_does_not_use_it():
    compare(Head(), traced, lambda batch: (torch.randn(batch, 6),), (4, 4, 4))


def test_or_one_who_uses_it_too():
    compare(HeadAndBias(), traced, lambda batch: (torch.randn(batch, 6),), (4, 4, 4))


def test_some_samples_are_checked_three_times():
    model = nn.Sequential(nn.Linear(4, 3))
    with PerSampleGradNorms(model, samples=2) as norms:
        call = traced(model)
        for _ in range(4):
            model.zero_grad()
            call(torch.randn(4, 4)).square().sum().backward()
            assert len(norms.per_sample["0"]) == 2
        assert norms._checked == 3


class Own(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_an_input_gradient_of_a_users_rule_is_not_taken_unseen():
    @register_rule(Own)
    class OwnRule(LayerRule):
        def per_sample_grads(self, module, saved, g, wanted):
            return {n: g.unsqueeze(2) * saved[0].unsqueeze(1) if n == "weight" else g for n in wanted}

        def fuses_weight_grad(self, module, x, output):
            return True

        def input_grad(self, module, x, weight, g):
            return 3 * g @ weight

    model = nn.Sequential(Own(6, 6), nn.ReLU(), Own(6, 3))
    plain = copy.deepcopy(model)
    x = torch.randn(4, 6)
    with PerSampleGradNorms(model) as norms:
        unregister_rule(Own)
        call = traced(model)
        for _ in range(4):
            model.zero_grad()
            plain.zero_grad()
            call(x).square().mean().backward()
            plain(x).square().mean().backward()
            assert len(norms.per_sample["0"]) == 4
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)


def test_blocks_may_be_compiled_after_uncompiled_passes():
    """Also with fullgraph=True, where no code may be left for a first time."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3))
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model) as norms, PerSampleGradNorms(plain) as expected:
        for step in range(8):
            if step == 4:
                in_place(model[1])
            x = torch.randn(4, 4)
            for m in (model, plain):
                m.zero_grad()
                m(x).square().mean().backward()
            for name, right in expected.per_sample.items():
                torch.testing.assert_close(norms.per_sample[name], right)
        assert "in the compiled graph" in str(norms.explain())
