"""`BatchAdvice` on one screen."""

from __future__ import annotations

import math

from hf_clars.theory.advice import BatchAdvice, FactorEstimate, LayerAdvice

SHOWN = 16
"""Layers that a screen has room for, beside the rest."""


def advice_table(advice: BatchAdvice, *, all_layers: bool = False) -> str:
    """Return the advice as plain text.

    Args:
        advice: From `advise`.
        all_layers: Show every layer. Default False: of more than 16, those with the smallest limits and the last one to
            leave linear scaling, in the order of the network.

    Returns:
        A table and a few lines that say what it means, without a final newline.
    """
    chosen = _chosen(advice, all_layers)
    rows = [_row(advice, layer) for layer in [*chosen, advice.whole]]
    header = ("layer", "R_k", "M_k early", "M_k late", "linear up to B")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(r, widths, strict=True))
        )
        for r in [header, *rows]
    ]
    lines.insert(len(lines) - 1, "-" * len(lines[0]))
    hidden = len(advice.layers) - len(chosen)
    if hidden:
        lines.insert(len(lines) - 2, f"... and {hidden} layers with larger limits or none")
    return "\n".join([*lines, "", *_conclusions(advice)])


def number(value: float) -> str:
    """Two significant digits: more are not meant. NaN is "-".

    Args:
        value: At least 0, or NaN.
    """
    if math.isnan(value):
        return "-"
    if math.isinf(value) or value == 0:
        return f"{value:g}"
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def _chosen(advice: BatchAdvice, all_layers: bool) -> list[LayerAdvice]:
    if all_layers or len(advice.layers) <= SHOWN:
        return list(advice.layers)
    smallest = sorted(advice.measured, key=lambda layer: layer.linear_limit)[: SHOWN - 1]
    return [layer for layer in advice.layers if layer in smallest or layer is advice.last]


def _row(advice: BatchAdvice, layer: LayerAdvice) -> tuple[str, ...]:
    limit = "-" if math.isnan(layer.linear_limit) else number(max(1.0, layer.linear_limit))
    late = _factor(layer.late, at_least=advice.lower_bounds)
    return (layer.name, number(layer.ratio), _factor(layer.early), late, limit)


def _factor(estimate: FactorEstimate, *, at_least: bool = False) -> str:
    if math.isinf(estimate.value):
        return f"> {number(estimate.low)}"
    return f">= {number(estimate.value)}" if at_least and estimate.value > 0 else number(estimate.value)


def _conclusions(advice: BatchAdvice) -> list[str]:
    first, last = advice.limiting, advice.last
    lines = [
        f"This run: B = {advice.batch:,}. Estimates over the first and last {advice.window} of {advice.steps} steps.",
        f"All layers scale linearly up to B = {number(max(1.0, first.linear_limit))}; {first.name} ends first.",
        f"Largest batch by B <= M_k in every layer: {advice.largest_batch:,}.",
        f"No layer's rate bound grows beyond B = {number(max(1.0, last.linear_limit))} ({last.name}).",
        "Beyond its M_k a layer gains less than proportionally from more samples; that is no sign of divergence,",
        "and nothing here is about accuracy.",
    ]
    if advice.lower_bounds:
        lines.append("Late values are lower bounds, often far too low: the log holds mean norms, not mean squares.")
    return lines
