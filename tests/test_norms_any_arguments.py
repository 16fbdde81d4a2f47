"""Promise: samples are found in whatever a model is called with; where none can be seen, nothing is counted twice."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import UncoveredParameterError
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)
B = 4


class Graph:
    """A batch that is no container, as torch_geometric's; it holds itself too."""

    def __init__(self, x):
        self.name, self.store = "a batch", SimpleNamespace(of=self, tensors={"x": x})

    def __call__(self):
        """Such a batch can be called too."""

    @property
    def x(self):
        return self.store.tensors["x"]


class Slots:
    """A batch whose tensors cannot be seen."""

    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Net(nn.Module):
    """Two layers with a rule, and perhaps a weight without one."""

    def __init__(self, *, bare, returned=lambda out: out):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(6, 6)) if bare else None
        self.returned = returned

    def forward(self, data):
        h = self.first(data.x if hasattr(data, "x") else torch.randn(data, 5, dtype=torch.float64)).tanh()
        return self.returned(self.last(h if self.weight is None else h @ self.weight))


def losses(model, data):
    torch.manual_seed(1)  # of a model that draws its samples itself
    out = model(data)
    return getattr(out, "logits", out).sin().sum(1)


def check(model, data_of, passes=4):
    """Passes on new data, against one backward pass for every sample."""
    model = model.double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step in range(passes):
            torch.manual_seed(step)
            data = data_of(torch.randn(B, 5, dtype=torch.float64))
            want = one_by_one(model, lambda m, i, data=data: losses(m, data)[i], B)
            model.zero_grad()
            losses(model, data).mean().backward()
            for name, expected in layer_norms(want, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("returned", [lambda out: out, lambda out: SimpleNamespace(logits=out)])
@pytest.mark.parametrize("data_of", [lambda x: SimpleNamespace(x=x), Graph])
def test_objects_that_hold_tensors(data_of, returned, bare):
    check(Net(bare=bare, returned=returned), data_of)


@pytest.mark.parametrize("data_of", [Slots, len])
def test_without_a_tensor_layers_with_rules_are_exact(data_of):
    check(Net(bare=False), data_of)


@pytest.mark.parametrize("data_of", [Slots, len])
def test_without_a_tensor_other_parameters_are_refused_by_name(data_of):
    with pytest.raises(UncoveredParameterError, match="weight: has a gradient"):
        check(Net(bare=True), data_of)
