"""Promise: the first pass follows the data by a mode of torch's, which disturbs nobody and ends with the pass."""

import gc

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import one_by_one


def network():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def test_an_error_of_the_measuring_ends_it():
    model = network()
    norms = PerSampleGradNorms(model, on_error=lambda error: None)
    model[0].register_forward_hook(lambda *_: norms.take_error(ValueError("of a rule")))
    model(torch.randn(4, 3))
    assert _get_current_function_mode_stack() == []
    norms.remove()


def test_an_error_of_the_model_ends_it():
    model = network()
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(4, 5))
    assert _get_current_function_mode_stack() == []
    norms.remove()


def test_it_ends_although_the_tracker_is_collected_in_the_middle():
    """As `CLARS(model)` may be, which nobody keeps."""
    model = network()
    PerSampleGradNorms(model)
    following = []

    def collect(*_):
        following.append(len(_get_current_function_mode_stack()))
        gc.collect()

    gc.disable()
    model[0].register_forward_hook(collect)
    model(torch.randn(4, 3))
    gc.enable()
    assert following == [1]
    assert _get_current_function_mode_stack() == []


class ChangesAView(nn.Module):
    """It makes a view without gradients, whose place in the graph torch does not say once its base is changed."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), nn.Linear(1, 1)

    def forward(self, x):
        scaled = torch.ones_like(x)
        with torch.no_grad():
            row = scaled[0]
        scaled.mul_(self.scale(x[:, :1]))
        row.shape  # noqa: B018 - torch looks at the view here
        return self.linear(scaled)


def test_a_view_whose_place_torch_does_not_know_is_let_be():
    torch.manual_seed(0)
    model, x = ChangesAView().double(), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no_grad mode"):
        _ = _stale_view().grad_fn
    want = one_by_one(model, lambda m, i: m(x[i : i + 1]).square().sum(), 4)
    for _ in range(3):
        model.zero_grad()
        with PerSampleGradNorms(model, layers="tensor") as norms:
            model(x).square().sum(1).mean().backward()
        for name, grads in want.items():
            torch.testing.assert_close(norms.per_sample[name], grads.flatten(1).norm(dim=1))


def _stale_view():
    base = torch.ones(4, 3)
    with torch.no_grad():
        row = base[0]
    base.mul_(torch.ones(3, requires_grad=True))
    return row
