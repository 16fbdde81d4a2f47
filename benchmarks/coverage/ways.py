"""By which ways a model's layers were measured, counted."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

# How the engine says that it needs one backward pass of a module for each sample.
_SLOW = re.compile(r"^(\S+).*need a backward pass of this module for every sample")


def ways_of(norms: Any, said: list[str]) -> dict[str, int]:
    """Count the ways.

    Args:
        norms: A tracker that has measured some passes.
        said: The warnings of these passes.

    Returns:
        {way: number of tensors (with `explain`) or modules}.
    """
    explain = getattr(norms, "explain", None)
    if explain is not None:
        return dict(Counter(str(_way(entry)) for entry in _entries(explain())))
    slow = {found[1] for s in said if (found := _SLOW.match(s))}
    counted: Counter[str] = Counter()
    for hooked in getattr(norms, "_hooked", ()):
        if hooked.params:
            counted["rule" if hooked.rule is not None else "no rule"] += 1
    if slow:
        counted["one backward a sample: " + ", ".join(sorted(slow)[:4])] = len(slow)
    return dict(counted)


def _entries(explained: Any) -> list[Any]:
    return list(explained.values()) if isinstance(explained, dict) else list(explained)


def _way(entry: Any) -> Any:
    return entry.get("way") if isinstance(entry, dict) else getattr(entry, "way", entry)
