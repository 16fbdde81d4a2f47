"""Promise: normalisations that are called as functions, outside modules with rules, are measured at their operation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.graph.operands import Operand
from tests.oracle import layer_norms, per_sample_grads

B, C = 4, 6

CALLS = {
    "batch_norm": lambda m, x: F.batch_norm(x, m.mean, m.var, m.weight, m.bias, m.training, 0.1, 1e-3),
    "group_norm": lambda m, x: F.group_norm(x, 3, m.weight, m.bias, 1e-3),
    "instance_norm": lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias),
    "layer_norm": lambda m, x: F.layer_norm(x.movedim(1, -1), (C,), m.weight, m.bias).movedim(-1, 1),
    "rms_norm": lambda m, x: (
        F.rms_norm(x.movedim(1, -1), (C,), m.weight).movedim(-1, 1) + m.bias.view(C, *[1] * (x.dim() - 2))
    ),
}
SHAPES = {"matrices": (B, C), "sequences": (B, C, 5), "images": (B, C, 4, 3), "volumes": (B, C, 2, 3, 2)}


class Called(nn.Module):
    """Owns what the function takes, and has no rule."""

    def __init__(self, call):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))
        self.register_buffer("mean", torch.randn(C))
        self.register_buffer("var", torch.rand(C) + 0.5)
        self.call = call

    def forward(self, x):
        return CALLS[self.call](self, x)


class Net(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.first, self.called, self.again = nn.Linear(C, C), Called(call), Called(call)

    def forward(self, x):
        h = self.first(x.movedim(1, -1)).movedim(-1, 1)
        h = self.again(self.called(h).tanh())
        return h.flatten(1).square().sum(1)


@pytest.fixture
def one_by_one_calls(monkeypatch):
    found, original = [], Operand.one_by_one
    monkeypatch.setattr(Operand, "one_by_one", lambda of, *rest: (found.append(of.node.name()), original(of, *rest))[1])
    return found


def check(model, shape, samples=None, memory=torch.contiguous_format):
    with PerSampleGradNorms(model, layers="tensor", samples=samples) as norms:
        for _ in range(5):
            x = torch.randn(shape, dtype=torch.float64)
            x = x.contiguous(memory_format=memory) if len(shape) == 4 else x
            want = layer_norms(per_sample_grads(model, lambda m, x=x: m(x).sum(), B), norms.layers)
            model.zero_grad()
            model(x).mean().backward()
            for name, value in want.items():
                torch.testing.assert_close(norms.per_sample[name], value[:samples], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("call", "kind"), [(c, k) for c in CALLS for k in SHAPES if (c, k) != ("instance_norm", "matrices")]
)
@pytest.mark.parametrize("train", [True, False])
def test_exact_in_every_pass(call, kind, train, one_by_one_calls):
    torch.manual_seed(0)
    check(Net(call).double().train(train), SHAPES[kind])
    if call in ("batch_norm", "group_norm", "layer_norm"):
        assert not one_by_one_calls


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_of_the_first_samples_and_in_any_memory_format(call, memory):
    check(Net(call).double(), SHAPES["images"], samples=3, memory=memory)
