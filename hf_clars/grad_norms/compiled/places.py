"""Where the samples are in the tensors of a traced graph: which axis is theirs, and how it is folded with others.

A model is called with tensors [B, ...]. What each function does with axes is written here, by its name; functions that
compute number by number are known by torch's own mark. Of any other function nothing is known, and what it returns is
`LOST`: nobody may take its first axis for the samples' because it is as long. Only where no other axis could be theirs,
it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from hf_clars.grad_norms.compiled.kinds_of_functions import (
    ALONG,
    ALONG_THE_LAST,
    IN_ORDER,
    JOINS,
    KEEP_SHAPES,
    KEEP_THE_FIRST,
    NAMES_AXES,
    OF_THE_LAST,
    REDUCTIONS,
    name_of,
)
from hf_clars.grad_norms.compiled.letters import letters_of_einsum, letters_of_matmul
from hf_clars.grad_norms.torch_traces import fake_values, is_pointwise, is_whole_function, value_of

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


def place_of_input(t: Tensor, batch: Any) -> Any:
    """Where the samples are in a tensor that the model is called with: a place, None (in no axis), or `LOST`."""
    if t.dim() == 0 or t.shape[0] == batch:
        return Place() if t.dim() else None
    return LOST if any(n == batch for n in t.shape) or t.shape[0] % batch == 0 else None


def place_of(node: fx.Node, places: Mapping[fx.Node, Any], batch: Any) -> Any:
    """Where the samples are in the result of an operation that was traced.

    Args:
        node: The operation.
        places: Of the operations before it.
        batch: B.

    Returns:
        A place; None if it is all samples', as a mean over them; or `LOST`. Of several results a tuple.
    """
    y, name = value_of(node), name_of(node)
    given = [n for n in node.all_input_nodes if places.get(n) is not None]
    if not given:
        return None
    if name == "getitem" and isinstance(places[given[0]], tuple):
        return places[given[0]][node.args[1]]
    several = isinstance(y, tuple | list)
    if name == "autograd_function_apply":  # what stands behind a module: its output, or its input and its output
        alike = _the_one([places[n] for n in given if value_of(n).shape == y[0].shape])
        return (alike, *(LOST for _ in y[1:]))
    if any(not isinstance(places[n], Place) for n in given):
        return (LOST,) * len(y) if several else LOST
    if getattr(node.target, "namespace", "") == "hf_clars":  # it goes through
        return places[given[0]]
    args: Any = fx.map_arg(node.args, value_of)
    kwargs: Any = fx.map_arg(node.kwargs, value_of)
    view = name in NAMES_AXES or (name == "unfold" and node.op == "call_method")
    listed = name == "getitem" and isinstance(args[1], tuple | list) and any(isinstance(k, list) for k in args[1])
    if view and value_of(given[0]) is args[0] and not listed and not _tensors(args[1:]):
        return _place_in_view(node.target, args, kwargs, places[given[0]], batch)
    of_tensors = {id(value_of(n)): places[n] for n in given}
    call = _Call(node, name, args, kwargs, of_tensors, batch)
    found = tuple(call.place(t) if isinstance(t, Tensor) else None for t in (y if several else (y,)))
    return found if several else found[0]


def place_after(node: fx.Node, written: fx.Node, places: Mapping[fx.Node, Any], batch: Any) -> Any:
    """Where the samples are in what an operation has written into: where they were, or `LOST`."""
    at, y = places.get(written), value_of(written)
    given = [n for n in node.all_input_nodes if n is not written and places.get(n) is not None]
    if not given:
        return at  # what is all samples', as a mean over them in a buffer
    if not isinstance(at, Place):
        return LOST
    if node.target is not operator.setitem:
        return place_of(node, places, batch)
    key, new = (a for a in node.args[1:])  # type: Any, Any
    if new not in given:  # a number, where a mask says so
        return _the_one([places[n] for n in given])
    key = fx.map_arg(key, value_of)
    if len(given) > 1 or _tensors(key if isinstance(key, tuple) else [key]):
        return LOST
    with fake_values(y):
        dims = y[key].dim()
    into, of = _place_in_view(operator.getitem, (y, key), {}, at, batch), places[new]
    same = isinstance(of, Place) and into == replace(of, axis=of.axis - value_of(new).dim() + dims)
    return at if same else LOST


def _the_one(found: Sequence[Any]) -> Any:
    """What all are, or `LOST`. Lengths may be symbols, which have no hash."""
    return found[0] if found and all(f == found[0] for f in found) else LOST


def _place_in_view(target: Any, args: Any, kwargs: Any, place: Place, batch: Any) -> Any:
    """Functions that name axes are called on a tensor whose memory moves along the samples' axis only."""
    shape = [_number(n) for n in args[0].shape]
    strides = [int(k == place.axis) for k in range(len(shape))]
    label = torch.empty(shape[place.axis], dtype=torch.int8).as_strided(shape, strides)
    rest, kwargs = torch.utils._pytree.tree_map(_number, (args[1:], kwargs))
    call = getattr(label, target) if isinstance(target, str) else None
    try:
        result = call(*rest, **kwargs) if call is not None else target(label, *rest, **kwargs)
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
        result.data_ptr() < label.data_ptr()
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
class _Call:
    """A function of tensors, some of which have samples."""

    node: fx.Node
    name: str
    args: Any
    kwargs: dict[str, Any]
    places: dict[int, Place]
    batch: Any

    def __post_init__(self) -> None:
        self.held = [t for t in _tensors([*self.args, *self.kwargs.values()]) if id(t) in self.places]
        self.x = self.held[0]
        self.at = self.places[id(self.x)]
        self.alone = all(t is self.x for t in self.held)

    def place(self, y: Tensor) -> Any:
        """Where the samples are in a result."""
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
        if name in REDUCTIONS and not (name in ("max", "min") and len(_tensors(self.args)) > 1):
            return self._reduced(y)
        if name in ALONG:
            along = self._axes(ALONG[name], ALONG_THE_LAST.get(name))
            return LOST if along is None or at.axis in along else self._agreed()
        if name == "scaled_dot_product_attention":
            known = all(self.places[id(t)].axis < t.dim() - 2 for t in self.held)
            return self._from_the_right(y) if known else at if self.alone and x is self.args[0] else LOST
        if (name in ("embedding", "getitem") and x is self.args[name == "getitem"]) or name in OF_THE_LAST:
            alike = self.alone or (name == "bilinear" and self._agreed() == at)
            kept = alike and (name in ("embedding", "getitem") or at.axis < x.dim() - (name != "one_hot"))
            return at if kept and y.shape[: at.axis + 1] == x.shape[: at.axis + 1] else LOST
        if name == "getitem":
            return self._indexed(y)
        if name in ("repeat", "tile", "repeat_interleave"):
            return self._repeated(y)
        if name in KEEP_SHAPES:
            return self._agreed() if y.shape == x.shape else LOST
        if is_pointwise(name):
            return self._from_the_right(y)
        return self._first_axis(y)

    def _agreed(self) -> Any:
        return _the_one([self.places[id(t)] for t in self.held])

    def _first_axis(self, y: Tensor) -> Any:
        """What keeps its first axis, by name; or by there being no other that could be the samples'."""
        x, at = self.x, self.at
        if at.axis or y.dim() == 0 or y.shape[0] != x.shape[0]:
            return LOST
        if self.name in KEEP_THE_FIRST:
            return self._agreed() if x is (self.args[0] if self.args else self.kwargs.get("input")) else LOST
        alone = not any(n == self.batch for t in (*self.held, y) for n in t.shape[1:])
        return self._agreed() if at == Place() and (alone or is_whole_function(self.node)) else LOST

    def _from_the_right(self, y: Tensor) -> Any:
        """Of operands that are broadcast: all have it in one place, counted from the right."""
        of = [(self.places[id(t)], t) for t in self.held]
        return _the_one([Place(place.axis - t.dim() + y.dim(), place.outer, place.inner) for place, t in of])

    def _joined(self, y: Tensor) -> Any:
        at, given = self.at, _tensors(self.args) + _tensors([*self.kwargs.values()])
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
        x, at, key = self.x, self.at, self.node.args[1]
        keys = list(key) if isinstance(key, tuple | list) else [key]
        if x is not self.args[0]:
            return LOST
        nodes = [k for k in keys if isinstance(k, fx.Node) and isinstance(value_of(k), Tensor)]
        if any(value_of(k).dtype == torch.bool for k in nodes):
            return LOST
        # Every sample's own number, beside a step that each has: x[arange(B), steps].
        own = [k for k in nodes[:1] if name_of(k) == "arange" and value_of(k).shape[0] == x.shape[0]]
        if own and keys[0] is own[0] and at == Place() and len(own[0].args) == 1:
            flat = all(value_of(k).dim() == 1 for k in nodes) and len(nodes) == len([k for k in keys if k in nodes])
            return at if flat and all(k in nodes for k in keys[: len(nodes)]) else LOST
        listed = [k for k in keys if isinstance(k, list)] + [k for k in nodes if value_of(k).dim() == 1]
        if not self.alone or len(listed) != 1 or len(nodes) > 1 or isinstance(key, list):
            return LOST
        before = keys[: keys.index(listed[0])]
        plain = all(isinstance(k, slice) and k == slice(None) for k in before)
        return at if plain and at.axis < len(before) else LOST

    # ---- products --------------------------------------------------------------------------------------------

    def _as_product(self) -> tuple[list[Tensor], list[str], str] | None:
        """The operands of a product, and a letter for each axis: of each operand, and of the result."""
        name, args = self.name, self.args
        if name == "einsum" and isinstance(args[0], str):
            operands = _tensors(args[1:])
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
        one = LOST if several else _the_one(found)
        return None if isinstance(one, Place) and one.axis < 0 else one


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for a in args:
        found += _tensors(a) if isinstance(a, tuple | list) else [a] if isinstance(a, Tensor) else []
    return found


def _in_order(x: Tensor, place: Place, y: Tensor, batch: Any) -> Place | None:
    """After the numbers were read in order: runs of `run` numbers belong to one sample."""
    run = place.inner * math.prod(x.shape[place.axis + 1 :])
    after = 1
    for axis in range(y.dim() - 1, -1, -1):
        length = y.shape[axis]
        if after * length > run and length > 1:
            inner = run // after
            outer = length // (inner * batch) if inner else 0
            return Place(axis, outer, inner) if inner * after == run and outer * inner * batch == length else None
        after = after * length
    return None
