"""Promise: NAG, LARS and CLARS are the paper's equations, on both update paths, with rates that change every step."""

import functools

import pytest
import torch
from torch import nn

from hf_clars.optim import CLARS, LARS, NAG, SignalLARS
from tests.twin import Twin, batch, loss_on, small_model

STEPS = 50
METHODS = {
    "nag": (NAG, {}, {}),
    "nag, decay": (NAG, {"weight_decay": 1e-2}, {"weight_decay": 1e-2}),
    "mgd": (NAG, {"momentum": 0.0}, {"momentum": 0.0}),
    "lars": (LARS, {"eta": 0.02}, {"eta": 0.02}),
    "lars, decay": (LARS, {"eta": 0.02, "weight_decay": 0.05}, {"eta": 0.02, "weight_decay": 0.05}),
    "clars": (CLARS, {"eta": 0.03}, {"eta": 0.03}),
    "clars, decay": (CLARS, {"eta": 0.03, "weight_decay": 0.05}, {"eta": 0.03, "weight_decay": 0.05}),
    "clars, rms": (CLARS, {"eta": 0.03, "norm": "rms"}, {"eta": 0.03, "norm": "rms"}),
    "signal": (SignalLARS, {"eta": 0.01}, {"eta": 0.01}),
    "signal, decay": (SignalLARS, {"eta": 0.03, "weight_decay": 0.05}, {"eta": 0.03, "weight_decay": 0.05}),
    "clars, tensors": (CLARS, {"eta": 0.03, "layers": "tensor"}, {"eta": 0.03, "layers": "tensor"}),
}


def schedule(step, method):
    base = 0.05 if method.startswith(("nag", "mgd")) else 1.0
    return base * (1.5 + torch.sin(torch.tensor(float(step))).item())


@functools.cache
def twin_of(method):
    """The twin after its last step, and its rates of each step: always in float64, and from the same weights."""
    cls, _, settings = METHODS[method]
    twin = Twin(small_model(), method="nag" if cls is NAG else cls.__name__.lower(), **settings)
    rates = []
    for step in range(STEPS):
        x, y = batch(step)
        twin.step(loss_on(x.double(), y), len(x), schedule(step, method))
        rates.append(dict(twin.rates))
    return twin.model, rates


@pytest.mark.parametrize("foreach", [True, False, None], ids=["multi-tensor", "single-tensor", "default"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["f64", "f32"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_its_literal_twin(method, dtype, tolerance, foreach):
    cls, settings, _ = METHODS[method]
    model = small_model().to(dtype)
    twin, twin_rates = twin_of(method)
    optimizer = cls(model, 1.0, foreach=foreach, **settings)
    for step in range(STEPS):
        x, y = batch(step)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, method)
        optimizer.zero_grad()
        loss_on(x, y)(model).backward()
        optimizer.step()
        rates = dict(zip(optimizer.layer_names, optimizer.last_step.rate.tolist(), strict=True))
        for name, rate in twin_rates[step].items():
            assert rates[name] == pytest.approx(rate, rel=100 * tolerance)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("foreach", [True, False, None])
def test_nag_at_a_constant_rate_is_torchs_nesterov_sgd(foreach):
    model, other = small_model().double(), small_model().double()
    ours = NAG(model, 0.05, momentum=0.9, weight_decay=1e-3, foreach=foreach)
    theirs = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
    for step in range(30):
        x, y = batch(step)
        for net, opt in ((model, ours), (other, theirs)):
            opt.zero_grad()
            loss_on(x, y)(net).backward()
            opt.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_nag_at_a_changing_rate_is_not_torchs_nesterov_sgd():
    model, other = small_model().double(), small_model().double()
    ours = NAG(model, 0.05)
    theirs = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9, nesterov=True)
    for step in range(5):
        for net, opt in ((model, ours), (other, theirs)):
            opt.param_groups[0]["lr"] = 0.05 / (1 + step)
            opt.zero_grad()
            loss_on(*batch(step))(net).backward()
            opt.step()
    first, second = next(model.parameters()), next(other.parameters())
    assert (first - second).norm() > 1e-3 * second.norm()


def test_micro_steps_of_eq_6_give_the_steps_of_eq_4():
    """Updating v and w one layer after the other, each with the stale gradient, is what NAG does at once."""
    model, twin = small_model().double(), small_model().double()
    optimizer = NAG(model, 0.05)
    blocks = dict(twin.named_parameters())
    v = {n: p.detach().clone() for n, p in blocks.items()}
    for step in range(4):
        optimizer.zero_grad()
        loss_on(*batch(step))(model).backward()
        optimizer.step()
        twin.zero_grad()
        loss_on(*batch(step))(twin).backward()
        stale = {n: p.grad.clone() for n, p in blocks.items()}
        for n, w in blocks.items():
            with torch.no_grad():
                v_next = w - 0.05 * stale[n]
                w.copy_(v_next + 0.9 * (v_next - v[n]))
                v[n] = v_next
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_reference_code_matches_an_independent_account_of_it():
    """Micro-batch norms with decay inside, layer scale at most 0.1, vectors unscaled, rate outside the momentum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: torch.zeros_like(w) for n, w in weights.items()}
    optimizer = CLARS.reference_code(model, 0.7, eta=0.05)
    decay, micro, size = 2e-4, 4, 8
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(micro, size, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (micro, size), generator=generator)
        optimizer.zero_grad()
        for m in range(micro):
            (nn.functional.cross_entropy(model(x[m]), y[m]) / micro).backward()
        optimizer.step()

        shapes = {n: w.clone().requires_grad_() for n, w in weights.items()}
        grads = []
        for m in range(micro):
            loss = nn.functional.cross_entropy(torch.func.functional_call(model, shapes, (x[m],)), y[m])
            grads.append(dict(zip(shapes, torch.autograd.grad(loss, list(shapes.values())), strict=True)))
        for n, w in weights.items():
            mean_norm = sum((g[n] + decay * w).norm() for g in grads) / micro
            scale = min(float(0.05 * w.norm() / mean_norm), 0.1) if w.dim() > 1 else 1.0
            buffers[n] = 0.9 * buffers[n] + sum(g[n] for g in grads) / micro + decay * w
            weights[n] = w - 0.7 * scale * buffers[n]
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[n], rtol=1e-9, atol=1e-12)
