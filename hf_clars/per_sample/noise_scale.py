"""The gradient noise scale from exact per-sample norms: pure functions, and the running average over steps.

Source: McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (2018), appendix A, with
B_small = 1: the small batches are the samples themselves, whose norms are all known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_clars.optim.rates import signal_share


def unbiased_moments(batch_square: Tensor, sample_square: Tensor, batch_size: Tensor | float) -> tuple[Tensor, Tensor]:
    """One step's unbiased estimates of ||G||^2 and tr(Sigma).

    With B independent samples E||g||^2 = ||G||^2 + tr(Sigma) / B, and the mean square of the samples' norms has the
    expectation ||G||^2 + tr(Sigma). Two equations, two unknowns.

    Args:
        batch_square: ||g||^2 of the batch gradient, any shape.
        sample_square: Mean over the batch's samples of ||g_i||^2, the same shape.
        batch_size: B, at least 2.

    Returns:
        ||G||^2 and tr(Sigma). The first can be negative where the gradient is mostly noise: average before dividing.
    """
    signal = (batch_size * batch_square - sample_square) / (batch_size - 1)
    noise = (sample_square - batch_square) * batch_size / (batch_size - 1)
    return signal, noise


@dataclass(frozen=True)
class NoiseScale:
    """B_simple = tr(Sigma) / ||G||^2, in samples, each [K] (or 0-dim for the model), float64.

    Attributes:
        value: tr(Sigma) / ||G||^2; infinity where the averaged ||G||^2 is not above 0: more steps are needed there.
        standard_error: Of the value, by the delta method over the steps; NaN after fewer than two steps.
        low: Where one standard error below ends. The band is symmetric for 1 / B_simple, whose denominator is the
            well-known one, so it can be told from infinity.
        high: Where one standard error above ends, infinity included.
        signal: Averaged ||G||^2.
        noise: Averaged tr(Sigma).
        share: s, the share of signal in the squared batch gradient, in [0, 1].
    """

    value: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor
    signal: Tensor
    noise: Tensor
    share: Tensor


class NoiseScaleAverage:
    """Average the two moments over steps, each by itself, and divide only then.

    A quotient of averages has a bias that vanishes with the number of steps; an average of quotients has one that
    stays. The last place of every vector is the whole model: the sum of its layers.

    Args:
        layers: K.
        decay: How much of the averages a step keeps, in [0, 1). Default 0.9: the last 19 steps or so. 1 averages all
            steps alike.

    Raises:
        ValueError: If `decay` is not in [0, 1].
    """

    def __init__(self, layers: int, *, decay: float = 0.9) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} cannot work: it must be in [0, 1].")
        self.layers = layers
        self.decay = decay
        self.steps = 0
        # Sums over steps of w x for x = (||g||^2, m, 1 / B), and of (signal, noise); w = decay^age.
        self._first = torch.zeros(5, layers + 1, dtype=torch.float64)
        # Sums of w^2 x for x = (signal^2, signal * noise, noise^2): what the delta method needs.
        self._second = torch.zeros(3, layers + 1, dtype=torch.float64)
        self._weight = 0.0
        self._weight_square = 0.0

    def update(self, batch_square: Tensor, sample_square: Tensor, batch_size: int) -> bool:
        """Add a step.

        Args:
            batch_square: ||g_k||^2, [K], of the whole batch over all passes and processes.
            sample_square: Mean over all its samples of ||g_ik||^2, [K], in the same units.
            batch_size: B, all its samples.

        Returns:
            Whether it was added. A batch of one sample shows no noise, and a step with a value that is not finite
            would spoil the average: neither is added.
        """
        if batch_size < 2:
            return False
        batch, sample = (_with_total(x) for x in (batch_square, sample_square))
        if not bool(torch.isfinite(batch).all() & torch.isfinite(sample).all()):
            return False
        signal, noise = unbiased_moments(batch, sample, batch_size)
        inverse = torch.full_like(batch, 1 / batch_size)
        keep = self.decay
        self._first = keep * self._first + torch.stack([batch, sample, inverse, signal, noise])
        self._second = keep**2 * self._second + torch.stack([signal * signal, signal * noise, noise * noise])
        self._weight = keep * self._weight + 1
        self._weight_square = keep**2 * self._weight_square + 1
        self.steps += 1
        return True

    def read(self) -> NoiseScale:
        """The noise scale of the K layers, and of the whole model in the last place: each [K + 1]; NaN before a step.

        The standard error takes the steps for independent draws around one noise scale. Steps of a network that learns
        are neither quite: it says how well the average is known, not how fast it drifts.
        """
        batch, sample, inverse, signal, noise = self._first / self._weight if self._weight else self._first * torch.nan
        value = torch.where(signal > 0, noise / signal, torch.inf)
        value = torch.where(torch.isnan(signal), torch.nan, value)
        squares = self._second / self._weight**2 if self._weight else self._second * torch.nan
        # Delta method. For r = noise / signal: var(r) = sum w^2 (noise_t - r signal_t)^2 / signal^2, and with n
        # effective steps n / (n - 1) for the degree of freedom that the mean has taken. For 1 / r likewise.
        number = self._weight**2 / self._weight_square if self._weight else 0.0
        factor = number / (number - 1) if self.steps > 1 and number > 1 else torch.nan
        error = _ratio_error(noise, signal, squares[2], squares[1], squares[0], factor)
        inverted, inverted_error = (
            signal / noise,
            _ratio_error(signal, noise, squares[0], squares[1], squares[2], factor),
        )
        upper, lower = inverted + inverted_error, inverted - inverted_error
        low = torch.where(upper > 0, 1 / upper, torch.where(torch.isnan(upper), torch.nan, torch.inf))
        high = torch.where(lower > 0, 1 / lower, torch.where(torch.isnan(lower), torch.nan, torch.inf))
        return NoiseScale(
            value=value,
            standard_error=torch.where(torch.isinf(value), torch.nan, error),
            low=low,
            high=high,
            signal=signal,
            noise=noise,
            share=signal_share(torch.stack([batch, sample]), 1 / inverse),
        )

    def layer(self, read: NoiseScale, place: int) -> dict[str, float]:
        """One layer (or -1, the model) of what `read` returned, as numbers."""
        names = ("value", "standard_error", "low", "high", "signal", "noise", "share")
        return {name: float(getattr(read, name)[place]) for name in names}


def _with_total(of_layers: Tensor) -> Tensor:
    """[K] and its sum, float64 on the CPU."""
    wide = of_layers.detach().to("cpu", torch.float64)
    return torch.cat([wide, wide.sum()[None]])


def _ratio_error(
    top: Tensor, bottom: Tensor, top_square: Tensor, cross: Tensor, bottom_square: Tensor, factor: float
) -> Tensor:
    """Standard error of top / bottom from the weighted sums of squares of their summands."""
    ratio = top / bottom
    variance = (top_square - 2 * ratio * cross + ratio.square() * bottom_square) / bottom.square()
    return (factor * variance.clamp(min=0)).sqrt()
