"""Promise: the theorems' bounds hold where they are proved, on problems with known constants; and they can fail.

The left-hand sides are means over 30 runs; the problems' own constants are checked against brute force first.
"""

import numpy as np
import pytest

from hf_clars.theory import (
    ProblemConstants,
    every_layer_conditions,
    theorem1_bound,
    theorem1_conditions,
    theorem2_bound,
    theorem2_conditions,
)
from tests.quadratics import FiniteSum, criterion, random_problem

KINDS = [(coupled, cosine) for coupled in (True, False) for cosine in (True, False)]
SEEDS = range(4)


@pytest.mark.parametrize(("coupled", "cosine"), KINDS)
def test_the_constants_of_the_problems_are_what_they_say(coupled, cosine):
    problem = random_problem(0, coupled=coupled, cosine=cosine)
    constants, rng = problem.constants, np.random.default_rng(1)
    w = rng.standard_normal((50, problem.directions.shape[1])) * 3
    every = np.tile(np.arange(len(problem.shifts)), (50, 1))
    samples, full = problem.sample(w, every), problem.gradient(w)
    np.testing.assert_allclose(samples.mean(1), full, atol=1e-12 * np.abs(full).max())
    variance = problem.layer_squares(samples - full[:, None, :]).mean(1)
    allowed = constants.variance_factor * problem.layer_squares(full) + constants.variance_floor
    assert (variance <= allowed * (1 + 1e-9)).all()
    step = rng.standard_normal(w.shape)
    finite = (problem.value(w + 1e-6 * step) - problem.value(w - 1e-6 * step)) / 2e-6
    np.testing.assert_allclose(finite, (full * step).sum(1), rtol=1e-4, atol=1e-4)
    for k, block in enumerate(problem.blocks):
        moved = w.copy()
        moved[:, block] += 0.1 * step[:, block]
        change = np.sqrt(problem.layer_squares(problem.gradient(moved) - full)[:, k])
        assert (change <= constants.lipschitz[k] * 0.1 * np.linalg.norm(step[:, block], axis=1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("coupled", "cosine"), KINDS)
def test_theorem_1_holds_at_the_largest_rate_and_can_fail_far_above(coupled, cosine, seed, batch):
    problem = random_problem(seed, coupled=coupled, cosine=cosine)
    constants = problem.constants
    conditions = theorem1_conditions(constants, batch)
    gamma = conditions.largest_gamma(constants)
    assert conditions.met_by(constants.rates(gamma))
    assert not conditions.met_by(constants.rates(1.01 * gamma))
    assert holds(problem, gamma, theorem1_bound, batch=batch, seed=seed).all()
    if not cosine:  # a sine cannot grow
        assert not holds(problem, 100 * gamma, theorem1_bound, batch=batch, seed=seed)[-1]


# At beta = 0.9 the theorem's rate is some 0.003 / L_g, or less for the noise: 100 times as much is still stable.
@pytest.mark.parametrize(("beta", "far"), [(0.0, 100), (0.5, 100), (0.9, 10_000)])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("coupled", "cosine"), KINDS)
def test_theorem_2_holds_at_the_largest_rate_and_can_fail_far_above(coupled, cosine, seed, beta, far):
    problem = random_problem(seed, coupled=coupled, cosine=cosine)
    constants, batch = problem.constants, 4
    conditions = theorem2_conditions(constants, batch, beta)
    gamma = conditions.largest_gamma(constants)
    assert conditions.met_by(constants.rates(gamma))
    assert not conditions.met_by(constants.rates(1.01 * gamma))
    assert holds(problem, gamma, theorem2_bound, batch=batch, seed=seed, beta=beta).all()
    if not cosine:
        assert not holds(problem, far * gamma, theorem2_bound, batch=batch, seed=seed, beta=beta)[-1]


def holds(problem, gamma, bound, *, batch, seed, beta=0.0, steps=120):
    """For T = 1 ... steps, whether the bound does; a run that has overflowed breaks it."""
    left, gap = criterion(problem, gamma, batch=batch, steps=steps, beta=beta, seed=seed)
    momentum = {"beta": beta} if bound is theorem2_bound else {}
    right = [bound(problem.constants, gamma, batch=batch, steps=t, gap=gap, **momentum) for t in range(1, steps + 1)]
    return left <= np.array(right)


def coherent_layers_beside_idle_ones(coherent=20, idle=380):
    """A convex quadratic of scalar layers without noise: `coherent` of L_k = 1 act as one, the others have L_k = 20."""
    directions = np.zeros((1 + idle, coherent + idle))
    directions[0, :coherent] = 1.0
    directions[1:, coherent:] = np.sqrt(coherent) * np.eye(idle)
    layers = coherent + idle
    lipschitz = np.concatenate([np.ones(coherent), np.full(idle, float(coherent))])
    hessian = directions.T @ directions
    np.testing.assert_allclose(np.diag(hessian), lipschitz)
    return FiniteSum(
        [slice(k, k + 1) for k in range(layers)],
        directions,
        np.zeros((1, layers)),
        np.zeros((1, layers)),
        False,
        ProblemConstants(lipschitz, np.linalg.norm(hessian, 2), np.zeros(layers)),
    )


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_printed_condition_on_the_mean_rate_is_not_enough_and_one_on_every_layer_is(beta):
    problem = coherent_layers_beside_idle_ones()
    constants, steps = problem.constants, 100
    printed = [theorem2_conditions(constants, 1, beta)] + ([theorem1_conditions(constants, 1)] if beta == 0 else [])
    for conditions in printed:
        gamma = conditions.largest_gamma(constants)
        assert conditions.met_by(constants.rates(gamma))
        left, gap = criterion(problem, gamma, batch=1, steps=steps, beta=beta, runs=1)
        assert left[-1] > 1e6 * theorem2_bound(constants, gamma, batch=1, steps=steps, gap=gap, beta=beta)
    gamma = every_layer_conditions(constants, 1, beta).largest_gamma(constants)
    left, gap = criterion(problem, gamma, batch=1, steps=steps, beta=beta, runs=1)
    assert left[-1] <= theorem2_bound(constants, gamma, batch=1, steps=steps, gap=gap, beta=beta)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("layers", [1, 12])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_conditions_on_every_layer_give_the_bound_that_their_proof_does(seed, layers, beta):
    problem = random_problem(seed, coupled=True, cosine=False, layers=layers, noise=10.0)
    c, batch, steps = problem.constants, 2, 100
    gamma = every_layer_conditions(c, batch, beta).largest_gamma(c)
    left, gap = criterion(problem, gamma, batch=batch, steps=steps, beta=beta, seed=seed)
    noise = 2 * c.kappa * c.variance_floor * gamma / batch * (1 / (1 - beta) + beta**2 / (4 * (1 - beta) ** 2))
    proved = 4 * (1 - beta) * gap / (steps * gamma * c.inverse_sum) + noise
    assert left[-1] <= proved
    assert proved <= theorem2_bound(c, gamma, batch=batch, steps=steps, gap=gap, beta=beta)
    if beta == 0:
        assert proved <= theorem1_bound(c, gamma, batch=batch, steps=steps, gap=gap)
