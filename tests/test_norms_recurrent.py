"""Promise: recurrent nets are exact, and no kernel runs once for every sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.graph import operands
from tests.oracle import layer_norms, one_by_one

B = 4


class Reader(nn.Module):
    """Uses all that the net returns, or only some of it."""

    def __init__(self, kind, use="everything", start=False, **values):
        super().__init__()
        self.net = kind(3, 4, batch_first=True, **values)
        self.use, self.start = use, start

    def forward(self, x):  # [B, T, 3]
        states = self.net.num_layers * (2 if self.net.bidirectional else 1)
        start = x.new_ones(states, len(x), 4) * x[:, 0, :1].T.unsqueeze(2)
        start = (start, start.sin()) if isinstance(self.net, nn.LSTM) else start
        sequence, state = self.net(x, start) if self.start else self.net(x)
        ends = torch.cat(state if isinstance(state, tuple) else (state,)).transpose(0, 1).flatten(1)
        parts = {"sequence": [sequence], "state": [ends], "everything": [sequence, ends]}[self.use]
        return torch.cat([p.flatten(1) for p in parts], dim=1)


def check(model, x, samples=None):
    model, x = model.double(), x.double()

    def loss_of(m, rows):
        out = m(x[rows])
        return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1).mean()

    expected = one_by_one(model, lambda m, i: loss_of(m, slice(i, i + 1)), len(x))
    with PerSampleGradNorms(model, samples=samples, layers="tensor") as norms:
        for _ in range(2):
            model.zero_grad()
            loss_of(model, slice(None)).backward()
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], want[:samples], rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture
def no_masks(monkeypatch):
    def refuse(of, *_):
        raise AssertionError(f"{of.node.name()} was differentiated once for every sample")

    monkeypatch.setattr(operands.Operand, "one_by_one", refuse)


@pytest.mark.parametrize("use", ["everything", "sequence", "state"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": B, "bias": False},
        {"start": True, "bidirectional": True},
        {"start": True, "num_layers": B},
    ],
    ids=lambda values: ", ".join(values) or "plain",
)
def test_exact(kind, values, use, no_masks):
    torch.manual_seed(0)
    check(Reader(kind, use=use, **values), torch.randn(B, 5, 3))


def test_time_first(no_masks):
    class TimeFirst(Reader):
        def __init__(self):
            super().__init__(nn.LSTM)
            self.net.batch_first = False

        def forward(self, x):
            return self.net(x.transpose(0, 1))[0].transpose(0, 1).flatten(1)

    torch.manual_seed(0)
    check(TimeFirst(), torch.randn(B, 5, 3))
    check(TimeFirst(), torch.randn(B, B, 3))


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    size=st.integers(1, 5),
    steps=st.integers(1, 5),
    layers=st.integers(1, 3),
    both=st.booleans(),
    samples=st.integers(1, 5),
)
def test_any_shape(kind, size, steps, layers, both, samples):
    torch.manual_seed(steps)
    check(Reader(kind, num_layers=layers, bidirectional=both), torch.randn(size, steps, 3), min(samples, size))


def test_another_activation(no_masks):
    torch.manual_seed(0)
    check(Reader(nn.RNN, nonlinearity="relu"), torch.randn(B, 5, 3))


def test_frozen_weights(no_masks):
    torch.manual_seed(0)
    model = Reader(nn.GRU, num_layers=2)
    model.net.weight_ih_l0.requires_grad_(False)
    model.net.bias_hh_l1.requires_grad_(False)
    check(model, torch.randn(B, 5, 3))


@pytest.mark.parametrize("values", [{"proj_size": 2}, {"num_layers": 2, "dropout": 0.5}])
def test_projections_and_dropout_are_exact(values):
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True, **values).double()
    x = torch.randn(B, 5, 3).double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        torch.manual_seed(1)
        loss = model(x)[0].sin().flatten(1).sum(1).mean()
        loss.backward()
        measured = norms.per_sample
    grads = {n: torch.zeros(B, *p.shape).double() for n, p in model.named_parameters()}
    for i in range(B):
        torch.manual_seed(1)
        model.zero_grad()
        model(x)[0][i].sin().sum().backward()
        for n, p in model.named_parameters():
            grads[n][i] = p.grad
    for name, want in layer_norms(grads, norms.layers).items():
        torch.testing.assert_close(measured[name], want, rtol=1e-9, atol=1e-12, msg=name)
