"""Promise: where a model is called with time first, it is said that steps are taken for samples; else it is not."""

import warnings

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one

B, WORDS, WIDTH = 4, 9, 6


class Words(nn.Module):
    """Says something at each step, of shape [T, B, WORDS]."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, x):
        return self.head(self.steps(self.table(x)))


class Recurrent(Words):
    def __init__(self):
        super().__init__()
        self.net = nn.GRU(WIDTH, WIDTH)

    def steps(self, x):
        return self.net(x)[0]


class ByHand(Words):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(2 * WIDTH, WIDTH)

    def steps(self, x):
        states = [torch.zeros_like(x[0])]
        for step in x:
            states.append(self.cell(torch.cat([step, states[-1]], 1)).tanh())
        return torch.stack(states[1:])


class Attention(Words):
    def __init__(self):
        super().__init__()
        self.net = nn.MultiheadAttention(WIDTH, 2)

    def steps(self, x):
        return self.net(x, x, x, need_weights=False)[0]


class OnNumbers(nn.Module):
    """Nothing lies below the net that would show what depends on what."""

    def __init__(self):
        super().__init__()
        self.net = nn.LSTM(WIDTH, WORDS)

    def forward(self, x):
        return self.net(x)[0]


class BatchFirst(nn.Module):
    """The way out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.transpose(0, 1)).transpose(0, 1)


class Standardised(Words):
    """Samples depend on each other, and so do columns."""

    def steps(self, x):
        return (x - x.mean((0, 1))) / x.std((0, 1))


MODELS = {"recurrent": Recurrent, "by hand": ByHand, "attention": Attention, "on numbers": OnNumbers}


def data(name, steps, batch):
    return torch.randn(batch, steps, WIDTH).double() if name == "on numbers" else torch.randint(WORDS, (batch, steps))


def loss_of(model, x):
    return model(x).sin().pow(2).sum((1, 2)).mean()


def is_said(model, inputs):
    with warnings.catch_warnings(record=True) as said, PerSampleGradNorms(model) as norms:
        warnings.simplefilter("always")
        for x in inputs:
            model.zero_grad()
            loss_of(model, x).backward()
    assert norms.per_sample
    return any("time first" in str(w.message) for w in said)


@pytest.mark.parametrize("steps", [B + 1, B])
@pytest.mark.parametrize("name", MODELS)
def test_time_first_is_said(name, steps):
    torch.manual_seed(0)
    assert is_said(MODELS[name]().double(), [data(name, steps, B).transpose(0, 1)])


@pytest.mark.parametrize("steps", [B + 1, B])
@pytest.mark.parametrize("name", MODELS)
def test_the_way_out_is_exact_and_says_nothing(name, steps):
    torch.manual_seed(0)
    model = BatchFirst(MODELS[name]()).double()
    assert not is_said(model, [data(name, steps, B)])
    with PerSampleGradNorms(model) as norms:
        for batch in (B, B, B, B - 1):
            x = data(name, steps, batch)
            model.zero_grad()
            loss_of(model, x).backward()
            want = one_by_one(model, lambda m, i, x=x: loss_of(m, x[i : i + 1]), batch)
            for layer, right in layer_norms(want, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[layer], right, rtol=1e-9, atol=1e-12)


def test_samples_that_depend_on_each_other_are_no_steps():
    torch.manual_seed(0)
    assert not is_said(Standardised().double(), [data("words", B + 1, B)])
