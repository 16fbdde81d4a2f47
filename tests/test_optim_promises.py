"""Promises of the optimizers beyond their equations: bounds, scales, accumulation, zero norms."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_clars.optim import CLARS, LARS, NAG
from tests.twin import batch, loss_on, mlp, small_model

# ---- R_k ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    micro=st.integers(1, 3),
    samples=st.one_of(st.none(), st.integers(1, 12)),
    norm=st.sampled_from(["mean", "rms"]),
    layers=st.sampled_from(["module", "tensor"]),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
)
def test_the_ratio_stays_between_0_and_1(size, micro, samples, norm, layers, scale, seed):
    model = small_model(seed).eval()
    optimizer = CLARS(model, 0.1, norm=norm, layers=layers, samples=samples)
    for m in range(micro):
        (loss_on(*batch(seed + m, size))(model) * scale).backward()
    optimizer.step()
    ratio = optimizer.last_step.ratio
    assert (ratio >= 0).all()
    assert (ratio <= 1 + 1e-6).all()


def test_clars_equals_lars_on_identical_samples():
    model, other = mlp().double(), None
    other = copy.deepcopy(model)
    clars, lars = CLARS(model, 2.0, eta=0.02), LARS(other, 2.0, eta=0.02)
    for step in range(10):
        torch.manual_seed(step)
        x, y = torch.randn(1, 6).double().expand(7, 6), torch.full((7,), step % 3)
        for net, opt in ((model, clars), (other, lars)):
            opt.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
        torch.testing.assert_close(clars.last_step.ratio, torch.ones(2).double())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scaling_the_loss_changes_no_rate_relative_to_the_gradient(scale):
    """The scale contract: p.grad and norms scale alike, so steps and R_k do not move at all."""
    model, other = small_model().double(), small_model().double()
    first, second = CLARS(model, 1.0), CLARS(other, 1.0)
    for step in range(3):
        loss = loss_on(*batch(step))
        first.zero_grad(), second.zero_grad()
        loss(model).backward()
        (loss(other) * scale).backward()
        first.step(), second.step()
        torch.testing.assert_close(first.last_step.ratio, second.last_step.ratio, rtol=1e-9, atol=0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [None, 24])
@pytest.mark.parametrize(("micro", "size"), [(1, 64), (4, 16), (16, 4)])
def test_accumulation_changes_nothing_without_batch_coupling(micro, size, samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 3)).double()
    reference = copy.deepcopy(model)
    ours, whole = CLARS(model, 1.0, samples=samples), CLARS(reference, 1.0, samples=samples)
    for step in range(5):
        x, y = batch(step, 64)
        x = x.double()
        ours.zero_grad(), whole.zero_grad()
        loss_on(x, y)(reference).backward()
        for part_x, part_y in zip(x.split(size), y.split(size), strict=True):
            (loss_on(part_x, part_y)(model) / micro).backward()
        ours.step(), whole.step()
        torch.testing.assert_close(ours.last_step.rate, whole.last_step.rate, rtol=1e-9, atol=0)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_subset_estimates_the_mean_of_the_whole_batch():
    model = small_model().eval()
    x, y = batch(0, 64)
    optimizer = CLARS(model, 1.0, samples=16)
    loss_on(x, y)(model).backward()
    optimizer.step()
    subset = optimizer.last_step.mean_sample_norm
    model = small_model().eval()
    optimizer = CLARS(model, 1.0)
    loss_on(x[:16], y[:16])(model).backward()
    optimizer.step()
    torch.testing.assert_close(subset, optimizer.last_step.mean_sample_norm)


# ---- zero norms and dead layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [CLARS, LARS])
@pytest.mark.parametrize("layers", ["module", "tensor"])
def test_a_zero_norm_layer_leaves_zero_with_a_plain_step(cls, layers):
    model = mlp().double()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    optimizer = cls(model, 0.5, eta=0.02, momentum=0.0, layers=layers)
    nn.functional.cross_entropy(model(torch.randn(8, 6).double()), torch.zeros(8, dtype=torch.long)).backward()
    expected = -0.5 * 0.02 * model[2].bias.grad
    optimizer.step()
    torch.testing.assert_close(model[2].bias.detach(), expected)
    assert model[2].bias.norm() > 0


@pytest.mark.parametrize("make", [CLARS, LARS, CLARS.reference_code], ids=["CLARS", "LARS", "reference_code"])
@pytest.mark.parametrize("dead", [0.0, 1e-30, 1e-12])
def test_a_dead_layer_that_wakes_does_not_destroy_the_weights(make, dead):
    """The gradient vanishes for a while, then comes back: no step moves a layer by more than healthy ones may."""
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = make(model, 1.0, eta=1e-2)
    x, y = torch.randn(8, 6).double(), torch.zeros(8, dtype=torch.long)
    largest = 0.0
    for step in range(12):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss * (dead if 3 <= step < 8 else 1.0)).backward()
        optimizer.step()
        for p, b in zip(model.parameters(), before, strict=True):
            largest = max(largest, float((p.detach() - b).norm() / b.norm()))
    # Layer-wise scaling moves a layer by lr * eta * (1 + momentum + ...) of its norm: 1 % * 10 here; a layer is several
    # tensors, and biases are small beside their weight. What must not happen is orders of magnitude more.
    assert largest < (30.0 if make == CLARS.reference_code else 3.0)  # two bound methods are equal, but not one object
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_clip_is_what_saves_a_momentum_that_keeps_old_gradients():
    """While the gradient is rounding noise, a rate outside the momentum multiplies what the buffer remembers."""
    changes = {}
    for clip in (None, 10.0):
        torch.manual_seed(0)
        model = mlp().double()
        optimizer = LARS(model, 1.0, eta=1e-2, momentum_form="heavy_ball", trust_clip=clip)
        for factor in (1.0, 1e-20):
            before = model[0].weight.detach().clone()
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(torch.ones(4, 6).double()), torch.zeros(4).long()) * factor).backward()
            optimizer.step()
        changes[clip] = float((model[0].weight.detach() - before).norm() / before.norm())
    assert changes[None] > 1e6
    assert changes[10.0] < 0.1


def test_the_trust_clip_bounds_the_ratio_and_its_default_is_out_of_the_way():
    model = mlp()
    optimizer = CLARS(model, 1.0, eta=1.0, trust_clip=2.0)
    nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.zeros(8, dtype=torch.long)).mul(1e-3).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.last_step.rate, torch.full((2,), 2.0))
    assert CLARS(mlp()).defaults["trust_clip"] == 1e8


@pytest.mark.parametrize("make", [NAG, LARS, CLARS])
def test_a_complex_parameter_is_refused_by_name(make):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"1\.weight is complex .*view_as_complex"):
        make(model, 0.1)
