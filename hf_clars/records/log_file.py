"""One file of a layer-rate log: its format, and reading and writing it whole or as a stream.

The same format serves the pieces of a running log and the merged file, so any piece can be opened on its own:
safetensors with the arrays `steps` (int64, [T], strictly increasing) and one float32 array [T, K] per name of
`QUANTITIES`, and per name of `SIGNAL_QUANTITIES` if the method measures them; metadata `format`, `version`, `layers`
(JSON list of K names) and `settings` (JSON object).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_clars.records.files import RecordError, from_json, nearest, to_json, write_complete

QUANTITIES = ("rate", "weight_norm", "grad_norm", "mean_sample_norm", "ratio")
"""gamma_k, ||w_k||, ||g_k||, n_k (mean per-sample gradient norm), R_k = ||g_k|| / n_k: rows of an appended tensor."""

SIGNAL_QUANTITIES = ("signal", "damping")
"""s_k (share of signal in the squared batch gradient) and f_k (what it makes of LARS' step): SignalLARS' own rows."""

FORMAT = "hf_clars.layer_rates"
VERSION = "1"

Floats = NDArray[np.float32]
Steps = NDArray[np.int64]


@dataclass(frozen=True)
class LogHead:
    """What all files of one log share.

    Attributes:
        layers: The K layer names.
        settings: Those of the run, a JSON-able dict.
        signal: Whether the log has `SIGNAL_QUANTITIES` beside `QUANTITIES`.
    """

    layers: tuple[str, ...]
    settings: dict[str, Any]
    signal: bool = False

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            RecordError: There are no names, one is not a string, or two are equal.
        """
        if not self.layers or not all(isinstance(name, str) for name in self.layers):
            raise RecordError(f"A layer-rate log needs at least one layer name, all strings; got {self.layers!r}.")
        twice = sorted(name for name, count in Counter(self.layers).items() if count > 1)
        if twice:
            raise RecordError(f"Layer names of a log must differ; given more than once: {', '.join(twice)}.")

    @property
    def quantities(self) -> tuple[str, ...]:
        """The names of the log's arrays, in the order of the rows of an appended tensor."""
        return QUANTITIES + SIGNAL_QUANTITIES if self.signal else QUANTITIES

    def metadata(self) -> dict[str, str]:
        """Return the safetensors metadata of a file with this head."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "layers": to_json(list(self.layers), "The list of layer names"),
            "settings": to_json(self.settings, "The settings of a layer-rate log"),
        }


@dataclass(frozen=True)
class LogFile:
    """A validated file of a log: where it is, its head, and its steps [T]; quantities are read when asked for."""

    path: Path
    head: LogHead
    steps: Steps

    def read(self, quantity: str, start: int = 0, stop: int | None = None) -> Floats:
        """Return rows `start:stop` (default: all) of a quantity, float32 [rows, K], read from disk at each call.

        One of `SIGNAL_QUANTITIES` that the log has not is NaN, as any quantity is that a method does not measure.

        Raises:
            RecordError: The file can no longer be read.
        """
        last = len(self.steps) if stop is None else min(stop, len(self.steps))
        if start >= last:  # safetensors has no empty slices
            return np.empty((0, len(self.head.layers)), np.float32)
        if quantity not in self.head.quantities:
            return np.full((last - start, len(self.head.layers)), np.nan, np.float32)
        try:
            with safe_open(self.path, framework="np") as file:
                return file.get_slice(quantity)[start:last]
        except SafetensorError as error:
            raise RecordError(f"{self.path} cannot be read: {error}.") from error


def check_quantity(quantity: str) -> None:
    """Raise `RecordError`, naming the nearest one, unless `quantity` is one that a log can have."""
    known = QUANTITIES + SIGNAL_QUANTITIES
    if quantity not in known:
        raise RecordError(
            f"A layer-rate log has no quantity {quantity!r}.{nearest(quantity, known)} It has: {', '.join(known)}."
        )


def write_log_file(path: Path, head: LogHead, steps: Steps, values: Floats) -> None:
    """Write one complete file of a log, or none.

    Args:
        path: The file to make or replace.
        head: Layer names and settings.
        steps: [T], strictly increasing.
        values: [T, Q, K], the quantities in the order of `head.quantities`.

    Raises:
        RecordError: The file system refused, or the settings are not JSON-able.
    """
    arrays: dict[str, np.ndarray] = {"steps": np.ascontiguousarray(steps)}
    for index, quantity in enumerate(head.quantities):
        arrays[quantity] = np.ascontiguousarray(values[:, index])
    metadata = head.metadata()
    write_complete(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))


def stream_log_file(path: Path, head: LogHead, parts: Sequence[LogFile]) -> None:
    """Join `parts`, in order, to one complete file at `path`, holding one array of one part in memory at a time.

    `safetensors.numpy.save_file` wants every array whole (322 MB for 100,000 steps of 161 layers), so the
    header, which is a length and a line of JSON (https://huggingface.co/docs/safetensors/index#format), is
    written here.

    Raises:
        RecordError: A part or the target could not be read or written; `path` is as it was before.
    """
    rows, width = sum(len(part.steps) for part in parts), len(head.layers)
    header: dict[str, Any] = {"__metadata__": head.metadata()}
    header["steps"] = {"dtype": "I64", "shape": [rows], "data_offsets": [0, 8 * rows]}
    begin = 8 * rows
    for quantity in head.quantities:
        end = begin + 4 * rows * width
        header[quantity] = {"dtype": "F32", "shape": [rows, width], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of their element size, as the format asks

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in parts:
                file.write(part.steps.astype("<i8").tobytes())
            for quantity in head.quantities:
                for part in parts:
                    for start in range(0, len(part.steps), 4096):
                        file.write(part.read(quantity, start, start + 4096).astype("<f4", copy=False).tobytes())

    write_complete(path, write)


def open_log_file(path: Path) -> LogFile:
    """Open and validate one file of a log: format, version, names, shapes, dtypes, increasing steps.

    Raises:
        FileNotFoundError: There is no such file (a running log may just have joined it to another).
        RecordError: The file is damaged or not of this format; the message says what differs.
    """
    try:
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            head = _read_head(path, file.metadata() or {}, signal=not names.isdisjoint(SIGNAL_QUANTITIES))
            width = len(head.layers)
            slices = {name: file.get_slice(name) for name in names}
            found = {name: (array.get_dtype(), array.get_shape()) for name, array in slices.items()}
            rows = (found.get("steps", ("", []))[1] or [0])[0]
            wanted = {"steps": ("I64", [rows])} | {name: ("F32", [rows, width]) for name in head.quantities}
            _compare(path, found, wanted)
            steps: Steps = file.get_tensor("steps")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{path} is not a readable safetensors file ({error}): it is damaged or cut off.") from error
    if np.any(steps[1:] <= steps[:-1]):
        raise RecordError(f"{path}: the steps do not increase. The file was damaged or made by another tool.")
    return LogFile(path, head, steps)


def _read_head(path: Path, metadata: dict[str, str], *, signal: bool) -> LogHead:
    if metadata.get("format") != FORMAT:
        raise RecordError(f"{path} is a safetensors file, but no layer-rate log (its metadata lacks format={FORMAT}).")
    if metadata.get("version") != VERSION:
        raise RecordError(
            f"{path} has layer-rate log version {metadata.get('version')!r}; this hf_clars reads version {VERSION!r}. "
            "Use the hf_clars that wrote it, or a newer one."
        )
    layers = from_json(metadata.get("layers", ""), f"{path}: the list of layer names")
    settings = from_json(metadata.get("settings", ""), f"{path}: the settings")
    if not isinstance(layers, list) or not isinstance(settings, dict):
        raise RecordError(f"{path}: layers must be a list and settings an object; the file was made by another tool.")
    return LogHead(tuple(layers), settings, signal)


def _compare(path: Path, found: dict[str, tuple[str, list[int]]], wanted: dict[str, tuple[str, list[int]]]) -> None:
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise RecordError(
                f"{path}: array {name!r} should be {_described(wanted.get(name))} "
                f"but is {_described(found.get(name))}. The file was damaged or made by another tool."
            )


def _described(entry: tuple[str, list[int]] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {entry[1]}"
