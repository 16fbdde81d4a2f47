"""The layer-rate logs of a study's final runs, by epoch: small enough to be kept beside the page that explains them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_clars.records import LayerRateLog
from research.study.plan import Run, Study
from research.study.results import ResultsFolder

COLUMNS = datasets.Features(
    {
        "network": datasets.Value("string"),
        "batch_size": datasets.Value("int64"),
        "arm": datasets.Value("string"),
        "seed": datasets.Value("int64"),
        "epoch": datasets.Value("int64"),
        "position": datasets.Value("int64"),
        "layer": datasets.Value("string"),
        "rate": datasets.Value("float32"),
        "ratio": datasets.Value("float32"),
        "weight_norm": datasets.Value("float32"),
        "grad_norm": datasets.Value("float32"),
    }
)
"""Medians over the updates of each epoch (from 1); `position` counts layers from the input."""

QUANTITIES = ("rate", "ratio", "weight_norm", "grad_norm")

Entry = dict[str, Any]


def summarise(studies: Iterable[Study], folder: ResultsFolder) -> list[Entry]:
    """One entry a final run, epoch and layer, for the runs that have a log and did not diverge.

    Args:
        studies: Of the folder.
        folder: Of results.

    Returns:
        Entries with the columns of `COLUMNS`.
    """
    entries: dict[str, list[Entry]] = {}
    for study in studies:
        for run in study.known_runs(folder.get):
            result = folder.get(run.settings.key)
            log = folder.log_folder(run.settings.key) / "layer_rates.safetensors"
            if run.stage == "final" and result is not None and result["diverged_at"] is None and log.exists():
                entries[run.settings.key + run.arm.name] = _of_run(run, LayerRateLog.open(log.parent))
    return [entry for of_run in entries.values() for entry in of_run]


def _of_run(run: Run, log: LayerRateLog) -> list[Entry]:
    by_epoch = {name: _medians(log[name], run.settings.epochs) for name in QUANTITIES}
    return [
        {
            "network": run.arm.network,
            "batch_size": run.settings.batch_size,
            "arm": run.arm.name,
            "seed": run.settings.seed,
            "epoch": epoch + 1,
            "position": k,
            "layer": layer,
            **{name: float(values[epoch, k]) for name, values in by_epoch.items()},
        }
        for epoch in range(run.settings.epochs)
        for k, layer in enumerate(log.layers)
    ]


def _medians(values: NDArray[np.float32], epochs: int) -> NDArray[np.float32]:
    """[T, K] -> [epochs, K]."""
    return np.stack([np.median(part, axis=0) for part in np.split(values, epochs)])


def over_epochs(entries: Iterable[Entry], quantity: str) -> tuple[list[str], NDArray[np.float64]]:
    """A quantity of one arm by epoch and layer, the geometric mean over seeds.

    Args:
        entries: Of one network and arm.
        quantity: One of `QUANTITIES`.

    Returns:
        (layer names, [epochs, K]).
    """
    entries = list(entries)
    layers = {entry["position"]: entry["layer"] for entry in entries}
    epochs, seeds = max(e["epoch"] for e in entries), sorted({e["seed"] for e in entries})
    values = np.full((len(seeds), epochs, len(layers)), np.nan)
    for entry in entries:
        values[seeds.index(entry["seed"]), entry["epoch"] - 1, entry["position"]] = entry[quantity]
    with np.errstate(divide="ignore"):
        return [layers[k] for k in sorted(layers)], np.exp(np.log(values).mean(0))
