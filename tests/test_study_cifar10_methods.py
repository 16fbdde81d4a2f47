"""Promise: the study's variants and baselines on CIFAR-10 compute what they are named after."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from hf_clars.optim import NAG, SignalLARS
from research.cifar10.methods import VRLARS, AdaScale, VariantSignalLARS, build_optimizer, factor
from research.cifar10.settings import METHODS, SCHEDULES, Settings, kind, rate_at


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(count=3, size=16):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator, dtype=torch.float64), torch.arange(size) % 3) for _ in range(count)
    ]


def steps(model, optimizer, *, passes=1):
    """Some steps; the rates of each."""
    rates = []
    for x, y in batches():
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(passes), y.chunk(passes), strict=True):
            (nn.functional.cross_entropy(model(part_x), part_y) / passes).backward()
            if isinstance(optimizer, VRLARS):
                optimizer.after_pass()
        optimizer.step()
        rates.append(None if optimizer.last_step is None else optimizer.last_step.rate.clone())
    return rates


def sample_moments(model, x, y):
    """By one backward a sample: (||g||^2, mean of ||g_i||^2, ||w||^2) of each linear layer."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    grads = []
    for i in range(len(x)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        grads.append([torch.cat([p.grad.flatten() for p in m.parameters()]) for m in layers])
    model.zero_grad()
    stacked = [torch.stack(of_layer) for of_layer in zip(*grads, strict=True)]
    weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in layers]
    return [(float(g.mean(0).norm() ** 2), float(g.norm(dim=1).square().mean()), float(w.norm() ** 2))
            for g, w in zip(stacked, weights, strict=True)]  # fmt: skip


def share_of(square, mean_square, size):
    return min(1.0, max(0.0, (size * square - mean_square) / ((size - 1) * square)))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("form", "by_hand"), [("gain", lambda s, n: (1 + (n - 1) * (1 - s)) / n),
                                               ("sum", lambda s, n: 1 / (1 + (n - 1) * s))])  # fmt: skip
def test_the_factors_are_their_formulas(form, by_hand, power):
    share = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    found = factor(share, form=form, n=19.0, power=power)
    assert found.tolist() == pytest.approx([by_hand(s, 19.0) ** power for s in share.tolist()])


@pytest.mark.parametrize("beta", [0.0, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_the_derived_factor_keeps_the_length_of_the_momentums_sum(share, beta):
    """Of steps with a fixed part (share of the square) and independent noise: that of pure noise at full length."""
    weights = torch.tensor([beta**i for i in range(2000)], dtype=torch.float64)
    square = share * weights.sum() ** 2 + (1 - share) * weights.square().sum()
    n = (1 + beta) / (1 - beta)
    f = float(factor(torch.tensor(share, dtype=torch.float64), form="sum", n=n, power=0.5))
    assert f**2 * float(square) == pytest.approx(float(weights.square().sum()), rel=1e-9)


def test_the_products_settings_make_the_products_class_and_the_variant_agrees_with_it():
    settings = Settings("signal_lars", 0.1)
    model, other = net(), net()
    product = build_optimizer(model, settings)
    assert type(product) is SignalLARS
    variant = VariantSignalLARS(
        other, 0.1, form="gain", power=1.0, share="layer", eta=1.0, n=16.0, momentum=0.9, weight_decay=5e-4
    )
    for one, two in zip(steps(model, product), steps(other, variant), strict=True):
        torch.testing.assert_close(one, two)


def test_one_share_for_the_network_comes_from_the_sums_over_layers():
    model = net()
    (x, y), *_ = batches()
    found = sample_moments(model, x, y)
    whole = share_of(sum(g / w for g, _, w in found), sum(m / w for _, m, w in found), len(x))
    optimizer = build_optimizer(model, Settings("signal_lars", 0.1, share="network", n=10.0, weight_decay=0.0))
    rates = steps(model, optimizer)[0]
    expected = [0.1 * (1 + 9 * (1 - whole)) / 10 * math.sqrt(w / g) for g, _, w in found]
    assert rates.tolist() == pytest.approx(expected, rel=1e-6)
    assert optimizer.last_step.signal.unique().numel() == 1


def test_adascale_is_its_gain_over_its_scale_for_every_layer():
    """r = (sigma^2 + mu^2) / (sigma^2 / S + mu^2), sigma^2 being the variance of a batch of B / S samples."""
    model = net()
    x, y = batches()[0][0], torch.zeros(16, dtype=torch.long)  # one label: a signal
    found = sample_moments(model, x, y)
    size, scale = len(x), 4
    square, mean_square = sum(g for g, _, _ in found), sum(m for _, m, _ in found)
    signal = (size * square - mean_square) / (size - 1)
    variance = (mean_square - signal) / (size / scale)
    gain = (variance + signal) / (variance / scale + signal)
    optimizer = AdaScale(model, 0.5, batch=scale * 128)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert 1 < gain < scale
    rates = optimizer.last_step.rate
    assert rates.tolist() == pytest.approx([0.5 * gain / scale] * 2, rel=1e-6)


def test_adascale_of_a_base_batch_is_nesterov():
    model, other = net(), net()
    steps(model, build_optimizer(model, Settings("adascale", 0.3, batch=128)))
    steps(other, NAG(other, 0.3, momentum=0.9, weight_decay=5e-4))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_vr_lars_scales_each_element_by_its_signal_to_noise_ratio():
    model, passes = net(), 4
    (x, y), *_ = batches()
    of_passes = []
    for part_x, part_y in zip(x.chunk(passes), y.chunk(passes), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(part_x), part_y).backward()
        of_passes.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    stacked = [torch.stack(of_weight) for of_weight in zip(*of_passes, strict=True)]
    ratios = [g.mean(0) ** 2 / g.var(0, unbiased=False) for g in stacked]
    expected = []
    for layer in (slice(0, 2), slice(2, 4)):  # weight and bias
        mean = torch.cat([r.flatten() for r in ratios[layer]]).mean()
        scaled = [g.mean(0) * (r / mean).clamp(0.1, 1.0) for g, r in zip(stacked[layer], ratios[layer], strict=True)]
        norm = torch.cat([g.flatten() for g in scaled]).norm()
        weight = torch.cat([p.detach().flatten() for p in list(model.parameters())[layer]]).norm()
        expected += [p.detach() - 1.9 * 0.1 * weight / norm * g  # the first step of Nesterov's: 1 + momentum
                     for p, g in zip(list(model.parameters())[layer], scaled, strict=True)]  # fmt: skip
    optimizer = VRLARS(model, 0.1, eta=1.0, momentum=0.9)
    for part_x, part_y in zip(x.chunk(passes), y.chunk(passes), strict=True):
        (nn.functional.cross_entropy(model(part_x), part_y) / passes).backward()
        optimizer.after_pass()
    optimizer.step()
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q)


def test_vr_lars_refuses_a_batch_of_one_pass():
    model = net()
    optimizer = VRLARS(model, 0.1, eta=1.0)
    (x, y), *_ = batches()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.after_pass()
    with pytest.raises(ValueError, match="several passes"):
        optimizer.step()


def test_a_power_of_the_ratio_lies_between_lars_and_clars():
    rates = {}
    for name, settings in {
        "lars": Settings("lars", 0.1),
        "half": Settings("lars_times_ratio", 0.1, power=0.5),
        "clars": Settings("clars", 0.1),
    }.items():
        model = net()
        rates[name] = steps(model, build_optimizer(model, dataclasses.replace(settings, weight_decay=0.0)))[0]
    torch.testing.assert_close(rates["half"].square(), rates["lars"] * rates["clars"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_steps(method):
    if method == "lamb":
        pytest.importorskip("timm")
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, Settings(method, 0.01))
    optimizer.last_step = getattr(optimizer, "last_step", None)
    steps(model, optimizer, passes=2)
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_begin_at_the_rate_and_do_not_rise(schedule):
    settings = Settings("lars", 2.0, schedule=schedule)
    rates = [rate_at(settings, step, 100, 0) for step in range(100)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(2.0, rel=0.1)  # TVLARS' sigmoid begins a little below
    assert rates[-1] == pytest.approx({"poly-2": 2e-4, "constant": 2.0, "steps": 2e-3}.get(schedule, rates[-1]))


def test_the_steps_of_the_papers_third_figure():
    settings = Settings("lars", 1.0, schedule="steps")
    rates = [rate_at(settings, step, 200, 0) for step in (59, 60, 119, 120, 149, 150)]
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001])


def test_a_warmup_rises_in_equal_parts_beside_the_decay():
    settings = Settings("lars", 1.0, schedule="constant", warmup=1.0)
    assert [rate_at(settings, step, 10, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("name", "value"), [("method", "adam"), ("schedule", "step"), ("form", "x"), ("share", "all")])
def test_words_that_no_run_can_have_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Settings(**{"method": "lars", "rate": 0.1, name: value})


def test_runs_at_other_rates_and_seeds_are_of_one_kind():
    settings = Settings("lars", 0.1)
    assert kind(settings) == kind(dataclasses.replace(settings, rate=0.2, seed=3))
    assert kind(settings) != kind(dataclasses.replace(settings, warmup=3.0))
    assert kind(vars(settings)) == kind(settings)
