"""Literal float64 twins of the optimizers: the paper's equations in v and w, layer by layer, with no buffer tricks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hf_clars.layers import param_layers
from hf_clars.optim import CLARS, LARS, NAG
from tests.oracle import per_sample_grads


class Twin:
    """Eq. 4 with gamma_k from Eq. 3 (LARS), Eq. 5 (CLARS) or constant over layers (NAG)."""

    def __init__(self, model, *, method, eta=1.0, momentum=0.9, weight_decay=0.0, layers="module", norm="mean"):
        self.model = copy.deepcopy(model).double()
        self.method, self.eta, self.momentum, self.decay = method, eta, momentum, weight_decay
        self.norm = norm
        self.layers = param_layers(self.model, layers=layers)
        self.v = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.rates, self.moments, self.n, self.signal_decay = {}, {}, 16.0, 0.9

    def step(self, loss_of, batch, lr):
        per_sample = per_sample_grads(self.model, loss_of, batch)
        params = dict(self.model.named_parameters())
        for layer in self.layers:
            w = torch.cat([params[n].detach().flatten() for n in layer.param_names])
            g_i = torch.cat([per_sample[n].flatten(1) for n in layer.param_names], dim=1)
            gamma = lr * self._ratio(w, g_i) * self._damping(layer.name, w, g_i)
            self.rates[layer.name] = float(gamma)
            for n in layer.param_names:
                g = per_sample[n].sum(0) + self.decay * params[n].detach()
                v_new = params[n].detach() - gamma * g
                with torch.no_grad():
                    params[n].copy_(v_new + self.momentum * (v_new - self.v[n]))
                self.v[n] = v_new

    def _ratio(self, w, g_i):
        """eta ||w|| / denominator; g_i [B, d] are contributions to a mean loss: their norms add up to the mean norm."""
        if self.method == "nag":
            return 1.0
        if self.method in ("lars", "signallars"):
            scale = g_i.sum(0).norm()
        elif self.norm == "mean":
            scale = g_i.norm(dim=1).sum()
        else:
            scale = (g_i * len(g_i)).norm(dim=1).square().mean().sqrt()
        denominator = scale + self.decay * w.norm()
        return self.eta * w.norm() / denominator if w.norm() > 0 and denominator > 0 else self.eta

    def _damping(self, name, w, g_i):
        """f_k of SignalLARS, from means over samples written out."""
        if self.method != "signallars":
            return 1.0
        b, own = len(g_i), g_i * len(g_i)  # own [B, d]: the samples' own gradients
        scale = w.norm() ** 2 if w.norm() > 0 else 1.0
        now = own.mean(0).norm() ** 2 / scale, own.norm(dim=1).square().mean() / scale
        a, m = (
            self.signal_decay * old + (1 - self.signal_decay) * new
            for old, new in zip(self.moments.get(name, (0.0, 0.0)), now, strict=True)
        )
        self.moments[name] = (a, m)
        share = min(1.0, max(0.0, float((b * a - m) / ((b - 1) * a)))) if a > 0 else 0.0
        return (1 + (self.n - 1) * (1 - share)) / self.n


def small_model(seed=0):
    """Convolution, train-mode BatchNorm, linear: biases and a norm layer included."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 4 * 4, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 3),
    )


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, 6, 6, generator=generator)
    y = torch.randint(0, 3, (size,), generator=generator)
    return x, y


def loss_on(x, y):
    def loss_of(model):
        return nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)

    return loss_of


OPTIMIZERS = {"CLARS": CLARS, "LARS": LARS, "NAG": NAG}


def train(model, optimizer, steps, *, start=0, scheduler=None):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_on(*batch(step))(model).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
