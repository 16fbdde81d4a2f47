"""The reading side of a layer-rate log: arrays by quantity, layer and step, while the run goes on or after it."""

import copy
from pathlib import Path
from typing import Any, Self

import numpy as np

from hf_clars.records.files import RecordError, nearest
from hf_clars.records.log_file import Floats, LogFile, LogHead, Steps, check_quantity
from hf_clars.records.pieces import FOLDER, HEAD, MERGED, find_log


class LogReader:
    """A log as it was when it was opened; `LayerRateLog` adds the writing."""

    def __init__(self, path: Path, head: LogHead, parts: list[LogFile]) -> None:
        self._path = path
        self._head = head
        self._parts: list[LogFile] | None = parts  # None: to be looked up again
        self._rows = sum(len(part.steps) for part in parts)
        self._last_step = int(parts[-1].steps[-1]) if parts and len(parts[-1].steps) else None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a log for reading: a `layer_rates.safetensors`, a folder of pieces, or a run's folder with either.

        A log that is still being written is seen as it is now; open it again to see later steps.

        Raises:
            RecordError: There is no log, or it is damaged (a damaged last piece is left out, with a warning).
        """
        path = Path(path)
        return cls(path, *find_log(path))

    @staticmethod
    def is_in(folder: str | Path) -> bool:
        """Whether a run's folder holds a log, growing or merged."""
        return (Path(folder) / FOLDER / HEAD).exists() or (Path(folder) / MERGED).exists()

    @property
    def layers(self) -> list[str]:
        """The K layer names, in the order of the columns."""
        return list(self._head.layers)

    @property
    def quantities(self) -> tuple[str, ...]:
        """The names of what the log holds: `QUANTITIES`, and after them `SIGNAL_QUANTITIES` if it has them."""
        return self._head.quantities

    @property
    def settings(self) -> dict[str, Any]:
        """The settings given to `create`, as JSON gives them back (tuples are lists)."""
        return copy.deepcopy(self._head.settings)

    @property
    def last_step(self) -> int | None:
        """The last step appended or read; None for an empty log."""
        return self._last_step

    @property
    def steps(self) -> Steps:
        """The logged steps, int64 [T], increasing."""
        found = [part.steps for part in self._current()]
        return np.concatenate([np.empty(0, np.int64), *found])[: self._rows]

    def __len__(self) -> int:
        """Return T, the number of logged steps."""
        return self._rows

    def __getitem__(self, quantity: str) -> Floats:
        """Return one quantity, float32 [T, K], read from disk at each call.

        Raises:
            RecordError: There is no such quantity (the message names the nearest one), or a file was damaged.
        """
        check_quantity(quantity)
        for _ in range(10):
            try:
                found = [part.read(quantity) for part in self._current()]
            except FileNotFoundError:  # the writer joined pieces since: look again, rows only get added
                self._parts = None
                continue
            values = np.concatenate([np.empty((0, len(self._head.layers)), np.float32), *found])[: self._rows]
            if len(values) == self._rows:
                return values
            break
        raise RecordError(f"The layer-rate log at {self._path} was changed while it was open; open it again.")

    def layer(self, name: str) -> dict[str, Floats]:
        """Return all quantities of one layer: {quantity: float32 [T]}.

        Raises:
            RecordError: There is no such layer; the message names the nearest one.
        """
        if name not in self._head.layers:
            raise RecordError(f"The log has no layer {name!r}.{nearest(name, self._head.layers)}")
        column = self._head.layers.index(name)
        return {quantity: self[quantity][:, column].copy() for quantity in self.quantities}

    def _current(self) -> list[LogFile]:
        if self._parts is None:
            self._parts = find_log(self._path)[1]
        return self._parts
