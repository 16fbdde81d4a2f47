"""The log of a run's measured steps, as safetensors in pieces.

A folder `per_sample_norms/` holds `part-00001.safetensors` and so on, each complete in itself, of at most `ROWS` steps;
only the last is written again while the run goes on. Metadata: `format`, `version`, `layers` (JSON list of K names) and
`settings` (JSON object). Arrays, T steps: `steps`, `samples`, `independent` (int64, [T]); `batch_square`,
`sample_square`, `sample_norm` (float64, [T, K]); `quantiles` (float64, [T, 5]); `loss` (float64, [T]); `top_norm`,
`top_share` (float64, [T, k]); `top_index`, `top_rank`, `top_micro_batch`, `top_row` (int64, [T, k]). `StepMeasures`
says what each is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_clars.per_sample.measures import StepMeasures
from hf_clars.per_sample.noise_scale import NoiseScale, NoiseScaleAverage
from hf_clars.records.files import RecordError, from_json, nearest, to_json, write_complete

FOLDER, FORMAT, VERSION, ROWS = "per_sample_norms", "hf_clars.per_sample_norms", "1", 500

ARRAYS = {"steps": "step"} | {f.name: f.name for f in fields(StepMeasures) if f.name != "step"}
"""Arrays of the file, and the attribute that each row comes from."""

_WHOLE = {"steps", "samples", "independent", "top_index", "top_rank", "top_micro_batch", "top_row"}


class PerSampleLog:
    """Write or read a log; make one with `create`, `resume` or `open`.

    Args:
        folder: The folder of the pieces.
        layers: The K layer names.
        settings: What a reader should know of the run.
    """

    def __init__(self, folder: Path, layers: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.layers = list(layers)
        self.settings = dict(settings)
        self._full = 0  # complete pieces on disk
        self._rows: list[dict[str, Tensor]] = []  # of the piece that grows

    # ---- writing ---------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, run: str | Path, *, layers: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> PerSampleLog:
        """Begin a log in a run's folder; pieces of an earlier one there are removed.

        Raises:
            RecordError: The folder cannot be written to, or the settings are not JSON-able.
        """
        log = cls(Path(run) / FOLDER, layers, settings or {})
        to_json(log.settings, "The settings of the per-sample log")
        try:
            log.folder.mkdir(parents=True, exist_ok=True)
            for old in _pieces(log.folder):
                old.unlink()
        except OSError as error:
            raise RecordError(f"The log of per-sample norms cannot be begun in {log.folder}: {error}.") from error
        return log

    @classmethod
    def resume(
        cls, run: str | Path, last_step: int, *, layers: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> PerSampleLog:
        """Continue a log after a step: what was measured later is dropped. Begins one where there is none.

        Raises:
            RecordError: The log there has other layers, or is damaged.
        """
        folder = Path(run) / FOLDER
        if not _pieces(folder):
            return cls.create(run, layers=layers, settings=settings)
        old = cls.open(folder)
        if old.layers != list(layers):
            raise RecordError(f"{folder} is a log of other layers than this model's: move it away, or train elsewhere.")
        arrays = old.read()
        kept = int((arrays["steps"] <= last_step).sum())
        log = cls.create(run, layers=layers, settings=settings or old.settings)
        for row in range(kept):
            log._add({name: values[row] for name, values in arrays.items()})
        log.flush()
        return log

    def append(self, step: StepMeasures) -> None:
        """Add a step, whose tensors may be on any device."""
        row = {array: torch.as_tensor(getattr(step, name)).cpu() for array, name in ARRAYS.items()}
        self._add({name: value.to(torch.int64 if name in _WHOLE else torch.float64) for name, value in row.items()})

    def _add(self, row: dict[str, Tensor]) -> None:
        if len(self._rows) == ROWS:
            self.flush()
            self._full, self._rows = self._full + 1, []
        self._rows.append(row)

    def flush(self) -> None:
        """Write what is in memory.

        Raises:
            RecordError: The file system refused; the steps stay in memory.
        """
        if not self._rows:
            return
        arrays = {name: torch.stack([row[name] for row in self._rows]).contiguous() for name in ARRAYS}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "layers": to_json(self.layers, "The list of layer names"),
            "settings": to_json(self.settings, "The settings of the per-sample log"),
        }
        path = self.folder / f"part-{self._full + 1:05d}.safetensors"
        write_complete(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))

    # ---- reading ---------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path) -> PerSampleLog:
        """Open a log: its folder, or the run's.

        Raises:
            RecordError: There is none, or it is damaged.
        """
        folder = Path(path)
        folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
        pieces = _pieces(folder)
        if not pieces:
            raise RecordError(f"There is no log of per-sample norms in {path}: its folder is called {FOLDER}.")
        layers, settings = _head(pieces[0])
        return cls(folder, layers, settings)

    @staticmethod
    def is_in(run: str | Path) -> bool:
        """Whether a run's folder holds a log."""
        return bool(_pieces(Path(run) / FOLDER))

    def read(self) -> dict[str, Tensor]:
        """All arrays, by name.

        Raises:
            RecordError: A piece is damaged, or of another log.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in ARRAYS}
        for piece in _pieces(self.folder):
            if _head(piece)[0] != self.layers:
                raise RecordError(f"{piece} has other layers than the first piece of its log: it was put there.")
            for name, values in _arrays(piece, len(self.layers)).items():
                found[name].append(values)
        try:
            arrays = {name: torch.cat(values) for name, values in found.items()}
        except RuntimeError as error:
            raise RecordError(f"The pieces in {self.folder} do not fit together: {error}.") from error
        steps = arrays["steps"]
        if bool((steps[1:] <= steps[:-1]).any()):
            raise RecordError(f"The steps of {self.folder} do not increase: a piece is missing or was put there.")
        return arrays

    def rows(self) -> Iterator[StepMeasures]:
        """The measured steps, one after the other."""
        arrays = self.read()
        for row in range(len(arrays["steps"])):
            values: dict[str, Any] = {name: arrays[array][row] for array, name in ARRAYS.items()}
            numbers = {name: int(values[name]) for name in ("step", "samples", "independent")}
            yield StepMeasures(**values | numbers)

    def layer(self, name: str) -> int:
        """The column of a layer.

        Raises:
            RecordError: There is no such layer; the nearest name is given.
        """
        if name not in self.layers:
            raise RecordError(f"The log has no layer {name!r}.{nearest(name, self.layers)}")
        return self.layers.index(name)

    def noise_scale(self, *, decay: float | None = None) -> tuple[Tensor, NoiseScale]:
        """The noise scale as it was known at each measured step.

        Args:
            decay: Of the running averages; default: the run's own setting, or 0.9.

        Returns:
            Steps [T], and a `NoiseScale` of [T, K + 1]: the layers, and the whole model in the last column.
        """
        known = float(self.settings.get("decay", 0.9)) if decay is None else decay
        average = NoiseScaleAverage(len(self.layers), decay=known)
        steps, rows = [], []
        for row in self.rows():
            if row.independent:
                average.update(row.batch_square, row.sample_square, row.samples)
            steps.append(row.step)
            rows.append(average.read())
        return torch.tensor(steps), NoiseScale(
            **{f.name: torch.stack([getattr(row, f.name) for row in rows]) for f in fields(NoiseScale)}
        )


def _pieces(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.safetensors"))


def _head(path: Path) -> tuple[list[str], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{path} is not a readable safetensors file ({error}): it is damaged or cut off.") from error
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise RecordError(f"{path} is no log of per-sample norms that this version reads ({FORMAT} {VERSION}).")
    layers = from_json(metadata.get("layers", ""), f"{path}: the list of layer names")
    settings = from_json(metadata.get("settings", ""), f"{path}: the settings")
    if not isinstance(layers, list) or not all(isinstance(x, str) for x in layers) or not isinstance(settings, dict):
        raise RecordError(f"{path}: layers must be a list of names and settings an object; another tool made the file.")
    return layers, settings


def _arrays(path: Path, width: int) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no dict
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{path} is not a readable safetensors file ({error}): it is damaged or cut off.") from error
    rows = len(found.get("steps", torch.empty(0)))
    for name in ARRAYS:
        values = found.get(name)
        dtype = torch.int64 if name in _WHOLE else torch.float64
        wide = width if name in ("batch_square", "sample_square", "sample_norm") else None
        if values is None or values.dtype != dtype or len(values) != rows or (wide and values.shape[1:] != (wide,)):
            raise RecordError(f"{path}: array {name!r} is missing or of another shape. Another tool made the file.")
    return {name: found[name] for name in ARRAYS}
