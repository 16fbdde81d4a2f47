"""Promise: a table that is looked up and is the last layer too is exact, and never made as [B, vocabulary, width]."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms, norm_math
from hf_clars.grad_norms.norm_sums import NormSums
from tests.oracle import layer_norms, one_by_one

B = 4


class Language(nn.Module):
    """Tokens looked up `times` times, once by a second module that shares the table, and the table as last layer."""

    def __init__(self, vocabulary, width, times=1, padding=None, tied=True, bias=False, checkpointed=False):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(vocabulary, width, padding_idx=padding) for _ in range(times))
        for table in self.tables[1:]:
            table.weight = self.tables[0].weight
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, vocabulary, bias=bias)
        if tied:
            self.head.weight = self.tables[0].weight
        self.checkpointed = checkpointed

    def forward(self, tokens):  # [B, T]
        x = sum((k + 1) * table(tokens.roll(k, 1)) for k, table in enumerate(self.tables))
        x = checkpoint(self.mix, x, use_reentrant=False) if self.checkpointed else self.mix(x)
        return self.head(torch.tanh(x))


def loss_of(model, tokens):
    out = model(tokens)
    return (out.flatten(1) * torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype)).sin().sum(1).mean()


def check(model, tokens, samples=None, layers="module", passes=1):
    model = model.double()
    expected = one_by_one(model, lambda m, i: loss_of(m, tokens[i : i + 1]), len(tokens))
    with PerSampleGradNorms(model, samples=samples, layers=layers) as norms:
        for part in tokens.chunk(passes):
            loss_of(model, part).backward()
        for name, want in layer_norms(expected, norms.layers).items():
            got = norms.per_sample[name]
            torch.testing.assert_close(got, want[:samples], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def no_dense_tables(monkeypatch):
    real = NormSums.add_grads

    def refuse(self, param, grads):
        assert param not in self._several, f"gradients {tuple(grads.shape)} were added up for each sample"
        real(self, param, grads)

    monkeypatch.setattr(NormSums, "add_grads", refuse)


CASES = {
    "product": ({"vocabulary": 3, "width": 2}, 30),
    "gram": ({"vocabulary": 40, "width": 30}, 3),
    "with a bias": ({"vocabulary": 5, "width": 3, "bias": True}, 6),
    "padding": ({"vocabulary": 5, "width": 3, "padding": 1}, 6),
    "looked up three times": ({"vocabulary": 5, "width": 3, "times": 3}, 6),
    "looked up twice, no last layer": ({"vocabulary": 5, "width": 3, "times": 2, "tied": False}, 6),
    "checkpointing": ({"vocabulary": 5, "width": 3, "checkpointed": True}, 6),
}


@pytest.mark.parametrize("layers", ["module", "tensor"])
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_exact_without_dense_gradients(case, samples, layers, no_dense_tables):
    torch.manual_seed(0)
    values, length = CASES[case]
    check(Language(**values), torch.randint(0, values["vocabulary"], (B, length)), samples, layers)


@settings(max_examples=30, deadline=None)
@given(
    vocabulary=st.integers(1, 9),
    width=st.integers(1, 6),
    length=st.integers(1, 8),
    times=st.integers(1, 3),
    tied=st.booleans(),
    slices=st.booleans(),
)
def test_any_shape(vocabulary, width, length, times, tied, slices):
    torch.manual_seed(vocabulary * 100 + length)
    patch = pytest.MonkeyPatch()
    if slices:  # as for layers too large for one slice of the batch
        patch.setattr(norm_math, "MAX_ELEMENTS", 2 * vocabulary * width)
    try:
        check(Language(vocabulary, width, times, tied=tied), torch.randint(0, vocabulary, (B, length)))
    finally:
        patch.undo()


def test_several_passes_are_one_batch(no_dense_tables):
    torch.manual_seed(0)
    check(Language(7, 4), torch.randint(0, 7, (B, 5)), passes=2)


def test_uses_of_another_kind_are_still_added_up():
    class Twice(Language):
        def forward(self, tokens):
            return super().forward(tokens) + self.head(self.mix(self.tables[0](tokens))).flip(1)

    torch.manual_seed(0)
    check(Twice(5, 3), torch.randint(0, 5, (B, 6)))


@pytest.mark.parametrize("cut", ["tokens", "last layer"])
def test_gradient_through_one_use_alone(cut, no_dense_tables):
    class Cut(Language):
        def forward(self, tokens):
            x = self.tables[0](tokens)
            mixed = self.mix(x.detach() if cut == "tokens" else x)
            out = self.head(torch.tanh(mixed))
            return mixed + x + 0 * out.detach().sum() if cut == "last layer" else out

    torch.manual_seed(0)
    check(Cut(5, 3), torch.randint(0, 5, (B, 6)))
