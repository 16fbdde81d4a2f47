"""The layer-wise rates as pure functions on K-vectors: one entry a layer, no loops, no device syncs.

Sources: LARS is Eq. 3 and CLARS Eq. 5 of Huo, Gu and Huang, "Large Batch Optimization for Deep Learning Using New
Complete Layer-Wise Adaptive Rate Scaling", AAAI 2021 (LARS itself: You, Gitman and Ginsburg, 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor


def trust_ratio(
    weight_norm: Tensor,
    gradient_scale: Tensor,
    *,
    weight_decay: Tensor | float = 0.0,
    clip: Tensor | float | None = None,
) -> Tensor:
    """||w_k|| / (s_k + weight_decay * ||w_k||), the factor that makes a layer's step proportional to its weights.

    Zero-norm rule: where ||w_k|| = 0 (a zero-initialised layer) or the denominator is 0 (a dead layer) the ratio is 1,
    so that the layer takes a plain step of gamma_scale * eta * g and can leave zero.

    Args:
        weight_norm: ||w_k||, [K].
        gradient_scale: s_k, [K]: ||g_k|| for LARS, n_k for CLARS.
        weight_decay: Coupled decay, a number or [K]. With it the gradient that is applied is g_k + decay * w_k, whose
            norm is at most the denominator.
        clip: Upper bound of the ratio, a number or [K], or None.

    Returns:
        [K].
    """
    denominator = gradient_scale + weight_decay * weight_norm
    usable = (weight_norm > 0) & (denominator > 0)
    ratio = torch.where(usable, weight_norm / denominator, 1.0)
    return ratio if clip is None else ratio.clamp(max=clip)


def mean_sample_norm(
    norm_sums: Tensor,
    square_sums: Tensor,
    grad_norm: Tensor,
    *,
    captured: Tensor | float,
    total: Tensor | float,
    norm: str,
) -> Tensor:
    """n_k of Eq. 5 in the units of `p.grad`, from sums over the captured samples.

    A sample adds c g_i to `p.grad`, c being whatever the loss was scaled with, so the sum of ||c g_i|| over the batch
    is n_k in the units of `p.grad`, and R_k = ||g_k|| / n_k needs no batch size. From a subset J of the samples the sum
    is estimated as (B / |J|) times the subset's. The triangle inequality n_k >= ||g_k|| holds for the whole batch; an
    estimate that falls below (a subset that is dead or unusually easy) is raised to it.

    Args:
        norm_sums: Sum of ||c g_i|| over captured samples, [K].
        square_sums: Sum of ||c g_i||^2 over captured samples, [K].
        grad_norm: ||g_k||, [K].
        captured: |J|.
        total: B.
        norm: `"mean"` (Eq. 5) or `"rms"` (Algorithm 1, line 4).

    Returns:
        [K].
    """
    factor = total / captured
    n = norm_sums * factor if norm == "mean" else (square_sums * (total * factor)).sqrt()
    return torch.maximum(n, grad_norm)


def signal_moments(weight_norm: Tensor, grad_norm: Tensor, sample_norm: Tensor) -> Tensor:
    """One step's two moments of a layer's gradient, relative to its weights: ||g_k||^2 and m_k over ||w_k||^2.

    Dividing by the weights' square makes steps comparable while weights grow; a layer without weights is left as it is.

    Args:
        weight_norm: ||w_k||, [K].
        grad_norm: ||g_k||, the batch gradient's norm, [K].
        sample_norm: sqrt(m_k), the root of the mean square of the samples' gradient norms, [K], in the same units.

    Returns:
        [2, K].
    """
    weights = torch.where(weight_norm > 0, weight_norm, 1.0)
    return (torch.stack([grad_norm, sample_norm]) / weights).clamp(max=1e15).square()  # finite in float32


def signal_share(moments: Tensor, batch_size: Tensor | float) -> Tensor:
    """s_k, the share of signal in a layer's squared batch gradient, from (averages of) its two moments.

    With B independent samples E||g_k||^2 = ||G_k||^2 + tr(Sigma_k) / B and E m_k = ||G_k||^2 + tr(Sigma_k), G_k being
    the gradient over all data. So (B ||g_k||^2 - m_k) / (B - 1) estimates ||G_k||^2 without bias (McCandlish et al.
    2018, appendix A), and s_k is its share of ||g_k||^2. It is 1 where all samples agree and 0 where the batch gradient
    is what noise alone would give.

    Args:
        moments: [2, K], see `signal_moments`.
        batch_size: B, samples of the batch. A batch of one sample shows no noise: the share is then taken as 0.

    Returns:
        [K], clipped to [0, 1]; 0 for a layer without a gradient.
    """
    batch, sample = moments
    b = torch.as_tensor(batch_size, dtype=batch.dtype, device=batch.device)
    usable = (batch > 0) & (b > 1)
    share = (b * batch - sample) / ((b - 1) * batch)
    return torch.where(usable, share.clamp(0.0, 1.0), 0.0)


def signal_damping(share: Tensor, n: float) -> Tensor:
    """f_k = [1 + (n - 1)(1 - s_k)] / n: 1 where the gradient is noise, 1 / n where it is signal.

    Where the gradients of successive steps agree, momentum adds them up in one direction; where they are noise, they
    cancel. n f_k is the gain of AdaScale (Johnson et al. 2020) of a batch n times as large, taken in each layer.

    Args:
        share: s_k, [K].
        n: How much shorter a step of pure signal is than one of pure noise, at least 1. 1 means no damping.

    Returns:
        [K], in [1 / n, 1].
    """
    return (1 + (n - 1) * (1 - share)) / n
