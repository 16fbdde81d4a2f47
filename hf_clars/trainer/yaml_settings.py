"""A YAML file of settings, read straight into the types of the dataclasses that take them."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import Field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from hf_clars.errors import ConfigError

ABSENT = object()
"""A setting that the file leaves to its default."""

_TRUE, _FALSE = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, which takes `1e-4` for the number that it is (YAML 1.2), not for a word (YAML 1.1)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z"), list("-+.0123456789")
)


class _MisfitError(ValueError):
    """A value of the file that its setting cannot take; the text says what it can."""


def read_settings(path: Path, fields: Mapping[str, tuple[Any, Field[Any]]], recipes: str) -> dict[str, Any]:
    """Read a YAML file of `name: value` lines.

    A setting that is words takes the value as it is written, so that `no` and `010` stay words. An empty value (`null`)
    leaves a setting to its default where the default is empty too, and is refused where it is not.

    Args:
        path: The file.
        fields: Type and dataclass field of each setting that there is, by name.
        recipes: Names of the recipes that could be meant instead, for the message.

    Returns:
        Each setting that the file gives, as its dataclass takes it.

    Raises:
        ConfigError: The file cannot be read, is no such file, names a setting twice, or holds a value that its setting
            cannot take. Names that no setting has are returned, with their values, for the caller to refuse.
    """
    settings: dict[str, Any] = {}
    for key, text, value in _entries(path, recipes):
        if key not in fields:
            settings[key] = value
            continue
        hint, field = fields[key]
        try:
            settings[key] = _fitted(hint, field, text, value)
        except _MisfitError as misfit:
            raise ConfigError(f"{path}: {key} is {_shown(text, value)}, but {misfit}.") from None
    return {key: value for key, value in settings.items() if value is not ABSENT}


def _entries(path: Path, recipes: str) -> list[tuple[str, str | None, Any]]:
    """(name, the value as it is written if it is one word or number, the value) of each line."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"The config file {path} cannot be read: {error.strerror}. Check the path, or name a recipe that is "
            f"installed: {recipes}."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: it is no text ({error}).") from error
    try:
        loader = _Loader(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        node = loader.get_single_node()
        if node is None or (isinstance(node, yaml.ScalarNode) and loader.construct_object(node) is None):
            raise ConfigError(f"{path} is empty: it must hold `key: value` lines.")
        if not isinstance(node, yaml.MappingNode):
            kind = type(loader.construct_object(node, deep=True)).__name__
            raise ConfigError(f"{path} must hold `key: value` lines, but holds {kind}.")
        names = [key.value for key, _ in node.value if key.value != "<<"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{path} names {twice} twice: keep one of the two lines.")
        loader.flatten_mapping(node)  # what `<<` brings in comes first, and the file's own lines win
        return [(str(key.value), _text(value), loader.construct_object(value, deep=True)) for key, value in node.value]
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _text(node: yaml.Node) -> str | None:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else None


def _shown(text: str | None, value: Any) -> str:
    if text is not None and value is not None:
        return repr(text)
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else "empty"


def _of_list(kinds: list[Any], item: Any) -> Any:
    try:
        return _scalar(kinds, str(item), item)
    except _MisfitError as error:
        raise _MisfitError(f"has {item!r} in it, which {error}") from None


def _fitted(hint: Any, field: Field[Any], text: str | None, value: Any) -> Any:
    kinds = _members(hint)
    if value is None:
        default = field.default if isinstance(field.default, str | int | float | Enum) else None
        if default is None or default == "":
            return ABSENT
        raise _MisfitError(f"has the default {getattr(default, 'value', default)}: leave the line out, or give a value")
    if isinstance(value, dict):
        if not any((typing.get_origin(kind) or kind) is dict for kind in kinds):
            raise _MisfitError("takes one value")
        return value
    lists = [kind for kind in kinds if (typing.get_origin(kind) or kind) is list]
    if isinstance(value, list):
        if not lists:
            raise _MisfitError("takes one value")
        return [_of_list(_members(_item(lists[0])), item) for item in value]
    if text is None:
        raise _MisfitError("takes one value")
    others = [kind for kind in kinds if kind not in lists]
    found = _scalar(others, text, value) if others else [_scalar(_members(_item(lists[0])), text, value)]
    choices = field.metadata.get("choices")
    if choices and found not in choices:
        raise _MisfitError(f"must be one of {', '.join(map(str, choices))}")
    return found


def _item(hint: Any) -> Any:
    return (typing.get_args(hint) or (str,))[0]


def _members(hint: Any) -> list[Any]:
    """The types that a setting may have, without None."""
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return [kind for kind in (typing.get_args(hint) if union else [hint]) if kind is not type(None)]


def _scalar(kinds: list[Any], text: str, value: Any) -> Any:
    """One word or number as the first of the types that can take it; words come last."""
    wanted = []
    for kind in sorted(kinds, key=lambda kind: kind is str):
        if kind is bool:
            if isinstance(value, bool) or (str not in kinds and text.lower() in (*_TRUE, *_FALSE)):
                return text.lower() in _TRUE
            wanted.append("true or false")
        elif kind in (int, float):
            number = _number(kind, text, value)
            if number is not None:
                return number
            wanted.append("a whole number" if kind is int else "a number")
        elif isinstance(kind, type) and issubclass(kind, Enum):
            names = [member.value for member in kind]
            if text in names or (value is False and "no" in names):
                return text if text in names else "no"
            raise _MisfitError(f"must be one of {', '.join(map(str, names))}")
        elif typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
            wanted.append(f"one of {', '.join(map(str, typing.get_args(kind)))}")
        elif kind is str:
            return text
    raise _MisfitError(f"must be {' or '.join(wanted) or 'a mapping'}")


def _number(kind: type, text: str, value: Any) -> float | int | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value if isinstance(value, int | float) else text)
    except ValueError:
        return None
    if kind is float:
        return number
    return int(number) if number.is_integer() and abs(number) < 2**53 else None
