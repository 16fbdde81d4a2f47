"""What a step works on, and what it measures: one entry a layer."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerMeasures:
    """What one step measured, each [K], on the weights' device; layers in the order of `layer_names`.

    Attributes:
        rate: gamma_k.
        weight_norm: ||w_k|| before the update.
        grad_norm: ||g_k||.
        mean_sample_norm: n_k in the units of `p.grad`; None for methods that do not measure it.
        ratio: R_k = ||g_k|| / n_k, in [0, 1]; None likewise.
        finite: Bool: the layer's gradient norms are neither NaN nor infinite; None for methods that measure none.
        applied: Bool, 0-dim: the step was taken, because all of them are; None likewise.
        signal: s_k, the running share of signal in ||g_k||^2, in [0, 1]; None for methods that do not use it.
        damping: f_k, what `signal` makes of LARS' step, in (0, 1]; None likewise.
        moments: [2, K], the running moments that `signal` is made of, this step's included; None likewise.
    """

    rate: Tensor
    weight_norm: Tensor
    grad_norm: Tensor
    mean_sample_norm: Tensor | None = None
    ratio: Tensor | None = None
    finite: Tensor | None = None
    applied: Tensor | None = None
    signal: Tensor | None = None
    damping: Tensor | None = None
    moments: Tensor | None = None

    def of(self, rows: Tensor) -> LayerMeasures:
        """The same of some layers, by their places."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        return LayerMeasures(
            **{
                name: value if value is None or value.dim() == 0 else value.index_select(-1, rows)
                for name, value in kept.items()
            }
        )

    def stacked(self) -> Tensor:
        """[5, K], or [7, K] with `signal` and `damping` where a signal was measured; NaN where another was not.

        The order is that of `hf_clars.records.QUANTITIES`, and of `SIGNAL_QUANTITIES` after them.
        """
        missing = torch.full_like(self.rate, float("nan"))
        rows = [self.rate, self.weight_norm, self.grad_norm, self.mean_sample_norm, self.ratio]
        rows += [] if self.signal is None else [self.signal, self.damping]
        return torch.stack([missing if row is None else row for row in rows])


@dataclass
class StepTensors:
    """The tensors that a step works on, and the layer (row) of each."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    layer: list[int]
