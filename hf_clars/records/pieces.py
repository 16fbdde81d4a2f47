"""The folder of pieces in which a layer-rate log grows: finding, joining, cutting and merging them.

`layer_rates/head.safetensors` is a log file without rows; it makes the folder a log, and holds names and
settings. `layer_rates/part-XXXXXXXX.safetensors` hold the rows, each named by its first step. Every file
appears by one rename. The invariants that make any moment safe to be killed at, and to be read at:

- joining small pieces replaces the first of them and deletes the others afterwards: a piece whose steps all
  lie in the one before it is such a leftover, and is passed over;
- cutting for a resume deletes from the last piece backwards: what is left is a beginning of the log at any
  moment;
- after a merge the head goes first: without it the folder is no log, and the merged file beside it is the
  log.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_clars.records.files import RecordError, sync_folder
from hf_clars.records.log_file import (
    Floats,
    LogFile,
    LogHead,
    Steps,
    open_log_file,
    stream_log_file,
    write_log_file,
)

FOLDER = "layer_rates"
MERGED = "layer_rates.safetensors"
HEAD = "head.safetensors"

FAN_IN = 16
"""So many small pieces are joined into one: each row is rewritten about log16(256 / flush_every) times, 0 to 2."""

FINAL_ROWS = 256
"""A piece of at least so many rows is never rewritten: it bounds the work of one flush, and the number of files."""

logger = logging.getLogger(__name__)


def find_log(path: Path) -> tuple[LogHead, list[LogFile]]:
    """Find and validate the log at `path`: a merged file, a folder of pieces, or a run's folder that holds either.

    Where a run's folder holds both, the pieces count: they are newer (a run that was resumed after its end).

    Raises:
        RecordError: There is no log, or it is damaged.
    """
    for _ in range(10):
        try:
            for folder in (path, path / FOLDER):
                if (folder / HEAD).is_file():
                    return scan(folder)
            # The last of these: a folder of pieces that was merged, and so removed, since its path was noted.
            for file in (path, path / MERGED, path.with_suffix(".safetensors")):
                if file.is_file():
                    merged = open_log_file(file)
                    return merged.head, [merged]
        except FileNotFoundError:  # the run that writes this log has just joined or merged pieces: look again
            continue
        break
    raise RecordError(
        f"There is no layer-rate log at {path}. Give a {MERGED} file, or the folder of a run that wrote one "
        f"(it holds {MERGED}, or {FOLDER}/ while the run goes on)."
    )


def scan(folder: Path) -> tuple[LogHead, list[LogFile]]:
    """Return head and valid pieces of `folder` in order of steps; an unreadable last piece is left out with a warning.

    Raises:
        FileNotFoundError: A piece vanished meanwhile; call again.
        RecordError: The head or a piece before the last is damaged, or pieces belong to different logs.
    """
    head = open_log_file(folder / HEAD).head
    parts: list[LogFile] = []
    paths = _part_paths(folder)
    for path in paths:
        try:
            part = open_log_file(path)
        except RecordError as error:
            if path != paths[-1]:
                raise RecordError(
                    f"{error} Delete this piece to read the others; its steps will be missing."
                ) from error
            logger.warning("Left out the last piece of a layer-rate log: %s", error)
            continue
        if (part.head.layers, part.head.signal) != (head.layers, head.signal):
            raise RecordError(
                f"{path} has other layers or quantities than {folder / HEAD}: two logs were mixed in one folder."
            )
        if not len(part.steps) or (parts and part.steps[-1] <= parts[-1].steps[-1]):
            continue  # a leftover of joining
        if parts and part.steps[0] <= parts[-1].steps[-1]:
            raise RecordError(f"{path} and {parts[-1].path} share some steps: two logs were mixed in one folder.")
        parts.append(part)
    return head, parts


def start(folder: Path, head: LogHead) -> None:
    """Make `folder` an empty log, removing what a killed run may have left in it.

    Raises:
        RecordError: The folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*_part_paths(folder), *folder.glob(".*.tmp")]:
            path.unlink()
    except OSError as error:
        raise RecordError(
            f"Cannot keep a layer-rate log in {folder}: {error}. Choose a folder that may be written."
        ) from error
    write_head(folder, head)


def write_head(folder: Path, head: LogHead) -> None:
    """Write the file that makes `folder` a log."""
    no_values = np.empty((0, len(head.quantities), len(head.layers)), np.float32)
    write_log_file(folder / HEAD, head, np.empty(0, np.int64), no_values)


def add_part(folder: Path, head: LogHead, steps: Steps, values: Floats) -> LogFile:
    """Write rows (steps [T], values [T, Q, K]) as one piece named by its first step, and return it."""
    path = folder / f"part-{int(steps[0]):08d}.safetensors"
    write_log_file(path, head, steps, values)
    return LogFile(path, head, steps)


def join_small(tail: list[LogFile]) -> list[LogFile]:
    """Join the small pieces at the end of a log where enough of them have gathered.

    Args:
        tail: The pieces after the last one of `FINAL_ROWS` rows or more.

    Returns:
        The new tail: at most 3 * (FAN_IN - 1) pieces.
    """
    while tail:
        run = 0
        while run < len(tail) and _level(tail[-1 - run]) <= _level(tail[-1]):
            run += 1
        if run < FAN_IN:
            break
        tail = [*tail[:-run], _join(tail[-run:])]
    if tail and len(tail[-1].steps) >= FINAL_ROWS:
        return []
    return tail


def cut_after(folder: Path, step: int) -> list[LogFile]:
    """Drop all rows with a step above `step`, and whatever is no valid piece; return the pieces that are left."""
    head, parts = scan(folder)
    valid = {part.path for part in parts}
    for path in reversed(_part_paths(folder)):
        if path not in valid:
            path.unlink()
    while parts and parts[-1].steps[-1] > step:
        part = parts.pop()
        keep = int(np.searchsorted(part.steps, step, side="right"))
        if keep:
            write_log_file(part.path, head, part.steps[:keep], _values(part)[:keep])
            parts.append(LogFile(part.path, head, part.steps[:keep]))
        else:
            part.path.unlink()
    for path in folder.glob(".*.tmp"):
        path.unlink()
    sync_folder(folder)
    return parts


def split_merged(merged: LogFile, folder: Path, step: int) -> list[LogFile]:
    """Make `folder` a log of the rows up to `step` of a merged file, which stays; return the pieces."""
    folder.mkdir(exist_ok=True)
    for path in _part_paths(folder):
        path.unlink()
    count = int(np.searchsorted(merged.steps, step, side="right"))
    parts = []
    for first in range(0, count, 16 * FINAL_ROWS):
        last = min(first + 16 * FINAL_ROWS, count)
        values = np.stack([merged.read(quantity, first, last) for quantity in merged.head.quantities], axis=1)
        parts.append(add_part(folder, merged.head, merged.steps[first:last], values))
    write_head(folder, merged.head)  # last: only now do the pieces take the place of the merged file
    return parts


def merge(folder: Path, target: Path) -> None:
    """Write the pieces of `folder` to one file `target`, and check it; the pieces stay."""
    head, parts = scan(folder)
    stream_log_file(target, head, parts)
    if len(open_log_file(target).steps) != sum(len(part.steps) for part in parts):
        raise RecordError(f"{target} does not hold all steps of {folder}: the disk lost data. The pieces are kept.")


def remove(folder: Path) -> None:
    """Delete the pieces of a merged log, the head first."""
    (folder / HEAD).unlink(missing_ok=True)
    sync_folder(folder)
    for path in [*_part_paths(folder), *folder.glob(".*.tmp")]:
        path.unlink()
    if not any(folder.iterdir()):  # someone else's file in it is not ours to delete
        folder.rmdir()


def _part_paths(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("part-*.safetensors") if path.stem[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem[5:]))


def _level(part: LogFile) -> int:
    return len(part.steps).bit_length() // 4


def _join(parts: Sequence[LogFile]) -> LogFile:
    steps = np.concatenate([part.steps for part in parts])
    values = np.concatenate([_values(part) for part in parts])
    joined = add_part(parts[0].path.parent, parts[0].head, steps, values)
    for part in parts[1:]:
        part.path.unlink(missing_ok=True)
    return joined


def _values(part: LogFile) -> Floats:
    return np.stack([part.read(quantity) for quantity in part.head.quantities], axis=1)
