"""Promise: what is called outside of the model's own call is exact, or refused, and whose rows are whose is said."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import BatchAxisError, SumCheckError, UncoveredParameterError
from tests.oracle import layer_norms, one_by_one

B, T, VOCAB, WIDTH = 4, 6, 11, 5


class Net(nn.Module):
    """A model with methods that users call: each takes [B, T] tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.first = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(T, WIDTH))

    def forward(self, tokens):
        return self.last(self.encode(tokens)) * self.gain

    def encode(self, tokens):
        return self.first(self.table(tokens)).tanh()

    def scaled(self, tokens):
        return self.encode(tokens) * self.gain

    def by_weight(self, tokens):
        return self.encode(tokens) * self.last.weight.sum(0)

    def tied(self, tokens):
        return nn.functional.linear(self.encode(tokens), self.table.weight)

    def flattened(self, tokens):
        return self.last(self.encode(tokens).flatten(0, 1)).unflatten(0, tokens.shape)

    def time_first(self, tokens):
        return self.last(self.encode(tokens).transpose(0, 1)).transpose(0, 1)

    def pooled_late(self, tokens):
        return self.last(self(tokens).mean(1))

    def flattened_late(self, tokens):
        return self.last(self(tokens).flatten(0, 1)).unflatten(0, tokens.shape)

    def time_first_late(self, tokens):
        return self.last(self(tokens).transpose(0, 1)).transpose(0, 1)


class WayOut(nn.Module):
    """What the errors say: a module around the model."""

    def __init__(self, model, method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, tokens):
        return getattr(self.model, self.method)(tokens)


def net():
    torch.manual_seed(0)
    return Net().double()


def losses(model, method, tokens):
    return getattr(model, method)(tokens).flatten(1).sin().sum(1)


def check(norms, method, passes=3):
    """Passes on new data, against one backward pass for every sample."""
    for step in range(passes):
        torch.manual_seed(step)
        tokens = torch.randint(VOCAB, (B, T))
        want = one_by_one(norms.model, lambda m, i, tokens=tokens: losses(m, method, tokens)[i], B)
        norms.model.zero_grad()
        losses(norms.model, method, tokens).mean().backward()
        for name, expected in layer_norms(want, norms.layers).items():
            torch.testing.assert_close(norms.per_sample[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "called"),
    [("encode", rf"first \(Linear\) .* \({B}, {T}, {WIDTH}\)"), ("pooled_late", rf"last .* \({B}, {WIDTH}\)")],
)
def test_layers_that_are_called_on_the_batch_are_exact_and_whose_rows_are_whose_is_said(method, called):
    words = rf"{called} outside of .* taken for the batch's {B} samples, in their order"
    with PerSampleGradNorms(net()) as norms, pytest.warns(UserWarning, match=words):
        check(norms, method, passes=4)


@pytest.mark.filterwarnings("ignore:.*taken for the batch's:UserWarning")
@pytest.mark.parametrize("passes", [0, 1, 6], ids="after {} of the model".format)
@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("scaled", (UncoveredParameterError, SumCheckError), "gain: "),
        ("by_weight", (UncoveredParameterError, SumCheckError), "last.weight: "),
        ("tied", SumCheckError, "table.weight: the samples' gradients do not add up"),
        ("flattened", BatchAxisError, r"last \(Linear\) takes .* nothing tells whose rows they are"),
        ("time_first", BatchAxisError, r"last \(Linear\) takes .* nothing tells whose rows they are"),
        ("flattened_late", BatchAxisError, r"last \(Linear\) takes .* nothing tells whose rows they are"),
        ("time_first_late", BatchAxisError, r"last \(Linear\) takes .* nothing tells whose rows they are"),
    ],
)
def test_what_a_method_hides_is_refused_with_a_way_out(method, error, words, passes):
    norms = PerSampleGradNorms(net())
    check(norms, "__call__", passes)
    for _ in range(3):
        with pytest.raises(error, match=rf"{words}.* the forward of a module around the model"):
            check(norms, method, 1)
    norms.remove()


@pytest.mark.parametrize("method", ["encode", "scaled", "by_weight", "tied", "flattened", "time_first"])
def test_the_way_out_is_exact(method):
    with PerSampleGradNorms(WayOut(net(), method)) as norms:
        check(norms, "__call__")
