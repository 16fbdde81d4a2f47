"""Promise: a model that returns its loss alone is exact in batches of any size, also where one divides other axes."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one

STEPS, WORDS, WIDTH = 9, 20, 6


class NextWord(nn.Module):
    """Its positions are added to [B, 9, WIDTH]: a batch of 3 or of 9 could as well be in the second axis."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.places = nn.Parameter(torch.randn(STEPS, WIDTH))

    def words(self, x):
        return x

    def forward(self, x):
        read, said = self.words(x)[:, :-1], x[:, 1:]
        heard = (self.table(read) + self.places).cumsum(1).tanh()
        return nn.functional.cross_entropy(self.head(heard).transpose(1, 2), said)


class Masked(NextWord):
    """Some words are others before they are looked up."""

    def words(self, x):
        return torch.where((x < 3) | (x == 7), 0, x) % WORDS


class OneHot(NextWord):
    """Numbers take the place of words."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(WORDS, WIDTH)

    def words(self, x):
        return nn.functional.one_hot(x, WORDS).type_as(self.places)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 3), (4, 4, 4, 9), (3, 3, 3, 4), (9, 4, 3, 2)])
@pytest.mark.parametrize("make", [NextWord, Masked, OneHot])
def test_batches_of_any_size_are_exact(make, sizes):
    torch.manual_seed(0)
    model = make().double()
    with PerSampleGradNorms(model) as norms:
        for batch in sizes:
            x = torch.randint(WORDS, (batch, STEPS + 1))
            model.zero_grad()
            model(x).backward()
            right = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]), batch)
            for layer, want in layer_norms(right, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[layer], want, rtol=1e-9, atol=1e-12)
