"""Promise: the K micro-steps of Eq. 6, of one layer each, are one step of Eq. 4, and that is what NAG does."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_clars.optim import NAG

SIZES = (3, 1, 4)
BLOCKS = [slice(0, 3), slice(3, 4), slice(4, 8)]


def one_step(w, v, gradient, rates, beta):
    """Eq. 4."""
    next_v = w.copy()
    for rate, block in zip(rates, BLOCKS, strict=True):
        next_v[block] -= rate * gradient[block]
    return next_v + beta * (next_v - v), next_v


def micro_steps(w, v, gradient, rates, beta):
    """Eq. 6: at micro-step s only the entries of layer k(s) = s mod K + 1 move; the gradient stays that of w_t."""
    w, v = w.copy(), v.copy()
    for rate, block in zip(rates, BLOCKS, strict=True):
        next_v = w[block] - rate * gradient[block]
        w[block] = next_v + beta * (next_v - v[block])
        v[block] = next_v
    return w, v


def whole_vector_micro_steps(w, v, gradient, rates, beta):
    """Eq. 6 to the letter: every micro-step takes the momentum of all layers."""
    for rate, block in zip(rates, BLOCKS, strict=True):
        next_v = w.copy()
        next_v[block] -= rate * gradient[block]
        w, v = next_v + beta * (next_v - v), next_v
    return w, v


class Quadratic(nn.Module):
    """Three layers of one tensor each, coupled by a dense Hessian."""

    def __init__(self, hessian, start):
        super().__init__()
        self.hessian = torch.tensor(hessian)
        self.layers = nn.ModuleList(nn.ParameterList([torch.tensor(start[block])]) for block in BLOCKS)

    def weights(self):
        return torch.cat([layer[0] for layer in self.layers])

    def forward(self):
        w = self.weights()
        return w @ self.hessian @ w / 2


def problem(seed):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((8, 8))
    return root.T @ root / 8, rng.standard_normal(8), np.exp(rng.normal(-3, 1, 3))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_micro_steps_by_layer_are_one_step_and_are_nag(seed, beta):
    hessian, w, rates = problem(seed)
    rng = np.random.default_rng(seed)
    model = Quadratic(hessian, w)
    groups = [{"params": list(layer), "lr": float(rate)} for layer, rate in zip(model.layers, rates, strict=True)]
    optimizer = NAG(groups, momentum=beta)
    v = micro_w = micro_v = w
    for _ in range(30):
        rates = np.exp(rng.normal(-3, 1, 3))  # the rates change from step to step, as CLARS's do
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = float(rate)
        w, v = one_step(w, v, hessian @ w, rates, beta)
        micro_w, micro_v = micro_steps(micro_w, micro_v, hessian @ micro_w, rates, beta)
        np.testing.assert_allclose(micro_w, w, rtol=1e-12)
        np.testing.assert_allclose(micro_v, v, rtol=1e-12)
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        np.testing.assert_allclose(model.weights().detach().numpy(), w, rtol=1e-9, atol=1e-12)


def test_the_whole_vector_reading_is_another_method_unless_beta_is_0():
    hessian, w, rates = problem(0)
    v = w + 0.1
    for beta, same in ((0.0, True), (0.9, False)):
        expected, _ = one_step(w, v, hessian @ w, rates, beta)
        literal, _ = whole_vector_micro_steps(w, v, hessian @ w, rates, beta)
        assert np.allclose(literal, expected) == same
