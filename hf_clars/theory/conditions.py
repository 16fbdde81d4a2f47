"""Step-size conditions: which rates Theorem 1 (mGD) and Theorem 2 (mNAG) are stated for, and which can be proved.

Source: Huo, Gu and Huang, "Large Batch Optimization for Deep Learning Using New Complete Layer-Wise Adaptive Rate
Scaling", AAAI 2021. K layers, gamma_k = gamma / L_k, batches of B independent samples, momentum beta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hf_clars.theory.constants import Floats, ProblemConstants, check_beta, check_not_negative, check_positive, quotient


@dataclass(frozen=True, eq=False)
class StepConditions:
    """Upper bounds on the layer rates gamma_k, each under its formula.

    Attributes:
        layer: Bounds on gamma_k itself, each [K].
        mean: Bounds on (1/K) sum_k gamma_k.
    """

    layer: Mapping[str, Floats]
    mean: Mapping[str, float]

    def largest_gamma(self, problem: ProblemConstants) -> float:
        """The largest gamma such that gamma_k = gamma / L_k meets every condition.

        Args:
            problem: The constants that the conditions were made from.

        Returns:
            gamma, which has no unit; infinite if nothing bounds it.
        """
        return min(self._largest(problem).values())

    def binding(self, problem: ProblemConstants) -> str:
        """The formula of the condition that sets `largest_gamma`; of several that do, the first."""
        largest = self._largest(problem)
        return min(largest, key=lambda name: largest[name])

    def met_by(self, rates: Floats, *, tolerance: float = 1e-9) -> bool:
        """Whether layer rates meet every condition.

        Args:
            rates: gamma_k, [K].
            tolerance: Relative, for rounding. Default 1e-9.

        Returns:
            True if they do.
        """
        allowed = 1 + tolerance
        each = all(bool((rates <= bound * allowed).all()) for bound in self.layer.values())
        return each and all(float(rates.mean()) <= bound * allowed for bound in self.mean.values())

    def _largest(self, problem: ProblemConstants) -> dict[str, float]:
        unit = problem.rates(1.0)
        each = {name: float((bound / unit).min()) for name, bound in self.layer.items()}
        return each | {name: float(bound / unit.mean()) for name, bound in self.mean.items()}


def theorem1_conditions(problem: ProblemConstants, batch: float) -> StepConditions:
    """Theorem 1 (mGD): gamma_k <= min{1/(8 L_k), B/(8 L_k M_k)}, mean gamma_k <= min{1, sqrt(B/M_g)} / (2 L_g).

    As printed. This is not enough: see `every_layer_conditions`.

    Args:
        problem: The constants.
        batch: B.

    Returns:
        The conditions.

    Raises:
        ConfigError: If `batch` is not above 0.
    """
    noise = _noise(problem, batch)
    return StepConditions(
        layer=_layer_terms(problem, batch, 0.0),
        mean={
            "1 / (2 L_g)": 1 / (2 * problem.global_lipschitz),
            "sqrt(B) / (2 L_g sqrt(M_g))": noise / (2 * problem.global_lipschitz),
        },
    )


def theorem2_conditions(problem: ProblemConstants, batch: float, beta: float) -> StepConditions:
    """Theorem 2 (mNAG): the conditions on gamma_k and on their mean.

    gamma_k <= min{(1-b)/(8 L_k), (1-b) B/(8 L_k M_k)} and (1/K) sum_k gamma_k <= min{(1-b)^2/(4 b^2 L_g),
    (1-b)^2 sqrt(B)/(4 b^2 L_g sqrt(M_g)), (1-b) sqrt(B)/(4 L_g sqrt(M_g)), (1-b)/(4 L_g)} with b = beta, as printed.
    At beta = 0 the terms with beta^2 below are infinite; what remains is a factor 2 stricter in the mean than
    Theorem 1. As there, this is not enough: see `every_layer_conditions`.

    Args:
        problem: The constants.
        batch: B.
        beta: In [0, 1).

    Returns:
        The conditions.

    Raises:
        ConfigError: If `batch` or `beta` is out of range.
    """
    return StepConditions(
        layer=_layer_terms(problem, batch, beta),
        mean={**_momentum_terms(problem, batch, beta), **_plain_terms(problem, batch, beta)},
    )


def every_layer_conditions(problem: ProblemConstants, batch: float, beta: float = 0.0) -> StepConditions:
    """Conditions under which the bounds of both theorems can be proved: not in the paper.

    The printed theorems bound only the **mean** of gamma_k by 1/L_g. A convex quadratic refutes that: 20 layers that
    act as one (L_k = 1, together 20) beside 380 of L_k = 20 that do not matter have a mean small enough for
    gamma = 1/8, and then the 20 diverge (`tests/test_theory_bounds_hold.py` runs it). It is enough that every gamma_k
    meets what is printed for the mean, and that L_g stands for L_k beside M_k: gamma_k <= min{(1-b)/(4 L_g),
    (1-b) B/(8 L_g M_k), (1-b)^2/(4 b^2 L_g), (1-b)^2 sqrt(B)/(4 b^2 L_g sqrt(M_g))}.

    Proof. Let D = diag(gamma_k), m_t = v_t - v_{t-1}, z_t = v_t + m_t b/(1-b). Then z_{t+1} = z_t - D g_t/(1-b),
    z_t - w_t = m_t b^2/(1-b), and sum_t ||m_t||^2 <= sum_t ||D g_t||^2/(1-b)^2. Descent along z, with
    -2<x, y> = ||x - y||^2 - ||x||^2 - ||y||^2, and c = max_k gamma_k, gives

        sum_t sum_k gamma_k E||grad_k f(w_t)||^2 <= 2(1-b)(f(w_0) - f_inf) + A sum_t E||D g_t||^2,
        A = L_g/(1-b) + c L_g^2 b^4/(1-b)^4.

    E||D g||^2 <= sum_k gamma_k^2 ((1 + M_k/B) E||grad_k f||^2 + M/B), and the conditions make
    A gamma_k (1 + M_k/B) <= 1/4 + 1/16 + 1/8 + 1/16 = 1/2. Hence the weighted mean is at most
    4(1-b)(f(w_0) - f_inf)/(T gamma sum_k 1/L_k) + 2 kappa (M gamma/B)(1/(1-b) + b^2/(4(1-b)^2)), which is below the
    bounds of Theorem 1 (b = 0) and Theorem 2.

    Args:
        problem: The constants.
        batch: B.
        beta: In [0, 1). Default 0, mGD.

    Returns:
        The conditions.

    Raises:
        ConfigError: If `batch` or `beta` is out of range.
    """
    global_lipschitz = np.full_like(problem.lipschitz, problem.global_lipschitz)
    by_curvature = (1 - beta) / (4 * global_lipschitz)
    alike = {name: np.full_like(by_curvature, bound) for name, bound in _momentum_terms(problem, batch, beta).items()}
    by_variance = _variance_term(problem, batch, beta, global_lipschitz)
    return StepConditions(
        layer={"(1-b) / (4 L_g)": by_curvature, "(1-b) B / (8 L_g M_k)": by_variance, **alike}, mean={}
    )


def corollary3_largest_rate(
    lipschitz: float, variance_factor: float, *, batch: float, beta: float, as_printed: bool = False
) -> float:
    """Corollary 3 (L_k = L_g and M_k = M_g for all k): the largest gamma_g = gamma_k.

    min{(1-b)/(8 L_g), (1-b) B/(8 L_g M_g), (1-b) sqrt(B)/(4 L_g sqrt(M_g)), (1-b)^2 sqrt(B)/(4 b^2 L_g sqrt(M_g)),
    (1-b)^2/(4 b^2 L_g)}, which is Theorem 2 for such constants. The last term is **misprinted** as (1-b)/(4 b^2 L_g),
    without the square, which for b near 1 allows rates that Theorem 2 does not. Here the mean condition of the theorems
    is one on every layer, so the objection in `every_layer_conditions` does not arise.

    Args:
        lipschitz: L_g.
        variance_factor: M_g, at least 0.
        batch: B.
        beta: In [0, 1).
        as_printed: Take the last term as the paper prints it. Default False.

    Returns:
        The rate itself (gamma / L_g in the theorems' terms).

    Raises:
        ConfigError: If a number is out of range.
    """
    check_positive(L_g=lipschitz, B=batch)
    check_not_negative(M_g=variance_factor)
    check_beta(beta)
    rest, noise = 1 - beta, math.sqrt(quotient(batch, variance_factor))
    return min(
        rest / (8 * lipschitz),
        rest / (8 * lipschitz) * quotient(batch, variance_factor),
        rest * noise / (4 * lipschitz),
        quotient(rest**2 * noise, 4 * beta**2 * lipschitz),
        quotient(rest if as_printed else rest**2, 4 * beta**2 * lipschitz),
    )


def linear_scaling_limit(problem: ProblemConstants) -> Floats:
    """The batch up to which each layer's own bound grows in proportion to B: M_k, [K].

    min{(1-b)/(8 L_k), (1-b) B/(8 L_k M_k)} of Theorem 2 is (1-b)/(8 L_k) * min{1, B/M_k}: linear for B <= M_k, constant
    above. This is the paper's explanation of linear scaling ("batch size B can be scaled up as long as B <= M_k").
    It is silent on the conditions on the mean rate, which grow with sqrt(B) only, until B = M_g.

    Args:
        problem: The constants.

    Returns:
        M_k.
    """
    return problem.variance_factor.copy()


def _layer_terms(problem: ProblemConstants, batch: float, beta: float) -> dict[str, Floats]:
    """The two conditions on gamma_k itself."""
    return {
        "(1-b) / (8 L_k)": (1 - beta) / (8 * problem.lipschitz),
        "(1-b) B / (8 L_k M_k)": _variance_term(problem, batch, beta, problem.lipschitz),
    }


def _variance_term(problem: ProblemConstants, batch: float, beta: float, lipschitz: Floats) -> Floats:
    """(1-b) B / (8 L M_k), [K], infinite where M_k = 0."""
    check_positive(B=batch)
    check_beta(beta)
    with np.errstate(divide="ignore"):
        return (1 - beta) / (8 * lipschitz) * (batch / problem.variance_factor)


def _momentum_terms(problem: ProblemConstants, batch: float, beta: float) -> dict[str, float]:
    """The two terms with beta^2 below, infinite for mGD."""
    below = 4 * beta**2 * problem.global_lipschitz
    return {
        "(1-b)^2 / (4 b^2 L_g)": quotient((1 - beta) ** 2, below),
        "(1-b)^2 sqrt(B) / (4 b^2 L_g sqrt(M_g))": quotient((1 - beta) ** 2 * _noise(problem, batch), below),
    }


def _plain_terms(problem: ProblemConstants, batch: float, beta: float) -> dict[str, float]:
    """The two terms of the mean that mGD has too."""
    bound = (1 - beta) / (4 * problem.global_lipschitz)
    return {"(1-b) sqrt(B) / (4 L_g sqrt(M_g))": bound * _noise(problem, batch), "(1-b) / (4 L_g)": bound}


def _noise(problem: ProblemConstants, batch: float) -> float:
    """sqrt(B / M_g)."""
    check_positive(B=batch)
    return math.sqrt(quotient(batch, problem.largest_variance))
