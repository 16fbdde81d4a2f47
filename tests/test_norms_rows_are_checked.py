"""Promise: rows that are taken for other samples' do not stay so in silence: the second pass looks at all of them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.axes.place import Place
from hf_clars.grad_norms.errors import BatchAxisError
from hf_clars.grad_norms.graph import following, taint
from tests.oracle import layer_norms, one_by_one, per_sample_grads
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


class FirstToken(nn.Module):
    """Tokens of all samples lie one after the other; what is made of the first ones depends on other samples."""

    def __init__(self, couple, before=lambda x: x):
        super().__init__()
        self.couple, self.before = couple, before
        self.first, self.layer, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(self.before(x)).relu()
        h = self.layer(h.flatten(0, 1)).tanh()
        return self.couple(self.last(h.view(*x.shape[:2], 4)[:, 0]))


SOME_DEPEND = {
    "the first sample": lambda h: h * h[:1],
    "the sample before": lambda h: h * h.roll(1, 0),
    "pairs": lambda h: h - h.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0),
    "all": lambda h: h + (h @ h.T).softmax(1) @ h,
    "logits": lambda h: functional.normalize(h, dim=1) @ functional.normalize(h.cos(), dim=1).T,
}


@pytest.mark.parametrize("name", SOME_DEPEND)
@pytest.mark.parametrize("before", [lambda x: x, lambda x: functional.pad(x[..., :2], (0, 1))], ids=["", "padded"])
@pytest.mark.parametrize("tokens", [2, 8])
def test_a_few_rows_of_samples_that_depend_on_each_other_are_no_fault(name, before, tokens):
    model = FirstToken(SOME_DEPEND[name], before).double()
    with PerSampleGradNorms(model) as norms:
        for batch in (4, 4, 4, 6):
            x = torch.randn(batch, tokens, 3, dtype=torch.float64)
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            right = layer_norms(per_sample_grads(model, lambda m, x=x: m(x).sin().sum(1).mean(), batch), norms.layers)
            for layer, found in norms.per_sample.items():
                torch.testing.assert_close(found, right[layer] * batch, rtol=1e-7, atol=1e-12, msg=layer)


def test_folded_rows_of_samples_that_depend_on_each_other_are_not_led_back_as_if_they_did_not():
    unknown = lambda x: torch.fft.ifftshift(torch.fft.fftshift(x, 2), 2)  # noqa: E731  after it nothing is known of the inputs
    model = FirstToken(SOME_DEPEND["all"], unknown).double()
    with PerSampleGradNorms(model), pytest.raises(BatchAxisError, match=r"layer .* does not tell which of the 4"):
        model(torch.randn(4, 5, 3, dtype=torch.float64))


class TwoViews(nn.Module):
    """Returns as many rows as samples, and twice as many; layers are used on both."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head, self.value = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, a, b):
        both = self.encoder(torch.cat([a, b])).tanh()
        return self.value(self.encoder(a)), self.head(both)


def test_views_that_are_returned_beside_rows_of_the_batch_are_no_fault():
    def loss_of(model, a, b):
        value, views = model(a, b)
        return (value.sin().sum() + (views * torch.tensor([1.0, 2.0], dtype=views.dtype)).sin().sum()) / len(a)

    model = TwoViews().double()
    with PerSampleGradNorms(model) as norms:
        for batch in (4, 4, 4, 3):
            a, b = torch.randn(2, batch, 3, dtype=torch.float64)
            model.zero_grad()
            loss_of(model, a, b).backward()
            one = one_by_one(model, lambda m, i, a=a, b=b: loss_of(m, a[i : i + 1], b[i : i + 1]), batch)
            for layer, found in layer_norms(one, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[layer], found, rtol=1e-7, atol=1e-12, msg=layer)


class Drawn(nn.Module):
    """Rows are given other places in some passes only."""

    def __init__(self, move):
        super().__init__()
        self.move, self.order = move, None
        self.first, self.layer, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.move(self.first(x).tanh(), self.order)
        return self.last(self.move(self.layer(h).tanh(), self.order))


ORDERS = [[0, 1], [0, 1], [1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("move", [lambda h, order: h[order], lambda h, order: h[torch.tensor(order), :]])
def test_a_shuffle_may_leave_all_in_order_at_first(move):
    model = Drawn(move).double()
    with warnings.catch_warnings(), PerSampleGradNorms(model) as norms:
        warnings.simplefilter("ignore")
        for model.order in ORDERS:
            x = torch.randn(2, 3, dtype=torch.float64)
            model.zero_grad()
            model(x).square().sum(1).mean().backward()
            right = layer_norms(one_by_one(model, lambda m, i, x=x: m(x)[i].square().sum(), 2), norms.layers)
            for name, found in norms.per_sample.items():
                torch.testing.assert_close(found, right[name], rtol=1e-6, atol=1e-9)


def test_rows_that_move_in_later_passes_only_are_named():
    model = Drawn(lambda h, order: h.flip(0) if order[0] else h).double()
    with PerSampleGradNorms(model) as norms:
        for model.order in ORDERS[:2]:
            step(model, 2)
            norms.totals()
        model.order = ORDERS[2]
        with pytest.raises(BatchAxisError, match="shuffles rows in some passes only"):
            step(model, 2)


def test_what_is_not_a_number_leads_to_nobody():
    gradient = torch.tensor([[0.0, 0.0], [torch.nan, torch.nan], [0.0, 1.0]])  # of padding that attends to nothing
    rows, columns = following._rows_touched(gradient)
    assert rows.tolist() == [False, False, True]
    assert columns.tolist() == [False, True]
