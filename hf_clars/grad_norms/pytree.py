"""Tensors inside the nested tuples, lists, dicts and model outputs that modules take and return."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any

from torch import Size, Tensor, nn
from torch.distributions import Distribution


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield every tensor of a nested structure, in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors_in(getattr(tree, field.name, None))
    elif isinstance(tree, Distribution):  # a policy's action beside its value
        yield from tensors_in(list(vars(tree).values()))


def tensors_within(tree: Any) -> list[Tensor]:
    """The tensors of a nested structure; if it has none, those that its objects hold, as a batch of graphs does."""
    return list(tensors_in(tree)) or list(_held_by(tree, set()))


def _held_by(tree: Any, seen: set[int]) -> Iterator[Tensor]:
    """As `tensors_in`, and of other objects the attributes, in the order in which they were set."""
    if isinstance(tree, Tensor):
        yield tree
    elif id(tree) not in seen and not isinstance(tree, type | ModuleType | nn.Module):  # these are no data
        seen.add(id(tree))
        inner = tree.values() if isinstance(tree, Mapping) else getattr(tree, "__dict__", {}).values()
        for value in tree if isinstance(tree, list | tuple) else inner:
            yield from _held_by(value, seen)


def of_the_batch(given: Iterable[Tensor]) -> Tensor | None:
    """The tensor whose first axis is the batch, of those that a model is called with: the first that has an axis.

    One number [1] before tensors of more axes is what all samples share, as the time of a diffusion step.
    """
    first: Tensor | None = None
    for t in given:
        if t.dim() > 1 or (t.dim() == 1 and first is None and t.shape[0] != 1):
            return t
        first = t if first is None and t.dim() else first
    return first


def is_differentiable(t: Tensor) -> bool:
    """Whether a gradient may come to a tensor."""
    return t.requires_grad and t.is_floating_point()


def differentiable_in(tree: Any) -> list[Tensor]:
    """The tensors of a nested structure to which a gradient may come, in a fixed order."""
    return [t for t in tensors_in(tree) if is_differentiable(t)]


def tensor_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module was called with; None if there is none."""
    return args[0] if args and isinstance(args[0], Tensor) else next(tensors_in((args, kwargs)), None)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor that a module was called with.

    Raises:
        ValueError: If there is none.
    """
    found = tensor_given(args, kwargs)
    if found is None:
        raise ValueError("The module was called without a tensor.")
    return found


def memory_of(t: Tensor) -> int | None:
    """Where a tensor's memory begins; None if it has none (it is elsewhere, or stands in for another)."""
    try:
        return t.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


class GivenTensors:
    """What a model was called with, of tensors with more axes than the batch: their first axis is the batch's.

    Args:
        batch: Samples.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._places: dict[tuple[int, ...], set[tuple[int | None, tuple[int, ...]]]] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        """The model is called with these."""
        for t in tensors:
            place = memory_of(t) if t.dim() > 1 and t.shape[0] == self._batch else None
            if place is not None:
                self._places.setdefault(t.shape, set()).add((place, t.stride()))

    def __contains__(self, x: Tensor) -> bool:
        alike = self._places.get(x.shape)
        return alike is not None and (memory_of(x), x.stride()) in alike


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """Copy a nested structure with `fn` applied to every tensor; its containers keep their types."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, MutableMapping) and type(tree) is not dict:
        mapped: Any = copy.copy(tree)  # a model output, whose keys are attributes too
        for key, value in tree.items():
            mapped[key] = map_tensors(fn, value)
        return mapped
    if isinstance(tree, Mapping):
        return {key: map_tensors(fn, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, Size):
        items = [map_tensors(fn, value) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*items)
        return items if isinstance(tree, list) else tuple(items)
    return tree
