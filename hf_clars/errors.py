"""The library's exceptions. Every message is one paragraph: what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class HfClarsError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(HfClarsError, ValueError):
    """A setting cannot work, alone or together with another."""


class DataError(HfClarsError, ValueError):
    """A dataset is missing, incomplete, or not what the task needs."""


def name_list(names: Sequence[object], most: int = 8) -> str:
    """The first few names for a message, and how many more there are."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
