"""Why methods did what they did: R_k over training beside what warmup does to all layers, in tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_clars.hub.markdown import plain, table
from research.study.layer_summary import Entry, over_epochs
from research.study.report import accuracy_text
from research.study.rows import ArmRows, Row, by_arm

EARLY = 5
"""Epochs at the beginning, and at the end, that are compared: as many as warmup takes in the study."""
USABLE = 0.02
"""How far below an arm's best held-out accuracy a value of its rate still counts as usable."""


def why_text(entries: Sequence[Entry], rows: Sequence[Row]) -> str:
    """The generated part of the page.

    Args:
        entries: Of the layer summary.
        rows: Of the same studies.

    Returns:
        Markdown.
    """
    parts = []
    for (network, batch_size), arms in by_arm(rows).items():
        own = [e for e in entries if e["network"] == network and e["batch_size"] == batch_size]
        parts.append(f"### {plain(network)}, B = {batch_size:,}")
        parts += [*_ratio_parts(own), robustness_table(arms), *_gains(arms)]
    return "\n\n".join(parts)


def _ratio_parts(entries: Sequence[Entry]) -> list[str]:
    parts = []
    for arm in ("clars", "lars", "mnag"):
        of_arm = [e for e in entries if e["arm"] == arm]
        if of_arm:
            layers, ratio = over_epochs(of_arm, "ratio")
            parts.append(ratio_table(arm, layers, ratio))
            parts.append(ratio_sentence(arm, layers, ratio))
    return parts


def early_over_late(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """R_k in the first epochs over R_k in the last ones, [K], of geometric means; below 1 is what a warmup would do.

    Args:
        ratio: R [epochs, K].

    Returns:
        [K].
    """
    return np.exp(np.log(ratio[:EARLY]).mean(0) - np.log(ratio[-EARLY:]).mean(0))


def ratio_table(arm: str, layers: Sequence[str], ratio: NDArray[np.float64]) -> str:
    """R_k by layer at some epochs.

    Args:
        arm: Its name.
        layers: [K], from input to output.
        ratio: R [epochs, K].

    Returns:
        A markdown table.
    """
    epochs = sorted({1, 2, 3, EARLY, len(ratio) // 2, len(ratio)} & set(range(1, len(ratio) + 1)))
    header = [f"R_k in {arm} runs", *(f"epoch {epoch}" for epoch in epochs), f"first {EARLY} / last {EARLY}"]
    change = early_over_late(ratio)
    lines = [
        [plain(layer), *(f"{ratio[epoch - 1, k]:.3f}" for epoch in epochs), f"{change[k]:.2f}"]
        for k, layer in enumerate(layers)
    ]
    return table(header, lines)


def ratio_sentence(arm: str, layers: Sequence[str], ratio: NDArray[np.float64]) -> str:
    """Whether R_k does what a warmup does.

    Args:
        arm: Its name.
        layers: [K].
        ratio: R [epochs, K].

    Returns:
        One or two sentences.
    """
    change = early_over_late(ratio)
    low, high = int((change < 1).sum()), int((change > 1).sum())
    warmup = np.mean([(epoch + 0.5) / EARLY for epoch in range(EARLY)])
    top, bottom = ratio[:EARLY, -1].mean(), ratio[:EARLY, 0].mean()
    return (
        f"In {arm} runs R_k of the first {EARLY} epochs is below that of the last {EARLY} in {low} of {len(layers)} "
        f"layers and above it in {high} (a warmup over {EARLY} epochs is a factor of {warmup:.2f} on the mean of those "
        f"epochs, the same for all layers; here the factors go from {change.min():.2f} to {change.max():.2f}). "
        f"In those epochs the last layer's R_k is {top / bottom:.2f} times the first layer's."
    )


def robustness_table(arms: Iterable[ArmRows]) -> str:
    """How wide the range of usable rates is, from all tuning runs.

    Args:
        arms: Of one network and batch size.

    Returns:
        A markdown table.
    """
    header = ["method", "best held-out accuracy, %", "usable values", "largest usable / smallest usable", "tried"]
    return table(header, [line for arm in arms if (line := _robustness(arm))])


def _robustness(arm: ArmRows) -> list[str]:
    scores = {row["value"]: 0.0 if row["diverged"] else row["accuracy"][-1] for row in arm.tuning}
    if not scores:
        return []
    best = max(scores.values())
    usable = [value for value, score in scores.items() if score >= best - USABLE]
    return [
        plain(arm.name),
        f"{100 * best:.1f}",
        ", ".join(f"{value:.3g}" for value in sorted(usable)),
        f"{max(usable) / min(usable):.3g} ({math.log10(max(usable) / min(usable)):.1f} decades)",
        f"{len(scores)} from {min(scores):.3g} to {max(scores):.3g}",
    ]


def _gains(arms: Sequence[ArmRows]) -> list[str]:
    """Sentences on who gains from a warmup, and on CLARS beside LARS."""
    by_name = {arm.name: arm for arm in arms if arm.final}
    sentences = []
    for name, arm in by_name.items():
        warm = by_name.get(f"{name}+warmup")
        if warm is not None:
            gain = 100 * (_mean(warm) - _mean(arm))
            sentences.append(
                f"- {plain(name)}: {accuracy_text(arm)} without and {accuracy_text(warm)} with warmup ({gain:+.2f} "
                "points)."
            )
    for own, other in (("clars", "lars"), ("clars", "lars+warmup"), ("clars", "mnag+warmup"), ("clars512", "clars")):
        if own in by_name and other in by_name:
            gain = 100 * (_mean(by_name[own]) - _mean(by_name[other]))
            sentences.append(f"- {plain(own)} beside {plain(other)}: {gain:+.2f} points.")
    return ["\n".join(sentences)] if sentences else []


def _mean(arm: ArmRows) -> float:
    return float(np.mean(arm.last_accuracies()))
