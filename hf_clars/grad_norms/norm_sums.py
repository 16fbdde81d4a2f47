"""What adds up while one backward pass delivers: uses of a parameter, and the parameters of a layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.norm_math import SMALL, squared_sum
from hf_clars.grad_norms.sum_check import SumCheck
from hf_clars.grad_norms.tied_tables import TiedTable


class NormSums:
    """Squared norms of the samples, added up over each layer's parameters.

    Args:
        layer_of: Layer index of every parameter.
        several: Parameters with more than one use: their gradients add up before they are squared.

    Attributes:
        squares: {layer index: Tensor [measured]}.
        tables: Parameters with several uses that are tables looked up; see `tied_tables.py`.
        check: Compares sums with the batch gradient, in passes that are checked.
    """

    def __init__(self, layer_of: Mapping[nn.Parameter, int], several: Collection[nn.Parameter]) -> None:
        self._layer_of = layer_of
        self._several = several
        self._added: dict[nn.Parameter, Tensor] = {}
        self._small: list[tuple[int, Tensor]] = []
        self.squares: dict[int, Tensor] = {}
        self.tables: dict[nn.Parameter, TiedTable | None] = {}
        self.check: SumCheck | None = None

    def take(self, param: nn.Parameter, grads: Tensor, dtype: torch.dtype) -> None:
        """Add one use's per-sample gradients, and look at their sum where sums are checked.

        Args:
            param: The parameter.
            grads: [measured, *shape]; where only norms are asked for, [measured, 1] with each sample's does as well.
            dtype: The precision that this use was computed in.
        """
        if self.check is not None:
            self.check.add_grads(param, grads, dtype)
        self.add_grads(param, grads)

    def add_squares(self, layer: int, squares: Tensor) -> None:
        """Add one parameter's squared norms [measured] to its layer."""
        held = self.squares.get(layer)
        self.squares[layer] = squares if held is None else held + squares

    def add_grads(self, param: nn.Parameter, grads: Tensor) -> None:
        """Add one use's per-sample gradients [measured, *shape]."""
        if param in self._several:
            held = self._added.get(param)
            self._added[param] = grads if held is None else held + grads
        elif grads.numel() < SMALL and not grads.is_complex():
            self._small.append((self._layer_of[param], grads))
        else:
            self.add_squares(self._layer_of[param], squared_sum(grads))

    def norms(self, layers: int) -> Tensor | None:
        """The norms, once.

        Args:
            layers: Number of layers K.

        Returns:
            Norms [K, measured], zero for layers that got no gradient; None when no layer got any.
        """
        for param, grads in self._added.items():
            self.add_squares(self._layer_of[param], squared_sum(grads))
        for param, table in self.tables.items():
            squares = None if table is None else table.squares()
            if squares is not None:
                self.add_squares(self._layer_of[param], squares)
        self._square_small()
        self._added.clear()
        self.tables.clear()
        if not self.squares:
            return None
        zeros = torch.zeros_like(next(iter(self.squares.values())))
        # A gradient that cancels is 0 give or take rounding, and what is taken from products may lie below that.
        norms = torch.stack([self.squares.get(k, zeros) for k in range(layers)]).clamp(min=0).sqrt()
        self.squares.clear()
        return norms

    def _square_small(self) -> None:
        """Square all gradients of one shape at once: there are many of them, and each operation takes its time."""
        by_shape: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
        for layer, grads in self._small:
            by_shape.setdefault((grads.shape, grads.dtype), []).append((layer, grads))
        self._small.clear()
        for group in by_shape.values():
            stacked = torch.stack([grads.flatten(1) if grads.dim() > 1 else grads[:, None] for _, grads in group])
            for (layer, _), squares in zip(group, torch.linalg.vecdot(stacked, stacked).unbind(), strict=True):
                self.add_squares(layer, squares)
