"""What was measured, as text tables, as JSON with every raw figure, and as pictures."""

from __future__ import annotations

import json
import os
import platform
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hf_clars.bench.timing import Ratio

JSON_NAME = "benchmark.json"
NOTE_WIDTH = 110

Rows = Sequence[Any]
"""Dataclasses of one kind, such as `CostRow`."""


def machine() -> dict[str, str]:
    """The computer and the versions that a result belongs to."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: GPU not measured"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "GPU": gpu,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def text_table(rows: Rows, columns: Mapping[str, Callable[[Any], object]]) -> str:
    """An aligned table that Markdown reads too.

    Args:
        rows: One object a line.
        columns: {heading: what it shows of a row}.

    Returns:
        Its lines; without a GPU the last one says that none was measured.
    """
    cells = [list(columns), *([_cell(show(row)) for show in columns.values()] for row in rows)]
    if not torch.cuda.is_available():
        cells.append(["all, on a GPU", *[""] * (len(columns) - 2), "not measured"])
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    return textwrap.shorten(str(value).replace("|", "/"), NOTE_WIDTH, placeholder=" ...")


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, as text; empty where there is none."""
    return f"{1000 * statistics.median(seconds):.4g}" if seconds else ""


def ratio_or_note(ratio: Ratio | float | None, note: str) -> str:
    """What stands in a table's last column."""
    if ratio is None:
        return note
    shown = str(ratio) if isinstance(ratio, Ratio) else f"{ratio:.2f}"
    return f"{shown}; {note}" if note else shown


def save_json(folder: Path, page: str, rows: Rows) -> Path:
    """Put one page's rows, with the machine they were measured on, into the folder's JSON; other pages stay.

    Args:
        folder: Made if it does not exist.
        page: The page's name.
        rows: Dataclasses.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JSON_NAME
    pages = json.loads(path.read_text()) if path.exists() else {}
    pages[page] = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(pages, indent=1) + "\n")
    return path
