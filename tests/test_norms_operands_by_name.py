"""Promise: an operation whose operands are given by name, as `linear(input=x)`, is followed as any other."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.test_norms_moved_rows import check

THERE = {
    "index_select": lambda h, order: torch.index_select(input=h, dim=0, index=order),
    "gather": lambda h, order: torch.gather(input=h, dim=0, index=order[:, None].expand_as(h)),
    "take_along_dim": lambda h, order: torch.take_along_dim(input=h, indices=order[:, None], dim=0),
    "embedding": lambda h, order: functional.embedding(input=order, weight=h),
    "matmul": lambda h, order: torch.matmul(input=functional.one_hot(order).to(h), other=h),
}
BACK = {
    "index_add": lambda h, order: torch.index_add(input=torch.zeros_like(h), dim=0, index=order, source=h),
    "index_copy": lambda h, order: torch.index_copy(input=torch.zeros_like(h), dim=0, index=order, source=h),
    "scatter_add": lambda h, order: torch.scatter_add(
        input=torch.zeros_like(h), dim=0, index=order[:, None].expand_as(h), src=h
    ),
}
IN_ORDER = {
    "linear": lambda h: functional.linear(input=h, weight=torch.eye(h.shape[1], dtype=h.dtype)),
    "conv1d": lambda h: functional.conv1d(input=h[:, None], weight=h.new_ones(1, 1, 1))[:, 0],
    "cat": lambda h: torch.cat(tensors=[h, h], dim=1)[:, ::2],
}


class Sorted(nn.Module):
    """A layer on rows in the order of a feature, which then come back."""

    def __init__(self, there=THERE["index_select"], back=BACK["index_copy"], between=lambda h: h):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 2)
        self.there, self.back, self.between = there, back, between

    def forward(self, x):
        h = self.between(self.first(x))
        order = h[:, 0].argsort()
        return self.last(self.back(self.inner(self.there(h, order)).tanh(), order))


@pytest.mark.filterwarnings("ignore:.*every sample")
@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(lambda way=way: Sorted(there=way), id=name) for name, way in THERE.items()),
        *(pytest.param(lambda way=way: Sorted(back=way), id=name) for name, way in BACK.items()),
        *(pytest.param(lambda way=way: Sorted(between=way), id=name) for name, way in IN_ORDER.items()),
    ],
)
def test_exact_in_every_pass(model):
    torch.manual_seed(0)
    check(model(), 5)
