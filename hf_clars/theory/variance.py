"""Estimates of M_k, M and M_g (Assumption 2) from the gradient norms of single samples.

Assumption 2: E||grad_k f_i(w) - grad_k f(w)||^2 <= M_k ||grad_k f(w)||^2 + M for every w. At one w the left side and
||grad_k f(w)||^2 are measured exactly over the data; constants that do at the measured points follow. They are
estimates: another w may need larger ones, and as the full gradient goes to 0 no M_k does without M > 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from hf_clars.errors import ConfigError, DataError
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.layers import LayerMode, ParamLayer, param_layers
from hf_clars.theory.constants import Floats, check_not_negative
from hf_clars.theory.measuring import Loss, check_not_empty, copy_to_measure, count_rows, model_loss


@dataclass(frozen=True, eq=False)
class GradientMoments:
    """Gradients of n samples at one w, layer by layer.

    Attributes:
        layers: K names.
        samples: n.
        mean_square: (1/n) sum_i ||grad_k f_i||^2, [K].
        mean_norm: (1/n) sum_i ||grad_k f_i||, [K]: n_k of Eq. 5 over all n samples.
        full_square: ||grad_k f||^2 = ||(1/n) sum_i grad_k f_i||^2, [K].
    """

    layers: tuple[str, ...]
    samples: int
    mean_square: Floats
    mean_norm: Floats
    full_square: Floats

    @property
    def variance(self) -> Floats:
        """E||grad_k f_i - grad_k f||^2 for a sample drawn at random, [K]."""
        return np.maximum(self.mean_square - self.full_square, 0.0)

    @property
    def variance_factor(self) -> Floats:
        """M_k of Assumption 2 at this w, with M = 0, [K]: infinite (or NaN) where the full gradient is 0."""
        return _divided(self.variance, self.full_square)

    @property
    def figure2_ratio(self) -> Floats:
        """What Figure 2 calls M_k: (1/n) sum_i ||grad_k f_i||^2 / ||grad_k f||^2, [K].

        This is Assumption 2's M_k **plus 1**, since the variance is the mean square less the square of the mean.
        """
        return _divided(self.mean_square, self.full_square)

    @property
    def norm_spread(self) -> Floats:
        """Var(||grad_k f_i||) / (mean ||grad_k f_i||)^2, [K]: how far mean and root mean square of the norms differ."""
        return np.maximum(_divided(self.mean_square, self.mean_norm**2) - 1, 0.0)


def measure_gradient_moments(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = model_loss,
    layers: LayerMode = "module",
    progress: bool = False,
) -> GradientMoments:
    """Measure every sample's gradient norm and the full gradient, in one pass over the data.

    A sample's gradient is that of `PerSampleGradNorms`; under train-mode BatchNorm it depends on the batch that the
    sample is in, and so does the result. Dropout adds its own variance: use eval mode for f_i as they are.

    Args:
        model: In the mode to measure in. Measured is a copy of it: the model itself stays as it is.
        batches: The data, read once.
        loss: (model, batch) -> mean loss of the batch's samples. Default: `model(**batch)["loss"]`.
        layers: `"module"` (default) or `"tensor"`.
        progress: Show a bar. Default False.

    Returns:
        The moments, on the host.

    Raises:
        DataError: If there are no samples, or a loss is not finite.
    """
    model = copy_to_measure(model)
    partition = param_layers(model, layers=layers)
    samples = 0
    with PerSampleGradNorms(model, layers=partition, loss_reduction="sum", keep_per_sample=False) as norms:
        for batch in tqdm(batches, desc="M_k", disable=not progress):
            rows = count_rows(batch)
            # Of the summed loss, so that p.grad adds up to the sum over all samples whatever the batches' sizes.
            (loss(model, batch) * rows).backward()
            samples += rows
        check_not_empty(samples, batches)
        totals = norms.totals()
        full = torch.stack([_square(layer) for layer in partition])
    assert totals is not None
    moments = GradientMoments(
        layers=tuple(layer.name for layer in partition),
        samples=samples,
        mean_square=totals.squares.double().cpu().numpy() / samples,
        mean_norm=totals.norms.double().cpu().numpy() / samples,
        full_square=full.cpu().numpy() / samples**2,
    )
    if not np.isfinite(moments.mean_square).all():
        raise DataError(
            "The gradients at these weights are not finite: the run has diverged. Measure at an earlier one."
        )
    return moments


def variance_constants(points: Sequence[GradientMoments], floor: float = 0.0) -> tuple[Floats, float]:
    """The smallest M_k with which Assumption 2 holds at every measured point, given M.

    Args:
        points: Moments at one or more weights (of one model and partition).
        floor: M, at least 0. Default 0.

    Returns:
        (M_k, [K]; M_g = max_k M_k).

    Raises:
        ConfigError: If `floor` is out of range, or there are no points.
    """
    check_not_negative(M=floor)
    _check_points(points)
    needed = np.stack([_divided(np.maximum(p.variance - floor, 0.0), p.full_square) for p in points])
    factor = np.nan_to_num(needed, nan=0.0, posinf=np.inf).max(axis=0)  # 0/0: nothing is needed there
    return factor, float(factor.max())


def variance_floor(points: Sequence[GradientMoments], factor: float | Floats = 0.0) -> float:
    """The smallest M with which Assumption 2 holds at every measured point and layer, given M_k.

    Args:
        points: Moments at one or more weights.
        factor: M_k, one number or [K]. Default 0: M is then the largest variance of any layer.

    Returns:
        M.

    Raises:
        ConfigError: If there are no points.
    """
    _check_points(points)
    return max(0.0, max(float((p.variance - factor * p.full_square).max()) for p in points))


def _check_points(points: Sequence[GradientMoments]) -> None:
    if not points or any(p.layers != points[0].layers for p in points):
        raise ConfigError("Variance constants need measurements at one point at least, all of the same layers.")


def _square(layer: ParamLayer) -> torch.Tensor:
    """||sum of gradients||^2 of one layer, float64; 0 where nothing arrived."""
    zero = torch.zeros((), dtype=torch.float64, device=layer.params[0].device)
    return sum((p.grad.double().square().sum() for p in layer.params if p.grad is not None), zero)


def _divided(numerator: Floats, denominator: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return numerator / denominator
