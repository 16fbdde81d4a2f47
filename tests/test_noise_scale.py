"""Promise: the noise scale is what closed forms and brute force say, whatever the number of passes and steps."""

import math

import pytest
import torch
from torch import nn

from hf_clars.per_sample import NoiseScaleAverage, NormMonitor, unbiased_moments

D = 12


def quadratic(seed=0):
    """Samples g_i = G + L z_i with known G and covariance L L^T."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(D, generator=generator, dtype=torch.float64) / 4
    root = torch.randn(D, D, generator=generator, dtype=torch.float64) / 3
    return mean, root, float(root.square().sum() / mean.square().sum())


def steps_of(mean, root, batch, steps, seed=1):
    """(||g||^2, mean ||g_i||^2) of each step, in two layers."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        g = mean + torch.randn(batch, D, generator=generator, dtype=torch.float64) @ root.T
        parts = g[:, :5], g[:, 5:]
        yield (
            torch.stack([part.mean(0).square().sum() for part in parts]),
            torch.stack([part.square().sum(1).mean() for part in parts]),
        )


@pytest.mark.parametrize("batch", [2, 16, 200])
def test_both_moments_are_unbiased_for_a_known_covariance(batch):
    mean, root, _ = quadratic()
    found = [
        torch.stack(unbiased_moments(b.sum(), m.sum(), batch)) for b, m in steps_of(mean, root, batch, 20_000 // batch)
    ]
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    expected = torch.stack([mean.square().sum(), root.square().sum()])
    assert ((found.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("batch", [8, 64])
def test_the_average_tends_to_the_closed_form_in_each_layer(batch):
    mean, root, whole = quadratic()
    average = NoiseScaleAverage(2, decay=1.0)
    for b, m in steps_of(mean, root, batch, 1500):
        assert average.update(b, m, batch)
    read = average.read()
    layers = [root[:5].square().sum() / mean[:5].square().sum(), root[5:].square().sum() / mean[5:].square().sum()]
    for place, expected in enumerate([*layers, whole]):
        assert abs(float(read.value[place]) - float(expected)) < 4 * float(read.standard_error[place])
        assert float(read.standard_error[place]) < 0.25 * float(expected)
    batch_square = mean.square().sum() + root.square().sum() / batch
    torch.testing.assert_close(read.share[-1], mean.square().sum() / batch_square, rtol=0.05, atol=0)


def test_the_standard_error_and_the_band_are_as_wide_as_the_scatter():
    mean, root, whole = quadratic()
    reads = []
    for seed in range(120):
        average = NoiseScaleAverage(2, decay=0.95)
        for b, m in steps_of(mean, root, 64, 60, seed=seed):
            average.update(b, m, 64)
        reads.append(average.read())
    values = torch.stack([r.value[-1] for r in reads])
    stated = torch.stack([r.standard_error[-1] for r in reads]).mean()
    torch.testing.assert_close(stated, values.std(), rtol=0.3, atol=0)
    inside = torch.stack([(r.low[-1] <= whole) & (whole <= r.high[-1]) for r in reads]).double().mean()
    assert 0.55 < inside < 0.8  # one standard error: 0.68


def test_the_quotient_of_averages_is_nearer_than_the_average_of_quotients():
    mean, root, whole = quadratic()
    average, quotients = NoiseScaleAverage(2, decay=1.0), []
    for b, m in steps_of(mean, root, 8, 2000):
        average.update(b, m, 8)
        signal, noise = unbiased_moments(b.sum(), m.sum(), 8)
        quotients.append(noise / signal)
    assert abs(average.read().value[-1] - whole) < 0.1 * whole < abs(torch.stack(quotients).mean() - whole)


def test_pure_noise_is_infinite_and_identical_samples_are_zero():
    average = NoiseScaleAverage(1)
    average.update(torch.tensor([0.05]), torch.tensor([1.0]), 16)  # less than 1 / 16: ||G||^2 would be negative
    assert math.isinf(average.read().value[-1])
    assert float(average.read().share[-1]) == 0
    same = NoiseScaleAverage(1)
    same.update(torch.tensor([2.0]), torch.tensor([2.0]), 16)
    assert float(same.read().value[-1]) == 0
    assert float(same.read().share[-1]) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_of_one_and_values_that_are_no_numbers_are_left_out(bad):
    average = NoiseScaleAverage(1)
    assert not average.update(torch.ones(1), torch.ones(1), 1)
    assert not average.update(torch.tensor([bad]), torch.ones(1), 8)
    assert average.steps == 0
    assert torch.isnan(average.read().value).all()


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        NoiseScaleAverage(1, decay=decay)


# ---- from a network, against brute force -----------------------------------------------------------------------


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).to(dtype)


def data(size=12):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


def brute_force(model, x, y):
    """One backward pass a sample; the moments written out."""
    rows = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(rows)
    b = len(g)
    noise = (g - g.mean(0)).square().sum() / (b - 1)  # the unbiased trace of the sample covariance
    return noise, g.mean(0).square().sum() - noise / b, g.norm(dim=1)


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_monitor_agrees_with_brute_force_for_any_accumulation(passes, reduction):
    model, (x, y) = network(), data()
    noise, signal, norms = brute_force(model, x, y)
    scale = 1.0 if reduction == "mean" else len(x)  # a summed loss has gradients B times as large, all of them
    with NormMonitor(model, every=1) as monitor:
        for number, (part, labels) in enumerate(zip(x.chunk(passes), y.chunk(passes), strict=True), 1):
            with monitor.batch(last=number == passes):
                loss = nn.functional.cross_entropy(model(part), labels, reduction=reduction)
                (loss / passes if reduction == "mean" else loss).backward()
        read = monitor.noise.read()
        torch.testing.assert_close(read.noise[-1], noise * scale**2, rtol=1e-9, atol=0)
        torch.testing.assert_close(read.signal[-1], signal * scale**2, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            read.value[-1], torch.where(signal > 0, noise / signal, torch.inf), rtol=1e-8, atol=0
        )
        top = monitor.last.top_norm[: len(x)]
        torch.testing.assert_close(top, norms.sort(descending=True).values * scale, rtol=1e-9, atol=0)


def test_all_passes_of_one_size_give_the_same_to_the_last_digits():
    found = []
    for passes in (1, 3):
        model, (x, y) = network(), data()
        with NormMonitor(model, every=1) as monitor:
            for number, (part, labels) in enumerate(zip(x.chunk(passes), y.chunk(passes), strict=True), 1):
                with monitor.batch(last=number == passes):
                    (nn.functional.cross_entropy(model(part), labels) / passes).backward()
            found.append(monitor.last)
    for name in ("batch_square", "sample_square", "sample_norm", "quantiles", "top_norm", "top_share"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-10, atol=0, equal_nan=True)


class Regression(nn.Module):
    """Squared errors of a linear model at fixed weights, an offset of its own."""

    def __init__(self, off, bias):
        super().__init__()
        self.slope, self.offset = nn.Linear(len(off), 1, bias=False).double(), nn.Linear(1, 1).double()
        self.slope.weight.data.copy_(off)
        self.offset.weight.requires_grad_(False)
        self.offset.bias.data.fill_(bias)

    def forward(self, x, noise):
        return (self.slope(x)[:, 0] + self.offset(torch.zeros_like(x[:, :1]))[:, 0] - noise).square().mean() / 2


def test_of_linear_regression_the_monitor_finds_the_closed_form_in_each_layer_and_its_error():
    off, bias, sigma = torch.full((6,), 0.4).double(), 0.3, 0.7
    spread = torch.linspace(0.5, 2, 6).double()  # variances of the inputs, which are Gaussian
    mean, squares = spread * off, float((spread * off * off).sum())
    second = spread.sum() * (squares + bias**2 + sigma**2) + 2 * mean.square().sum()
    signal = torch.stack([mean.square().sum(), torch.tensor(bias**2).double()])
    noise = torch.stack([second, torch.tensor(squares + bias**2 + sigma**2).double()]) - signal
    expected = torch.cat([noise / signal, (noise.sum() / signal.sum())[None]])
    generator, model = torch.Generator().manual_seed(0), Regression(off, bias)
    inside, signals = [], []
    with NormMonitor(model, every=1, decay=1.0, strict=True, top_k=0) as monitor:
        for _ in range(30):
            monitor.noise = NoiseScaleAverage(2, decay=1.0)
            for _ in range(16):
                model.zero_grad()
                with monitor.batch():
                    x = torch.randn(32, 6, generator=generator).double() * spread.sqrt()
                    model(x, sigma * torch.randn(32, generator=generator).double()).backward()
            read = monitor.noise.read()
            inside.append((read.low <= expected) & (expected <= read.high))
            signals.append(read.signal)
    found = torch.stack(signals)
    away = found.mean(0) - torch.cat([signal, signal.sum()[None]])
    assert (away.abs() < 4 * found.std(0) / math.sqrt(30)).all()
    covered = torch.stack(inside).double().mean(0)
    assert ((covered > 0.48) & (covered < 0.88)).all()  # one standard error: 0.68, give or take 2.4 of its own


def test_batchnorm_in_training_mode_couples_samples_so_the_scale_is_left_out_with_a_word(caplog):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)).double()
    x, y = data()
    with NormMonitor(model, every=1, strict=True) as monitor:
        for _ in range(2):
            with monitor.batch():
                nn.functional.cross_entropy(model(x), y).backward()
            model.zero_grad()
        assert monitor.noise.steps == 0
        assert (monitor.last.ratio <= 1).all()
        assert sum("BatchNorm in training mode" in r.getMessage() for r in caplog.records) == 1
        model.eval()
        with monitor.batch():
            nn.functional.cross_entropy(model(x), y).backward()
        assert monitor.noise.steps == 1


def test_within_a_batch_as_between_batches():
    """The noise told from one batch's samples is the scatter of gradients over many batches, which needs no samples."""
    model, (x, y) = network(), data(400)
    generator = torch.Generator().manual_seed(5)
    between = []
    with NormMonitor(model, every=1, strict=True, decay=1.0) as monitor:
        for _ in range(60):
            chosen = torch.randint(0, 400, (8,), generator=generator)
            with monitor.batch():
                nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            between.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            model.zero_grad()
        read = monitor.noise.read()
    g = torch.stack(between)
    noise = 8 * (g - g.mean(0)).square().sum() / (len(g) - 1)
    torch.testing.assert_close(read.noise[-1], noise, rtol=0.2, atol=0)
