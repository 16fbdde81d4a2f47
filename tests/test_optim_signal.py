"""Promise: SignalLARS damps LARS by the measured share of signal, and is LARS where there is none."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_clars.optim import LARS, SignalLARS
from hf_clars.optim.rates import signal_damping, signal_moments, signal_share
from hf_clars.records import load_optimizer_state, save_optimizer_state
from tests.twin import batch, loss_on, small_model, train


def group_norm_model():
    """Samples are not coupled: a batch may be split as one likes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    ).double()


def vectors(count):
    return st.lists(st.floats(0, 1e6), min_size=count, max_size=count)


@settings(max_examples=200, deadline=None)
@given(vectors(3), vectors(3), vectors(3), st.integers(1, 10_000), st.floats(1, 1000))
def test_the_share_is_a_share_and_the_damping_between_one_and_its_nth_part(w, g, m, size, n):
    moments = signal_moments(*(torch.tensor(v, dtype=torch.float64) for v in (w, g, m)))
    share = signal_share(moments, size)
    assert ((share >= 0) & (share <= 1)).all()
    damping = signal_damping(share, n)
    assert ((damping >= 1 / n - 1e-12) & (damping <= 1 + 1e-12)).all()


def test_the_share_of_a_known_signal_in_known_noise():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(50, generator=generator, dtype=torch.float64)
    size, noise = 64, 4.0
    moments = torch.zeros(2, 1, dtype=torch.float64)
    for _ in range(4000):
        grads = signal + noise * torch.randn(size, 50, generator=generator, dtype=torch.float64)
        norms = grads.mean(0).norm()[None], grads.norm(dim=1).square().mean().sqrt()[None]
        moments += signal_moments(torch.ones(1, dtype=torch.float64), *norms) / 4000
    true = signal.norm() ** 2 / (signal.norm() ** 2 + 50 * noise**2 / size)
    assert float(signal_share(moments, size)) == pytest.approx(float(true), abs=0.005)


def test_one_sample_shows_no_noise_and_is_taken_as_lars_would():
    moments = torch.tensor([[1.0], [1.0]])
    assert float(signal_share(moments, 1)) == 0.0


def test_where_there_is_no_signal_it_is_lars():
    """Pairs of samples with opposite labels of a symmetric loss nearly cancel: the share is clipped to 0."""
    ours, theirs = group_norm_model(), group_norm_model()
    optimizer = SignalLARS(ours, 1.0, eta=0.01, weight_decay=0.01)
    lars = LARS(theirs, 1.0, eta=0.01, weight_decay=0.01)
    x = torch.randn(8, 1, 6, 6, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    near = torch.cat([x[::2], x[::2] + 1e-3]).reshape(2, 4, 1, 6, 6).transpose(0, 1).reshape(8, 1, 6, 6)
    for _ in range(5):
        for model, o in ((ours, optimizer), (theirs, lars)):
            o.zero_grad()
            (model(near)[:, 0] * signs).mean().backward()
            o.step()
        assert (optimizer.last_step.signal == 0).all()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_identical_samples_are_all_signal_and_the_step_is_the_nth_part_of_lars():
    ours, theirs = group_norm_model(), group_norm_model()
    x, y = batch(0, size=1)
    x, y = x.expand(8, 1, 6, 6).double(), y.expand(8)
    optimizer, lars = SignalLARS(ours, 1.0, eta=0.01, n=10), LARS(theirs, 1.0, eta=0.01)
    for model, o in ((ours, optimizer), (theirs, lars)):
        nn.functional.cross_entropy(model(x), y).backward()
        o.step()
    torch.testing.assert_close(optimizer.last_step.rate, lars.last_step.rate / 10)


@pytest.mark.parametrize("splits", [2, 4])
def test_accumulated_passes_are_one_batch(splits):
    whole, parts = group_norm_model(), group_norm_model()
    one, several = SignalLARS(whole, 0.5), SignalLARS(parts, 0.5)
    for step in range(4):
        x, y = batch(step)
        one.zero_grad()
        nn.functional.cross_entropy(whole(x.double()), y).backward()
        one.step()
        several.zero_grad()
        for part_x, part_y in zip(x.double().chunk(splits), y.chunk(splits), strict=True):
            (nn.functional.cross_entropy(parts(part_x), part_y) / splits).backward()
        several.step()
        torch.testing.assert_close(one.last_step.signal, several.last_step.signal)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("scale", [1e-3, 1024.0])
def test_a_loss_scale_taken_out_before_the_step_changes_nothing(scale):
    plain, scaled = group_norm_model(), group_norm_model()
    one, other = SignalLARS(plain, 0.5), SignalLARS(scaled, 0.5)
    for step in range(3):
        x, y = batch(step)
        for model, o, factor in ((plain, one, 1.0), (scaled, other, scale)):
            o.zero_grad()
            (factor * nn.functional.cross_entropy(model(x.double()), y)).backward()
            for p in model.parameters():
                p.grad /= factor
            o.step()
    torch.testing.assert_close(one.last_step.signal, other.last_step.signal)
    torch.testing.assert_close(one.last_step.rate, other.last_step.rate)


def test_it_goes_on_from_a_saved_state_bit_for_bit(tmp_path):
    whole = small_model()
    train(whole, SignalLARS(whole, 0.5), 8)
    first = small_model()
    optimizer = SignalLARS(first, 0.5)
    train(first, optimizer, 4)
    save_optimizer_state(optimizer.state_dict(), tmp_path / "optimizer.safetensors")
    second = copy.deepcopy(first.cpu())
    for hooks in (m._forward_hooks for m in second.modules()):
        hooks.clear()
    second = small_model()
    second.load_state_dict(first.state_dict())
    again = SignalLARS(second, 0.5)
    again.load_state_dict(load_optimizer_state(tmp_path / "optimizer.safetensors"))
    train(second, again, 4, start=4)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_is_not_taken_leaves_the_running_moments():
    model, other = group_norm_model(), group_norm_model()
    with_nan, without = SignalLARS(model, 0.5), SignalLARS(other, 0.5)
    for step in range(4):
        x, y = batch(step)
        if step == 2:
            with_nan.zero_grad()
            (nn.functional.cross_entropy(model(x.double()), y) * float("nan")).backward()
            with_nan.step()
            assert not with_nan.last_step.applied
        for m, o in ((model, with_nan), (other, without)):
            o.zero_grad()
            nn.functional.cross_entropy(m(x.double()), y).backward()
            o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_looking_at_the_measures_does_not_move_the_averages():
    model, other = small_model(), small_model()
    one, two = SignalLARS(model, 0.5), SignalLARS(other, 0.5)
    for step in range(3):
        for m, o in ((model, one), (other, two)):
            o.zero_grad()
            loss_on(*batch(step))(m).backward()
        for _ in range(3):
            one.layer_measures()
        one.step()
        two.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("setting", "value"), [("n", 0.5), ("n", float("nan")), ("signal_decay", 1.0)])
def test_settings_that_cannot_work_are_named(setting, value):
    with pytest.raises(ValueError, match=setting):
        SignalLARS(small_model(), 0.5, **{setting: value})
