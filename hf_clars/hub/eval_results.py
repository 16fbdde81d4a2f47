"""Results as the Hub reads them from a model's `.eval_results/` folder, for leaderboards of benchmark data sets."""

from __future__ import annotations

import math
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hf_clars.hub.markdown import one_line
from hf_clars.hub.summary import RunSummary

FOLDER = ".eval_results"
VALUE = "eval_accuracy"


def write_eval_results(folder: Path, summary: RunSummary) -> Path | None:
    """Write a run's top-1 accuracy as `.eval_results/<data set>.yaml`.

    The Hub lists results by data set, so there are none of data that are not on the Hub. One value belongs to one task
    of the data set: the top-1 accuracy, from 0 to 1. The card's model-index and `all_results.json` have the others.

    Args:
        folder: The run's folder.
        summary: The facts of the run.

    Returns:
        The file; None where there is nothing to say.
    """
    value = summary.results.get(VALUE)
    if summary.dataset_id is None or value is None or not math.isfinite(value):
        return None
    split = f", {one_line(summary.eval_split)} split" if summary.eval_split else ""
    entry = EvalResultEntry(
        dataset_id=summary.dataset_id,
        task_id=summary.eval_task or summary.dataset_config or "default",
        value=float(value),
        notes=f"top-1 accuracy{split}",
    )
    path = folder / FOLDER / f"{summary.dataset_id.rsplit('/', 1)[-1]}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")
    return path
