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

from hf_clars.grad_norms.axes.functions import JOINS

_WRITES = {"index_add": 2, "index_copy": 2, "index_fill": 2, "index_reduce": 2, "scatter": 2, "scatter_add": 2}
_WRITES |= {"scatter_reduce": 2, "index_put": 1, "masked_scatter": 1, "__setitem__": 1}
"""Functions that write into what they are called on, and which argument says where; the third follows the axis."""

_ALONG = {"index_select": 1, "gather": 1, "take_along_dim": 2, "roll": 2, "flip": 1, "sort": 1, "topk": 2}
"""Functions that move rows along some axes, and which argument says along which."""

_LAST_BY_DEFAULT = ("sort", "topk")
_ALWAYS = ("take", "masked_select", "flipud", "_pack_padded_sequence", "roi_align", "roi_pool", "ps_roi_align")
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
    if name in JOINS:
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


def has_batch_axis(t: Tensor, batch: int) -> bool:
    """Whether the batch may be the first axis, or the second as in a recurrent net's state."""
    return t.dim() > 0 and (len(t) == batch or (t.dim() == 3 and t.shape[1] == batch))


class GivenRows:
    """Which tensors that a model is called with have no axis of the batch, in any pass: by their number.

    The nodes of all graphs of a batch may be as many as the batch has samples, or a multiple of it, by chance.
    """

    def __init__(self) -> None:
        self.loose: set[int] = set()

    def look(self, given: Sequence[Tensor], batch: int) -> bool:
        """Returns whether one is so for the first time."""
        now = {i for i, t in enumerate(given) if batch > 1 and t.dim() and not has_batch_axis(t, batch)}
        new = not now <= self.loose
        self.loose |= now
        return new
