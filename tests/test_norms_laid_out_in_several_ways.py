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
