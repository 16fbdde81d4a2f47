"""Promise: a graph that is like one before is not walked again, and one that is not is measured right all the same."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.graph.walk import GraphWalk
from tests.oracle import one_by_one

B, PASSES = 4, 9


class Changing(nn.Module):
    """What it computes changes from pass to pass; rules measure all of it at first."""

    def __init__(self, change):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.spare = nn.Linear(5, 5)
        self.change, self.late = change, False

    def forward(self, x):
        h = self.norm(self.first(x).tanh())
        if self.late:
            h = self.change(self, h)
        return self.last(h).square().sum(-1) + 0.1 * self.spare(x).square().sum(-1)


CHANGES = {
    "a module is called twice": lambda m, h: m.norm(h),
    "another module is called": lambda m, h: m.spare(h),
    "a weight is used without its module": lambda m, h: nn.functional.linear(h, m.first.weight),
    "a bias is used in one operation more": lambda m, h: h * m.first.bias,
    "something made of a weight is used": lambda m, h: h + 2 * m.last.weight.sum(0),
    "the same operations, in another order": lambda m, h: m.norm(m.first(h).tanh()),
    "nothing": lambda m, h: h,
}


def norms_are_exact(model, norms, x):
    model.zero_grad()
    model(x).mean().backward()
    want = one_by_one(model, lambda m, i: m(x[i : i + 1]).sum(), len(x))
    assert norms.per_sample.keys() == want.keys()
    for name, grads in want.items():
        torch.testing.assert_close(norms.per_sample[name], grads.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-12)


@pytest.fixture
def walks(monkeypatch):
    counted, run = [], GraphWalk.run
    monkeypatch.setattr(GraphWalk, "run", lambda self, outputs: (counted.append(1), run(self, outputs))[1])
    return counted


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokens", [(), (2,)])
def test_a_graph_that_changes_after_many_passes(change, tokens):
    torch.manual_seed(0)
    model = Changing(CHANGES[change]).double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step in range(PASSES):
            model.late = step >= PASSES - 3
            x = torch.randn(B, *tokens, 5, dtype=torch.float64)
            model.zero_grad()
            loss = model(x)
            loss.reshape(B, -1).sum(1).mean().backward()
            want = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]).sum(), B)
            for name, grads in want.items():
                torch.testing.assert_close(norms.per_sample[name], grads.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-12)


def test_steady_passes_are_not_walked(walks):
    model = Changing(CHANGES["nothing"]).double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step in range(PASSES):
            if step == 4:
                walks.clear()
            norms_are_exact(model, norms, torch.randn(B, 5, dtype=torch.float64))
    assert not walks


def test_each_number_of_samples_is_walked_once(walks):
    model = Changing(CHANGES["nothing"]).double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for samples in (4, 4, 4, 6, 4, 6, 4, 6):
            norms_are_exact(model, norms, torch.randn(samples, 5, dtype=torch.float64))
    assert len(walks) <= 5


class Scaled(nn.Module):
    """A parameter of no module with a rule, which trains later."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 5), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return (self.layer(x) * self.scale).square().sum(-1)


def test_a_parameter_that_is_thawed_after_many_passes():
    """The operation is the same one, with or without a gradient for its second operand."""
    torch.manual_seed(0)
    model = Scaled().double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step in range(PASSES):
            model.scale.requires_grad_(step == 0 or step >= PASSES - 3)
            x = torch.randn(B, 5, dtype=torch.float64)
            model.zero_grad()
            model(x).mean().backward()
            want = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]).sum(), B)
            for name, grads in want.items():
                torch.testing.assert_close(norms.per_sample[name], grads.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-12)


class InPlace(nn.Module):
    """Operations in place on outputs that are views, and hooks of the user on them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 1)

    def forward(self, x):
        h = self.first(x.tanh()).relu_()
        g = self.second(h)
        g.mul_(0.5).add_(h)
        out = self.last(g)
        if out.requires_grad:
            out.register_hook(lambda grad: 3 * grad)
        return out.flatten(1).sum(1)


def test_outputs_that_are_changed_in_place_and_gradients_that_a_hook_changes():
    torch.manual_seed(0)
    model = InPlace().double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for _ in range(PASSES):
            norms_are_exact(model, norms, torch.randn(B, 3, 5, dtype=torch.float64))


class Positions(nn.Module):
    """Tables that no data looks up, and bare parameters: none is measured by a rule."""

    def __init__(self, layout="one row for all"):
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(9, 6), nn.Embedding(7, 6, padding_idx=2), nn.Embedding(2, 6)
        self.bias, self.norm, self.head = nn.Parameter(torch.randn(6)), nn.LayerNorm(6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.rand(3))
        self.layout, self.late = layout, ""
        self.register_buffer("numbers", torch.tensor([0, 3, 2, 3, 1]))

    def forward(self, x):
        numbers = {
            "one row for all": self.numbers[None],
            "no row": self.numbers,
            "a row each": self.numbers.expand(len(x), -1),
        }[self.layout]
        h = self.words(x) + self.places(numbers) + self.kinds(torch.zeros_like(numbers)) * self.bias
        if self.late == "a parameter more":
            h = h * self.bias
        h = self.head(self.norm(h))
        return (h * (self.gain if self.late != "a constant" else 2.0)).square().sum((1, 2))


@pytest.mark.parametrize("layout", ["one row for all", "no row", "a row each"])
@pytest.mark.parametrize("late", ["", "a parameter more", "a constant"])
def test_uses_that_no_rule_measures_are_found_again(layout, late, walks):
    torch.manual_seed(0)
    model = Positions(layout).double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step in range(PASSES + 3):
            model.late = late if step >= PASSES else ""
            walks.clear()
            x = torch.randint(0, 9, (B, 5))
            model.zero_grad()
            model(x).mean().backward()
            want = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]).sum(), B)
            for name, grads in want.items():
                torch.testing.assert_close(norms.per_sample[name], grads.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-12)
            if 4 <= step < PASSES or (step > PASSES and late != "a constant"):
                assert not walks, step


def test_a_parameter_in_the_place_of_another():
    """The same operations on the same shapes: only the leaf tells."""

    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.a, self.b = nn.Linear(5, 5), nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(5))
            self.late = False

        def forward(self, x):
            a, b = (self.b, self.a) if self.late else (self.a, self.b)
            return ((self.layer(x) * a).tanh() * b).square().sum(-1)

    torch.manual_seed(0)
    model = Swapped().double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step in range(PASSES):
            model.late = step >= PASSES - 3
            norms_are_exact(model, norms, torch.randn(B, 5, dtype=torch.float64))


class Sometimes(nn.Module):
    """A layer computes with its own weights, or with what is made of them."""

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.scaled = nn.Linear(5, 5), nn.Linear(5, 2), False

    def forward(self, x):
        made = {n: 2 * p for n, p in self.layer.named_parameters()}
        h = torch.func.functional_call(self.layer, made, (x,)) if self.scaled else self.layer(x)
        return self.head(h.tanh()).square().sum(-1)


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_now_and_then_computes_with_what_is_made_of_its_weights(first):
    torch.manual_seed(0)
    model = Sometimes().double()
    with PerSampleGradNorms(model, layers="tensor", check=False) as norms:
        for step in range(12):
            model.scaled = first if step < 5 else bool(step % 2)
            norms_are_exact(model, norms, torch.randn(B, 5, dtype=torch.float64))
