"""LARS that measures its own warmup: each layer's rate is damped by the share of signal in its gradient.

Sources: the two moments are McCandlish et al. (2018), appendix A; the damping is the gain of AdaScale (Johnson et al.,
2020), here in each layer and measured from the samples themselves. That a warmup counteracts a high share of signal at
the start of training is the finding of Kosson, Messmer and Jaggi (NeurIPS 2024, arXiv 2410.23922).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import on_device
from hf_clars.layers import LayerMode
from hf_clars.optim.clars import CLARS
from hf_clars.optim.lars import TRUST_CLIP
from hf_clars.optim.measures import LayerMeasures, StepTensors
from hf_clars.optim.rates import signal_damping, signal_moments, signal_share, trust_ratio
from hf_clars.optim.state_names import MOMENTS
from hf_clars.optim.update import MomentumForm


class SignalLARS(CLARS):
    """LARS times f_k, gamma_k = lr * eta * f_k * ||w_k|| / ||g_k||, with f_k = [1 + (n - 1)(1 - s_k)] / n.

    s_k is the share of signal in layer k's squared batch gradient, measured from every sample's gradient norm while
    `backward()` runs (see `hf_clars.optim.rates.signal_share`), and averaged over steps. Early in training, and with
    large batches, it is near 1 and the step is up to n times shorter: that is the warmup, and nobody has to set its
    length. Where s_k is 0, this is LARS exactly.

    Args:
        model: The module to train, as it will be called.
        lr: gamma_scale, the global rate that schedules move. Default 0.1.
        eta: Trust coefficient. Default 1e-2.
        n: How much shorter a step of pure signal is than one of pure noise, at least 1. Default 16.
        signal_decay: How much of the running moments a step keeps, in [0, 1). Default 0.9.
        momentum: beta in [0, 1); the rate is inside the buffer. Default 0.9.
        weight_decay: Coupled, and weight_decay * ||w_k|| is added to the denominator, as in `LARS`. Default 0.
        samples: Measure the first `samples` of each accumulated batch; None (default): every sample.
        layers: `"module"` (default) or `"tensor"`.
        trust_clip: Upper bound on ||w_k|| / ||g_k||. Default 1e8. None: no bound.
        scale_norm_and_bias: False trains biases and normalisation weights at `lr` itself. Default True.
        params: Groups of the model's parameters with settings of their own.
        momentum_form: `"nesterov"` (default) or `"heavy_ball"`.
        foreach: Use the multi-tensor path. Default: on the CPU no, elsewhere yes.

    A step that is not taken (NaN, infinity) leaves the running moments as they are. A batch of one sample shows no
    noise, and is taken as LARS would. `last_step.mean_sample_norm` is the root of the mean square here.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: For settings out of range.
        UncoveredParameterError: In the first forward pass, if hooks cannot see a trainable parameter.
        NoNormsError: At a step, if gradients did not come from a backward pass through the model.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        eta: float = 1e-2,
        n: float = 16.0,
        signal_decay: float = 0.9,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        samples: int | None = None,
        layers: LayerMode = "module",
        trust_clip: float | None = TRUST_CLIP,
        scale_norm_and_bias: bool = True,
        params: Iterable[dict[str, Any]] | None = None,
        momentum_form: MomentumForm = "nesterov",
        foreach: bool | None = None,
    ) -> None:
        if not 1 <= n < math.inf:
            raise ValueError(
                f"n={n}: a step of pure signal is n times shorter than one of noise; give a finite number, at least 1."
            )
        if not 0 <= signal_decay < 1:
            raise ValueError(f"signal_decay={signal_decay} cannot work: it must be in [0, 1).")
        self.n = float(n)
        self.signal_decay = float(signal_decay)
        super().__init__(
            model,
            lr,
            eta=eta,
            momentum=momentum,
            weight_decay=weight_decay,
            samples=samples,
            norm="rms",
            layers=layers,
            trust_clip=trust_clip,
            scale_norm_and_bias=scale_norm_and_bias,
            params=params,
            momentum_form=momentum_form,
            foreach=foreach,
        )

    @property
    def measures_signal(self) -> bool:
        """It does."""
        return True

    def _measure(self, tensors: StepTensors) -> LayerMeasures:
        weight_norm, grad_norm, sample_norm, batch_size = self._measured_norms(tensors)
        moments = self._averaged(signal_moments(weight_norm, grad_norm, sample_norm))
        share = signal_share(moments, batch_size)
        trust = trust_ratio(
            weight_norm, grad_norm, weight_decay=self._weight_decays(weight_norm), clip=self._clips(weight_norm)
        )
        damping = self._where_adaptive(signal_damping(share, self.n))
        rate = self._rates(trust) * damping
        ratio = torch.where(sample_norm > 0, grad_norm / sample_norm, 1.0)
        return LayerMeasures(
            rate, weight_norm, grad_norm, sample_norm, ratio, signal=share, damping=damping, moments=moments
        )

    def _running(self, like: Tensor) -> Tensor:
        """[2, K], the running moments before this step; 0 before the first, whose small weight cancels in the share."""
        if not any(MOMENTS in group for group in self._all_groups):
            return torch.zeros_like(like)
        parts, rows = [], []
        for g, group in enumerate(self._all_groups):
            if MOMENTS in group:
                parts.append(group[MOMENTS].to(like).reshape(2, -1))
                rows += self._book.rows_in(g)
        return torch.zeros_like(like).index_copy(1, on_device(tuple(rows), like.device), torch.cat(parts, dim=1))

    def _averaged(self, now: Tensor) -> Tensor:
        """The running moments with this step's."""
        return self.signal_decay * self._running(now) + (1 - self.signal_decay) * now

    def _keep(self, measures: LayerMeasures) -> None:
        """Keep the running moments, unless the step was not taken."""
        moments, applied = measures.moments, measures.applied
        assert moments is not None
        assert applied is not None
        self._store(torch.where(applied, moments, self._running(moments)))

    def _store(self, moments: Tensor) -> None:
        """Put the moments [2, K] into the groups: [2] where a group is one layer, else [2, layers of the group]."""
        for g, group in enumerate(self._all_groups):
            rows = self._book.rows_in(g)
            if len(rows) == 1:
                group[MOMENTS] = moments[:, rows[0]]
            elif rows:
                group[MOMENTS] = moments.index_select(1, on_device(tuple(rows), moments.device))

    def _make_state(self, tensors: StepTensors) -> None:
        super()._make_state(tensors)
        like = tensors.params[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._store(torch.zeros(2, len(self._book.layers), dtype=dtype, device=like.device))
