"""All runs of a study as rows, kept as parquet: what every table and picture is made from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets

from research.study.plan import Lookup, Run, Study

COLUMNS = datasets.Features(
    {
        "key": datasets.Value("string"),
        "network": datasets.Value("string"),
        "arm": datasets.Value("string"),
        "batch_size": datasets.Value("int64"),
        "stage": datasets.Value("string"),
        "tuned": datasets.Value("string"),
        "value": datasets.Value("float64"),
        "seed": datasets.Value("int64"),
        "selected": datasets.Value("bool"),
        "evaluated_on": datasets.Value("string"),
        "diverged": datasets.Value("bool"),
        "diverged_at": datasets.Value("int64"),
        "accuracy": datasets.List(datasets.Value("float64")),
        "eval_loss": datasets.List(datasets.Value("float64")),
        "train_loss": datasets.List(datasets.Value("float64")),
        "updates": datasets.Value("int64"),
        "parameters": datasets.Value("int64"),
        "seconds": datasets.Value("float64"),
        "settings": datasets.Value("string"),
    }
)
"""`selected`: the run was made at the value that its arm chose. `settings`: all of them, as JSON. Curves by epoch."""

Row = dict[str, Any]


def rows_of(study: Study, result: Lookup) -> list[Row]:
    """One row a finished run.

    Args:
        study: Whose runs.
        result: Looks a result up.

    Returns:
        Rows with the columns of `COLUMNS`, in the order of the plan.
    """
    runs = [run for run in study.known_runs(result) if result(run.settings.key) is not None]
    chosen = {run.arm: run.value for run in runs if run.stage == "final"}
    return [_row(run, result(run.settings.key) or {}, chosen) for run in runs]


def _row(run: Run, result: dict[str, Any], chosen: dict[Any, float | None]) -> Row:
    return {
        "key": run.settings.key,
        "network": run.arm.network,
        "arm": run.arm.name,
        "batch_size": run.settings.batch_size,
        "stage": run.stage,
        "tuned": run.arm.tune,
        "value": run.value,
        "seed": run.settings.seed,
        "selected": run.arm in chosen and chosen[run.arm] == run.value,
        "evaluated_on": "held-out training images" if run.settings.held_out else "test images",
        "diverged": result["diverged_at"] is not None,
        **{name: result[name] for name in COLUMNS if name in result},
        "settings": json.dumps(result["settings"], sort_keys=True),
    }


@dataclass(frozen=True)
class ArmRows:
    """The rows of one arm.

    Attributes:
        network: Its network.
        batch_size: B.
        name: Of the arm.
        tuning: Runs of grid and extension, by increasing value.
        final: Runs of all seeds at the chosen value.
    """

    network: str
    batch_size: int
    name: str
    tuning: list[Row]
    final: list[Row]

    @property
    def chosen(self) -> float | None:
        """The value of the final runs; None before there are any, or when nothing was tuned."""
        return self.final[0]["value"] if self.final else None

    @property
    def chosen_at_edge(self) -> bool:
        """Whether the chosen value is the smallest or largest that was tried."""
        return bool(self.tuning) and self.chosen in (self.tuning[0]["value"], self.tuning[-1]["value"])

    def last_accuracies(self) -> list[float]:
        """Test accuracy after the last epoch of each seed; what diverged counts as 0."""
        return [0.0 if row["diverged"] else row["accuracy"][-1] for row in self.final]


def by_arm(rows: Iterable[Row]) -> dict[tuple[str, int], list[ArmRows]]:
    """Rows by what is compared.

    Args:
        rows: Of one study or several.

    Returns:
        {(network, batch size): its arms}.
    """
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["network"], row["batch_size"], row["arm"]), []).append(row)
    groups: dict[tuple[str, int], list[ArmRows]] = {}
    for (network, batch_size, name), members in found.items():
        tuning = sorted((r for r in members if r["stage"] != "final"), key=lambda r: r["value"])
        final = [r for r in members if r["stage"] == "final"]
        groups.setdefault((network, batch_size), []).append(ArmRows(network, batch_size, name, tuning, final))
    return groups


def epochs_to(row: Row, accuracy: float) -> int | None:
    """The first epoch (from 1) whose accuracy is at least so high; None: never.

    Args:
        row: Of a run.
        accuracy: Between 0 and 1.

    Returns:
        The epoch.
    """
    return next((epoch for epoch, value in enumerate(row["accuracy"], 1) if value >= accuracy), None)
