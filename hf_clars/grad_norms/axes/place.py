"""Where the samples are in a function's result: which axis is theirs, and how it is folded with others.

A model is called with tensors [B, ...]. What each function does with axes is written here, by its name; functions that
compute number by number are known by torch's own mark. Of any other function nothing is known, and what it returns is
`LOST`: nobody may take its first axis for the samples' because it is as long.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.axes.functions import (
    ALONG,
    ALONG_THE_LAST,
    BY_NAME,
    IN_ORDER,
    JOINS,
    KEEP_SHAPES,
    KEEP_THE_FIRST,
    NAMES_AXES,
    OF_THE_LAST,
    REDUCTIONS,
    is_pointwise,
)
from hf_clars.grad_norms.axes.letters import letters_of_einsum, letters_of_matmul
from hf_clars.grad_norms.pytree import tensors_in

#: Samples are somewhere in a tensor, and nobody knows where.
LOST = "lost"


@dataclass(frozen=True)
class Place:
    """Where the samples are in a tensor.

    Attributes:
        axis: Which axis is theirs. It is outer x B x inner long.
        outer: What is folded into it and runs slower than the samples, as time.
        inner: What runs faster, as windows.
    """

    axis: int = 0
    outer: Any = 1
    inner: Any = 1

    def length(self, batch: Any) -> Any:
        """Of the axis."""
        return self.outer * batch * self.inner


def the_one(found: Sequence[Any]) -> Any:
    """What all are, or `LOST`. Lengths may be symbols, which have no hash."""
    return found[0] if found and all(f == found[0] for f in found) else LOST


def place_in_view(function: Any, args: Any, kwargs: Any, place: Place, batch: Any) -> Any:
    """Where the samples are in a view: the function is called on a tensor whose memory moves along their axis only.

    Args:
        function: It, or the name of a tensor's method.
        args: What it is called with, the tensor first.
        kwargs: The same.
        place: Where they are in the tensor.
        batch: B.
    """
    shape = [_number(n) for n in args[0].shape]
    strides = [int(k == place.axis) for k in range(len(shape))]
    label = torch.empty(shape[place.axis], dtype=torch.int8).as_strided(shape, strides)
    rest, kwargs = torch.utils._pytree.tree_map(_number, (args[1:], kwargs))
    call = getattr(label, function) if isinstance(function, str) else None
    try:
        result = call(*rest, **kwargs) if call is not None else function(label, *rest, **kwargs)
    except Exception:  # an index by numbers that only a run knows
        return LOST
    part = _number(batch * place.inner)
    if isinstance(result, tuple | list):
        return tuple(_place_of_label(t, label, place, part) for t in result)
    return _place_of_label(result, label, place, part)


def _number(n: Any) -> Any:
    """A size as it is in this trace. To ask for `int(n)` would make code for this size alone."""
    return n.node.hint if isinstance(n, torch.SymInt) else n


def _place_of_label(result: Tensor, label: Tensor, place: Place, part: int) -> Any:
    """Where the samples' axis is now. Of a folded axis there may be less: `part` rows are one batch."""
    if (
        result.data_ptr() < label.data_ptr() * bool(result.numel())
        or result.untyped_storage().data_ptr() != label.untyped_storage().data_ptr()
    ):
        return LOST  # numbers at other places, as an index by a list gives them
    along = [k for k, (n, stride) in enumerate(zip(result.shape, result.stride(), strict=True)) if stride and n > 1]
    if len(along) != 1 or result.stride(along[0]) != 1:
        return LOST
    length = result.shape[along[0]]
    if length == label.untyped_storage().nbytes():
        return Place(along[0], place.outer, place.inner)
    if result.storage_offset() % part or length % part:
        return LOST
    return Place(along[0], length // part, place.inner)


@dataclass
class Call:
    """A function of tensors, some of which have samples.

    Attributes:
        name: The function's, without the underscores around it.
        function: It, or the name of a tensor's method.
        args: What it is called with.
        kwargs: The same.
        places: Of the tensors that have samples, by `id`.
        batch: B.
        whole: Whether it is a function with a graph of its own, which is trusted to keep the first axis.
        counts: Numbers 0 to B - 1, by `id`.
    """

    name: str
    function: Any
    args: Any
    kwargs: Mapping[str, Any]
    places: Mapping[int, Place]
    batch: Any
    whole: bool = False
    counts: Container[int] = ()

    def __post_init__(self) -> None:
        named = [k for k in BY_NAME if k in self.kwargs]
        self.args = (*self.args, *(self.kwargs[k] for k in named))
        self.kwargs = {k: v for k, v in self.kwargs.items() if k not in named}
        self.held = [t for t in tensors_in((self.args, self.kwargs)) if id(t) in self.places]
        self.x = self.held[0]
        self.at = self.places[id(self.x)]
        self.alone = all(t is self.x for t in self.held)

    def places_in(self, results: Any) -> Any:
        """Where the samples are in what it returned: a place, None (all samples are in all of it), or `LOST`.

        Args:
            results: A tensor, or several, of which a tuple is returned.
        """
        args = self.args
        listed = (
            self.name == "getitem" and isinstance(args[1], tuple | list) and any(isinstance(k, list) for k in args[1])
        )
        view = self.name in NAMES_AXES or (self.name == "unfold" and isinstance(self.function, str))
        if view and self.x is args[0] and not listed and next(tensors_in(args[1:]), None) is None:
            return place_in_view(self.function, args, self.kwargs, self.at, self.batch)
        if isinstance(results, tuple | list):
            return tuple(self._place(t) if isinstance(t, Tensor) else None for t in results)
        return self._place(results)

    def _place(self, y: Tensor) -> Any:
        found = self._found(y)
        if isinstance(found, Place) and (y.dim() <= found.axis or y.shape[found.axis] != found.length(self.batch)):
            return LOST
        return found

    def _found(self, y: Tensor) -> Any:
        name, x, at = self.name, self.x, self.at
        if name in IN_ORDER:
            return _in_order(x, at, y, self.batch) or LOST
        if name in (*JOINS, "stack"):
            return self._joined(y)
        if (products := self._as_product()) is not None:
            return self._after_product(y, *products)
        if name in REDUCTIONS and not (name in ("max", "min") and len(list(tensors_in(self.args))) > 1):
            return self._reduced(y)
        if name in ALONG:
            along = self._axes(ALONG[name], ALONG_THE_LAST.get(name))
            return LOST if along is None or at.axis in along else self._agreed()
        if name == "scaled_dot_product_attention":
            known = all(self.places[id(t)].axis < t.dim() - 2 for t in self.held)
            return self._from_the_right(y) if known else at if self.alone and x is self.args[0] else LOST
        if (name in ("embedding", "getitem") and x is self.args[name == "getitem"]) or name in OF_THE_LAST:
            return self._before_the_last(y)
        if name == "getitem":
            return self._indexed(y)
        if name == "multi_head_attention_forward":  # [T, B, width], and what each looked at, [B, ...]
            known = at == Place(1) and x is self.args[0] and y.dim() > 2
            return LOST if not known else at if y.shape == x.shape else Place()
        if name in ("repeat", "tile", "repeat_interleave"):
            return self._repeated(y)
        if name in KEEP_SHAPES:
            return self._agreed() if y.shape == x.shape else LOST
        if is_pointwise(name):
            return self._from_the_right(y)
        return self._first_axis(y)

    def _agreed(self) -> Any:
        return the_one([self.places[id(t)] for t in self.held])

    def _before_the_last(self, y: Tensor) -> Any:
        """What makes others of the last axis, or of the last ones, and what adds some after them: as a table does."""
        name, x, at = self.name, self.x, self.at
        last = len(self.args[1]) // 2 if name == "pad" else int(name in ("glu", "bilinear"))
        alike = self.alone or (name == "bilinear" and self._agreed() == at)
        kept = alike and x is self.args[name == "getitem"] and at.axis < x.dim() - last
        return at if kept and y.shape[: at.axis + 1] == x.shape[: at.axis + 1] else LOST

    def _first_axis(self, y: Tensor) -> Any:
        """What keeps its first axis, by name."""
        x, at = self.x, self.at
        if at.axis or y.dim() == 0 or y.shape[0] != x.shape[0]:
            return LOST
        if self.name in KEEP_THE_FIRST:
            name, first = self.name, next(iter(self.args), None)
            axes = int(name[-2]) + 2 if name[-2:] in ("1d", "2d", "3d") else x.dim()  # else its first are channels
            single = name == "embedding_bag" and not self.alone  # of a table that has samples rows are looked up
            return self._agreed() if x is first and x.dim() == axes and not single else LOST
        return self._agreed() if at == Place() and self.whole else LOST

    def _from_the_right(self, y: Tensor) -> Any:
        """Of operands that are broadcast: all have it in one place, counted from the right."""
        of = [(self.places[id(t)], t) for t in self.held]
        return the_one([Place(place.axis - t.dim() + y.dim(), place.outer, place.inner) for place, t in of])

    def _joined(self, y: Tensor) -> Any:
        at, given = self.at, list(tensors_in((self.args, self.kwargs)))
        if self.name not in ("cat", "concat", "concatenate", "stack") or self._agreed() is LOST:
            return LOST
        along = self.kwargs.get("dim", self.kwargs.get("axis", self.args[1] if len(self.args) > 1 else 0)) % y.dim()
        if self.name == "stack":
            return Place(at.axis + (along <= at.axis), at.outer, at.inner)
        if along != at.axis:
            return at
        every = len(given) == len(self.held)  # whole batches, one after the other
        return Place(at.axis, len(given) * at.outer, at.inner) if every else LOST

    def _axes(self, position: int, default: Any = None) -> list[int] | None:
        """The axes that an argument names."""
        given = next((self.kwargs[k] for k in ("dim", "dims", "axis") if k in self.kwargs), None)
        if given is None:
            given = self.args[position] if len(self.args) > position else default
            if self.name == "flip" and isinstance(given, int):
                given = self.args[position:]
        given = given if isinstance(given, tuple | list) else (given,)
        if any(isinstance(d, bool) or not isinstance(d, int) for d in given):
            return None
        return [d % self.x.dim() for d in given]

    def _reduced(self, y: Tensor) -> Any:
        at, x = self.at, self.x
        along = self._axes(REDUCTIONS[self.name])
        if not self.alone:
            return LOST
        if along is None or at.axis in along:
            return None if self.name not in ("argmax", "argmin") else LOST
        gone = 0 if y.dim() == x.dim() else sum(d < at.axis for d in along)
        return Place(at.axis - gone, at.outer, at.inner)

    def _repeated(self, y: Tensor) -> Any:
        at, x, name = self.at, self.x, self.name
        axis = at.axis + y.dim() - x.dim()
        times = y.shape[axis] // x.shape[at.axis] if y.dim() >= x.dim() else 0
        if name != "repeat_interleave":
            return Place(axis, times * at.outer, at.inner)
        along, each = self._axes(2), self.args[1] if len(self.args) > 1 else None
        if along is None or not isinstance(each, int):
            return LOST
        return Place(axis, at.outer, at.inner * (each if at.axis in along else 1))

    def _indexed(self, y: Tensor) -> Any:
        """An index by tensors: of other axes than the samples', or of one step for each sample."""
        x, at, key = self.x, self.at, self.args[1]
        keys = list(key) if isinstance(key, tuple | list) else [key]
        if x is not self.args[0]:
            return LOST
        given = list(tensors_in(keys))
        if any(k.dtype == torch.bool for k in given):
            return LOST
        if dots := [i for i, k in enumerate(keys) if k is Ellipsis]:
            left = x.dim() - sum(k is not None for k in keys) + 1
            keys[dots[0] : dots[0] + 1] = [slice(None)] * left
        # Every sample's own number, beside a step that each has: x[arange(B), steps].
        if given and keys[0] is given[0] and id(given[0]) in self.counts and at == Place():
            flat = all(k.dim() == 1 for k in given) and all(isinstance(k, Tensor) for k in keys[: len(given)])
            return at if flat else LOST
        listed = [k for k in keys if isinstance(k, list)] + [k for k in given if k.dim() == 1]
        if not self.alone or len(listed) != 1 or len(given) > 1 or isinstance(key, list):
            return LOST
        before = keys[: next(i for i, k in enumerate(keys) if k is listed[0])]
        plain = all(isinstance(k, slice) and k == slice(None) for k in before)
        return at if plain and at.axis < len(before) else LOST

    # ---- products --------------------------------------------------------------------------------------------

    def _as_product(self) -> tuple[list[Tensor], list[str], str] | None:
        """The operands of a product, and a letter for each axis: of each operand, and of the result."""
        name, args = self.name, self.args
        if name == "einsum" and isinstance(args[0], str):
            operands = list(tensors_in(args[1:]))
            return (operands, *letters_of_einsum(args[0], [t.dim() for t in operands]))
        plus = name in ("addmm", "baddbmm", "addmv")
        if plus or name in ("matmul", "bmm", "mm", "mv", "dot", "imatmul"):
            a, b = args[plus : plus + 2]
            axes, result = letters_of_matmul(a.dim(), b.dim())
            added = [args[0]] if plus and args[0].dim() == len(result) else []
            return [a, b, *added], [*axes, *(result for _ in added)], result
        if name in ("linear", "cdist") and len(args) > 1:
            return [*args[:2]], *letters_of_matmul(args[0].dim(), args[1].dim(), turned=True)
        return None

    def _after_product(self, y: Tensor, operands: list[Tensor], axes: list[str], result: str) -> Any:
        of = [(letters, self.places[id(t)]) for letters, t in zip(axes, operands, strict=True) if id(t) in self.places]
        found = [Place(result.find(letters[at.axis]), at.outer, at.inner) for letters, at in of]
        several = len({letters[at.axis] for letters, at in of}) > 1 or len(of) < len(self.held)
        one = LOST if several else the_one(found)
        return None if isinstance(one, Place) and one.axis < 0 else one


def _in_order(x: Tensor, place: Place, y: Tensor, batch: Any) -> Place | None:
    """After the numbers were read in order: runs of `run` numbers belong to one sample."""
    run = place.inner * math.prod(x.shape[place.axis + 1 :])
    after = 1
    for axis in range(y.dim() - 1, -1, -1):
        length = y.shape[axis]
        if after * length > run and length > 1:
            inner = run // after
            outer = length // (inner * batch) if inner else 0
            inner, outer = (1 if n == 1 else n for n in (inner, outer))  # no symbol for what is a number
            return Place(axis, outer, inner) if inner * after == run and outer * inner * batch == length else None
        after = after * length
    return None
