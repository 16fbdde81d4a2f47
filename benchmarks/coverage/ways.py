"""By which ways a model's layers were measured, counted."""

from __future__ import annotations

from collections import Counter

from hf_clars.grad_norms import PerSampleGradNorms


def ways_of(norms: PerSampleGradNorms, said: list[str]) -> dict[str, int]:
    """Count the ways.

    Args:
        norms: A tracker that has measured some passes.
        said: The warnings of these passes.

    Returns:
        {way: number of tensors}.
    """
    counted: Counter[str] = Counter()
    for parameter in norms.explain().parameters:
        counted.update({_short(way) for way in parameter.ways} or {"not used"})
    return dict(counted)


def _short(way: str) -> str:
    if way.startswith("one backward"):
        return "one backward pass a sample"
    return "in the graph" if way.startswith("in the graph") else "rule"
