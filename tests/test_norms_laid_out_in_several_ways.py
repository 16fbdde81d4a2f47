"""Promise: a layer or parameter may be used with the batch first and with time first in one pass, of any length."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Shared(nn.Module):
    """What is named is used on [B, T, 4] and on [T, B, 4], in some order."""

    def __init__(self, what, order):
        super().__init__()
        self.what, self.order = what, order
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        if what == "scale":
            self.scale = nn.Parameter(1 + 0.3 * torch.randn(4))
        else:
            self.layer = nn.Linear(4, 4) if what == "linear" else nn.LayerNorm(4)

    def use(self, h):
        return h * self.scale if self.what == "scale" else self.layer(h)

    def forward(self, x):
        h = self.first(x).tanh()
        if self.order == "time first":
            b = self.use(h.transpose(0, 1)).transpose(0, 1)
        a = self.use(h).sin()
        if self.order != "time first":
            b = self.use((a if self.order == "one after the other" else h).transpose(0, 1)).transpose(0, 1)
        return self.last((a + b.square()).mean(1))


@pytest.mark.parametrize("lengths", [(5, 5, 4, 8, 4), (4, 4, 4, 4, 3), (8, 8, 8, 8, 6), (5, 5, 5, 8, 4)])
@pytest.mark.parametrize("order", ["batch first", "time first", "one after the other"])
@pytest.mark.parametrize("what", ["linear", "layer norm", "scale"])
def test_each_use_is_measured_by_its_own_rows(what, order, lengths):
    model = Shared(what, order).double()
    with PerSampleGradNorms(model) as norms:
        for batch, length in zip((4, 4, 4, 4, 3), lengths, strict=True):
            x = torch.randn(batch, length, 3, dtype=torch.float64)
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            expected = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]).sin().sum(1).mean(), batch)
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], want, rtol=1e-9, atol=1e-12, msg=name)


class Unfolded(nn.Module):
    """Rows of each sample lie apart, however many there are: views, or time first."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.layer, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(4))

    def forward(self, x):
        h = self.first(x).tanh()
        views, tokens = h.shape[:2]
        if self.how == "views":
            h = (self.layer(h.repeat(2, 1, 1).flatten(0, 1)) * self.scale).tanh().view(2, views, tokens, 4).sum(0)
        else:
            h = h.transpose(0, 1).flatten(0, 1)
            h = (self.layer(h) * self.scale).tanh().view(tokens, views, 4).transpose(0, 1)
        return self.last(h.mean(1))


@pytest.mark.parametrize("lengths", [(1, 4, 2, 5, 4), (2, 1, 4, 8, 1), (4, 1, 4, 8, 2)])
@pytest.mark.parametrize("how", ["views", "time first"])
def test_what_one_token_shows_is_not_believed_of_more(how, lengths):
    model = Unfolded(how).double()
    with PerSampleGradNorms(model) as norms:
        for batch, length in zip((4, 4, 4, 4, 3), lengths, strict=True):
            x = torch.randn(batch, length, 3, dtype=torch.float64)
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            expected = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]).sin().sum(1).mean(), batch)
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], want, rtol=1e-9, atol=1e-12, msg=name)


def test_convolutions_of_one_pixel_with_strides_left_from_a_turn():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(3, 4), nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.layer(self.first(x).tanh().transpose(1, 2)).flatten(1)

    model = Turned().double()
    with PerSampleGradNorms(model) as norms:
        for length in (1, 1, 1, 2):
            x = torch.randn(4, length, 3, dtype=torch.float64)
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            expected = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]).sin().sum(1).mean(), 4)
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], want, rtol=1e-9, atol=1e-12, msg=name)
