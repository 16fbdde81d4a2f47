"""Promise: tokens made of parameters that a model gives to other samples' rows are measured for whom they served.

RF-DETR gives each window a copy of the class token, in another order than that of the windows. All copies are alike, so
that no value tells; but the gradient of one sample's copies arrives at the tokens that stood beside other samples.
"""

import warnings

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import BatchAxisError, PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)
D = 5


class Windows(nn.Module):
    """Images of four patches in two windows, each with a copy of the class token."""

    def __init__(self, spread, normed=False):
        super().__init__()
        self.spread = spread
        self.patches, self.inner, self.head = nn.Linear(7, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 5, D))
        self.norm = nn.LayerNorm(D) if normed else nn.Identity()

    def forward(self, x):
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1) + self.positions
        tokens = self.norm(tokens)
        windows = torch.cat([self.spread(tokens[:, :1]), tokens[:, 1:].reshape(2 * len(x), 2, D)], 1)
        return self.head(self.inner(windows.tanh()).prod(1).view(len(x), 2, D).sum(1))


SPREADS = {
    "batch after batch": lambda t: t.repeat(2, 1, 1),
    "each sample's together": lambda t: t.repeat_interleave(2, 0),
    "the next sample's": lambda t: t.roll(1, 0).repeat_interleave(2, 0),
}


@pytest.mark.parametrize("spread", SPREADS)
def test_tokens_are_those_of_the_samples_they_served(spread):
    torch.manual_seed(0)
    model = Windows(SPREADS[spread]).double()
    with warnings.catch_warnings(), PerSampleGradNorms(model) as norms:
        warnings.simplefilter("ignore")
        for batch in (3, 3, 4, 3):
            x = torch.randn(batch, 4, 7, dtype=torch.float64)
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            right = layer_norms(one_by_one(model, lambda m, i, x=x: m(x)[i].sin().sum(), batch), norms.layers)
            for layer, found in norms.per_sample.items():
                torch.testing.assert_close(found, right[layer], rtol=1e-7, atol=1e-12, msg=layer)


def test_a_layer_on_such_tokens_is_refused_by_name():
    model = Windows(SPREADS["batch after batch"], normed=True).double()
    with PerSampleGradNorms(model), pytest.raises(BatchAxisError, match=r"norm \(LayerNorm\).* in rows of others"):
        model(torch.randn(3, 4, 7, dtype=torch.float64)).sin().sum(1).mean().backward()
