"""Promise: conditions, bounds and corollaries are the paper's, fit together at any constants, and refuse nonsense."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_clars
from hf_clars.errors import ConfigError
from hf_clars.theory import (
    ProblemConstants,
    corollary1_bound,
    corollary1_gamma,
    corollary2_bound,
    corollary2_gamma,
    corollary3_bound,
    corollary3_largest_rate,
    every_layer_conditions,
    linear_scaling_limit,
    theorem1_bound,
    theorem1_conditions,
    theorem2_bound,
    theorem2_conditions,
)


def positive(low, high):
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@st.composite
def problems(draw, spread=1e3, noise=1e4):
    layers = draw(st.integers(1, 6))
    lipschitz = draw(st.lists(positive(1, spread), min_size=layers, max_size=layers))
    whole = max(lipschitz) * draw(positive(1, layers + 1e-9))
    factor = draw(st.lists(positive(1e-3, noise), min_size=layers, max_size=layers))
    return ProblemConstants(lipschitz, whole, factor, draw(positive(1e-4, 1e4)))


betas = st.just(0.0) | st.floats(0.0, 0.99)
runs = st.fixed_dictionaries(
    {"batch": st.integers(1, 10**5), "steps": st.integers(1, 10**6), "gap": positive(1e-3, 1e3)}
)


def test_it_is_a_public_name():
    assert hf_clars.theory.theorem2_bound is theorem2_bound
    assert "theory" in hf_clars.__all__


def test_figures_worked_out_by_hand():
    problem = ProblemConstants([1.0, 4.0], 8.0, [16.0, 1.0], 3.0)
    assert problem.kappa == 8
    assert problem.inverse_sum == 1.25
    np.testing.assert_allclose(problem.weights, [0.8, 0.2])
    # gamma_1 <= min(1/8, 4/(8 * 16)) = 1/32; gamma_2 <= 1/32, gamma <= 1/8; mean = gamma * 5/8 <= 1/16 * sqrt(4/16).
    conditions = theorem1_conditions(problem, 4)
    assert conditions.largest_gamma(problem) == pytest.approx(1 / 32)
    assert conditions.binding(problem) == "(1-b) B / (8 L_k M_k)"
    assert theorem1_bound(problem, 1 / 32, batch=4, steps=10, gap=2.0) == pytest.approx(
        8 * 2 * 32 / (10 * 1.25) + 20 * 3 / (32 * 4)
    )
    # b = 1/2: each <= 1/64; mean <= min(1/4 / (4/4 * 8), that / 2, 1/2 / 2 / 32, 1/2 / 32) = 1/128, gamma <= 8/5 / 128.
    conditions = theorem2_conditions(problem, 4, 0.5)
    assert conditions.largest_gamma(problem) == pytest.approx(1 / 80)
    assert conditions.binding(problem) == "(1-b) sqrt(B) / (4 L_g sqrt(M_g))"
    assert sorted(conditions.mean.values()) == pytest.approx([1 / 128, 1 / 64, 1 / 64, 1 / 32])
    assert theorem2_bound(problem, 1 / 80, batch=4, steps=10, gap=2.0, beta=0.5) == pytest.approx(
        8 * 0.5 * 2 * 80 / (10 * 1.25) + 3 / 80 / (0.5 * 4) * (4 + 16 + 32)
    )
    assert corollary3_largest_rate(2.0, 4.0, batch=16, beta=0.5) == pytest.approx(1 / 32)
    assert corollary3_largest_rate(2.0, 4.0, batch=16, beta=0.9) == pytest.approx(0.01 / (4 * 0.81 * 2))


@settings(deadline=None, max_examples=200)
@given(problems(), betas, runs)
def test_the_largest_gamma_is_exactly_where_the_conditions_end(problem, beta, run):
    for conditions in (
        theorem1_conditions(problem, run["batch"]),
        theorem2_conditions(problem, run["batch"], beta),
        every_layer_conditions(problem, run["batch"], beta),
    ):
        gamma = conditions.largest_gamma(problem)
        assert conditions.met_by(problem.rates(gamma))
        assert not conditions.met_by(problem.rates(gamma * 1.001))
        assert conditions.binding(problem) in {**conditions.layer, **conditions.mean}


@settings(deadline=None, max_examples=200)
@given(problems(), betas, runs)
def test_theorem_2_without_momentum_is_theorem_1_with_less_room(problem, beta, run):
    batch = run["batch"]
    mgd, nag = theorem1_conditions(problem, batch), theorem2_conditions(problem, batch, 0.0)
    assert all(np.isfinite(bound).all() for bound in nag.layer.values())
    assert [name for name, bound in nag.mean.items() if math.isinf(bound)] == [n for n in nag.mean if "b^2" in n]
    gamma = nag.largest_gamma(problem)
    assert mgd.largest_gamma(problem) / 2 <= gamma * (1 + 1e-12)
    assert gamma <= mgd.largest_gamma(problem)
    assert theorem1_bound(problem, gamma, **run) <= theorem2_bound(problem, gamma, **run, beta=0.0)
    # Momentum only asks for more.
    assert theorem2_conditions(problem, batch, beta).largest_gamma(problem) <= gamma


@settings(deadline=None, max_examples=200)
@given(problems(), betas, st.integers(1, 10**5))
def test_a_layers_bound_is_linear_up_to_its_m_k_and_constant_beyond(problem, beta, batch):
    def bounds(size):
        return np.minimum(*theorem2_conditions(problem, size, beta).layer.values())

    limit = linear_scaling_limit(problem)
    np.testing.assert_array_equal(limit, problem.variance_factor)
    expected = np.where(2 * batch <= limit, 2.0, np.where(batch >= limit, 1.0, limit / batch))
    np.testing.assert_allclose(bounds(2 * batch) / bounds(batch), expected)


@settings(deadline=None, max_examples=300)
@given(problems(spread=3.0, noise=1.0), betas, runs)
def test_corollaries_1_and_2_follow_from_their_theorems_or_refuse(problem, beta, run):
    cases = (
        (corollary1_gamma, corollary1_bound, theorem1_conditions, theorem1_bound, {}, 0.0),
        (corollary2_gamma, corollary2_bound, theorem2_conditions, theorem2_bound, {"beta": beta}, beta),
    )
    for gamma_of, bound, conditions_of, theorem, momentum, b in cases:
        conditions = conditions_of(problem, run["batch"], *momentum.values())
        root = run["batch"] * run["gap"] / (run["steps"] * problem.variance_floor * problem.inverse_sum)
        expected = min((1 - b) / 8, math.sqrt(root))
        if not conditions.met_by(problem.rates(expected)):
            with pytest.raises(ConfigError, match="does not apply"):
                gamma_of(problem, **run, **momentum)
            continue
        gamma = gamma_of(problem, **run, **momentum)
        assert gamma == pytest.approx(expected)
        curvature, variance = conditions.layer.values()
        assert (curvature <= variance).all()  # what the corollaries suppose
        theorems = theorem(problem, gamma, **run, **momentum)
        assert theorems <= bound(problem, **run, **momentum) * (1 + 1e-12)


def test_the_corollaries_do_apply_to_some_problem_with_either_term_of_gamma():
    problem = ProblemConstants([1.0, 1.0], 1.0, [2.0, 1.0], 1.0)
    assert corollary1_gamma(problem, batch=100, steps=2, gap=1.0) == 1 / 8
    assert corollary1_gamma(problem, batch=100, steps=10**6, gap=1.0) == pytest.approx(math.sqrt(100 / 2e6))
    assert corollary2_gamma(problem, batch=100, steps=2, gap=1.0, beta=0.2) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="largest M_k is 2 and B=1"):
        corollary1_gamma(problem, batch=1, steps=10, gap=1.0)
    with pytest.raises(ConfigError, match="b\\^2 L_g"):
        corollary2_gamma(problem, batch=100, steps=2, gap=1.0, beta=0.9)


@settings(deadline=None, max_examples=200)
@given(positive(0.1, 10), positive(0.01, 1e4), positive(0.01, 10), st.integers(1, 20), betas, runs)
def test_corollary_3_is_theorem_2_for_equal_layers_and_its_misprints_are_told_apart(l_g, m_g, floor, layers, beta, run):
    problem = ProblemConstants([l_g] * layers, l_g, [m_g] * layers, floor)
    batch = run["batch"]
    rate = corollary3_largest_rate(l_g, m_g, batch=batch, beta=beta)
    gamma = theorem2_conditions(problem, batch, beta).largest_gamma(problem)
    assert rate == pytest.approx(gamma / l_g)
    given_ = {"lipschitz": l_g, "variance_floor": floor, "layers": layers, "rate": rate, "beta": beta, **run}
    bound = corollary3_bound(**given_)
    assert bound == pytest.approx(layers * theorem2_bound(problem, gamma, **run, beta=beta))
    noise = bound - corollary3_bound(**{**given_, "variance_floor": 0.0})
    assert corollary3_bound(**given_, as_printed=True) - bound == pytest.approx((batch - 1) * noise, rel=1e-6, abs=1e-9)
    printed = corollary3_largest_rate(l_g, m_g, batch=batch, beta=beta, as_printed=True)
    assert printed >= rate
    within = theorem2_conditions(problem, batch, beta).met_by(np.full(layers, printed))
    assert within == (printed <= rate * (1 + 1e-9))


def test_corollary_3_as_printed_allows_four_times_the_rate_at_beta_0_9():
    rates = [corollary3_largest_rate(1.0, 1.0, batch=10**4, beta=0.9, as_printed=printed) for printed in (False, True)]
    assert rates == pytest.approx([0.01 / 3.24, 0.1 / 8])


def test_without_noise_nothing_depends_on_the_batch():
    problem = ProblemConstants([1.0, 2.0], 2.0, [0.0, 0.0])
    for beta in (0.0, 0.9):
        gammas = {theorem2_conditions(problem, batch, beta).largest_gamma(problem) for batch in (1, 10**6)}
        bounds = {theorem2_bound(problem, 0.01, batch=batch, steps=9, gap=1.0, beta=beta) for batch in (1, 10**6)}
        assert len(gammas) == len(bounds) == 1
    assert corollary1_gamma(problem, batch=1, steps=10**9, gap=1.0) == 1 / 8


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ProblemConstants([], 1.0, []), "one number a layer"),
        (lambda: ProblemConstants([1.0], 1.0, [1.0, 2.0]), "one number a layer"),
        (lambda: ProblemConstants([1.0, 0.0], 1.0, [1.0, 1.0]), "L_2=0"),
        (lambda: ProblemConstants([1.0], math.inf, [1.0]), "L_g=inf"),
        (lambda: ProblemConstants([2.0], 1.0, [1.0]), "below the largest L_k"),
        (lambda: ProblemConstants([1.0], 1.0, [-1.0]), "M_1=-1"),
        (lambda: ProblemConstants([1.0], 1.0, [1.0], math.nan), "M=nan"),
        (lambda: theorem1_conditions(ONE, 0), "B=0"),
        (lambda: theorem2_conditions(ONE, 1, 1.0), "beta=1 "),
        (lambda: every_layer_conditions(ONE, 1, -0.1), "beta=-0.1"),
        (lambda: theorem2_bound(ONE, 0.0, batch=1, steps=1, gap=1.0, beta=0.5), "gamma=0"),
        (lambda: theorem1_bound(ONE, 0.1, batch=1, steps=0, gap=1.0), "T=0"),
        (lambda: theorem1_bound(ONE, 0.1, batch=1, steps=1, gap=-1.0), "f_inf=-1"),
        (lambda: corollary3_largest_rate(1.0, 1.0, batch=1, beta=math.nan), "beta=nan"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


ONE = ProblemConstants([1.0], 1.0, [1.0], 1.0)
