"""What tells one ranking from another: a call that goes on where another was stopped must be the same one."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from types import CellType, CodeType
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor, nn, uint8

from hf_clars.layers import ParamLayer
from hf_clars.per_sample.indexing import IndexedDataset

LOOKED_AT = 8  # items, to tell one data set from another
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
DEPTH = 8  # of values within values, and of functions that call functions
ROWS_AT_ONCE = 10_000  # of columns of numbers
UNTOLD = ("_name_or_path", "transformers_version", "problem_type", "use_cache")
"""Of a configuration: they change no gradient, and some are set as a model is called."""


def ranking_head(
    model: nn.Module,
    dataset: Any,
    indices: Sequence[int],
    layers: Sequence[ParamLayer],
    *,
    per_layer: bool,
    functions: Sequence[Any],
) -> dict[str, Any]:
    """What a ranking's numbers depend on, as JSON takes it.

    Args:
        model: The model.
        dataset: The data set.
        indices: Those that are ranked, in their order.
        layers: The partition whose norms are taken.
        per_layer: Whether each layer has a column.
        functions: What computes losses and makes batches.

    Returns:
        {what: its value, or a hash}; the names are those that an error tells.
    """
    return {
        "samples": len(dataset),
        "indices": hashlib.sha256(np.asarray(indices, np.int64).tobytes()).hexdigest(),
        "weights": _weights(model),
        "model": _structure(model),
        "parameters": _hash([list(layer.param_names) for layer in layers]),
        "layers": [layer.name for layer in layers] if per_layer else [],
        "data": _look_of(dataset, indices),
        "functions": [_name_of(function) for function in functions],
    }


def _hash(value: Any) -> str:
    """Of what can be written the same each time it is made; addresses in memory are left out."""
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(_plain(value, DEPTH), sort_keys=True))
    return hashlib.sha256(text.encode()).hexdigest()


def _weights(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return found.hexdigest()


def _structure(model: nn.Module) -> str:
    """The modules as they are printed, and the configuration: what the weights do not say, as an activation."""
    config: Any = getattr(model, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else {}
    return _hash([repr(model), {name: value for name, value in entries.items() if name not in UNTOLD}])


def _look_of(dataset: Any, indices: Sequence[int]) -> str:
    """A hash of a few items, and of whole columns of numbers where there are columns.

    A data set whose items change from one look to the next, as by augmentation, is known by that.
    """
    from datasets.fingerprint import Hasher

    places = indices[:: max(1, len(indices) // LOOKED_AT)]
    first, second = ([Hasher.hash(dataset[i]) for i in places] for _ in range(2))
    return Hasher.hash([first if first == second else "changes", _numbers(dataset)])


def _numbers(dataset: Any) -> str:
    """A hash of a `datasets.Dataset`'s columns of plain numbers, labels above all; of no column elsewhere."""
    from datasets import Dataset

    held = dataset.dataset if isinstance(dataset, IndexedDataset) else dataset
    fields = held.features.arrow_schema if isinstance(held, Dataset) else ()
    names = [field.name for field in fields if any(kind(field.type) for kind in NUMBERS)]
    found = hashlib.sha256(" ".join(names).encode())
    for table in held.select_columns(names).with_format("arrow").iter(ROWS_AT_ONCE) if names else ():
        for column in table.columns:
            found.update(str(column.to_pylist()).encode() if column.null_count else column.to_numpy().tobytes())
    return found.hexdigest()


def _name_of(function: Any, depth: int = DEPTH) -> list[Any]:
    """What a function is told by: its name, its code, and the plain values that it works with."""
    if isinstance(function, functools.partial):
        return [_name_of(function.func, depth), _plain([function.args, function.keywords], depth)]
    code = getattr(function, "__code__", None)
    held = getattr(function, "__dict__", {}) if code is None else _held(function, code)
    return [*_name_and_code(function), _plain(held, depth)]


def _name_and_code(function: Any) -> list[str]:
    from datasets.fingerprint import Hasher

    named = function if hasattr(function, "__qualname__") else type(function)
    code = getattr(function, "__code__", None)
    return [f"{named.__module__}.{named.__qualname__}", "" if code is None else Hasher.hash(code)]


def _held(function: Any, code: CodeType) -> dict[str, Any]:
    """What a function takes from elsewhere, by name: of its module, its scope, its defaults and its object."""
    around = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    own = {name: _name_and_code(value) if inspect.isroutine(value) else value for name, value in around.items()}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    scope = {name: _contents(cell) for name, cell in cells}
    others = {
        "its defaults": [function.__defaults__, function.__kwdefaults__],
        "its object's": getattr(getattr(function, "__self__", None), "__dict__", {}),
    }
    return {**own, **scope, **others}


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # what is not there yet
        return None


def _plain(value: Any, depth: int) -> Any:
    """A value as JSON takes it; of what is not plain (a tokenizer, a model), its class."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Tensor):
        return _plain(value.detach().cpu().double().numpy(), depth)
    if isinstance(value, np.ndarray | np.generic):
        return [list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    if depth and isinstance(value, Mapping):
        return {str(key): _plain(inner, depth - 1) for key, inner in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_plain(inner, depth - 1) for inner in value]
    if depth and (inspect.isroutine(value) or isinstance(value, functools.partial)):
        return _name_of(value, depth - 1)
    return f"{type(value).__module__}.{type(value).__qualname__}"
