"""What a study leaves for readers: parquet of all runs, pictures, and tables in a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_clars.records import RecordError
from research.plots.layer_comparison import Lines, plot_layers
from research.plots.tuning import plot_curves, plot_tuning
from research.study import layer_summary
from research.study import rows as run_rows
from research.study.layer_summary import Entry, over_epochs, summarise
from research.study.parquet import read_parquet, write_parquet
from research.study.plan import Study
from research.study.report import put_between_markers, results_text
from research.study.results import ResultsFolder
from research.study.rows import ArmRows, Row, by_arm, rows_of
from research.study.why import why_text

RUNS, CURVES, TUNING, PAGE = "runs.parquet", "curves.png", "tuning.png", "README.md"
LAYERS, RATES, RATIOS, WHY = "layers.parquet", "layer_rates.png", "layer_ratios.png", "why.md"
RATE_ARMS = ("mnag+warmup", "lars", "lars+warmup", "clars", "clars+warmup")
RATIO_ARMS = ("mnag", "lars", "clars", "clars512", "reference_code")
"""Whose layers are drawn: rates where warmup is to be seen, R_k where there is none."""


def write_report(studies: Sequence[Study], results: Path, output: Path) -> list[Path]:
    """Write everything that can be said by now; unfinished studies too.

    Args:
        studies: Of one results folder.
        results: That folder.
        output: Where to; tables go into its README.md, between markers, and the rest of that page is kept.

    Returns:
        The files.

    Raises:
        RecordError: If nothing is finished.
    """
    folder = ResultsFolder(results)
    rows: dict[str, Row] = {}
    for study in studies:
        for row in rows_of(study, folder.get):
            rows.setdefault(row["key"] + row["arm"], row)
    if not rows:
        raise RecordError(f"{results} holds no result of this study yet: there is nothing to report.")
    output.mkdir(parents=True, exist_ok=True)
    write_parquet(list(rows.values()), run_rows.COLUMNS, output / RUNS)
    files = [output / RUNS, *write_pages(output)]
    entries = summarise(studies, folder)
    if not entries:
        return files
    write_parquet(entries, layer_summary.COLUMNS, output / LAYERS)
    return [*files, output / LAYERS, *write_why(output)]


def write_pages(output: Path) -> list[Path]:
    """Pictures and tables from the parquet file of runs alone.

    Args:
        output: The folder of `RUNS`.

    Returns:
        The files.
    """
    groups = {f"{net}, B = {size:,}": arms for (net, size), arms in by_arm(read_parquet(output / RUNS)).items()}
    final = {title: curves for title, arms in groups.items() if (curves := _curves(arms))}
    plot_curves(output / CURVES, final or {title: {} for title in groups})  # of an unfinished study, what is there
    tuned = {title: _tuning(arms) for title, arms in groups.items() if any(arm.tuning for arm in arms)}
    files = [output / CURVES]
    if tuned:
        plot_tuning(output / TUNING, tuned)
        files.append(output / TUNING)
    return [*files, _put(results_text(read_parquet(output / RUNS)), output / PAGE)]


def write_why(output: Path) -> list[Path]:
    """The page about layers, from the two parquet files alone.

    Args:
        output: The folder of `RUNS` and `LAYERS`.

    Returns:
        The files.
    """
    entries = read_parquet(output / LAYERS)
    files = [output / RATES, output / RATIOS]
    plot_layers(files[0], _layers(entries, RATE_ARMS, "rate"), ylabel=r"rate $\gamma_k$")
    plot_layers(files[1], _layers(entries, RATIO_ARMS, "ratio"), ylabel=r"$R_k = \Vert g_k\Vert / n_k$")
    return [*files, _put(why_text(entries, read_parquet(output / RUNS)), output / WHY)]


def _layers(entries: Sequence[Entry], arms: Sequence[str], quantity: str) -> dict[str, dict[str, Lines]]:
    found: dict[str, dict[str, Lines]] = {}
    for network in dict.fromkeys(entry["network"] for entry in entries):
        of_arm = {arm: [e for e in entries if e["network"] == network and e["arm"] == arm] for arm in arms}
        lines: dict[str, Lines] = {arm: over_epochs(own, quantity) for arm, own in of_arm.items() if own}
        if lines:
            found[network] = lines
    return found


def _put(text: str, page: Path) -> Path:
    """Replace the generated part of a page, and keep the rest."""
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    page.write_text(put_between_markers(before, text), encoding="utf-8")
    return page


def _curves(arms: Sequence[ArmRows]) -> dict[str, list[list[float]]]:
    return {arm.name: [row["accuracy"] for row in arm.final] for arm in arms if arm.final}


def _tuning(arms: Sequence[ArmRows]) -> dict[str, list[tuple[float, float | None, bool]]]:
    return {
        arm.name: [
            (row["value"], None if row["diverged"] else row["accuracy"][-1], row["selected"]) for row in arm.tuning
        ]
        for arm in arms
    }
