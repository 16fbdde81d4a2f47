"""The data set's index of each sample, kept from the data set through shuffling and workers to the model's door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from hf_clars.errors import DataError
from hf_clars.grad_norms.hooks import BoundHook

INDEX_COLUMN = "sample_index"


class IndexedDataset(Dataset[Any]):
    """A map-style data set whose items also hold their own index.

    Args:
        dataset: Anything with a length and items that are mappings.
        column: The index's name in an item.

    Raises:
        DataError: For a data set without a length, or whose items are no mappings or have the column already.
    """

    def __init__(self, dataset: Any, column: str = INDEX_COLUMN) -> None:
        checked_length(dataset)
        self.dataset = dataset
        self.column = column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        item = self.dataset[place]
        if not isinstance(item, Mapping):
            raise DataError(
                f"Item {place} of the data set is a {type(item).__name__}, which has no room for an index: make items "
                f"dicts with a {self.column!r} of their own."
            )
        if self.column in item:
            raise DataError(_has_column(self.column))
        return {**item, self.column: place % len(self)}


def with_index(dataset: Any, column: str = INDEX_COLUMN) -> Any:
    """The same data set with a column that holds each sample's index.

    Trainer drops columns that the model's `forward` does not name: set `remove_unused_columns=False` beside it. The
    callback takes the column out of the batch before the model sees it. A collator of your own must keep it, see
    `keep_index`.

    Args:
        dataset: A `datasets.Dataset`, or any map-style data set of mappings.
        column: Its name.

    Returns:
        A data set of the same kind where that has columns, else a wrapper around it.

    Raises:
        DataError: For a data set without a length, or that has such a column already.
    """
    length = checked_length(dataset)
    if column in (getattr(dataset, "column_names", None) or ()):
        raise DataError(_has_column(column))
    plain = getattr(dataset, "format", None)  # a transform would have to hand the column on: wrap that
    if hasattr(dataset, "add_column") and isinstance(plain, dict) and plain.get("type") is None:
        return dataset.add_column(column, list(range(length)))
    return IndexedDataset(dataset, column)


def _has_column(column: str) -> str:
    return (
        f"The data set has a column {column!r} already. If it holds indices, train on the data set as it is; if not, "
        "give with_index and the callback another name: with_index(dataset, column=...), index_column=..."
    )


class keep_index:
    """A collator that keeps the index column, around one that drops what it does not know.

    TRL's do, so before `trainer.train()`::

        trainer.data_collator = keep_index(trainer.data_collator)

    Args:
        collate: Makes a batch, a mapping, of a list of items, one sample each.
        column: The index's name.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], column: str = INDEX_COLUMN) -> None:
        self.collate, self.column = collate, column

    def __call__(self, items: list[Any]) -> Any:
        """The batch, and the index of each item where items have one."""
        bare = [without_column(item, self.column) for item in items]
        batch = self.collate(bare)
        if all(isinstance(item, Mapping) and self.column in item for item in items):
            batch[self.column] = torch.as_tensor([item[self.column] for item in items])
        return batch


def without_column(item: Any, column: str) -> Any:
    """An item without its index, if it has one."""
    known = isinstance(item, Mapping) and column in item
    return {name: value for name, value in item.items() if name != column} if known else item


def checked_length(dataset: Any) -> int:
    """The length of a map-style data set.

    Raises:
        DataError: If it has none, or no items by number, or is a mapping (of splits, or of columns).
    """
    if isinstance(dataset, Mapping):
        raise DataError(
            f"The data set is a {type(dataset).__name__} with the keys {', '.join(map(str, list(dataset)[:5]))}, and "
            "has no items by number: give one of its splits, or datasets.Dataset.from_dict(...) of its columns."
        )
    try:
        length = len(dataset)
    except TypeError:
        length = -1
    if length < 0 or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{type(dataset).__name__} has no length or no items by number, so its samples have no index: give a "
            "map-style data set (for a stream, take the part that you want to rank into memory first)."
        )
    return length


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward has a parameter of that name."""
    try:
        return name in signature(model.forward).parameters
    except (TypeError, ValueError):  # a forward that is not Python's
        return False


def named_columns(model: nn.Module) -> set[str] | None:
    """The columns that a model's forward names, and labels by their other names; None if it takes any."""
    try:
        named = signature(model.forward).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is Parameter.VAR_KEYWORD for p in named.values()):
        return None
    return {*named, "label", "label_ids"}


def checked_index(index: Any) -> Tensor:
    """Indices as a tensor of whole numbers.

    Raises:
        DataError: For anything else.
    """
    try:
        found = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise DataError(
            f"The samples' indices came as {type(index).__name__ if found is None else found.dtype}: give whole "
            "numbers, one for each sample, as with_index(dataset) does."
        )
    return found


class IndexTaker:
    """Takes the index column out of what the model is called with, and passes it on.

    A model whose forward has a parameter of that name keeps it.

    Args:
        model: The module itself.
        column: The column's name.
        receive: Called with the column, or None where the batch has none, at each call with gradients.

    Attributes:
        meets_compiler: Whether compiled code has called the model.
    """

    meets_compiler = False

    def __init__(self, model: nn.Module, column: str, receive: Any) -> None:
        self._column = column
        self._receive = receive
        self._wanted = takes(model, column)
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(
            BoundHook(self._take), with_kwargs=True, prepend=True
        )

    def _take(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = next((m for m in (kwargs, *args[:1]) if isinstance(m, Mapping) and self._column in m), None)
        if torch.is_grad_enabled():
            self._receive(None if given is None else given[self._column])
        if given is None or self._wanted:
            return None
        rest = {k: v for k, v in given.items() if k != self._column}
        return (args, rest) if given is kwargs else ((rest, *args[1:]), kwargs)

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
