"""Where the samples are in the tensors of a traced graph: which axis is theirs, and how it is folded with others.

A model is called with tensors [B, ...]. Functions that only name axes, or read in order, are followed exactly; those
that keep the leading axes, as layers and products do, are taken at their word. Of anything else nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hf_clars.grad_norms.torch_traces import value_of

_IN_ORDER = ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
_NAMES_AXES = (
    *("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "getattr", "unsqueeze", "squeeze"),
    *("expand", "expand_as", "select", "narrow", "getitem", "slice", "chunk", "split", "unbind"),
)
_PRODUCTS = ("matmul", "bmm", "scaled_dot_product_attention")
_LAYERS = ("linear", "layer_norm", "rms_norm", "softmax", "log_softmax", "dropout", "pad", "cumsum")
_SUMS = ("sum", "mean", "amax", "amin", "norm", "var", "std", "logsumexp")
_JOINS = ("cat", "concat", "concatenate")
SPREADS = ("expand", "expand_as", "repeat", "broadcast_to", "tile")
_MOVES = ("roll", "flip")


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


MOVED = Place(-1)
"""Samples were given other places by what they are."""


def place_of(node: fx.Node, places: Mapping[fx.Node, Any], batch: Any) -> Any:
    """Where the samples are in the result of an operation that was traced.

    Args:
        node: The operation.
        places: Of the operations before it.
        batch: B.

    Returns:
        A place, or None if it is not known; of several results a tuple.
    """
    y, name = value_of(node), name_of(node)
    given = [n for n in node.all_input_nodes if places.get(n) is not None]
    if any(places[n] is MOVED for n in given) or _moves(node, name, places):
        return tuple(MOVED for _ in y) if isinstance(y, tuple | list) else MOVED
    if name == "getitem" and given and isinstance(places[given[0]], tuple):
        return places[given[0]][node.args[1]]
    if name == "autograd_function_apply":  # what stands behind a module: its output, or its input and its output
        first = next(n for n in node.args[2:] if isinstance(n, fx.Node))
        return tuple(None if k else places.get(first) for k in range(len(y)))
    if not given or any(isinstance(places[n], tuple) for n in given):
        return None
    args: Any = fx.map_arg(node.args, value_of)
    kwargs: Any = fx.map_arg(node.kwargs, value_of)
    if name in _NAMES_AXES:
        return _place_in_view(node.target, args, kwargs, value_of(given[0]), places[given[0]])
    of_tensors = {id(value_of(n)): places[n] for n in given}
    several = isinstance(y, tuple | list)
    found = tuple(
        _place_after(name, args, kwargs, of_tensors, t, batch) if isinstance(t, Tensor) else None
        for t in (y if several else (y,))
    )
    return found if several else found[0]


def name_of(node: fx.Node) -> str:
    """The name of an operation in a traced graph, without what tells its variants apart."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    return name.rstrip("_") if node.op == "call_method" else name


def is_view(name: str) -> bool:
    """Whether a function's result has the numbers of its operand, and no others."""
    return name in (*_IN_ORDER, *_NAMES_AXES, *SPREADS)


def _place_in_view(target: Any, args: Any, kwargs: Any, x: Tensor, place: Place) -> Any:
    """Functions that name axes are called on a tensor whose memory moves along the samples' axis only."""
    if args[0] is not x:
        return None
    strides = [int(k == place.axis) for k in range(x.dim())]
    label = torch.empty(int(x.shape[place.axis]), dtype=torch.int8).as_strided([int(n) for n in x.shape], strides)
    rest = tuple(int(a) if isinstance(a, torch.SymInt) else a for a in args[1:])
    try:
        result = getattr(label, target)(*rest, **kwargs) if isinstance(target, str) else target(label, *rest, **kwargs)
    except Exception:  # an index by numbers that only a run knows
        return None
    if isinstance(result, tuple | list):
        return tuple(_place_of_label(t, label, place) for t in result)
    return _place_of_label(result, label, place)


def _place_of_label(result: Tensor, label: Tensor, place: Place) -> Place | None:
    along = [k for k, (n, stride) in enumerate(zip(result.shape, result.stride(), strict=True)) if stride and n > 1]
    whole = len(along) == 1 and result.stride(along[0]) == 1 and result.shape[along[0]] == label.shape[place.axis]
    return Place(along[0], place.outer, place.inner) if whole else None


def _moves(node: fx.Node, name: str, places: Mapping[fx.Node, Any]) -> bool:
    """Whether samples are given other places, as by an index that the data make, or a sort."""
    x = next((n for n in node.all_input_nodes), None)
    place = places.get(x) if x is not None else None
    if not isinstance(place, Place) or not isinstance(value_of(x), Tensor):
        return False
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        item = index[place.axis] if len(index) > place.axis and None not in index and Ellipsis not in index else None
        return isinstance(item, fx.Node) and item in places  # not a number, nor made of numbers alone
    along = [*node.args[1:], node.kwargs.get("dim")]
    dims = [a % value_of(x).dim() for a in along if isinstance(a, int) and not isinstance(a, bool)]
    if name in ("index_select", "gather", "take_along_dim"):
        return place.axis in dims and any(isinstance(a, fx.Node) and a in places for a in along)
    return name in ("sort", "argsort") and place.axis in dims


def _place_after(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], places: dict[int, Place], y: Tensor, batch: Any
) -> Place | None:
    """Where the samples are in a function's result; `places` by the `id` of its operands."""
    held = [t for t in _tensors(args) if id(t) in places] + [t for t in kwargs.values() if id(t) in places]
    x = held[0]
    place = places[id(x)]
    if name in _IN_ORDER:
        return _in_order(x, place, y, batch)
    if name in _JOINS:
        along = kwargs.get("dim", args[1] if len(args) > 1 else 0) % y.dim()
        return _agreed(held, places, y, batch) if along != place.axis else None
    if name == "stack":
        along = kwargs.get("dim", args[1] if len(args) > 1 else 0) % y.dim()
        return Place(place.axis + (along <= place.axis), place.outer, place.inner)
    if name in _SUMS:
        return _after_sum(x, args, kwargs, place, y)
    if name in _MOVES:
        given = kwargs.get("dims", args[2 if name == "roll" else 1] if len(args) > 1 else None)
        along = (given,) if isinstance(given, int) else given
        return None if along is None or place.axis in [d % x.dim() for d in along] else place
    if name in _PRODUCTS and not all(t.dim() == y.dim() and places[id(t)].axis < y.dim() - 2 for t in held):
        return place if held == [args[0]] and _is_kept(x, place, y) and place.axis < x.dim() - 1 else None
    if name in (*_PRODUCTS, *_LAYERS):
        return place if _is_kept(x, place, y) and len({places[id(t)] for t in held}) == 1 else None
    if name == "embedding":
        index = args[0] if id(args[0]) in places else args[1] if len(args) > 1 else x
        return place if index is x and _is_kept(x, place, y) else None
    return _agreed(held, places, y, batch)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for a in args:
        found += _tensors(a) if isinstance(a, tuple | list) else [a] if isinstance(a, Tensor) else []
    return found


def _is_kept(x: Tensor, place: Place, y: Tensor) -> bool:
    return y.dim() > place.axis and y.shape[: place.axis + 1] == x.shape[: place.axis + 1]


def _agreed(held: Sequence[Tensor], places: dict[int, Place], y: Tensor, batch: Any) -> Place | None:
    """Of operands that are broadcast: all have it in one place, counted from the right."""
    right = {(places[id(t)].axis - t.dim(), places[id(t)].outer, places[id(t)].inner) for t in held}
    if len(right) == 1:
        axis, outer, inner = right.pop()
        if axis + y.dim() >= 0 and y.shape[axis] == outer * batch * inner:
            return Place(axis + y.dim(), outer, inner)
    # Layers that change the other axes, as convolutions and pools do, keep the first.
    left = {places[id(t)] for t in held}
    return Place() if left == {Place()} and y.dim() > 0 and y.shape[0] == batch else None


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


def _after_sum(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any], place: Place, y: Tensor) -> Place | None:
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if given is None:
        return None
    along = [d % x.dim() for d in (given if isinstance(given, tuple | list) else (given,))]
    if place.axis in along:
        return None
    gone = 0 if y.dim() == x.dim() else sum(d < place.axis for d in along)
    return Place(place.axis - gone, place.outer, place.inner)
