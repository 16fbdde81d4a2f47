"""The convergence bounds: Theorems 1 and 2, Corollaries 1, 2 and 3.

Source: Huo, Gu and Huang, "Large Batch Optimization for Deep Learning Using New Complete Layer-Wise Adaptive Rate
Scaling", AAAI 2021. All bound

    (1/T) sum_{t<T} sum_k q_k E||grad_k f(w_t)||^2,    q_k = (1/L_k) / sum_j (1/L_j),

for T steps with gamma_k = gamma / L_k from w_0. This is theory about gradients that become small: it says nothing of
the loss that is reached, of test accuracy, or of networks whose constants are only estimates at some weights. A bound
function is the formula; for which gamma it holds is a matter of `hf_clars.theory.conditions`.
"""

from __future__ import annotations

import math

from hf_clars.errors import ConfigError
from hf_clars.theory.conditions import StepConditions, theorem1_conditions, theorem2_conditions
from hf_clars.theory.constants import ProblemConstants, check_beta, check_not_negative, check_positive, quotient


def theorem1_bound(problem: ProblemConstants, gamma: float, *, batch: float, steps: int, gap: float) -> float:
    """Theorem 1 (mGD): 8 (f(w_0) - f_inf) / (T gamma sum_k 1/L_k) + (4 + 2 kappa) M gamma / B.

    Args:
        problem: The constants; kappa is the smallest allowed, max_k L_g / L_k.
        gamma: gamma_k L_k.
        batch: B.
        steps: T.
        gap: f(w_0) - f_inf, at least 0.

    Returns:
        The right-hand side.

    Raises:
        ConfigError: If a number is out of range.
    """
    first = _first_term(problem, gamma, batch, steps, gap)
    return 8 * first + (4 + 2 * problem.kappa) * problem.variance_floor * gamma / batch


def theorem2_bound(
    problem: ProblemConstants, gamma: float, *, batch: float, steps: int, gap: float, beta: float
) -> float:
    """Theorem 2 (mNAG), with b = beta.

    8 (1-b) (f(w_0) - f_inf) / (T gamma sum_k 1/L_k) + M gamma / ((1-b) B) * (4 + 2 kappa + 2 kappa / (1-b)). At b = 0
    the second term has 4 + 4 kappa where Theorem 1 has 4 + 2 kappa.

    Args:
        problem: The constants; kappa is the smallest allowed, max_k L_g / L_k.
        gamma: gamma_k L_k.
        batch: B.
        steps: T.
        gap: f(w_0) - f_inf, at least 0.
        beta: In [0, 1).

    Returns:
        The right-hand side.

    Raises:
        ConfigError: If a number is out of range.
    """
    check_beta(beta)
    first = _first_term(problem, gamma, batch, steps, gap)
    noise = problem.variance_floor * gamma / ((1 - beta) * batch)
    return 8 * (1 - beta) * first + noise * _variance_constant(problem, beta)


def corollary1_gamma(problem: ProblemConstants, *, batch: float, steps: int, gap: float) -> float:
    """Corollary 1 (mGD): gamma = min{1/8, sqrt(B (f(w_0) - f_inf) / (T M sum_k 1/L_k))}.

    The corollary supposes that 1/(8 L_k) dominates the bounds on gamma_k (that is, M_k <= B for all k) and that the
    mean of gamma_k meets Theorem 1's condition.

    Args:
        problem: The constants.
        batch: B.
        steps: T.
        gap: f(w_0) - f_inf.

    Returns:
        gamma.

    Raises:
        ConfigError: If a number is out of range, or what is supposed does not hold.
    """
    return _corollary_gamma("Corollary 1", problem, 0.0, batch, steps, gap, theorem1_conditions(problem, batch))


def corollary1_bound(problem: ProblemConstants, *, batch: float, steps: int, gap: float) -> float:
    """Corollary 1 (mGD): 64 G / (T S) + (12 + 2 kappa) sqrt(M G / (T B S)), G = f(w_0) - f_inf, S = sum_k 1/L_k.

    Follows from Theorem 1 at `corollary1_gamma`.

    Args:
        problem: The constants.
        batch: B.
        steps: T.
        gap: G.

    Returns:
        The right-hand side.

    Raises:
        ConfigError: If a number is out of range.
    """
    root = _noise_root(problem, batch, steps, gap)
    return 64 * gap / (steps * problem.inverse_sum) + (12 + 2 * problem.kappa) * root


def corollary2_gamma(problem: ProblemConstants, *, batch: float, steps: int, gap: float, beta: float) -> float:
    """Corollary 2 (mNAG): gamma = min{(1-b)/8, sqrt(B (f(w_0) - f_inf) / (T M sum_k 1/L_k))}.

    The corollary supposes that (1-b)/(8 L_k) dominates the bounds on gamma_k (that is, M_k <= B for all k) and that the
    mean of gamma_k meets Theorem 2's condition.

    Args:
        problem: The constants.
        batch: B.
        steps: T.
        gap: f(w_0) - f_inf.
        beta: In [0, 1).

    Returns:
        gamma.

    Raises:
        ConfigError: If a number is out of range, or what is supposed does not hold.
    """
    conditions = theorem2_conditions(problem, batch, beta)
    return _corollary_gamma("Corollary 2", problem, beta, batch, steps, gap, conditions)


def corollary2_bound(problem: ProblemConstants, *, batch: float, steps: int, gap: float, beta: float) -> float:
    """Corollary 2 (mNAG, Eq. 7), with b = beta, G = f(w_0) - f_inf, S = sum_k 1/L_k.

    64 G / ((1-b) T S) + (8 + (4 + 2 kappa + 2 kappa / (1-b)) / (1-b)) sqrt(M G / (T B S)). Follows from Theorem 2 at
    `corollary2_gamma`, with room: Theorem 2 gives the first term without 1/(1-b), and 8 (1-b) in place of 8.

    Args:
        problem: The constants.
        batch: B.
        steps: T.
        gap: G.
        beta: In [0, 1).

    Returns:
        The right-hand side.

    Raises:
        ConfigError: If a number is out of range.
    """
    check_beta(beta)
    root = _noise_root(problem, batch, steps, gap)
    first = 64 * gap / ((1 - beta) * steps * problem.inverse_sum)
    return first + (8 + _variance_constant(problem, beta) / (1 - beta)) * root


def corollary3_bound(
    *,
    lipschitz: float,
    variance_floor: float,
    layers: int,
    rate: float,
    batch: float,
    steps: int,
    gap: float,
    beta: float,
    as_printed: bool = False,
) -> float:
    """Corollary 3 (Eq. 8; L_k = L_g and M_k = M_g for all k): a bound on (1/T) sum_t E||grad f(w_t)||^2.

    8 (1-b) G / (T gamma_g) + M_C L_g gamma_g / ((1-b) B) * (6 + 2/(1-b)), with M_C = K M and gamma_g the rate itself:
    K times Theorem 2 for such constants. The paper **misprints** (1-b) in the first term as (1-eta), a symbol that it
    does not use there, and leaves out 1/B in the second, which makes the printed bound B times too large in that term
    (true, but without the gain of a batch; or M_C is to be read as K M / B).

    Args:
        lipschitz: L_g.
        variance_floor: M, of one layer, at least 0.
        layers: K.
        rate: gamma_g.
        batch: B.
        steps: T.
        gap: G = f(w_0) - f_inf, at least 0.
        beta: b, in [0, 1).
        as_printed: Without 1/B, as the paper prints it; (1-eta) is read as (1-b) all the same. Default False.

    Returns:
        The right-hand side.

    Raises:
        ConfigError: If a number is out of range.
    """
    check_positive(L_g=lipschitz, K=layers, gamma_g=rate, B=batch, T=steps)
    check_not_negative(M=variance_floor, **{"f(w_0) - f_inf": gap})
    check_beta(beta)
    noise = layers * variance_floor * lipschitz * rate / (1 - beta) / (1 if as_printed else batch)
    return 8 * (1 - beta) * gap / (steps * rate) + noise * (6 + 2 / (1 - beta))


def _first_term(problem: ProblemConstants, gamma: float, batch: float, steps: int, gap: float) -> float:
    """G / (T gamma S), after all numbers have been checked."""
    check_positive(gamma=gamma, B=batch, T=steps)
    check_not_negative(**{"f(w_0) - f_inf": gap})
    return gap / (steps * gamma * problem.inverse_sum)


def _variance_constant(problem: ProblemConstants, beta: float) -> float:
    return 4 + 2 * problem.kappa + 2 * problem.kappa / (1 - beta)


def _noise_root(problem: ProblemConstants, batch: float, steps: int, gap: float) -> float:
    """sqrt(M G / (T B S))."""
    check_positive(B=batch, T=steps)
    check_not_negative(**{"f(w_0) - f_inf": gap})
    return math.sqrt(problem.variance_floor * gap / (steps * batch * problem.inverse_sum))


def _corollary_gamma(
    name: str,
    problem: ProblemConstants,
    beta: float,
    batch: float,
    steps: int,
    gap: float,
    conditions: StepConditions,
) -> float:
    check_positive(B=batch, T=steps, **{"f(w_0) - f_inf": gap})
    if problem.largest_variance > batch:
        raise ConfigError(
            f"{name} does not apply: it supposes that {1 - beta:g}/(8 L_k) is the smaller bound on every gamma_k, but "
            f"the largest M_k is {problem.largest_variance:g} and B={batch:g}. Use the theorem's bound."
        )
    root = math.sqrt(quotient(batch * gap, steps * problem.variance_floor * problem.inverse_sum))
    gamma = min((1 - beta) / 8, root)
    if not conditions.met_by(problem.rates(gamma)):
        raise ConfigError(
            f"{name} does not apply: its gamma={gamma:g} is above {conditions.largest_gamma(problem):g}, which is what "
            f"{conditions.binding(problem)} allows for these constants. Use the theorem's bound."
        )
    return gamma
