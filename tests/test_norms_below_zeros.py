"""Promise: a head that begins with zeros, as in many vision transformers, lets nothing be learned that is not so later.

No gradient reaches the layers below it in the first pass, so that the graph cannot tell whose rows are whose.
"""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one

B = 4


class Net(nn.Module):
    """Attention with packed weights, in which time comes first; a table, also with as many steps as samples."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.gain = nn.Parameter(torch.randn(4))
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = self.first(x).transpose(0, 1)
        x = self.attention(x, x, x)[0] * self.gain
        return self.head(x.transpose(0, 1).mean(1))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y, reduction="sum")


@pytest.mark.parametrize("steps", [5, B])
def test_norms_are_exact_in_every_step_and_cheap_once_the_head_has_learned(steps):
    torch.manual_seed(0)
    model = Net().double()
    with PerSampleGradNorms(model, loss_reduction="sum", layers="tensor", check=False) as norms:
        for step in range(5):
            x, y = torch.randn(B, steps, 4, dtype=torch.double), torch.randint(3, (B,))
            model.zero_grad()
            loss_of(model, x, y).backward()
            grads = one_by_one(model, lambda m, i, x=x, y=y: loss_of(m, x[i : i + 1], y[i : i + 1]), B)
            for name, right in layer_norms(grads, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], right, rtol=1e-9, atol=1e-12, msg=f"{name}, {step}")
            if step % 2:  # two micro-batches a step
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.1 * p.grad
        uses = norms._finder._gate_of
    assert not uses


class Queries(nn.Module):
    """Queries made of parameters alone, as the first of a decoder, of which a sample takes as much as it says."""

    def __init__(self):
        super().__init__()
        self.table, self.query, self.head = nn.Parameter(torch.randn(1, 2, 4)), nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x, heard):
        queries = self.query(self.table.repeat(len(x), 1, 1))
        return self.head(x) + queries[:, -1] * heard[:, None]


@pytest.mark.filterwarnings("ignore:.*every sample")
def test_what_is_heard_a_little_and_then_not_at_all_is_exact():
    """In half precision a gradient that is nearly zero comes from a few samples, and in another pass from none."""
    torch.manual_seed(0)
    model = Queries().double()
    with PerSampleGradNorms(model) as norms:
        for heard in ([0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0, 1], [2, 3, 1, 4]):
            x = torch.randn(len(heard), 5, dtype=torch.float64)
            given = torch.tensor(heard, dtype=torch.float64)
            model.zero_grad()
            model(x, given).sin().sum(1).mean().backward()
            wanted = one_by_one(model, lambda m, i, x=x, given=given: m(x, given)[i].sin().sum(), len(heard))
            right = layer_norms(wanted, norms.layers)
            for layer, found in norms.per_sample.items():
                torch.testing.assert_close(found, right[layer], rtol=1e-7, atol=1e-12, msg=layer)
