"""What stands behind a module in compiled code, and the operation as which a trace takes it.

torch.compile interprets each line of Python that it traces, which takes long; what an operation does, it runs. An
operation knows the module by a name, and so each module has code of its own. Where the whole model is compiled it has
that in any case. Blocks that are alike and compiled one by one share code: there all is traced.
"""

from __future__ import annotations

import copy
import os
import uuid
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_clars.distributed import is_split
from hf_clars.grad_norms.compiled.arithmetic import Arithmetic
from hf_clars.grad_norms.compiled.functions import Linked, OneProduct, Watched, Way
from hf_clars.grad_norms.compiled.operations import refuse
from hf_clars.grad_norms.registry import LayerRule, is_shipped

_LIBRARY = torch.library.Library("hf_clars", "FRAGMENT")
_OF_ALL = "Tensor? places, str module, str[] names, bool[] summed"
_LIBRARY.define(f"behind(Tensor y, Tensor? x, Tensor[] rows, Tensor[] params, Tensor[] saved, {_OF_ALL}) -> Tensor")
_LIBRARY.define(f"linked(Tensor y, Tensor[] tensors, int earlier, {_OF_ALL}) -> (Tensor, Tensor)")

_PROCESS = uuid.uuid4().hex
"""In each name, beside a fork's number: torch keeps compiled code on disk by names, and others' is of other modules."""

_known: weakref.WeakValueDictionary[str, Behind] = weakref.WeakValueDictionary()


class Behind(Arithmetic):
    """One module in compiled code: the function behind it. It takes what `Arithmetic` takes.

    Attributes:
        known_as: Its name among operations; "" if a trace must follow what it does, as where a rule of a user's may
            read the module's tensors, which an operation would have to be given.
        runs: Whether this is an operation's, that runs.
    """

    runs = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.known_as = ""
        if is_shipped(self.rule) and not self.rule.reads_tensors:
            self.known_as = f"{_PROCESS} {os.getpid()} {self.state.receiver} {self.hooked.path}"
            _known[self.known_as] = self

    def put(
        self,
        y: Tensor,
        x: Tensor | None,
        rows: Sequence[Tensor],
        params: Sequence[Tensor],
        saved: Sequence[Tensor],
        names: tuple[str, ...],
        summed: tuple[bool, ...],
    ) -> Tensor:
        """Put what makes the norms behind a module.

        Args:
            y: What the module returned.
            x: What it was called with; None if its weight's gradient must come from autograd.
            rows: Rows and counts of its parameters.
            params: These parameters.
            saved: What the rule saved.
            names: The parameters' names.
            summed: Whether their rows are shared, [B, *shape].
        """
        way = None if x is None or any(summed) else self._way(names, x, y, rows[0].shape[0])
        if way is None or x is None:
            found: Tensor = Watched.apply(y, self, names, summed, *rows, *saved)
            return found
        found = OneProduct.apply(y.detach(), self, names, way, x, *rows, *params)
        return found

    def link(
        self, y: Tensor, tensors: Sequence[Tensor], earlier: int, names: tuple[str, ...], summed: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor]:
        """The same for a table with several uses; see `Linked`."""
        found: tuple[Tensor, Tensor] = Linked.apply(y, self, names, summed, earlier, *tensors)
        return found

    def for_rows(
        self, names: tuple[str, ...], summed: tuple[bool, ...], saved: tuple[Tensor, ...], g: Tensor, batch: int
    ) -> list[Tensor]:
        """See `Arithmetic`. An error does not end what is compiled: it is said when the code runs."""
        if not self.runs:  # it is traced, and an error is the tracer's to see
            return super().for_rows(names, summed, saved, g, batch)
        try:
            return super().for_rows(names, summed, saved, g, batch)
        except Exception as error:
            words = f"{self.hooked}: its rule cannot be compiled ({type(error).__name__}: {error})"
            shapes = [getattr(self.module, n).shape if whole else () for n, whole in zip(names, summed, strict=True)]
            first, *rest = [g.new_zeros((batch, *shape), dtype=self.state.leaf.dtype) for shape in shapes]
            return [refuse(first, self.state.receiver, words, False), *rest]

    def _way(self, names: tuple[str, ...], x: Tensor, output: Tensor, batch: int) -> Way | None:
        """How the weight gradient comes from this engine; None: from autograd, as always with a rule of the user's."""
        if "weight" not in names or x.shape[0] != batch or is_split(self.module.weight) or not self._is_first():
            return None
        if not is_shipped(self.rule):
            return None  # the sum check would compare what it gives with itself, and its input_grad with nothing
        # Sums, as of normalisation layers, a compiler joins with what is around them; products it cannot.
        products = type(self.rule).fuses_weight_grad is not LayerRule.fuses_weight_grad
        if products and self.rule.gives_whole_backward and self.rule.supplies_backward(self.module, x, output):
            return "kernels"
        return "torch" if self.rule.gives_input_grad and self.rule.fuses_weight_grad(self.module, x, output) else None

    def _is_first(self) -> bool:
        """Whether no other tracker's call of this module comes before: it would be cut off."""
        for hook in self.module._forward_hooks.values():
            traced = getattr(hook, "traced", None)
            if isinstance(traced, Behind):
                return traced.state.receiver == self.state.receiver
        return True


def _of(name: str, places: Tensor | None) -> Behind:
    """A module, which hands over what the sum check compares if `places` are given; see `Arithmetic`."""
    call = copy.copy(_known[name])
    call.runs = True
    call.state = copy.copy(call.state)
    call.state.checked = places is not None
    call.places = call.places if places is None else places
    return call


def _behind(
    y: Tensor,
    x: Tensor | None,
    rows: list[Tensor],
    params: list[Tensor],
    saved: list[Tensor],
    places: Tensor | None,
    module: str,
    names: list[str],
    summed: list[bool],
) -> Tensor:
    return _of(module, places).put(y, x, rows, params, saved, tuple(names), tuple(summed))


def _linked(
    y: Tensor,
    tensors: list[Tensor],
    earlier: int,
    places: Tensor | None,
    module: str,
    names: list[str],
    summed: list[bool],
) -> tuple[Tensor, Tensor]:
    return _of(module, places).link(y, tensors, earlier, tuple(names), tuple(summed))


# For each kind of tensor torch runs them as what they are made of, and records that for the backward pass.
_LIBRARY.impl("behind", _behind)
_LIBRARY.impl("linked", _linked)

behind, linked = torch.ops.hf_clars.behind.default, torch.ops.hf_clars.linked.default
