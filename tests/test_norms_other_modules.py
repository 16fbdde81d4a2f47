"""Promise: modules that no rule was written for are measured exactly, wherever the batch is in them."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from tests.three_passes import B, check, on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)


class LastStep(nn.Module):
    """Cells called once a step: the state they return is made from the one that they carry."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(5, 4), nn.GRUCell(5, 4), nn.Linear(8, 3)

    def forward(self, x):  # [B, T, 5]
        h = c = k = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            k = self.gru(step, k)
        return self.head(torch.cat([h, k], 1))


class HiddenAndPooled(nn.Module):
    """Returns a tensor and another made from it, as encoders with a pooler do."""

    def __init__(self):
        super().__init__()
        self.gain, self.pool = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x):
        hidden = torch.tanh(x * self.gain)
        return {"hidden": hidden, "pooled": self.pool(hidden).tanh()}


class UsesBoth(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = HiddenAndPooled(), nn.Linear(4, 3)

    def forward(self, x):
        out = self.encoder(x)
        return self.head(out["hidden"] * out["pooled"])


class Queries(nn.Module):
    """Takes no input; what it returns is an input of the decoder, which is called after it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 4))

    def forward(self):
        return self.table


class Decoder(nn.Module):
    """The queries belong to it, but are made before it is called."""

    def __init__(self):
        super().__init__()
        self.queries, self.attention = Queries(), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, queries, x):
        return self.attention(queries, x, x)[0]


class Decodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, self.head = Decoder(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.decoder(self.decoder.queries().expand(len(x), -1, -1), x).mean(1))


class Uncalled(nn.Module):
    """Uses parameters of modules that it does not call."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 3)])
        self.table = nn.Embedding(5, 4)

    def forward(self, x):
        x = x + self.table.weight.mean(0)
        for weight in self.weights:
            x = (x @ weight).tanh()
        return x


class ViewThenInPlace(nn.Module):
    """An in-place activation on a module's output that is a view, as that of a Linear layer over tokens."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.relu_(self.inner(x)).flatten(1)


class Unfolds(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return (x * self.gain).view(len(x), 2, 3)


class SampleBySample(nn.Module):
    """A convolution called on one image without a batch axis; it has as many channels as there are samples."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(B, B, 3)

    def forward(self, x):
        return torch.stack([self.conv(image).mean((1, 2)) for image in x])


class TimeFirst(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 3)

    def forward(self, x):  # [B, T, 4]
        out = self.inner(x.transpose(0, 1))
        return self.head((out[0] if isinstance(out, tuple) else out)[-1].tanh())


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class LastState(nn.Module):
    """Classifies by the state after the last step, [layers * directions, B, 4] whatever `batch_first` says."""

    def __init__(self, net, **settings):
        super().__init__()
        self.net, self.head = net(4, 4, batch_first=True, **settings), nn.Linear(4, 3)

    def forward(self, x):
        sequence, state = self.net(x)
        state = state[0] if isinstance(state, tuple) else state
        return self.head(state[-1] + sequence.mean((1, 2), keepdim=True)[:, 0])


class TimeFirstAttention(nn.Module):
    """The output has time first, the weights that come with it the batch."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x)[0].mean(0))


class TiedHead(nn.Module):
    """Its bias is that of the layer inside too, as in the heads of masked language models."""

    def __init__(self, direct):
        super().__init__()
        self.decoder, self.direct = nn.Linear(4, 4), direct
        self.bias = self.decoder.bias

    def forward(self, x):
        x = self.decoder(x)
        return x.tanh() * self.bias if self.direct else x


class TiedHeads(nn.Module):
    """A tied head called twice."""

    def __init__(self, direct):
        super().__init__()
        self.head = TiedHead(direct)

    def forward(self, x):
        return self.head(self.head(x).tanh())


class TiedByHand(nn.Module):
    """A language model whose embedding is its last layer too, without a module for that."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        return nn.functional.linear(self.body(self.embed(tokens)).tanh(), self.embed.weight)


class AsManyQueries(nn.Module):
    """As many learned queries, and as long a table, as there are samples; both go through layers once for all."""

    def __init__(self):
        super().__init__()
        self.queries, self.norm, self.project = nn.Parameter(torch.randn(B, 4)), nn.LayerNorm(4), nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(B, B, 2))
        self.bias = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):  # [B, T, 4]
        queries = self.project(self.norm(self.queries).tanh())
        attention = (queries @ x.mT).softmax(-1) * self.bias(self.table).squeeze(-1).mean(0)[:, None]
        return self.head((attention @ x).mean(1))


class Checkpointed(nn.Module):
    """Its tokens are proven, and its positions differentiated, through a part that is computed once more for it."""

    def __init__(self, prepare):
        super().__init__()
        self.tokens, self.positions, self.prepare = nn.Embedding(7, 4), nn.Embedding(5, 4), prepare
        self.block, self.head = (
            nn.Sequential(nn.Linear(4, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, 4)),
            nn.Linear(4, 3),
        )

    def forward(self, tokens):
        x = self.tokens(tokens + 0 if self.prepare else tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(checkpoint(self.block, x, use_reentrant=False).mean(1))


MODULES = {
    "recurrent cells": (LastStep, lambda: torch.randn(B, 4, 5)),
    "an output made from another": (UsesBoth, lambda: torch.randn(B, 4)),
    "queries made before their decoder is called": (Decodes, lambda: torch.randn(B, 5, 4)),
    "parameters of modules that are not called": (Uncalled, lambda: torch.randn(B, 4)),
    "in place after Linear, Gram": (lambda: ViewThenInPlace(nn.Linear(40, 30)), lambda: torch.randn(B, 3, 40)),
    "in place after Linear, product": (lambda: ViewThenInPlace(nn.Linear(4, 5)), lambda: torch.randn(B, 30, 4)),
    "in place after a module without a rule": (lambda: ViewThenInPlace(Unfolds()), lambda: torch.randn(B, 6)),
    "in place after InstanceNorm": (
        lambda: ViewThenInPlace(nn.InstanceNorm1d(4, affine=True)),
        lambda: torch.randn(B, 4, 5),
    ),
    "images without a batch axis": (SampleBySample, lambda: torch.randn(B, B, 6, 6)),
    "time first": (lambda: TimeFirst(nn.LSTM(4, 4)), lambda: torch.randn(B, 5, 4)),
    "last state of a GRU": (lambda: LastState(nn.GRU), lambda: torch.randn(B, 5, 4)),
    "last state of an LSTM, as many layers as samples": (
        lambda: LastState(nn.LSTM, num_layers=B),
        lambda: torch.randn(B, 5, 4),
    ),
    "time-first attention": (TimeFirstAttention, lambda: torch.randn(B, 5, 4)),
    "a bias of two modules": (lambda: TiedHeads(False), lambda: torch.randn(B, 5, 4)),
    "a bias of two modules that both use it": (lambda: TiedHeads(True), lambda: torch.randn(B, 5, 4)),
    "an embedding that is the last layer too": (TiedByHand, lambda: torch.randint(0, 7, (B, 5))),
    "as many queries as samples": (AsManyQueries, lambda: torch.randn(B, 5, 4)),
    "checkpointing": (lambda: Checkpointed(False), lambda: torch.randint(0, 7, (B, 5))),
    "checkpointing, tokens made inside": (lambda: Checkpointed(True), lambda: torch.randint(0, 7, (B, 5))),
    "Transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Flatten()),
        lambda: torch.randn(B, B, 4),
    ),
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("case", MODULES)
def test_modules(case, samples):
    torch.manual_seed(0)
    build, data = MODULES[case]
    check(build(), data(), samples)


@pytest.mark.parametrize("inner", [nn.Linear(4, 4), nn.LayerNorm(4), nn.LSTM(4, 4), Attends()])
def test_as_many_steps_as_samples_are_not_taken_for_samples(inner):
    """[T, B, width] with T = B: nothing in the shapes says that the samples are along the second axis."""
    torch.manual_seed(0)
    check(TimeFirst(inner), torch.randn(B, B, 4))


def test_as_many_steps_as_samples_may_follow_the_batch():
    """[B, T, width] with T = B, also where samples are coupled and a gradient tells nothing."""
    check(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Flatten()), torch.randn(B, B, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.BatchNorm1d(4 * B))
    with PerSampleGradNorms(model) as norms:
        model(torch.randn(B, B, 4)).sin().sum().backward()
    assert norms.per_sample["0"].shape == (B,)
