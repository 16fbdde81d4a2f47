"""The study's kept runs as one parquet file: `python -m research.cifar10.rows --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets

from research.cifar10.choosing import json_lines
from research.cifar10.settings import KIND, Settings
from research.study.parquet import read_parquet, write_parquet

MADE_BY = ("prototype", "product")
"""Who made a run: a prototype (148 runs on an H100), which had code of its own, or the product's classes."""

KINDS = {"float": "float64", "int": "int64", "str": "string"}
NUMBERS = datasets.List(datasets.List(datasets.Value("float64")))
FEATURES = datasets.Features(
    {"made_by": datasets.Value("string"), "device": datasets.Value("string")}
    | {f.name: datasets.Value(KINDS[str(f.type)]) for f in fields(Settings)}
    | {"accuracy": datasets.Value("float64"), "diverged": datasets.Value("bool"), "seconds": datasets.Value("float64")}
    | {"curve": NUMBERS, "layers": datasets.List(datasets.Value("string")), "signal": NUMBERS}
)


def prototype_row(row: dict[str, Any]) -> dict[str, Any]:
    """A run of the prototype in this study's words.

    Its "p" is n where a factor of s has one, and a power of R_k otherwise.

    Args:
        row: As the prototype kept it.
    """
    name, p = row["method"], float(row["p"])
    kinds: dict[str, dict[str, Any]] = {
        "LARS": {"method": "lars"},
        "NAG": {"method": "nag"},
        "LARS x R^p": {"method": "clars"} if p == 1 else {"method": "lars_times_ratio", "power": p},
        "LARS x [1+(p-1)(1-s)]/p": {"method": "signal_lars", "n": p},
        "LARS x [1+(p-1)s]^-1": {"method": "signal_lars", "n": p, "form": "sum"},
        "LARS x [1+(p-1)s]^-1/2": {"method": "signal_lars", "n": p, "form": "sum", "power": 0.5},
    }
    settings = {f.name: f.default for f in fields(Settings)} | kinds[name]
    settings |= {k: row[k] for k in ("network", "batch", "rate", "seed", "epochs", "width", "schedule")}
    settings["warmup"] = float(row["warmup_epochs"])
    nothing = [float("nan")] * len(row["loss"])
    signal, ratio = row["median_s"] or nothing, row["median_R"] or nothing
    curve = [[step, loss, s, r] for (step, loss), s, r in zip(row["loss"], signal, ratio, strict=True)]
    found = {"accuracy": row["accuracy"], "diverged": row["diverged"], "seconds": float("nan"), "curve": curve}
    return {"made_by": "prototype", "device": "cuda", **settings, **found, "layers": [], "signal": []}


def product_row(row: dict[str, Any]) -> dict[str, Any]:
    """A run of `research.cifar10.run`, with settings of today that it was made before at their defaults."""
    defaults = {f.name: f.default for f in fields(Settings)}
    return {"made_by": "product", **defaults, **row}


def write_runs(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write runs to a parquet file, in an order of their settings; a run that is there twice is kept once.

    Args:
        rows: Of `prototype_row`, `product_row` or `read_runs`.
        path: The file.
    """
    by_settings = {
        (row["made_by"], row["device"], *(row[k] for k in KIND), row["rate"], row["seed"]): row for row in rows
    }
    ordered = [by_settings[key] for key in sorted(by_settings)]
    write_parquet([{name: row[name] for name in FEATURES} for row in ordered], FEATURES, path)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Runs that `write_runs` wrote."""
    return read_parquet(path)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in json_lines(path) if row.get("accuracy") is not None]


def main() -> int:
    """Add runs to a parquet file."""
    parser = argparse.ArgumentParser(description="Add runs to the study's parquet file; runs in it are kept.")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="what research.cifar10.run wrote, *.jsonl")
    parser.add_argument("--prototype", type=Path, help="the prototype's 148 runs, *.jsonl")
    parser.add_argument("--output", type=Path, default=Path("model_cards/cifar10/runs.parquet"), help="(%(default)s)")
    args = parser.parse_args()
    rows = read_runs(args.output) if args.output.exists() else []
    if args.prototype:
        rows += [prototype_row(row) for row in _json_lines(args.prototype)]
    rows += [product_row(row) for path in args.runs for row in _json_lines(path)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_runs(rows, args.output)
    print(f"{len(read_runs(args.output))} runs in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
