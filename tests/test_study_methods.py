"""Promise: every method of a study is what its name says, step by step, against literal accounts of it."""

import math

import pytest
import torch
from torch.nn import functional

from hf_clars.errors import ConfigError
from research.study.loop import Training
from research.study.methods import METHODS, method_of
from tests.oracle import per_sample_grads
from tests.test_study_loop import CLASSES, SIDE, images, tiny

STEPS = 6


def prepared(settings, count=40):
    """A training on `count` images in float64, and its first weights by name."""
    training = Training.prepare(settings, images(settings, count), torch.device("cpu"))
    training.model.double()
    return training, {n: p.detach().clone() for n, p in training.model.named_parameters()}


def batch(step, size):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def gradient(training, weights, x, y):
    """{name: gradient of the mean loss at `weights`}."""
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    logits = torch.func.functional_call(training.model, leaves, (x,)).logits
    found = torch.autograd.grad(functional.cross_entropy(logits, y), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def assert_weights(training, weights):
    for name, p in training.model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def poly2(step, total):
    return (1 - step / total) ** 2


def test_reference_code_measures_64_micro_batches_of_8_and_steps_with_the_whole_batch():
    settings = tiny("reference_code", batch_size=1024, micro_batch=256, learning_rate=0.7, schedule="constant")
    training, weights = prepared(settings, 1024)
    buffers = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in range(3):
        x, y = batch(step, 1024)
        training.update(step, list(zip(x.split(256), y.split(256), strict=True)))
        micro = [gradient(training, weights, x[i : i + 8], y[i : i + 8]) for i in range(0, 512, 8)]
        whole = gradient(training, weights, x, y)
        for n, w in weights.items():
            mean_norm = sum((g[n] + 2e-4 * w).norm() for g in micro) / 64
            scale = min(float(0.05 * w.norm() / mean_norm), 0.1) if w.dim() > 1 else 1.0
            buffers[n] = 0.9 * buffers[n] + whole[n] + 2e-4 * w
            weights[n] = w - 0.7 * scale * buffers[n]
    assert_weights(training, weights)


def layers_of(weights):
    """{module: names of its tensors}: a layer of the paper."""
    found = {}
    for name in weights:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def joint_norm(tensors):
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def test_tvlars_is_lars_under_its_falling_sigmoid():
    """m' = w - gamma phi_t eta ||w|| / ||g|| g, w' = m' + mu (m' - m): Algorithm 1 of arXiv 2309.14053."""
    schedule = {"delay_epochs": 2, "steepness": 0.3, "alpha": 1.0, "minimum": 0.01}
    settings = tiny("tvlars", schedule="tvlars", schedule_kwargs=schedule, eta=0.05, learning_rate=2.0)
    training, weights = prepared(settings)
    m = dict(weights)
    delay = 2 * 2
    for step in range(STEPS):
        x, y = batch(step, 16)
        training.update(step, [(x, y)])
        g = gradient(training, weights, x, y)
        phi = 1 / (1.0 + math.exp(0.3 * (step - delay))) + 0.01
        new = {}
        for names in layers_of(weights).values():
            rate = 2.0 * phi * 0.05 * joint_norm(weights[n] for n in names) / joint_norm(g[n] for n in names)
            for n in names:
                new[n] = weights[n] - rate * g[n]
        weights = {n: new[n] + 0.9 * (new[n] - m[n]) for n in weights}
        m = new
    assert_weights(training, weights)


def test_lamb_is_algorithm_2_of_its_paper():
    settings = tiny("lamb", learning_rate=0.02, weight_decay=0.01)
    training, weights = prepared(settings)
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    total = 3 * 2
    for step in range(total):
        x, y = batch(step, 16)
        training.update(step, [(x, y)])
        g = gradient(training, weights, x, y)
        for n, w in weights.items():
            first[n] = 0.9 * first[n] + 0.1 * g[n]
            second[n] = 0.999 * second[n] + 0.001 * g[n] ** 2
            r = first[n] / (1 - 0.9 ** (step + 1)) / ((second[n] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6)
            update = r + 0.01 * w
            trust = w.norm() / update.norm() if w.norm() > 0 and update.norm() > 0 else 1.0
            weights[n] = w - 0.02 * poly2(step, total) * trust * update
    assert_weights(training, weights)


def capped(r, mean_square, g_square, size):
    signal = (size * g_square - mean_square) / (size - 1)  # unbiased for ||E g||^2
    return min(1.0, max(0.0, size * signal / mean_square))


VARIANTS = {
    "power 0": ({"kind": "power", "value": 0.0}, lambda r, s, g2, size: 1.0),
    "power 0.5": ({"kind": "power", "value": 0.5}, lambda r, s, g2, size: math.sqrt(r)),
    "power 1": ({"kind": "power", "value": 1.0}, lambda r, s, g2, size: r),
    "floor": ({"kind": "floor", "value": 0.7}, lambda r, s, g2, size: max(r, 0.7)),
    "cap": ({"kind": "cap", "value": 0.0}, capped),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_lars_times_its_function_of_the_ratio(name):
    kwargs, factor = VARIANTS[name]
    settings = tiny("lars_times_ratio", method_kwargs=kwargs, learning_rate=1.0, schedule="constant")
    training, weights = prepared(settings)
    for step in range(STEPS):
        x, y = batch(step, 16)
        before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
        # Each sample's contribution to the mean loss: 16 of them add up to the gradient.
        shares = per_sample_grads(training.model, lambda net, x=x, y=y: functional.cross_entropy(net(x).logits, y), 16)
        training.update(step, [(x, y)])
        rates = dict(zip(training.optimizer.layer_names, training.optimizer.last_step.rate.tolist(), strict=True))
        for layer, names in layers_of(weights).items():
            per_sample = [joint_norm(16 * shares[n][i] for n in names) for i in range(16)]
            g = joint_norm(shares[n].sum(0) for n in names)
            mean_square = sum(v**2 for v in per_sample) / 16
            h = factor(g / (sum(per_sample) / 16), mean_square, g**2, 16)
            expected = 0.05 * joint_norm(before[n] for n in names) / g * h
            assert rates[layer] == pytest.approx(expected, rel=1e-6), (name, layer)


def test_the_average_is_of_all_steps_so_far_the_latest_weighing_most():
    settings = tiny("lars_times_ratio", method_kwargs={"kind": "average", "value": 0.8}, schedule="constant")
    training, _ = prepared(settings)
    seen = []
    for step in range(STEPS):
        training.update(step, [batch(step, 16)])
        measured = training.optimizer.last_step
        seen.append(measured.ratio)
        weights = [0.8 ** (step - t) for t in range(step + 1)]
        mean = sum(w * r for w, r in zip(weights, seen, strict=True)) / sum(weights)
        expected = 0.5 * 0.05 * measured.weight_norm / measured.grad_norm * mean
        torch.testing.assert_close(measured.rate, expected)


def test_names_that_do_not_exist_are_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="'reference_code'"):
        method_of(tiny("reference"))
    with pytest.raises(ConfigError, match="tvlars, both or neither"):
        method_of(tiny("tvlars"))
    with pytest.raises(ConfigError, match="multiple"):
        method_of(tiny("reference_code", micro_batch=4, batch_size=16))
    assert set(METHODS) >= {"nag", "lars", "clars", "reference_code", "tvlars", "lamb"}
