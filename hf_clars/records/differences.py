"""What a checkpoint and the run that wants to resume from it do not have in common, in words."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hf_clars.records.files import RecordError

SHOWN = 3
"""So many differences are spelled out; the others are counted."""

Described = tuple[tuple[int, ...], str]


def tensor_differences(given: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Compare tensors with those of a model's state dict by name, shape and dtype.

    Args:
        given: Tensors by name; meta tensors will do.
        model: The model that is to be filled.

    Returns:
        One entry a difference; empty when the tensors fill the model.
    """
    return named_differences(given, wanted_tensors(given, model))


def named_differences(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Compare two sets of tensors by name, shape and dtype.

    Args:
        given: The checkpoint's.
        wanted: The model's.

    Returns:
        One entry a difference.
    """
    found, described = ({name: _described(t) for name, t in tensors.items()} for tensors in (given, wanted))
    return _differences(found, described, "the model")


def wanted_tensors(names: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that a checkpoint must have: all, but tied ones once, and none that are never saved.

    Args:
        names: Those that the checkpoint has.
        model: The model.

    Returns:
        Tensors by name.
    """
    tensors, found = model.state_dict(), set(names)
    stored = {tensors[name].data_ptr() for name in found if name in tensors}
    # Private name: _keys_to_ignore_on_save, by which models of transformers say what they do not store. It ends when
    # transformers says so in public.
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {
        name: tensor
        for name, tensor in tensors.items()
        # A tied tensor is stored once, under one of its names.
        if name in found or not (name in ignored or (tensor.numel() and tensor.data_ptr() in stored))
    }


def optimizer_differences(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    """Compare a saved optimizer state with an optimizer: layers, the tensors of each, and their shapes.

    Args:
        state: As `load_optimizer_state` returns it.
        optimizer: Whose state it shall become.

    Returns:
        One entry a difference.

    Raises:
        RecordError: The state is no optimizer's.
    """
    try:
        found = [(str(group.get("layer", i)), len(group["params"])) for i, group in enumerate(state["param_groups"])]
        held = {int(key): dict(value) for key, value in state["state"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"The optimizer state is not one of torch's ({error!r}): it is damaged.") from error
    wanted = [(str(group.get("layer", i)), len(group["params"])) for i, group in enumerate(optimizer.param_groups)]
    by_name = getattr(_innermost(optimizer), "arranged_state", None)
    stored = {int(index) for group in state["param_groups"] for index in group["params"]}
    beyond = [f"it has state for parameter {index} of {len(stored)}" for index in held if index not in stored]
    if beyond:
        return beyond
    if by_name is not None:
        try:
            held = {int(key): dict(value) for key, value in by_name(dict(state))["state"].items()}
        except ValueError as error:
            return _layer_differences(dict(found), dict(wanted)) or [str(error)]
        # Each parameter finds its state by name, but a run that resumes keeps its layers too.
        gone = {name: count for name, count in found if name not in dict(wanted)}
        if gone and all("layer" in group for group in (*state["param_groups"], *optimizer.param_groups)):
            return _layer_differences(gone, {})
    elif found != wanted:
        return _layer_differences(dict(found), dict(wanted))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    differences = []
    for index, tensors in held.items():
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape != params[index].shape:
                shapes = f"{list(tensor.shape)}, the parameter {list(params[index].shape)}"
                differences.append(f"{name} of parameter {index} is {shapes}")
    return differences


def _innermost(optimizer: Any) -> Any:
    """The optimizer inside a launcher's wrappers."""
    while not hasattr(optimizer, "arranged_state") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def sentence(differences: list[str]) -> str:
    """The first differences and how many more there are."""
    more = len(differences) - SHOWN
    return "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _layer_differences(found: dict[str, int], wanted: dict[str, int]) -> list[str]:
    return [
        f"layer {name!r} has {_count(found.get(name))} in the checkpoint, {_count(wanted.get(name))} here"
        for name in dict.fromkeys([*found, *wanted])
        if found.get(name) != wanted.get(name)
    ]


def _count(tensors: int | None) -> str:
    return "no tensor" if tensors is None else f"{tensors} tensor{'s' if tensors != 1 else ''}"


def _differences(found: Mapping[str, Described], wanted: Mapping[str, Described], owner: str) -> list[str]:
    differences = []
    for name in dict.fromkeys([*wanted, *found]):
        ours, theirs = wanted.get(name), found.get(name)
        if theirs is None:
            differences.append(f"{name!r} is only in {owner}")
        elif ours is None:
            differences.append(f"{name!r} is only in the checkpoint")
        elif ours != theirs:
            differences.append(f"{name!r} is {_words(theirs)} in the checkpoint, {_words(ours)} in {owner}")
    return differences


def _words(described: Described) -> str:
    return f"{described[1]} {list(described[0])}"


def described_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as meta tensors: names, shapes and dtypes; no value is read.

    Args:
        path: The file.

    Raises:
        RecordError: It is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a file is no dict
            return {
                name: torch.empty(part.get_shape(), dtype=_dtype_of(part.get_dtype(), path), device="meta")
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, RuntimeError) as error:  # the last: a size that no tensor can have
        raise RecordError(f"{path} is not a readable safetensors file ({error}): it is damaged or cut off.") from error


def _described(tensor: Tensor) -> Described:
    return tuple(tensor.shape), _dtype_word(tensor.dtype)


_WORDS: dict[torch.dtype, str] = {}


def _dtype_of(word: str, path: Path) -> torch.dtype:
    """The dtype that the format calls by this word."""
    if word not in _WORDS.values():
        for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
            with contextlib.suppress(Exception), warnings.catch_warnings():  # safetensors has no word for some
                warnings.simplefilter("ignore")
                _dtype_word(dtype)
    known = {spelled: dtype for dtype, spelled in _WORDS.items()}
    if word not in known:
        raise RecordError(f"{path} holds a tensor of type {word}, which this torch does not have.")
    return known[word]


def _dtype_word(dtype: torch.dtype) -> str:
    """The format's word for a dtype, as the library itself spells it in a header."""
    if dtype not in _WORDS:
        header = save({"x": torch.zeros(0, dtype=dtype)}, None)
        _WORDS[dtype] = header.split(b'"dtype":"', 1)[1].split(b'"', 1)[0].decode()
    return _WORDS[dtype]
