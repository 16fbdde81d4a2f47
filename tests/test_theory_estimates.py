"""Promise: L_k, L_g, M_k, M and M_g come out as brute force gives them, again and again, and the model is untouched."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hf_clars.errors import ConfigError, DataError
from hf_clars.layers import param_layers
from hf_clars.optim import CLARS, LARS, NAG
from hf_clars.theory import estimate_lipschitz, measure_gradient_moments, variance_constants, variance_floor
from tests.oracle import one_by_one
from tests.trainer_kit import Images, Plain


def smooth_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def classification(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def points(count=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (count,), generator=generator)


def uneven(x, y, *sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def dense_hessian(model, x, y):
    params = list(model.parameters())
    gradients = torch.autograd.grad(classification(model, (x, y)), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    rows = [torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True) for value in flat]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).detach()


@pytest.mark.parametrize("layers", ["module", "tensor"])
def test_lipschitz_constants_are_the_spectral_norms_of_the_dense_hessian(layers):
    model, (x, y) = smooth_model(), points()
    hessian = dense_hessian(model, x, y)
    assert torch.linalg.eigvalsh(hessian)[0] < 0  # not convex: the largest absolute value counts
    found = estimate_lipschitz(
        model, uneven(x, y, 7, 12, 1), loss=classification, layers=layers, tolerance=1e-9, max_iterations=3000
    )
    assert found.converged
    assert found.whole.value == pytest.approx(float(torch.linalg.matrix_norm(hessian, 2)), rel=1e-4)
    begin = 0
    for layer in param_layers(model, layers=layers):
        end = begin + sum(p.numel() for p in layer.params)
        expected = float(torch.linalg.matrix_norm(hessian[begin:end, begin:end], 2))
        assert found.layers[layer.name].value == pytest.approx(expected, rel=1e-4)
        begin = end
    assert list(found.layers) == [layer.name for layer in param_layers(model, layers=layers)]


def test_power_iteration_repeats_itself_stops_by_its_tolerance_and_says_if_it_did_not():
    model, (x, y) = smooth_model(), points()
    batches = uneven(x, y, 20)
    assert estimate_lipschitz(model, batches, loss=classification) == estimate_lipschitz(
        model, batches, loss=classification
    )
    other = estimate_lipschitz(
        model, batches, loss=classification, generator=torch.Generator().manual_seed(5), tolerance=1e-8
    )
    loose = estimate_lipschitz(model, batches, loss=classification, tolerance=0.1)
    assert loose.whole.iterations < other.whole.iterations
    assert loose.whole.value <= other.whole.value * (1 + 1e-6)  # from below
    short = estimate_lipschitz(model, batches, loss=classification, max_iterations=1)
    assert (short.whole.iterations, short.whole.converged, short.converged) == (1, False, False)


def test_a_loss_without_curvature_has_constant_0():
    model = nn.Linear(3, 1).double()
    found = estimate_lipschitz(model, [points()], loss=lambda m, batch: m(batch[0]).mean())
    assert (found.whole.value, found.whole.converged) == (0.0, True)


def test_fused_attention_is_differentiated_twice():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3, attn_implementation="sdpa",
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    found = estimate_lipschitz(model, DataLoader(Images(16), 8), max_iterations=2, tolerance=0.5)
    assert found.whole.value > 0


def exact_moments(model, data):
    """Gradients of every sample, one at a time, in float64."""
    model.double()
    batch = {k: torch.stack([row[k] for row in data]) for k in ("pixel_values", "labels")}
    x, y = batch["pixel_values"].double(), batch["labels"]
    rows = one_by_one(model, lambda m, i: m(x[i : i + 1], y[i : i + 1])["loss"], len(y))
    model.float()
    stacked = {
        layer.name: torch.cat([rows[n].flatten(1) for n in layer.param_names], 1) for layer in param_layers(model)
    }
    return stacked


@pytest.mark.parametrize("batch_size", [64, 24])  # 24: the last batch is smaller
def test_variance_factors_are_those_of_single_samples(batch_size):
    model, data = Plain(), Images(64)
    moments = measure_gradient_moments(model, DataLoader(data, batch_size))
    assert moments.samples == 64
    for k, (name, rows) in enumerate(exact_moments(model, data).items()):
        assert moments.layers[k] == name
        full = rows.mean(0)
        variance = (rows - full).square().sum(1).mean()
        assert moments.variance[k] == pytest.approx(float(variance), rel=1e-4)
        assert moments.variance_factor[k] == pytest.approx(float(variance / full.square().sum()), rel=1e-4)
        figure2 = rows.square().sum(1).mean() / full.square().sum()
        assert moments.figure2_ratio[k] == pytest.approx(float(figure2), rel=1e-4)
        norms = rows.norm(dim=1)
        assert moments.mean_norm[k] == pytest.approx(float(norms.mean()), rel=1e-4)
        spread = norms.var(correction=0) / norms.mean() ** 2
        assert moments.norm_spread[k] == pytest.approx(float(spread), rel=1e-3)
    np.testing.assert_allclose(moments.figure2_ratio, moments.variance_factor + 1, rtol=1e-6)


def test_constants_of_several_points_hold_at_each_and_are_the_smallest():
    model, found = Plain(), []
    for _ in range(3):
        found.append(measure_gradient_moments(model, DataLoader(Images(64), 32)))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))

    def within(factor, floor):
        return [(p.variance <= (factor * p.full_square + floor) * (1 + 1e-9)) for p in found]

    for floor in (0.0, float(np.median(found[0].variance))):
        factor, largest = variance_constants(found, floor)
        assert largest == factor.max()
        assert np.all(within(factor, floor))
        assert not np.any(np.all(within(factor * 0.999, floor), axis=0) & (factor > 0))
    factor, _ = variance_constants(found)
    for given in (0.0, 0.5 * factor):
        floor = variance_floor(found, given)
        assert np.all(within(given, floor))
        assert not np.all(within(given, floor * 0.999))
    assert variance_floor(found, factor) == pytest.approx(0, abs=1e-9)


def test_identical_samples_have_no_variance():
    model, x = Plain(), torch.randn(1, 1, 8, 8)
    batch = {"pixel_values": x.repeat(16, 1, 1, 1), "labels": torch.zeros(16, dtype=torch.long)}
    moments = measure_gradient_moments(model, [batch])
    np.testing.assert_allclose(moments.figure2_ratio, 1, rtol=1e-5)
    np.testing.assert_allclose(moments.variance_factor, 0, atol=1e-5)


@pytest.mark.parametrize("optimizer", [NAG, LARS, CLARS])
def test_measuring_between_two_steps_changes_neither_the_training_nor_the_result(optimizer):
    batches, weights, found = list(DataLoader(Images(64), 32)), [], []
    for measured in (True, False):
        model = Plain()
        trained = optimizer(model, lr=0.1)
        for batch in batches:
            trained.zero_grad()
            model(**batch)["loss"].backward()
            if measured:  # with gradients in place that are still to be stepped with
                found.append(measure_gradient_moments(model, batches).mean_square)
                estimate_lipschitz(model, batches, max_iterations=1)
            trained.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        trained.remove_hooks()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    np.testing.assert_allclose(found[0], measure_gradient_moments(Plain(), batches).mean_square, rtol=1e-6)


def test_gradients_buffers_hooks_and_mode_are_left_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().train()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    kept = {p: (p.grad, p.grad.clone()) for p in model.parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = uneven(*points(), 10, 10)
    measure_gradient_moments(model, batches, loss=classification)
    estimate_lipschitz(model, batches, loss=classification, max_iterations=2)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    for p, (gradient, value) in kept.items():
        assert p.grad is gradient
        torch.testing.assert_close(p.grad, value, rtol=0, atol=0)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_measured_is_refused():
    model, batches = smooth_model(), [points()]
    for measure in (measure_gradient_moments, estimate_lipschitz):
        with pytest.raises(DataError, match="no batch with samples"):
            measure(model, [], loss=classification)
        with pytest.raises(DataError, match="one row a sample"):
            measure(model, ["text"], loss=classification)
    with pytest.raises(DataError, match="read only once"):
        estimate_lipschitz(model, iter(batches), loss=classification)
    with pytest.raises(ConfigError, match="tolerance=0"):
        estimate_lipschitz(model, batches, loss=classification, tolerance=0)
    with pytest.raises(ConfigError, match="one point at least"):
        variance_constants([])
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(DataError, match="diverged"):
        measure_gradient_moments(model, batches, loss=classification)
