"""What a study leaves for readers: parquet of all runs, pictures, and tables in a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_clars.plots.study import plot_curves, plot_tuning
from hf_clars.study.plan import Study
from hf_clars.study.report import put_between_markers, results_text
from hf_clars.study.results import ResultsFolder
from hf_clars.study.rows import ArmRows, Row, by_arm, read_rows, rows_of, write_rows

RUNS, CURVES, TUNING, PAGE = "runs.parquet", "curves.png", "tuning.png", "README.md"


def write_report(studies: Sequence[Study], results: Path, output: Path) -> list[Path]:
    """Write everything that can be said by now; unfinished studies too.

    Args:
        studies: Of one results folder.
        results: That folder.
        output: Where to; tables go into its README.md, between markers, and the rest of that page is kept.

    Returns:
        The files.
    """
    folder = ResultsFolder(results)
    rows: dict[str, Row] = {}
    for study in studies:
        for row in rows_of(study, folder.get):
            rows.setdefault(row["key"] + row["arm"], row)
    output.mkdir(parents=True, exist_ok=True)
    write_rows(list(rows.values()), output / RUNS)
    return [output / RUNS, *write_pages(output)]


def write_pages(output: Path) -> list[Path]:
    """Pictures and tables from the parquet file alone.

    Args:
        output: The folder of `RUNS`.

    Returns:
        The files.
    """
    groups = {f"{net}, B = {size:,}": arms for (net, size), arms in by_arm(read_rows(output / RUNS)).items()}
    plot_curves(output / CURVES, {title: _curves(arms) for title, arms in groups.items()})
    tuned = {title: _tuning(arms) for title, arms in groups.items() if any(arm.tuning for arm in arms)}
    files = [output / CURVES]
    if tuned:
        plot_tuning(output / TUNING, tuned)
        files.append(output / TUNING)
    page = output / PAGE
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    text = results_text(read_rows(output / RUNS))
    page.write_text(put_between_markers(before, text), encoding="utf-8")
    return [*files, page]


def _curves(arms: Sequence[ArmRows]) -> dict[str, list[list[float]]]:
    return {arm.name: [row["accuracy"] for row in arm.final] for arm in arms if arm.final}


def _tuning(arms: Sequence[ArmRows]) -> dict[str, list[tuple[float, float | None, bool]]]:
    return {
        arm.name: [
            (row["value"], None if row["diverged"] else row["accuracy"][-1], row["selected"]) for row in arm.tuning
        ]
        for arm in arms
    }
