"""Norms of micro-batch gradients: the estimator of the authors' published code.

Their code measures ||g_k|| of 64 batches of 8 samples and takes the mean. Here a micro-batch is one forward and
backward of the accumulated batch, so 8 samples a device and step give theirs. It needs no layer rules, and it is
biased low: within a micro-batch gradients cancel before the norm is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.accumulator import NormAccumulator
from hf_clars.grad_norms.forward_pass import ForwardPass, NormTotals
from hf_clars.grad_norms.hooks import BoundHook
from hf_clars.layers import ParamLayer


@dataclass(frozen=True)
class _Products:
    """Per layer, [K]: ||g||^2 and <g, w> of one micro-batch's gradient."""

    squares: Tensor
    dots: Tensor


class MicroBatchGradNorms(NormAccumulator):
    """Mean norm of the micro-batch gradients of an accumulated batch.

    Args:
        model: The module; its forward must be called as a whole, once a micro-batch.
        layers: The partition to measure.
        samples: Measure micro-batches until this many samples were seen; None for all.
        weight_decay: Measure ||g + weight_decay * w|| instead of ||g||, as the authors' code does. Default 0.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ParamLayer],
        *,
        samples: int | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(model, layers, samples=samples)
        self.weight_decay = weight_decay
        self._products: list[_Products] = []
        self._dots: dict[int, Tensor] = {}
        self._latest: ForwardPass | None = None
        self._watched: set[nn.Parameter] = set()
        self._watch_params()
        self._watch_results()

    def _watch_params(self) -> None:
        for param in self._layer_of.keys() - self._watched:
            self._hooks.add(param.register_hook, BoundHook(self._arrived, param))
            self._watched.add(param)

    def cover(self, layers: Sequence[ParamLayer]) -> None:
        """Measure other layers from now on; they must hold the parameters of the old ones.

        Args:
            layers: The partition; between two batches.
        """
        super().cover(layers)
        self._watch_params()

    def _open(self, batch_size: int, *, implicit: bool = False) -> ForwardPass:
        self._close()
        self._drop_if_cleared()
        seen = sum(p.batch_size for p in self._passes)
        wanted = self.samples is None or seen < self.samples
        opened = ForwardPass(batch_size, batch_size if wanted else 0, self._layer_of, implicit)
        self._passes.append(opened)
        self._latest = opened
        return opened

    @torch.no_grad()
    def _arrived(self, param: nn.Parameter, g: Tensor) -> None:
        forward_pass, layer = self._latest, self._layer_of[param]
        if forward_pass is None or not forward_pass.measured:
            return
        self._mark(forward_pass)
        forward_pass.uses.add(param)
        g = g.detach().float() if g.dtype in (torch.float16, torch.bfloat16) else g.detach()
        forward_pass.sums.add_squares(layer, g.square().sum())
        if self.weight_decay:
            dot = (g * param.detach()).sum()
            self._dots[layer] = self._dots[layer] + dot if layer in self._dots else dot

    def _close(self) -> None:
        for forward_pass in self._passes:
            if forward_pass.closed or not forward_pass.backward_seen:
                continue
            forward_pass.closed = True
            if forward_pass.sums.squares:
                zero = torch.zeros_like(next(iter(forward_pass.sums.squares.values())))
                order = range(len(self.layers))
                squares = torch.stack([forward_pass.sums.squares.get(k, zero) for k in order])
                dots = torch.stack([self._dots.get(k, zero) for k in order])
                self._products.append(_Products(squares, dots))
                forward_pass.sums.squares.clear()
                self._dots.clear()

    @torch.no_grad()
    def totals(self) -> NormTotals | None:
        """Sums over the measured micro-batches, all of one size, in which `captured` and `total` count.

        What was not measured may have come in passes of another size.
        """
        self._close()
        if not self._products:
            return None
        done = [p for p in self._passes if p.backward_seen]
        samples = sum(p.measured for p in done)
        total = sum(p.batch_size for p in done) * len(self._products) / samples
        squares = torch.stack([p.squares for p in self._products])
        if self.weight_decay:
            # One micro-batch adds c g_m to p.grad with c = 1 / total: its decayed gradient is c (g_m + decay * w).
            share = self.weight_decay / total
            dots = torch.stack([p.dots for p in self._products])
            weights = torch.stack([sum_of_squares(layer.params) for layer in self.layers])
            squares = (squares + 2 * share * dots + share**2 * weights).clamp(min=0)
        return NormTotals(squares.sqrt().sum(0), squares.sum(0), captured=len(self._products), total=total)

    def reset(self) -> None:
        """Forget the batch accumulated so far."""
        super().reset()
        self._products.clear()
        self._dots.clear()


def sum_of_squares(params: Sequence[nn.Parameter]) -> Tensor:
    """||w||^2 over several tensors, a scalar in float32 at least."""
    norms = [torch.linalg.vector_norm(p.detach(), dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    return torch.stack(norms).square().sum()
