"""Promise: one look at all samples' gradients at once finds every row that is not its own sample's."""

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from hf_clars.grad_norms.graph.following import stay
from hf_clars.grad_norms.graph.layout import Layout, Root


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("exchanged", [(0, 1), (3, 19), (16, 17), (38, 39)])
def test_one_look_at_all_samples_misses_none(exchanged, coupled):
    """Rows in their places, two rows exchanged, and a little of a row in another."""
    torch.manual_seed(0)
    order = torch.arange(40)
    order[list(exchanged)] = order[list(exchanged)].flip(0)
    h = 2 * torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    for made, right in ((h.sin(), True), (h.sin()[order], False), (h.sin() + 1e-9 * h[order], False)):
        out = functional.batch_norm(made, None, None, training=True) if coupled else made.tanh()
        nodes = [out.grad_fn] if coupled else []
        assert (
            stay([Root(get_gradient_edge(out), out.detach())], [(get_gradient_edge(h), Layout())], 40, nodes) == right
        )
