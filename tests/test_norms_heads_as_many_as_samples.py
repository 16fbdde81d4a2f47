"""Promise: heads or experts that are as many as the samples are not taken for them, in the first pass neither."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

HEADS = 3
one_thread = pytest.fixture(autouse=True)(on_one_thread)

PRODUCTS = {
    "heads": lambda x, w: torch.einsum("bhtd,hdk->bhtk", x, w),
    "weights first": lambda x, w: torch.einsum("hdk,bhtd->bhtk", w, x),
    "heads second to last": lambda x, w: torch.einsum("bhtd,hdk->bthk", x, w),
    "heads first": lambda x, w: torch.einsum("bhtd,hdk->hbtk", x, w).transpose(0, 1),
    "summed over the heads": lambda x, w: torch.einsum("bhtd,hdk->btk", x, w),
    "a matrix product": lambda x, w: x @ w,
    "after a product of the data": lambda x, w: torch.einsum("bhsd,hdk->bhsk", x.softmax(2).mT @ x, w),
}


class PerHead(nn.Module):
    """Each head has a matrix of its own. `einsum` brings the heads to the front before it multiplies."""

    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.product, self.split = product, nn.Linear(4, HEADS * 4)
        self.per_head = nn.Parameter(torch.randn(HEADS, 4, 4))

    def forward(self, x):  # [B, T, 4]
        heads = self.split(x).unflatten(-1, (HEADS, 4)).transpose(1, 2)
        return self.product(heads, self.per_head)


@pytest.mark.parametrize("sizes", [(3, 3, 5, 3), (4, 3, 3, 6)])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_pass_is_exact(product, sizes):
    model = PerHead(PRODUCTS[product]).double()

    def loss_of(m, x):
        return m(x).flatten(1).sin().sum(1).mean()

    with PerSampleGradNorms(model) as norms:
        for size in sizes:
            model.zero_grad()
            x = torch.randn(size, 2, 4, dtype=torch.float64)
            expected = one_by_one(model, lambda m, i, x=x: loss_of(m, x[i : i + 1]), size)
            loss_of(model, x).backward()
            found = norms.per_sample
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
