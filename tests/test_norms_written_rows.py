"""Promise: rows of the batch that are written into something blank are measured as their own sample's.

As in another order, or into a buffer for each expert: that may have as many rows as the batch has samples.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.test_norms_moved_rows import B, by_value, check
from tests.three_passes import on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Written(nn.Module):
    """Rows are written to other places of something blank: in another order, or into a buffer for each expert."""

    def __init__(self, place):
        super().__init__()
        self.place = place
        self.gate, self.weights, self.last = nn.Linear(4, B), nn.Parameter(torch.randn(B, 4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        if self.place == "order":
            order, out = by_value(x), torch.zeros_like(x)
            out[order] = x
            return self.last(out)[order]
        if self.place == "index_copy":
            order = by_value(x)
            return self.last(torch.zeros_like(x).index_copy(0, order, x))[order]
        chosen, n = self.gate(x).argmax(-1), len(x)
        place = functional.one_hot(chosen, B).cumsum(0).gather(1, chosen[:, None])[:, 0] - 1
        if self.place == "buffers":
            buffers = x.new_zeros(B, n, 4)
            buffers[chosen, place] = x
        else:
            buffers = x.new_zeros(B * n, 4).index_add(0, chosen * n + place, x).view(B, n, 4)
        return self.last(torch.bmm(buffers, self.weights)[chosen, place])


MODELS = {
    "written in another order": lambda: Written("order"),
    "copied to other places": lambda: Written("index_copy"),
    "a buffer for each expert": lambda: Written("buffers"),
    "a buffer for each expert, added to": lambda: Written("added"),
}


@pytest.mark.filterwarnings("ignore:.*every sample")
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_written_somewhere(name):
    torch.manual_seed(0)
    check(MODELS[name](), 4)
