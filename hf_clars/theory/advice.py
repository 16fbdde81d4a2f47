"""`advise`: from the layer-rate log of a CLARS run, up to which batch size each layer's rate could have grown.

Theory: Theorem 2 of Huo, Gu and Huang (AAAI 2021) bounds layer k's rate by (1-b)/(8 L_k) * min{1, B/M_k}: it grows
linearly with the batch up to B = M_k and not beyond. Estimate: M_k, from what the log holds (`variance_factor`).
Neither tells whether a larger batch reaches the same accuracy, nor that it diverges: the theorem is about the worst
case, and above M_k a larger batch still averages, only with less use for each sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from hf_clars.errors import ConfigError, DataError
from hf_clars.records import LayerRateLog
from hf_clars.theory.constants import Floats

WHOLE = "whole network"


def variance_factor(
    ratio_square: ArrayLike, batch: int, *, norm_spread: ArrayLike = 0.0, data_size: int | None = None
) -> Floats:
    """M_k (Assumption 2 with M = 0) from R_k^2 = ||g_k||^2 / n_k^2 of batches of B samples.

    Let s^2 be the mean of ||grad_k f_i||^2, g^2 = ||grad_k f||^2, so that M_k = s^2/g^2 - 1. For B independent samples
    E||g_k||^2 = g^2 + (s^2 - g^2)/B. The log holds n_k, which estimates the mean norm mu, not s; with
    c = Var(||grad_k f_i||) / mu^2 it is s^2 = (1 + c) mu^2. For n_k near mu, with a = 1/B,

        M_k + 1 = (1 - a) (1 + c) / (R_k^2 - a (1 + c)),

    about 1/R_k^2 where B is far above M_k. Without replacement from N samples the variance of the mean is smaller, and
    a = (N - B) / (B (N - 1)).

    **Bias.** c is not logged (`norm="mean"`). With c = 0, M_k + 1 comes out too small by a factor of at least 1 + c: a
    lower bound, good early in training (c = 0.03 to 0.05 in the untrained network of the quickstart), and far too low
    late, when a few samples carry the gradient (c = 60 to 160 in the same network, trained). With `norm="rms"` n_k
    estimates s itself: c = 0 is exact. `GradientMoments.norm_spread` measures c. n_k of single batches also fluctuates,
    by about sqrt(c/B) of itself, and norms of micro-batches instead of samples make the result lower still.

    Args:
        ratio_square: R_k^2, averaged over steps, any shape.
        batch: B, at least 2.
        norm_spread: c. Default 0.
        data_size: N. Default None: independent samples (N far above B).

    Returns:
        M_k, at least 0; infinite where the batch's gradient is no larger than chance makes it.

    Raises:
        ConfigError: If `batch` is below 2 or above `data_size`.
    """
    if batch < 2 or (data_size is not None and data_size < batch):
        raise ConfigError(
            f"batch={batch} of data_size={data_size}: give a batch of at least 2 samples (one sample always agrees "
            "with itself) and no more than the data set has."
        )
    share = 1 / batch if data_size is None else (data_size - batch) / (batch * (data_size - 1))
    square = 1 + np.asarray(norm_spread, np.float64)
    signal = np.asarray(ratio_square, np.float64) - share * square
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(signal > 0, np.maximum((1 - share) * square / signal - 1, 0.0), np.inf)


@dataclass(frozen=True)
class FactorEstimate:
    """M_k over a window of steps.

    Attributes:
        value: The estimate; infinite if this batch cannot resolve it, NaN without a step to measure.
        low: The same two standard errors of the mean of R_k^2 lower.
    """

    value: float
    low: float

    @property
    def safe(self) -> float:
        """The estimate, or what it is at least where that is all that can be said."""
        return self.value if math.isfinite(self.value) else self.low


@dataclass(frozen=True)
class LayerAdvice:
    """What the log says of one layer.

    Attributes:
        name: The layer.
        ratio: Root mean square of R_k in the early window.
        early: M_k in the first steps.
        late: M_k in the last steps.
        linear_limit: The batch up to which its rate bound grows linearly. From the early window; with `norm="rms"`,
            where the late value is no mere lower bound, the smaller of both. NaN without a step to measure.
    """

    name: str
    ratio: float
    early: FactorEstimate
    late: FactorEstimate
    linear_limit: float


@dataclass(frozen=True)
class BatchAdvice:
    """What the log says of the run.

    Attributes:
        batch: The run's global batch B.
        steps: Logged steps.
        window: Steps in the early and in the late window.
        lower_bounds: True for `norm="mean"`: late values are lower bounds only.
        layers: Every layer, in the order of the log.
        whole: The network taken as one layer (Corollary 3): its M is the mean of M_k weighted by ||grad_k f||^2, also
            known as the simple gradient noise scale.
    """

    batch: int
    steps: int
    window: int
    lower_bounds: bool
    layers: tuple[LayerAdvice, ...]
    whole: LayerAdvice

    @property
    def measured(self) -> list[LayerAdvice]:
        """Layers that had gradients and were trained."""
        return [layer for layer in self.layers if math.isfinite(layer.linear_limit)]

    @property
    def limiting(self) -> LayerAdvice:
        """The layer that leaves the range of linear scaling first."""
        return min(self.measured, key=lambda layer: layer.linear_limit)

    @property
    def last(self) -> LayerAdvice:
        """The layer that leaves it last: no layer's rate bound grows with the batch beyond its limit."""
        return max(self.measured, key=lambda layer: layer.linear_limit)

    @property
    def largest_batch(self) -> int:
        """The largest power of two with B <= M_k in every layer, at least 1."""
        return 2 ** max(0, math.floor(math.log2(max(1.0, self.limiting.linear_limit))))


def advise(
    log: LayerRateLog | str | Path,
    *,
    batch: int | None = None,
    data_size: int | None = None,
    window: float = 0.1,
) -> BatchAdvice:
    """Estimate each layer's M_k and the batch sizes that follow from it.

    Steps at which a layer had no gradient or was frozen are left out. R_k^2 is averaged over a window, during which the
    weights move: M_k + 1 is a harmonic mean over it.

    Args:
        log: The log of a CLARS run, or what `LayerRateLog.open` takes.
        batch: B. Default: "global_batch" of the log's settings.
        data_size: The number of training samples, if B is a noticeable part of it. Default None.
        window: Share of the logged steps that count as early, and as late. Default 0.1.

    Returns:
        The advice.

    Raises:
        DataError: If the log has no per-sample norms or no usable step.
        ConfigError: If the batch is neither given nor in the log, or a number is out of range.
        RecordError: If there is no such log.
    """
    log = log if isinstance(log, LayerRateLog) else LayerRateLog.open(log)
    settings = log.settings
    batch = _batch(settings.get("global_batch") if batch is None else batch)
    if not 0 < window <= 0.5:
        raise ConfigError(f"window={window:g} must be a share of the steps above 0 and at most 0.5.")
    squares = _usable(log)
    steps = max(1, round(window * len(log)))
    exact = settings.get("norm") == "rms"
    estimates = [
        _layer_advice(name, values, steps, batch=batch, data_size=data_size, exact=exact)
        for name, values in zip([*log.layers, WHOLE], squares.T, strict=True)
    ]
    advice = BatchAdvice(batch, len(log), steps, not exact, tuple(estimates[:-1]), estimates[-1])
    if not advice.measured:
        raise DataError(
            f"In the first {steps} steps of the log no layer had a gradient, so nothing can be said of the batch size. "
            "Give a larger window."
        )
    return advice


def _batch(batch: object) -> int:
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 2:
        raise ConfigError(
            f"The run's batch size is {batch!r}; give the global batch, at least 2, as `batch` (or log it as "
            '"global_batch" in the settings).'
        )
    return batch


def _usable(log: LayerRateLog) -> Floats:
    """R_k^2 of every layer and, in the last column, of the whole network; [T, K + 1], NaN where there is none."""
    norms, gradients, rates = (log[name].astype(np.float64) for name in ("mean_sample_norm", "grad_norm", "rate"))
    if not len(log) or np.isnan(norms).all():
        method = str(log.settings.get("method", "this")).upper()
        raise DataError(
            f"The log of {method} with {len(log)} steps holds no mean norms of samples' gradients, from which M_k is "
            "estimated: only CLARS measures them. Train with method clars, or use "
            "hf_clars.theory.measure_gradient_moments on the model."
        )
    usable = np.isfinite(gradients) & np.isfinite(norms) & (norms > 0) & (rates > 0)
    above, below = np.where(usable, gradients**2, 0.0), np.where(usable, norms**2, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.column_stack([above / np.where(usable, below, np.nan), above.sum(1) / below.sum(1)])


def _layer_advice(
    name: str, squares: Floats, steps: int, *, batch: int, data_size: int | None, exact: bool
) -> LayerAdvice:
    early = _estimate(squares[:steps], batch, data_size)
    late = _estimate(squares[-steps:], batch, data_size)
    limit = early.safe if not exact else float(np.fmin(early.safe, late.safe))
    first = squares[:steps][np.isfinite(squares[:steps])]
    return LayerAdvice(name, float(np.sqrt(first.mean())) if len(first) else math.nan, early, late, limit)


def _estimate(squares: Floats, batch: int, data_size: int | None) -> FactorEstimate:
    found = squares[np.isfinite(squares)]
    if not len(found):
        return FactorEstimate(math.nan, math.nan)
    error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    value, low = variance_factor([found.mean(), min(found.mean() + 2 * error, 1.0)], batch, data_size=data_size)
    return FactorEstimate(float(value), float(low))
