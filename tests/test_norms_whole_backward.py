"""Promise: a backward pass that comes from this engine is autograd's own: gradients, input gradients and norms.

Kernels are replaced by their plain torch twins, so that the way of a GPU is gone on a CPU, by every rule that has one.
"""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_clars.grad_norms import LayerRule, PerSampleGradNorms, register_rule, unregister_rule
from hf_clars.grad_norms.registry import fits_gradients, registered_rules
from hf_clars.grad_norms.rules import convolution, linear, normalization
from hf_clars.grad_norms.rules.linear import LinearRule
from tests.oracle import per_sample_grads

B = 3


def timm_norm():
    layers = pytest.importorskip("timm.layers")
    return layers.BatchNormAct2d(16)


LAYERS = {
    "Linear": (lambda: nn.Linear(16, 16), (B, 4, 16)),
    "Linear without bias": (lambda: nn.Linear(16, 8, bias=False), (B, 4, 16)),
    "Conv1D, square": (lambda: Conv1D(16, 16), (B, 4, 16)),
    "Conv1D": (lambda: Conv1D(24, 16), (B, 4, 16)),
    "convolution": (lambda: nn.Conv2d(16, 8, 3, padding=1), (B, 16, 4, 4)),
    "convolution, strides": (lambda: nn.Conv2d(16, 8, 3, 2, 1, bias=False), (B, 16, 5, 5)),
    "convolution, groups": (lambda: nn.Conv2d(16, 16, 3, groups=16), (B, 16, 5, 5)),
    "convolution 1x1": (lambda: nn.Conv2d(16, 8, 1), (B, 16, 4, 4)),
    "BatchNorm": (lambda: nn.BatchNorm2d(16), (B, 16, 4, 4)),
    "BatchNorm and activation": (timm_norm, (B, 16, 4, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(16), (B, 4, 16)),
    "RMSNorm": (lambda: nn.RMSNorm(16), (B, 4, 16)),
    "GroupNorm": (lambda: nn.GroupNorm(4, 16), (B, 16, 4, 4)),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Where no kernel runs, an operation of `kernels/operations.py` is its twin in `kernels/reference.py`."""
    for module in (linear, convolution, normalization):
        monkeypatch.setattr(module, "kernels_fit", lambda output: True)


def between(layer):
    """The layer, with something that trains on either side, so that its input has a gradient."""
    width = 16
    return nn.ModuleDict({"before": nn.Linear(width, width), "layer": layer})


def run(model, x):
    images = x.dim() == 4
    x = x.movedim(1, -1) if images else x
    h = model["before"](x)
    h = h.movedim(-1, 1).contiguous(memory_format=torch.channels_last) if images else h
    # A gradient that is not zero where the output is, for activations that are zero there.
    return (model["layer"](h) + 1).square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_and_norms(name, samples, as_on_a_gpu, fresh_forms):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = between(make())
    model.forward = lambda x: run(model, x)
    x = torch.randn(shape)
    plain = copy.deepcopy(between(model["layer"]))
    plain["before"] = copy.deepcopy(model["before"])
    with PerSampleGradNorms(model, layers="tensor", samples=samples) as norms:
        for _ in range(3):
            model.zero_grad()
            model(x).backward()
            plain.zero_grad()
            run(plain, x).backward()
            for (at, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=lambda m, at=at: f"{at}: {m}")
            want = per_sample_grads(plain, lambda m: B * run(m, x.double()), B)
            for at, grads in want.items():
                found, right = norms.per_sample[at].double(), grads.flatten(1).norm(dim=1)[:samples]
                torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4, msg=lambda m, at=at: f"{at}: {m}")


def test_a_rule_that_inherits_a_backward_pass_of_another_layer_is_not_asked_for_it(as_on_a_gpu, fresh_forms):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    @register_rule(Doubled)
    class DoubledRule(LinearRule):
        def per_sample_grads(self, module, saved, g, wanted):
            return super().per_sample_grads(module, saved, 2 * g, wanted)

        def squared_norms(self, module, saved, g, wanted):
            return super().squared_norms(module, saved, 2 * g, wanted)

    try:
        model = between(Doubled(16, 16))
        model.forward = lambda x: run(model, x)
        plain, x = copy.deepcopy(between(model["layer"])), torch.randn(B, 4, 16)
        plain["before"] = copy.deepcopy(model["before"])
        with PerSampleGradNorms(model):
            model(x).backward()
        run(plain, x).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    finally:
        unregister_rule(Doubled)


def test_whose_backward_pass_a_rule_has():
    class Plain(LayerRule):
        def per_sample_grads(self, module, saved, g, wanted):
            return {}

    assert not fits_gradients(Plain, "whole_backward")
    mine = {name: rule for name, rule in registered_rules().items() if fits_gradients(type(rule), "whole_backward")}
    assert {"torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"} <= mine.keys()
    assert "timm.layers.norm_act.BatchNormAct2d" not in mine
