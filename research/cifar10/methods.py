"""The optimizers of the study: the product's own, variants of SignalLARS, and the baselines that the product lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_clars.optim import CLARS, LARS, NAG, LayerMeasures, SignalLARS
from hf_clars.optim.measures import StepTensors
from hf_clars.optim.rates import signal_damping, signal_share
from research.cifar10.settings import BASE_BATCH, Settings
from research.study.variants import RatioVariant, power

GSNR_FLOOR = 0.1


class VariantSignalLARS(SignalLARS):
    """SignalLARS with another factor, or with one share of signal for the whole network.

    Args:
        model: The module to train.
        lr: The rate.
        form: "gain": f = ([1 + (n - 1)(1 - s)] / n)^power, the product's at power 1. "sum": f = [1 + (n - 1) s]^-power.
            With power 1/2 and n = (1 + b) / (1 - b) it keeps the length of the momentum's sum what it is for pure
            noise (`docs/why.md`).
        power: See there.
        share: "layer" or "network": s from the sums over layers of both moments.
        **settings: As of `SignalLARS`.
    """

    def __init__(self, model: nn.Module, lr: float, *, form: str, power: float, share: str, **settings: Any) -> None:
        self.form, self.power, self.share = form, power, share
        super().__init__(model, lr, **settings)

    def _averaged(self, now: Tensor) -> Tensor:
        return super()._averaged(now.sum(1, keepdim=True).expand_as(now) if self.share == "network" else now)

    def _damping(self, share: Tensor) -> Tensor:
        return factor(share, form=self.form, n=self.n, power=self.power)


def factor(share: Tensor, *, form: str, n: float, power: float) -> Tensor:
    """The factor of a share of signal [K], see `VariantSignalLARS`."""
    base = signal_damping(share, n) if form == "gain" else 1 / (1 + (n - 1) * share)
    return base**power


class AdaScale(SignalLARS):
    """AdaScale (Johnson et al., 2020) on Nesterov's momentum: one rate for the whole network, lr * r / S.

    r = (sigma^2 + mu^2) / (sigma^2 / S + mu^2) is the gain of a batch S = B / 128 times as large, in [1, S]. With the
    share s of signal in the squared batch gradient it is 1 + (S - 1)(1 - s). lr is the rate of a batch of pure noise.
    The published method moves its schedule by the sum of the gains and ends where that has reached a number; here, as
    for every method, the schedule follows the steps, whose number is given.

    Args:
        model: The module to train.
        lr: The rate.
        batch: B.
        **settings: As of `SignalLARS`, without n.
    """

    def __init__(self, model: nn.Module, lr: float, *, batch: int, **settings: Any) -> None:
        super().__init__(model, lr, eta=1.0, n=max(1.0, batch / BASE_BATCH), **settings)

    def _measure(self, tensors: StepTensors) -> LayerMeasures:
        weight_norm, grad_norm, sample_norm, batch_size = self._measured_norms(tensors)
        squares = torch.stack([grad_norm, sample_norm]).square()
        moments = self._averaged(squares.sum(1, keepdim=True).expand_as(squares))
        share = signal_share(moments, batch_size)
        damping = signal_damping(share, self.n)
        rate = self._rates(torch.ones_like(share)) * damping
        ratio = torch.where(sample_norm > 0, grad_norm / sample_norm, 1.0)
        return LayerMeasures(
            rate, weight_norm, grad_norm, sample_norm, ratio, signal=share, damping=damping, moments=moments
        )


class VRLARS(LARS):
    """LARS of a gradient whose elements are scaled by their signal-to-noise ratio (Jiang et al., arXiv 2309.13681).

    r = g^2 / var(g_d) over the gradients g_d of the batch's passes (the paper's devices), divided by its mean over the
    layer, and clipped to [0.1, 1]; r * g takes the place of g. Call `after_pass` after each `backward()`.

    Args:
        model: The module to train.
        lr: The rate.
        **settings: As of `LARS`.
    """

    def __init__(self, model: nn.Module, lr: float, **settings: Any) -> None:
        super().__init__(model, lr, **settings)
        self._before: dict[Tensor, Tensor] = {}
        self._squares: dict[Tensor, Tensor] = {}
        self._passes = 0

    @torch.no_grad()
    def after_pass(self) -> None:
        """Take in what a pass has added to `p.grad`."""
        self._passes += 1
        for group in self.param_groups:
            for p in group["params"]:
                added = p.grad - self._before[p] if p in self._before else p.grad
                self._squares[p] = self._squares.get(p, 0) + added.square()
                self._before[p] = p.grad.clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients, then step as LARS does.

        Raises:
            ValueError: The batch was a single pass, which has no variance.
        """
        if self._passes < 2:
            raise ValueError("VR-LARS needs a batch of several passes: make chunk smaller than the batch.")
        for group in self.param_groups:
            ratios = [self._ratio(p) for p in group["params"]]
            mean = torch.cat([r.flatten() for r in ratios]).mean()
            for p, ratio in zip(group["params"], ratios, strict=True):
                p.grad.mul_((ratio / mean.clamp_min(1e-30)).clamp(GSNR_FLOOR, 1.0))
        self._before, self._squares, self._passes = {}, {}, 0
        return super().step(closure)

    def _ratio(self, p: Tensor) -> Tensor:
        """g^2 / var: a pass adds g_d / k to the mean of k of them."""
        assert p.grad is not None
        square = p.grad.square()
        variance = (self._passes * self._squares[p] - square).clamp_min(0)
        return square / variance.clamp_min(1e-30)


def build_optimizer(model: nn.Module, s: Settings) -> Optimizer:
    """The optimizer of some settings.

    Args:
        model: The module to train.
        s: Settings.

    Returns:
        The product's class where the settings are the product's.
    """
    common: dict[str, Any] = {"momentum": s.momentum, "weight_decay": s.weight_decay}
    if s.method == "lamb":
        return _lamb(model, s)
    if s.method == "nag":
        return NAG(model, s.rate, **common)
    if s.method in ("lars", "tvlars"):  # TVLARS (arXiv 2309.14053) is LARS under a schedule of its own
        return LARS(model, s.rate, eta=1.0, **common)
    if s.method == "vr_lars":
        return VRLARS(model, s.rate, eta=1.0, **common)
    if s.method == "lars_times_ratio":
        return RatioVariant(model, s.rate, factor=power(s.power), eta=1.0, **common)
    if s.method == "clars":
        return CLARS(model, s.rate, eta=1.0, **common)
    if s.method == "adascale":
        return AdaScale(model, s.rate, batch=s.batch, signal_decay=s.decay, **common)
    common |= {"eta": 1.0, "n": s.n, "signal_decay": s.decay}
    if (s.form, s.power, s.share) == ("gain", 1.0, "layer"):
        return SignalLARS(model, s.rate, **common)
    return VariantSignalLARS(model, s.rate, form=s.form, power=s.power, share=s.share, **common)


def _lamb(model: nn.Module, s: Settings) -> Optimizer:
    """LAMB (You et al., 2020, Algorithm 2) by timm, every tensor scaled, no clipping of the global norm."""
    from timm.optim.lamb import Lamb  # an extra, for this baseline alone

    return Lamb(model.parameters(), lr=s.rate, weight_decay=s.weight_decay, max_grad_norm=None, always_adapt=True)
