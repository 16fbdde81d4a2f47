"""Functions that give rows of the batch other places: a sort, a shuffle, tokens on their way to experts, one sample.

What follows them may be as long as the batch, and its rows are another sample's all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SCATTERS = ("index_add", "index_copy", "index_put", "index_fill", "scatter", "masked_scatter", "__setitem__")
"""How the names of functions begin that write rows back to where they came from."""

_ALONG = {"index_select": 1, "gather": 1, "take_along_dim": 2, "roll": 2, "flip": 1, "sort": 1, "topk": 2}
"""Functions that move rows along some axes, and which argument says along which."""

_LAST_BY_DEFAULT = ("sort", "topk")
_ALWAYS = ("take", "masked_select", "flipud", "_pack_padded_sequence")
_JOINS = ("cat", "concat", "concatenate")
_TAKES_APART = {"unbind": 1, "select": 1, "narrow": 1, "split": 2, "chunk": 2, "tensor_split": 2, "vsplit": 0}
"""Functions that give parts of the batch, and which argument says along which axis, if it is not the first."""


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
    """Whether an index picks rows by a list of them, and not all in order; one that the data make may be any."""

    def by_data(item: Any) -> bool:
        return isinstance(item, Tensor) and holds(item)

    axis, items = 0, index if isinstance(index, tuple) else (index,)
    for item in items:
        if item is None or isinstance(item, bool):
            continue
        if item is Ellipsis:
            return False  # axes from the end on
        if isinstance(item, int | slice):
            axis += 1
            continue
        count = item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1
        if not axes.isdisjoint(range(axis, axis + count)) and (by_data(item) or not _in_order(item, x.shape[axis])):
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
