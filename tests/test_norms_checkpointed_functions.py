"""Promise: a parameter that a checkpointed function takes, with no module called inside, is measured in every pass."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from tests.three_passes import assert_exact, on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)


def again(x, weight):
    return torch.tanh(x @ weight)


def made_inside(x, weight):
    return torch.tanh(x @ torch.tanh(weight * weight.exp()))


def offloaded(x, weight):
    with save_on_cpu():
        return again(x, weight)


WAYS = {
    "once": lambda x, w: checkpoint(again, x, w, use_reentrant=False),
    "reentrant": lambda x, w: checkpoint(again, x, w, use_reentrant=True),
    "made of it inside": lambda x, w: checkpoint(made_inside, x, w, use_reentrant=False),
    "several times": lambda x, w: checkpoint(
        again, checkpoint(again, x, w, use_reentrant=False), w, use_reentrant=False
    ),
    "inside and outside": lambda x, w: checkpoint(again, x @ w, w, use_reentrant=False),
    "offloaded": offloaded,
}


class Model(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.first, self.head = way, nn.Linear(4, 4), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):  # [B, T, 4]
        return self.head(self.way(self.first(x), self.weight))


class Uncalled(nn.Module):
    """It calls one layer, and takes the parameters of another itself."""

    def __init__(self):
        super().__init__()
        self.called, self.taken = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.called(x).tanh(), self.taken.weight, self.taken.bias)


class WithItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.taken, self.gain = Uncalled(), nn.Linear(4, 4, bias=False), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return nn.functional.linear(self.inside(x) * self.gain, self.taken.weight) + self.inside(x)


BLOCKS = {
    "an encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "taken inside": Uncalled,
    "with a parameter of its own": WithItsOwn,
}


class Blocks(nn.Module):
    """A block that is called some times, under reentrant checkpointing: its graph is made in the backward pass."""

    def __init__(self, block, times):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.head, self.times = nn.Linear(4, 4), block(), nn.Linear(4, 2), times

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            x = checkpoint(self.block, x, use_reentrant=True)
        return self.head(x)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("block", BLOCKS)
def test_so_are_parameters_of_modules_that_a_checkpointed_one_does_not_call(block, times):
    compare(Blocks(BLOCKS[block], times).double())


@pytest.mark.parametrize("way", WAYS)
def test_it_is_exact(way):
    compare(Model(WAYS[way]).double())


def compare(model):
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for size, tokens in ((3, 5), (3, 5), (5, 2), (2, 4), (3, 5)):
            model.zero_grad()
            x = torch.randn(size, tokens, 4, dtype=torch.float64)
            model(x).flatten(1).sin().sum(1).mean().backward()
            assert_exact(norms, plain, x)
