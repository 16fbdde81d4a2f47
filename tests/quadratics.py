"""Finite-sum problems whose constants are known exactly, and mGD / mNAG on many runs of them at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_clars.theory import ProblemConstants


@dataclass
class FiniteSum:
    """f_i(w) = sum_k (1 + s_ik) phi_k(w_k) + e_i^T w  (or one s_i for all layers, phi coupling them).

    phi(w) = sum_j a_j h((Q w)_j), h(u) = u^2 / 2 or 1 - cos(u): both have 0 <= phi and |h''| <= 1. The s are
    +-sqrt(M_k), each sign with e_i and -e_i alike, so that E||grad_k f_i - grad_k f||^2 = M_k ||grad_k f||^2 +
    E||e_ik||^2 for every w.
    """

    blocks: list[slice]
    directions: np.ndarray  # Q with rows scaled by sqrt(a)
    scales: np.ndarray  # [n, K]: s
    shifts: np.ndarray  # [n, d]: e
    cosine: bool
    constants: ProblemConstants

    def value(self, w):
        u = w @ self.directions.T / self._lengths
        return ((1 - np.cos(u) if self.cosine else u**2 / 2) * self._lengths**2).sum(-1)

    def gradient(self, w):
        u = w @ self.directions.T / self._lengths
        return (np.sin(u) if self.cosine else u) * self._lengths @ self.directions

    @property
    def _lengths(self):
        return np.linalg.norm(self.directions, axis=1)

    def sample(self, w, i):
        """Gradients of samples i [R, B] at w [R, d]: [R, B, d]."""
        factors = np.repeat(1 + self.scales, [s.stop - s.start for s in self.blocks], axis=1)
        return factors[i] * self.gradient(w)[:, None, :] + self.shifts[i]

    def layer_squares(self, gradient):
        return np.stack([(gradient[..., s] ** 2).sum(-1) for s in self.blocks], axis=-1)


def random_problem(seed, *, coupled, cosine, layers=4, noise=1.0, floor=1.0):
    """Coupled layers share one M_k; separate layers have their own."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, layers)
    ends = np.cumsum(sizes)
    blocks = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    width = int(ends[-1])
    directions = rng.standard_normal((width, width)) * np.exp(rng.normal(0, 0.7, width))
    if not coupled:
        separate = np.zeros_like(directions)
        for block in blocks:
            own = directions[block, block]
            separate[block, block] = own / np.linalg.norm(own, 2) * np.exp(rng.normal(0, 0.5))
        directions = separate
    hessian = directions.T @ directions
    factor = noise * np.exp(rng.normal(0, 1.5, layers))
    if coupled:
        factor[:] = factor[0]
    half = 16
    signs = np.sign(rng.standard_normal((half, 1 if coupled else layers))) * np.ones((half, layers))
    shifts = floor * rng.standard_normal((half, width))
    return FiniteSum(
        blocks,
        directions,
        # Every (s, e) with its three reflections: the cross terms and the means are exactly 0.
        np.concatenate([signs, -signs, signs, -signs]) * np.sqrt(factor),
        np.concatenate([shifts, shifts, -shifts, -shifts]),
        cosine,
        ProblemConstants(
            [np.linalg.norm(hessian[s, s], 2) for s in blocks],
            np.linalg.norm(hessian, 2),
            factor,
            max((shifts[:, s] ** 2).sum(1).mean() for s in blocks),
        ),
    )


def criterion(problem, gamma, *, batch, steps, beta=0.0, runs=30, seed=0, start=3.0):
    """(The theorems' left-hand side for T = 1 ... steps, f(w_0)).

    The former is the mean over runs of (1/T) sum_t sum_k q_k ||grad_k f(w_t)||^2.
    """
    rng = np.random.default_rng(seed)
    width = problem.directions.shape[1]
    w = np.tile(start * np.random.default_rng(seed + 1).standard_normal(width), (runs, 1))
    gap, v, terms = float(problem.value(w[0])), w, []
    rates = np.repeat(problem.constants.rates(gamma), [s.stop - s.start for s in problem.blocks])
    with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is what some tests are about
        for _ in range(steps):
            terms.append((problem.layer_squares(problem.gradient(w)) @ problem.constants.weights).mean())
            chosen = rng.integers(0, len(problem.shifts), (runs, batch))
            step = w - rates * problem.sample(w, chosen).mean(1)
            w, v = step + beta * (step - v), step
        return np.cumsum(terms) / np.arange(1, steps + 1), gap
