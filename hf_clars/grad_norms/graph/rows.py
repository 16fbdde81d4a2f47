"""Functions that give rows of the batch other places: a sort, a shuffle, tokens on their way to experts, one sample.

What follows them may be as long as the batch, and its rows are another sample's all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

_WRITES = {"index_add": 2, "index_copy": 2, "index_fill": 2, "index_reduce": 2, "scatter": 2, "scatter_add": 2}
_WRITES |= {"scatter_reduce": 2, "index_put": 1, "masked_scatter": 1, "__setitem__": 1}
"""Functions that write into what they are called on, and which argument says where; the third follows the axis."""

_ALONG = {"index_select": 1, "gather": 1, "take_along_dim": 2, "roll": 2, "flip": 1, "sort": 1, "topk": 2}
"""Functions that move rows along some axes, and which argument says along which."""

_LAST_BY_DEFAULT = ("sort", "topk")
_ALWAYS = ("take", "masked_select", "flipud", "_pack_padded_sequence", "roi_align", "roi_pool", "ps_roi_align")
_TURNS = ("transpose", "permute", "swapaxes", "swapdims")
_SUMS: tuple[str, ...] = ("sum", "mean", "var", "std", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp")
_SUMS += (
    "softmax",
    "log_softmax",
    "cumsum",
    "normalize",
    "flip",
    "roll",
    "cat",
    "concat",
    "stack",
    "unsqueeze",
    "movedim",
)
_IN_ORDER = ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "contiguous")
_ANY_AXIS = ("linear", "matmul", "layer_norm", "rms_norm")
_LAYERS = (*_ANY_AXIS, "one_hot", "embedding", "group_norm", "batch_norm", "instance_norm", "interpolate")
_OVER_PIXELS = ("conv", "conv_transpose", "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "dropout")
_EACH = {"to", "type", "float", "half", "bfloat16", "double", "clone", "detach", "dropout", "masked_fill", "clamp"}
_EACH |= {"relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu"}
_EACH |= {"elu", "selu", "celu", "mish", "softplus", "logsigmoid", "erf", "clip", "lerp", "expand", "expand_as"}
_EACH |= {"sin", "cos", "exp", "log", "sqrt", "rsqrt", "square", "neg", "abs", "sign", "floor", "ceil", "round"}
_EACH |= {"where", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "invert", "logical_not", "isnan"}
_EACH |= {"logical_and", "logical_or", "long", "int", "bool", "type_as", "nan_to_num", "maximum", "minimum"}
_EACH |= {"mod", "remainder", "floordiv", "floor_divide"}
_EACH |= {f"{sign}{op}" for sign in ("", "r", "i") for op in ("add", "sub", "mul", "div", "truediv", "pow")}
"""Functions after which it is known which axis is the samples': they name axes, read and write in order, are layers
that look at rows one by one, or look at each number by itself. After others, one look at the graph tells."""

_LAST_TWO = ("mT", "mH", "adjoint")
_PARTS = {"unbind": 1, "chunk": 2, "split": 2, "tensor_split": 2}
_PRODUCTS = ("matmul", "bmm", "scaled_dot_product_attention")
"""Functions that swap the last two axes; give parts along an axis, which an argument names; multiply matrices."""

_JOINS = ("cat", "concat", "concatenate")
_TAKES = {"__getitem__": 1, "index_select": 2, "gather": 2, "masked_select": 1}
_TAKES_APART = {"unbind": 1, "select": 1, "narrow": 1, "split": 2, "chunk": 2, "tensor_split": 2, "vsplit": 0}
"""Functions that give parts of the batch, and which argument says along which axis, if it is not the first."""

_PLAIN = (int, slice, type(None), EllipsisType)
"""What an index may hold beside lists of rows."""

_OPERANDS = (("input", "tensors", "tensor", "x", "self"), ("other", "mat2", "weight"))
"""What functions call their first two operands."""


def operands_first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A call's positional arguments, and before all others the operands that were given by name.

    Args:
        args: What a function was called with.
        kwargs: The same.
    """
    found = tuple(args)
    for place, names in enumerate(_OPERANDS):
        if len(found) == place:
            found += tuple(kwargs[name] for name in names if name in kwargs)
    return found


def moves_rows(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int, holds: Callable[[Tensor], bool]
) -> bool:
    """Whether a function may give rows of the batch other places.

    Args:
        name: The function's.
        args: What it was called with.
        kwargs: The same.
        batch: B.
        holds: Whether a tensor depends on the data.
    """
    if not args:
        return False
    if name in _JOINS:
        parts = [t for t in args[0] if holds(t) and t.dim() and len(t)]
        return len(parts) > 1 and all(len(t) < batch for t in parts) and sum(map(len, parts)) == batch
    if name == "einsum":
        return _contracts_rows(args, holds)
    if name == "embedding":
        return len(args) > 1 and holds(args[1])
    x = args[0]
    if name == "repeat_interleave":
        return _repeats_unevenly(x, args, kwargs, holds)
    if not isinstance(x, Tensor) or not x.dim() or not holds(x):
        return False
    if name in ("matmul", "mm", "__matmul__", "__rmatmul__"):
        return all(isinstance(t, Tensor) and t.dim() == 2 and holds(t) for t in args[:2])
    axes = {0, 1} if x.dim() > 1 and x.shape[1] == batch != len(x) else {0}
    if name == "__getitem__":
        return _picks(x, args[1], axes, holds) or (_is_batch(x, batch) and _takes_part(x, args[1]))
    if name in _TAKES_APART:
        place = _TAKES_APART[name]
        along = kwargs.get("dim", args[place] if 0 < place < len(args) else 0)
        return along in (0, -x.dim()) and _is_batch(x, batch)
    if name == "__iter__":
        return _is_batch(x, batch)
    if name in _ALONG:
        along = _axes_of(name, args, kwargs)
        return along is None or not axes.isdisjoint(k % x.dim() for k in along)
    return name in _ALWAYS


def axis_after(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], held: Sequence[Tensor], axis: int, result: Tensor
) -> int | None:
    """Which axis of a function's result is surely the samples', each sample's rows together; None: not sure.

    Args:
        name: The function's.
        args: What it was called with.
        kwargs: The same.
        held: What of it depends on the data.
        axis: Which axis of these is.
        result: The result.
    """
    if not args:
        return None  # all were given by names that are not known
    plain, dims = name.strip("_"), held[0].dim()
    if plain in _TURNS or plain in _SUMS:
        given = [*args[1:], *(v for k, v in kwargs.items() if k.startswith("dim"))]
        given = [k for g in given for k in (g if isinstance(g, tuple | list) else (g,))]
        count = dims + (plain in ("stack", "unsqueeze"))
        named = [k % count for k in given if isinstance(k, int) and not isinstance(k, bool)]
        if plain in _SUMS:
            return axis if named and min(named) > axis else None
        if plain == "permute":
            return named.index(axis) if len(named) == dims else None
        return {named[0]: named[1], named[1]: named[0]}.get(axis, axis) if len(named) == 2 else None
    first = held[0].shape[: axis + 1]
    kept = result.shape[: axis + 1] == first
    if plain == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if sum(not isinstance(item, _PLAIN) for item in index) > 1:
            return None  # what they take may come first
        if index[0] is Ellipsis:
            return axis if len(index) <= dims - axis and None not in index else None
        return axis if len(index) > axis and all(item == slice(None) for item in index[: axis + 1]) else None
    if plain in _IN_ORDER:
        return axis if held[0] is args[0] and (axis == 0 or kept) else None
    if plain in _LAST_TWO:
        return {dims - 2: dims - 1, dims - 1: dims - 2}.get(axis, axis)
    if plain == "pad":
        return axis if len(kwargs.get("pad") or args[1]) <= 2 * (dims - axis - 1) else None
    if plain in _PARTS:
        place = _PARTS[plain]
        along = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else 0)) % dims
        return None if along == axis else axis - (plain == "unbind" and along < axis)
    alike = kept and all(t.dim() == result.dim() and t.shape[: axis + 1] == first for t in held)
    if alike and (plain in _EACH or (plain in _PRODUCTS and dims > axis + 2)):
        return axis
    if len(held) > 1 or held[0] is not args[0] or not kept:
        return None
    if plain in _ANY_AXIS:
        return axis if result.dim() == dims > axis + 1 else None
    pixels = int(plain[-2]) if plain[-2:] in ("1d", "2d", "3d") and plain[:-2] in _OVER_PIXELS else None
    return axis if axis == 0 and (plain in _LAYERS or dims - 2 == pixels) else None


def joins_batches(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], held: Sequence[Tensor], axis: int, batch: int
) -> bool:
    """Whether a function lays whole batches one after the other, as two views of each image.

    Args:
        name: The function's.
        args: What it was called with.
        kwargs: The same.
        held: What of it depends on the data.
        axis: Which axis of these is the samples'.
        batch: B.
    """
    if name not in _JOINS or len(held) < 2 or len(held) != len(args[0]):
        return False
    along = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return along % held[0].dim() == axis and all(t.shape[axis] == batch for t in held)


@dataclass(frozen=True)
class Taken:
    """Rows that were taken from a tensor, or written to one.

    Attributes:
        length: Of the tensor.
        numbers: [N, axes]: which rows.
    """

    length: int
    numbers: Tensor

    def same_as(self, other: Taken) -> bool:
        """Whether they are the same rows of a tensor as long."""
        mine, others = self.numbers, other.numbers
        same = self.length == other.length and mine.shape == others.shape and mine.device == others.device
        return same and (mine is others or (not mine.is_meta and torch.equal(mine, others)))


def is_write(name: str) -> bool:
    """Whether a function writes into what it is called on."""
    return name.rstrip("_") in _WRITES or name == "__setitem__"


def taken_rows(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Taken]:
    """Which rows a function takes, or writes; none where it does not go by numbers of rows.

    Args:
        name: The function's.
        args: What it is called with, first the tensor.
        kwargs: The same.
    """
    plain = name if name.startswith("__") else name.rstrip("_")
    place = (_WRITES | _TAKES).get(plain)
    x = args[0]
    if place is None or not isinstance(x, Tensor) or not x.dim():
        return []
    given = (*args, *(kwargs[k] for k in ("dim", "index", "indices", "mask") if k in kwargs))
    if len(given) <= place:
        return []
    index = given[place]
    if place == 2:
        if not isinstance(given[1], int) or given[1] % x.dim() or not isinstance(index, Tensor):
            return []
        by_row = index.reshape(len(index), -1) if index.dim() else index.view(1, 1)
        uniform = by_row.shape[1] > 0 and index.dim() > 1 and index.stride(-1) == 0
        return [Taken(len(x), by_row[:, :1] if uniform else by_row)]
    items = index if isinstance(index, tuple | list) and not _is_numbers(index) else (index,)
    leading = []
    for item in items:
        if item is None:  # a new axis
            continue
        if isinstance(item, Tensor) and item.dtype == torch.bool and item.dim():
            leading += list(item.nonzero().unbind(1)) if not item.is_meta else [item]
        elif isinstance(item, Tensor) or _is_numbers(item):
            leading.append(torch.as_tensor(item).flatten())
        elif isinstance(item, int) and not isinstance(item, bool):
            leading.append(torch.tensor([item]))
        elif isinstance(item, slice) and not leading and len(range(*item.indices(len(x)))) < len(x):
            leading.append(torch.arange(*item.indices(len(x))))
            break
        else:
            break
    if not leading:
        return []
    if len({(t.shape, t.device) for t in leading}) > 1:
        leading = leading[:1]
    return [Taken(len(x), torch.stack(leading, 1))]


def _is_numbers(item: Any) -> bool:
    return isinstance(item, list) and all(isinstance(i, int) for i in item)


def _repeats_unevenly(x: Any, args: Sequence[Any], kwargs: Mapping[str, Any], holds: Callable[[Tensor], bool]) -> bool:
    """Whether rows, or their numbers, are repeated, each as often as the data say."""
    repeats = kwargs.get("repeats", args[1] if len(args) > 1 else x)
    return isinstance(repeats, Tensor) and repeats.numel() > 1 and holds(repeats)


def _axes_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Along which axes; None: over all of them as one."""
    place = _ALONG[name]
    given = args[place:] if name == "flip" else args[place : place + 1]
    found = given[0] if len(given) == 1 else given
    for key in ("dim", "dims", "axis"):
        found = kwargs.get(key, found)
    if found is None or (not isinstance(found, int) and not found):
        return (-1,) if name in _LAST_BY_DEFAULT else None
    return (found,) if isinstance(found, int) else tuple(found)


def _picks(x: Tensor, index: Any, axes: set[int], holds: Callable[[Tensor], bool]) -> bool:
    """Whether an index picks rows by a list: one of the data, or alone, may leave all in order this time only."""

    def by_data(item: Any) -> bool:
        return isinstance(item, Tensor) and holds(item)

    axis, items = 0, index if isinstance(index, tuple) else (index,)
    alone = sum(not isinstance(item, _PLAIN) for item in items) < 2
    for item in items:
        if item is None or isinstance(item, bool):
            continue
        if item is Ellipsis:
            return False  # axes from the end on
        if isinstance(item, int | slice):
            axis += 1
            continue
        count = item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1
        all_in_order = not alone and not by_data(item) and _in_order(item, x.shape[axis])
        if not axes.isdisjoint(range(axis, axis + count)) and not all_in_order:
            return True
        axis += count
    return False


def _is_batch(x: Tensor, batch: int) -> bool:
    """Whether rows are the samples'; of three projections of a batch of three, [3, 3, ...], memory tells."""
    return len(x) == batch and x.dim() > 1 and (bool(x.shape[1] % batch) or x.stride(0) >= max(x.stride()))


def _takes_part(x: Tensor, index: Any) -> bool:
    """Whether an index takes one sample, or a slice of the samples."""
    first = index[0] if isinstance(index, tuple) and index else index
    if isinstance(first, slice):
        return len(range(*first.indices(len(x)))) < len(x)
    return isinstance(first, int) and not isinstance(first, bool)


def _in_order(index: Any, length: int) -> bool:
    """Whether an index takes each row once, in order, as beside another that says which token."""
    try:
        rows = torch.as_tensor(index)
        counts = rows.dtype != torch.bool and rows.numel() == length and rows.shape[0] == length
        return counts and (rows.is_meta or torch.equal(rows.flatten(), torch.arange(length, device=rows.device)))
    except RuntimeError:  # values that cannot be read
        return False


def _contracts_rows(args: Sequence[Any], holds: Callable[[Tensor], bool]) -> bool:
    """Whether a product of two tensors that depend on the data sums over their first axis."""
    if not isinstance(args[0], str):
        return False
    operands = args[1:] if isinstance(args[1], Tensor) else args[1]
    taken, arrow, made = args[0].replace(" ", "").partition("->")
    first = [letters[:1] for letters, t in zip(taken.split(","), operands, strict=False) if holds(t)]
    return bool(arrow) and len(first) > 1 and any(letter not in made for letter in first)
