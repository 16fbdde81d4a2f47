"""Rows as parquet files and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_clars.records.files import write_complete


def write_parquet(rows: Sequence[dict[str, Any]], features: datasets.Features, path: Path) -> None:
    """Write rows to one file, which is there whole or not at all.

    Args:
        rows: At least one, each with all columns.
        features: The columns.
        path: The file to make or replace.
    """
    table = datasets.Dataset.from_list(list(rows), features=features)

    def write(temporary: Path) -> None:
        table.to_parquet(str(temporary))

    write_complete(path, write)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Rows that `write_parquet` wrote.

    Args:
        path: The file.

    Returns:
        The rows.
    """
    return datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
