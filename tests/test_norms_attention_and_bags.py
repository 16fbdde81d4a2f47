"""Promise: attention and bags of tokens need no rule: the graph's way is exact, and makes no matrix for each sample."""

import itertools

import pytest
import torch
from torch import nn

from benchmarks.coverage.judge import expected, judge
from benchmarks.coverage.subject import B, Subject, stir
from hf_clars.grad_norms import BatchAxisError, PerSampleGradNorms
from hf_clars.grad_norms.graph import measured_uses

PRECISIONS = ["float32", "bf16", "float64"]


class Bags(nn.Module):
    """As many tokens in each bag, or bags one after the other in one line of text; some bags of it are empty."""

    def __init__(self, mode, weighted=False, line=False, fold=1, calls=1, **values):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode=mode, **values), nn.Linear(4 * fold, 2)
        self.weighted, self.line, self.fold, self.calls = weighted, line, fold, calls

    def batch(self):
        if self.line:
            return {"lengths": torch.tensor([3, 0, 4]), "text": torch.tensor([5, 1, 5, 2, 2, 6, 1])}
        return {"text": torch.tensor([[5, 1, 5, 2], [2, 2, 2, 2], [0, 6, 1, 4]]).repeat(1, self.fold)}

    def forward(self, text, lengths=None):
        if lengths is None:
            text, offsets = text.reshape(len(text) * self.fold, -1), None
        else:
            ends = lengths.cumsum(0).clamp(max=len(text))
            offsets = torch.cat([ends - lengths, ends[-1:]]) if self.bag.include_last_offset else ends - lengths
        weights = torch.linspace(-1, 2, text.numel()).view_as(text) if self.weighted else None
        weights = weights if weights is None else weights.to(self.bag.weight.dtype)
        for _ in range(self.calls):
            found = self.bag(text, offsets, per_sample_weights=weights)
        found = found + self.bag(text.flip(0), offsets).tanh() if self.calls > 1 else found
        return self.head(found.reshape(-1, 4 * self.fold).tanh())


class Attention(nn.Module):
    """Looks at itself, or at other keys and values."""

    def __init__(self, need_weights, others=False, masked=False, **values):
        super().__init__()
        self.first, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, **values)
        self.need_weights, self.others, self.masked = need_weights, others, masked

    def batch(self):
        torch.manual_seed(0)
        sizes = {"keys": (B, 7, self.attention.kdim), "values": (B, 7, self.attention.vdim)} if self.others else {}
        return {"x": torch.randn(B, 5, 4)} | {name: torch.randn(size) for name, size in sizes.items()}

    def forward(self, x, keys=None, values=None):
        first = self.attention.batch_first
        query, keys, values = (t if t is None or first else t.transpose(0, 1) for t in (self.first(x), keys, values))
        keys, values = (query, query) if keys is None else (keys, values)  # the same tensor is one product
        mask = torch.arange(x.shape[1]).expand(len(x), -1) > 3 if self.masked else None
        found, weights = self.attention(
            query, keys, values, need_weights=self.need_weights, key_padding_mask=mask, average_attn_weights=False
        )
        found = found if first else found.transpose(0, 1)
        return (found, weights) if self.need_weights else found


BAGS = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "sum, padding": {"mode": "sum", "padding_idx": 2},
    "mean, padding": {"mode": "mean", "padding_idx": 2},
    "max, padding": {"mode": "max", "padding_idx": 2},
    "weights": {"mode": "sum", "weighted": True},
    "weights, padding, a line of text": {"mode": "sum", "weighted": True, "line": True, "padding_idx": 2},
    "counts of the batch": {"mode": "mean", "scale_grad_by_freq": True},
    **{
        f"{mode}, a line of text, end={end}": {"mode": mode, "line": True, "include_last_offset": end}
        for mode, end in itertools.product(["sum", "mean", "max"], [False, True])
    },
    **{f"{mode}, two bags a sample": {"mode": mode, "fold": 2} for mode in ("sum", "mean", "max")},
    **{f"{mode}, called twice": {"mode": mode, "calls": 2} for mode in ("mean", "max")},
}
ATTENTION = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no biases": {"bias": False},
    "keys and values of their own": {"others": True},
    "other widths": {"others": True, "kdim": 3, "vdim": 6},
    "other widths, batch first": {"others": True, "kdim": 3, "vdim": 6, "batch_first": True},
    "biases as one more key": {"add_bias_kv": True},
    "biases and zeros as more keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "a mask": {"masked": True, "batch_first": True},
    "dropout": {"dropout": 0.3, "batch_first": True},
}


def check(model, precision):
    """Three passes that are checked by sums, and four that are not."""
    torch.manual_seed(0)
    stir(model)
    subject = Subject(model, model.batch())
    row = judge(subject, precision, expected(subject, [precision])[precision], enough=0)
    assert row["verdict"] == "exact", row
    assert not row["coupled"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", BAGS)
def test_bags_are_exact(case, precision):
    check(Bags(**BAGS[case]), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_exact(case, need_weights, precision):
    check(Attention(need_weights, **ATTENTION[case]), precision)


def test_attention_in_evaluation_is_exact():
    check(Attention(need_weights=False, batch_first=True).eval(), "float32")


@pytest.mark.parametrize(
    "model",
    [
        *(Bags(mode, line=line) for mode in ("sum", "mean", "max") for line in (False, True)),
        *(Attention(False, batch_first=first) for first in (False, True)),
    ],
    ids=lambda model: f"{model.bag.mode}, {model.line}" if isinstance(model, Bags) else "attention",
)
def test_no_gradients_of_matrices_are_made(model, monkeypatch):
    """A table for each sample cost hundreds of times a plain pass."""
    made, before = [], measured_uses.operand_grads

    def operand_grads(of):
        made.append(of.shape)
        return before(of)

    monkeypatch.setattr(measured_uses, "operand_grads", operand_grads)
    subject = Subject(model, model.batch())
    with PerSampleGradNorms(model, check=False) as norms:
        subject.loss(model, subject.batch).backward()
        assert all(bool((t > 0).any()) for t in norms.per_sample.values())
    assert not [shape for shape in made if len(shape) > 1], made
    with PerSampleGradNorms(model, check=True) as norms:  # its sums need them
        subject.loss(model, subject.batch).backward()
    assert [shape for shape in made if len(shape) > 1]


def test_a_table_with_sparse_gradients_is_exact():
    dense, sparse = Bags("sum"), Bags("sum", sparse=True)
    sparse.load_state_dict(dense.state_dict())
    found = []
    for model in (dense, sparse):
        subject = Subject(model, model.batch())
        with PerSampleGradNorms(model) as norms:
            subject.loss(model, subject.batch).backward()
            found.append(norms.per_sample)
    torch.testing.assert_close(found[0], found[1])


def test_text_in_the_first_place_is_refused():
    """The first tensor tells how many samples there are, and a line of text does not."""
    model = Bags("mean", line=True)
    with (
        PerSampleGradNorms(model),
        pytest.raises(
            BatchAxisError, match=r"bag\.weight: used by EmbeddingBagBackward\d with results of shape \(3, 4\)"
        ),
    ):
        model(model.batch()["text"], model.batch()["lengths"])
