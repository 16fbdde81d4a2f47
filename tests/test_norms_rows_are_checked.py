"""Promise: rows that are taken for other samples' do not stay so in silence: the second pass looks at all of them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.axes.place import Place
from hf_clars.grad_norms.errors import BatchAxisError
from hf_clars.grad_norms.graph import taint
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Moved(nn.Module):
    """What is named is used on rows in other places, which come back."""

    def __init__(self, what, away=lambda h: h.flip(0)):
        super().__init__()
        self.what, self.away = what, away
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        if what == "layer":
            self.layer = nn.Linear(4, 4)
        else:
            self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = self.away(self.first(x).tanh())
        h = self.layer(h) if self.what == "layer" else h * self.scale
        return self.last(self.away(h.tanh()))


@pytest.fixture
def faulty(monkeypatch):
    """An engine that takes every function for one that leaves rows where they are."""
    monkeypatch.setattr(taint, "moves_rows", lambda *_: False)
    monkeypatch.setattr(taint.DataTaint, "_places_after", lambda self, *given: [Place()])


def step(model, batch):
    model.zero_grad()
    model(torch.randn(batch, 3, dtype=torch.float64)).square().mean().backward()


@pytest.mark.parametrize("batch", [2, 3, 6])
@pytest.mark.parametrize("what", ["layer", "scale"])
def test_a_fault_of_the_engine_is_named_in_the_second_pass(faulty, what, batch):
    model = Moved(what).double()
    with PerSampleGradNorms(model) as norms:
        step(model, batch)
        norms.totals()
        with pytest.raises(BatchAxisError, match=f"{what}.*: its rows were taken for the batch's {batch} samples"):
            step(model, batch)


def test_a_pass_of_one_sample_tells_nothing_and_the_next_one_does(faulty):
    model = Moved("layer").double()
    with PerSampleGradNorms(model) as norms:
        for batch in (3, 1, 1):
            step(model, batch)
            norms.totals()
        with pytest.raises(BatchAxisError, match="its rows were taken"):
            step(model, 3)


def test_who_wants_no_checks_gets_none(faulty):
    model = Moved("layer").double()
    with PerSampleGradNorms(model, check=False) as norms:
        for _ in range(3):
            step(model, 3)
            norms.totals()


class Attends(nn.Module):
    """Every sample looks at all others."""

    def __init__(self):
        super().__init__()
        self.first, self.key, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last((h @ self.key(h).T).softmax(1) @ h)


class Pairs(nn.Module):
    """Every sample's product with every other's is returned."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.scale = nn.Linear(3, 4), nn.Linear(3, 4), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * functional.normalize(self.one(x)) @ functional.normalize(self.other(x)).T


COUPLED = {
    "attention over the batch": Attends,
    "pairs": Pairs,
    "BatchNorm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "the batch's mean": lambda: Moved("layer", lambda h: h - h.mean(0)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_depend_on_each_other_are_no_fault(name):
    model = COUPLED[name]().double()
    with warnings.catch_warnings(), PerSampleGradNorms(model) as norms:
        warnings.simplefilter("ignore")
        for batch in (4, 4, 3):
            step(model, batch)
            assert norms.totals().total == batch


def test_norms_and_gradients_of_the_checked_pass_are_those_of_any_other():
    model = Moved("scale").double()
    data = torch.randn(3, 5, 3, dtype=torch.float64)
    with PerSampleGradNorms(model) as norms:
        for x in data:
            model.zero_grad()
            losses = model(x).square().sum(1)
            losses.mean().backward()
            right = layer_norms(one_by_one(model, lambda m, i, x=x: m(x)[i].square().sum(), 5), norms.layers)
            for name, found in norms.per_sample.items():
                torch.testing.assert_close(found, right[name], rtol=1e-6, atol=1e-9)
