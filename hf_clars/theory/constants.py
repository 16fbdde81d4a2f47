"""The constants that the paper's theorems are stated in, and the checks of every number that goes into them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_clars.errors import ConfigError

Floats = NDArray[np.float64]


class ProblemConstants:
    """What Assumptions 1 and 2 of Huo, Gu and Huang (AAAI 2021) say of a problem with K layers.

    They must hold at every w. For a network nobody knows such constants: what `estimate_lipschitz` and
    `measure_gradient_moments` give are values at the weights where they were taken, which are too small where another w
    is worse.

    Args:
        lipschitz: L_k, [K], above 0: ||grad_k f(w) - grad_k f(w + U_k v)|| <= L_k ||v||.
        global_lipschitz: L_g: the same for the whole gradient. At least the largest L_k.
        variance_factor: M_k, [K], at least 0: E||grad_k f_i - grad_k f||^2 <= M_k ||grad_k f||^2 + M. (The paper has
            M_k > 0 and M > 0; 0 is the limit of samples that agree.)
        variance_floor: M, at least 0. Default 0.

    The arguments are attributes, L_k and M_k as float64 arrays.

    Raises:
        ConfigError: If a number is out of range, not finite, or the lengths differ.
    """

    def __init__(
        self,
        lipschitz: ArrayLike,
        global_lipschitz: float,
        variance_factor: ArrayLike,
        variance_floor: float = 0.0,
    ) -> None:
        self.lipschitz: Floats = np.asarray(lipschitz, np.float64)
        self.global_lipschitz = float(global_lipschitz)
        self.variance_factor: Floats = np.asarray(variance_factor, np.float64)
        self.variance_floor = float(variance_floor)
        self._check()

    def _check(self) -> None:
        given, factor = self.lipschitz, self.variance_factor
        if given.ndim != 1 or not len(given) or given.shape != factor.shape:
            raise ConfigError(
                f"L_k and M_k must be two lists with one number a layer; they have shapes {given.shape} and "
                f"{factor.shape}."
            )
        check_positive(**{f"L_{k}": value for k, value in enumerate(given, 1)}, L_g=self.global_lipschitz)
        check_not_negative(**{f"M_{k}": value for k, value in enumerate(factor, 1)}, M=self.variance_floor)
        # A norm of the whole and one of a block round differently: equality may come out just below.
        if self.global_lipschitz < given.max() * (1 - 1e-6):
            raise ConfigError(
                f"L_g={self.global_lipschitz:g} is below the largest L_k, {given.max():g}: a change in one layer is a "
                "change of the whole, so no layer's constant can exceed the global one. Estimate both at the same "
                "weights, and L_g with enough iterations."
            )

    @property
    def largest_variance(self) -> float:
        """M_g = max_k M_k."""
        return float(self.variance_factor.max())

    @property
    def kappa(self) -> float:
        """The smallest kappa that the theorems allow: max_k L_g / L_k."""
        return float(self.global_lipschitz / self.lipschitz.min())

    @property
    def inverse_sum(self) -> float:
        """sum_k 1 / L_k."""
        return float((1 / self.lipschitz).sum())

    @property
    def weights(self) -> Floats:
        """q_k = (1/L_k) / sum_j (1/L_j), [K]: the theorems bound the mean over t of sum_k q_k E||grad_k f(w_t)||^2."""
        return 1 / self.lipschitz / self.inverse_sum

    def rates(self, gamma: float) -> Floats:
        """gamma_k = gamma / L_k, [K], the layer rates that the theorems are about."""
        return gamma / self.lipschitz


def check_positive(**values: float) -> None:
    """Raise unless every value is finite and above 0.

    Args:
        values: By the names they have in the formulas.

    Raises:
        ConfigError: Naming the first that is not.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value:g} cannot be used in a bound: it must be a finite number above 0.")


def check_not_negative(**values: float) -> None:
    """Raise unless every value is finite and at least 0.

    Args:
        values: By the names they have in the formulas.

    Raises:
        ConfigError: Naming the first that is not.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}={value:g} cannot be used in a bound: it must be a finite number, at least 0.")


def check_beta(beta: float) -> None:
    """Raise unless beta is a momentum constant.

    Args:
        beta: In [0, 1).

    Raises:
        ConfigError: If it is not.
    """
    if not 0 <= beta < 1:
        raise ConfigError(f"beta={beta:g} is no momentum constant of mNAG: it must be in [0, 1).")


def quotient(numerator: float, denominator: float) -> float:
    """A fraction of numbers at least 0, infinite for a denominator of 0: as a bound, one that nothing exceeds."""
    return numerator / denominator if denominator > 0 else math.inf
