"""The tables of a study, from its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from hf_clars.hub.markdown import plain, table
from research.study.rows import ArmRows, Row, by_arm, epochs_to

CLARS_ARM, RIVALS = "clars", ("lars", "lars+warmup", "mnag+warmup")
MILESTONES = (0.80, 0.85)
CHANCE = 0.15
"""Accuracy below which a run of ten classes has learnt next to nothing."""

BEGIN, END = "<!-- results: made by research/compare_methods.py -->", "<!-- end of results -->"


def results_text(rows: Iterable[Row]) -> str:
    """All tables, one a network and batch size, with what the columns mean.

    Args:
        rows: Of one study or several.

    Returns:
        Markdown.
    """
    parts = []
    for (network, batch_size), arms in by_arm(rows).items():
        parts += [f"### {plain(network)}, B = {batch_size:,}", *verdict(arms), _overview(arms), arm_table(arms)]
    return "\n\n".join(parts)


def verdict(arms: Sequence[ArmRows]) -> list[str]:
    """CLARS without warmup beside the best of the others and its nearest rivals, the first thing to say.

    Args:
        arms: Of one network and batch size.

    Returns:
        One list of sentences; none before CLARS and another method have their final runs.
    """
    by_name = {arm.name: arm for arm in arms if arm.final}
    others = [arm for name, arm in by_name.items() if not name.startswith("clars")]
    if CLARS_ARM not in by_name or not others:
        return []
    own = by_name[CLARS_ARM]
    rivals = [max(others, key=_mean), *(by_name[name] for name in RIVALS if name in by_name)]
    sentences = [f"CLARS without warmup reaches {accuracy_text(own)} %."]
    for place, rival in enumerate(dict.fromkeys(arm.name for arm in rivals)):
        what = "The best other method, " if place == 0 else ""
        sentences.append(f"{what}{_beside(own, by_name[rival])}")
    return ["\n".join(f"- {sentence}" for sentence in sentences)]


def _beside(own: ArmRows, rival: ArmRows) -> str:
    gap = 100 * (_mean(own) - _mean(rival))
    error = 100 * math.sqrt(_squared_error(own) + _squared_error(rival))
    side = "above" if gap > 0 else "below"
    clear = "more than two standard errors" if abs(gap) > 2 * error else "within two standard errors"
    if min(len(own.final), len(rival.final)) < 2:
        clear = "of one run, so what is chance is not known"
    return f"{plain(rival.name)}: {accuracy_text(rival)} %; CLARS is {abs(gap):.2f} points {side} it ({clear})."


def _squared_error(arm: ArmRows) -> float:
    """Of the mean over seeds."""
    values = arm.last_accuracies()
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


def arm_table(arms: Sequence[ArmRows]) -> str:
    """One line an arm, best first.

    Args:
        arms: Of one network and batch size.

    Returns:
        A markdown table.
    """
    header = ["method", "tuned", "chosen", "held-out accuracy, %", "test accuracy, %"]
    header += [f"epochs to {milestone:.0%}" for milestone in MILESTONES]
    header += ["diverged in tuning", "diverged, final", f"below {CHANCE:.0%}, all runs"]
    lines = [_line(arm) for arm in sorted(arms, key=lambda arm: -_mean(arm))]
    if not any(arm.tuning for arm in arms):  # nothing is said of tuning
        kept = [i for i, name in enumerate(header) if name in ("method", "test accuracy, %", "diverged, final")]
        header, lines = [header[i] for i in kept], [[line[i] for i in kept] for line in lines]
    return table(header, lines)


def _line(arm: ArmRows) -> list[str]:
    everything = arm.tuning + arm.final
    tuned = everything[0]["tuned"]
    chosen = "-" if arm.chosen is None else f"{arm.chosen:.4g}{' (edge)' if arm.chosen_at_edge else ''}"
    return [
        plain(arm.name),
        "-" if tuned is None else f"{plain(tuned)}, {len(arm.tuning)} values",
        chosen,
        _best_held_out(arm.tuning),
        accuracy_text(arm),
        *(_milestone(arm, accuracy) for accuracy in MILESTONES),
        _count(arm.tuning, lambda row: row["diverged"]),
        _count(arm.final, lambda row: row["diverged"]),
        _count(everything, lambda row: not row["diverged"] and row["accuracy"][-1] < CHANCE),
    ]


def _best_held_out(tuning: Sequence[Row]) -> str:
    scores = [0.0 if row["diverged"] else row["accuracy"][-1] for row in tuning]
    return f"{100 * max(scores):.2f}" if scores else "-"


def _mean(arm: ArmRows) -> float:
    return statistics.mean(arm.last_accuracies()) if arm.final else -1.0


def accuracy_text(arm: ArmRows) -> str:
    """Mean and standard deviation over the seeds, in per cent.

    Args:
        arm: With its final runs.

    Returns:
        Such as "88.1 ± 0.2"; "-" before there are final runs.
    """
    values = [100 * value for value in arm.last_accuracies()]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _milestone(arm: ArmRows, accuracy: float) -> str:
    reached = [epoch for row in arm.final if (epoch := epochs_to(row, accuracy)) is not None]
    if not reached:
        return "-"
    mean = f"{statistics.mean(reached):.1f}"
    return mean if len(reached) == len(arm.final) else f"{mean} ({len(reached)} of {len(arm.final)})"


def _count(rows: Sequence[Row], what: object) -> str:
    assert callable(what)
    return f"{sum(bool(what(row)) for row in rows)} of {len(rows)}"


def _overview(arms: Sequence[ArmRows]) -> str:
    rows = [row for arm in arms for row in arm.tuning + arm.final]
    extended = any(row["stage"] == "extension" for row in rows)
    seeds = len({row["seed"] for row in rows if row["stage"] == "final"})
    more = ", the last two after a best value at an edge of some method's grid" if extended else ""
    budget = sorted({len(arm.tuning) for arm in arms})
    waiting = [arm.name for arm in arms if not arm.final]
    unfinished = f"**Unfinished**: no final runs yet of {', '.join(map(plain, waiting))}. " if waiting else ""
    if budget == [0]:
        how = "one seed" if seeds == 1 else f"{seeds} seeds, mean ± standard deviation"
        return f"{unfinished}{len(rows)} runs of {rows[0]['parameters']:,} parameters; nothing is tuned; {how}."
    return (
        f"{unfinished}{len(rows)} runs of {rows[0]['parameters']:,} parameters; "
        f"{' or '.join(map(str, budget))} values a method{more}; {seeds} seeds at the chosen value: mean ± standard "
        'deviation after the last epoch. "Diverged": the loss was not finite.'
    )


def put_between_markers(document: str, text: str) -> str:
    """Replace what an earlier report wrote into a document.

    Args:
        document: With the two markers, or without: then the text goes to its end.
        text: The new text.

    Returns:
        The document.
    """
    block = f"{BEGIN}\n\n{text}\n\n{END}"
    before, found, rest = document.partition(BEGIN)
    if not found:
        return f"{document.rstrip()}\n\n{block}\n" if document.strip() else f"{block}\n"
    return before + block + rest.partition(END)[2]
