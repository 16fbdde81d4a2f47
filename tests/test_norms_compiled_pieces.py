"""Promise: what uncompiled code hands from one piece of compiled code to the next is followed, or refused by name."""

import pytest
import torch
from torch import nn

from hf_clars.errors import HfClarsError
from hf_clars.grad_norms import PerSampleGradNorms
from tests.test_norms_compiled_uses import compare, fresh_compiler  # noqa: F401  (a fixture)


class Net(nn.Module):
    """Two pieces, and what a test does between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.head, self.gain = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(4))
        self.between = between

    def forward(self, x):
        return self.head(self.between(x, self.first(x)) * self.gain)


def in_pieces(model):
    return torch.compile(model, backend="eager")


def outside(function):
    return torch._dynamo.disable(function)


def attend(h):
    parts = h.view(len(h), 2, 2)
    return (parts.transpose(1, 2).softmax(-1) @ parts).flatten(1)


def logged_attending_and_masked(x, h):
    """As rows stay: nothing, what runs by itself, and numbers that are made of the input."""
    h.detach().sum().item()
    h = outside(attend)(h)
    return h * outside(lambda x: (x > 0).to(x.dtype))(x)


def time_first(x, h):
    return outside(lambda h: h.sin())(torch.stack([h, x])).sum(0)


@pytest.mark.parametrize("between", [logged_attending_and_masked, time_first], ids=lambda between: between.__name__)
def test_norms_are_exact_where_rows_stay(between):
    compare(Net(between), lambda batch: (torch.randn(batch, 4),), (4, 4, 4, 5), call=in_pieces)


def shuffled(x, h):
    order = h.detach().sum(1).argsort()
    return outside(lambda h: h[order])(h)


def by_a_product(x, h):
    turn = torch.eye(len(h)).flip(0).to_sparse()
    return outside(lambda h: torch.sparse.mm(turn, h))(h)


def in_place(x, h):
    return outside(lambda h: h.copy_(h.flip(0).clone()))(h)


def mixed(x, h):
    return outside(lambda h: h - h.mean(0))(h)


def without_a_gradient(x, h):
    return outside(lambda h: h.detach().flip(0))(h)


@pytest.mark.parametrize(
    "between", [shuffled, by_a_product, in_place, mixed, without_a_gradient], ids=lambda between: between.__name__
)
def test_rows_that_uncompiled_code_moves_are_refused_by_name(between):
    with PerSampleGradNorms(Net(between), check=False) as norms:
        with pytest.raises(HfClarsError, match=r"gain.*nobody knows which rows belong to which"):
            in_pieces(norms.model)(torch.randn(6, 4))
        norms.reset()


def test_also_if_they_are_moved_in_a_later_pass_only():
    moves = iter((False, False, True))

    def between(x, h):
        return outside(lambda h: h.flip(0) if next(moves) else h * 2)(h)

    with PerSampleGradNorms(Net(between), check=False) as norms:
        called = in_pieces(norms.model)
        for _ in range(2):
            called(torch.randn(6, 4)).sum().backward()
        with pytest.raises(HfClarsError, match=r"gain, head\.weight.*nobody knows which rows belong to which"):
            called(torch.randn(6, 4))
        norms.reset()
