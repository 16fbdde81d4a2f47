"""A run as pictures see it: its name, its layer-rate log and what Trainer logged."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_clars.per_sample.log import PerSampleLog
from hf_clars.plots.style import PlotError
from hf_clars.records import LayerRateLog, RecordError

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: What tells it from the other runs.
        log: Its layer-rate log; None for a run that kept none (a plain Trainer).
        history: The entries of Trainer's `log_history`; empty if there is no `trainer_state.json` yet.
        samples: Its log of per-sample norms; None for a run that kept none.
    """

    name: str
    log: LayerRateLog | None
    history: list[dict[str, Any]]
    samples: PerSampleLog | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the log says of the run; empty without a log."""
        return {} if self.log is None else self.log.settings

    def points(self, key: str) -> list[tuple[int, float, float]]:
        """Return (step, epoch, value) of each entry that has a number under `key`."""
        return [
            (int(entry["step"]), float(entry.get("epoch", float("nan"))), float(entry[key]))
            for entry in self.history
            if isinstance(entry.get(key), int | float) and isinstance(entry.get("step"), int)
        ]


def open_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Open runs, each by its folder or by a `layer_rates.safetensors`.

    Args:
        paths: Of finished or still running runs.

    Returns:
        The runs, with names that differ: the folder's, longer by its parents where two are alike.

    Raises:
        PlotError: A folder holds nothing that can be drawn, the same one is given twice, or its state is damaged.
        RecordError: A log is damaged.
    """
    places = [Path(path) for path in paths]
    folders = [(place if place.is_dir() else place.parent).resolve() for place in places]
    names = _told_apart(folders)
    return [_open(place, name) for place, name in zip(places, names, strict=True)]


def _told_apart(folders: list[Path]) -> list[str]:
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise PlotError(f"The run {twice} is given twice: name each run once.")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _open(place: Path, name: str) -> Run:
    if not place.exists():
        raise PlotError(f"There is no run at {place}: give the folder that training wrote (its output_dir).")
    history = _history(place) if place.is_dir() else []
    samples = PerSampleLog.open(place) if place.is_dir() and PerSampleLog.is_in(place) else None
    try:
        log = LayerRateLog.open(place)
    except RecordError:
        # No log at all is an older or a plain Trainer's run; a damaged one is an error.
        if (not history and samples is None) or _has_log(place):
            raise
        log = None
    return Run(name, log, history, samples)


def _has_log(folder: Path) -> bool:
    return (folder / "layer_rates").exists() or (folder / "layer_rates.safetensors").exists()


def _history(folder: Path) -> list[dict[str, Any]]:
    """The log history in the folder, or in its last checkpoint while the run goes on."""
    checkpoints = [p for p in folder.glob(f"checkpoint-*/{STATE}") if p.parent.name[11:].isdecimal()]
    files = [folder / STATE, *sorted(checkpoints, key=lambda p: int(p.parent.name[11:]), reverse=True)]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return []
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return [entry for entry in history if isinstance(entry, dict)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlotError(
            f"{path} is no state that Trainer wrote ({error!r}): it is damaged. Delete it to draw the layer rates "
            "without loss and accuracy."
        ) from error
