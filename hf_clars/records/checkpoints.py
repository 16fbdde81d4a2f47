"""Checkpoint folders that are complete or absent: written beside, forced to disk, renamed.

While it is written, a checkpoint is `RUN/.partial/checkpoint-N`; the name `RUN/checkpoint-N` appears by one rename,
after everything in it is on the disk. Its last file, `checkpoint.json`, holds the format's version, the size of every
file and the settings of the run. One that is deleted moves to `.partial` first, so that no half of it ever has a
checkpoint's name.

There is no file or link `latest`: which checkpoint is the newest follows from the names, and a second record of it
could disagree with them after a crash, and would not survive copying to a store without links. `newest_checkpoint`
tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from hf_clars.records.files import RecordError, from_json, sync_folder, to_json

FORMAT = "hf_clars.checkpoint"
VERSION = "1"
MANIFEST = "checkpoint.json"
PARTIAL = ".partial"
TRAINER_STATE = "trainer_state.json"

logger = logging.getLogger(__name__)


def partial_run(run: Path) -> Path:
    """The folder in which `checkpoint-N` is written before it is moved to `run`; on the same file system."""
    return run / PARTIAL


def clear_partial(run: Path) -> None:
    """Delete what a killed run has left unfinished."""
    shutil.rmtree(partial_run(run), ignore_errors=True)


def write_manifest(folder: Path, settings: dict[str, Any]) -> None:
    """Write the last file of a checkpoint.

    Args:
        folder: The checkpoint, otherwise complete.
        settings: What a run that resumes from it must, or should, have in common with it; JSON-able.

    Raises:
        RecordError: The settings are not JSON-able.
        OSError: The file system refused.
    """
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    content = {"format": FORMAT, "version": VERSION, "settings": settings, "files": files}
    (folder / MANIFEST).write_text(to_json(content, "The settings of a checkpoint") + "\n", encoding="utf-8")


def commit(partial: Path, final: Path) -> None:
    """Force a checkpoint to disk and give it its name, in the place of an older one of that name.

    Args:
        partial: As `partial_run` has it.
        final: `RUN/checkpoint-N`.

    Raises:
        OSError: The file system refused; `final` is then as it was before.
    """
    for path in _files(partial):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for folder, _, _ in os.walk(partial):
        sync_folder(Path(folder))
    if final.exists():
        _move_aside(final)
    partial.rename(final)
    sync_folder(final.parent)
    clear_partial(final.parent)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, such that it is never seen in part.

    Raises:
        OSError: It could not be moved aside.
    """
    shutil.rmtree(_move_aside(folder), ignore_errors=True)


def _move_aside(folder: Path) -> Path:
    aside = partial_run(folder.parent) / f"{folder.name}.old"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def rotate(run: Path, keep: int | None, protected: set[Path]) -> None:
    """Delete the oldest checkpoints, by step, until `keep` are left.

    Args:
        run: The run's folder.
        keep: How many to keep; None or below 1: all.
        protected: Never deleted, but counted.
    """
    found = [folder for _, folder in _numbered(run)]
    if keep is None or keep < 1:
        return
    removable = [folder for folder in found if folder not in protected]
    for folder in removable[: max(0, len(found) - max(keep, len(protected)))]:
        try:
            remove_checkpoint(folder)
        except OSError as error:
            logger.warning("The old checkpoint %s could not be deleted: %s", folder, error)
    with contextlib.suppress(OSError):  # not there, or somebody else's file is in it
        partial_run(run).rmdir()


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None; incomplete ones are passed over with a warning."""
    for _, folder in reversed(_numbered(run)):
        missing = what_is_missing(folder)
        if missing is None:
            return folder
        logger.warning("Passed over %s, which is not complete: %s", folder, missing)
    return None


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint is not complete, in a few words; None when it is.

    One without `checkpoint.json`, written in place by the plain Trainer, counts as complete when its last file is
    there.
    """
    try:
        files = read_manifest(folder)["files"] if (folder / MANIFEST).exists() else {TRAINER_STATE: None}
        for name, size in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is absent"
            if size is not None and path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
        step_of(folder)
    except (RecordError, OSError) as error:
        return str(error)
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `checkpoint.json`, checked: `format`, `version`, `settings`, `files`.

    Raises:
        RecordError: It is damaged, of another version, or names files outside of its folder.
        OSError: It cannot be read.
    """
    path = folder / MANIFEST
    content = _json_object(path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise RecordError(
            f"{path} has format {content.get('format')!r}, version {content.get('version')!r}; this hf_clars reads "
            f"{FORMAT!r}, version {VERSION!r}. Use the hf_clars that wrote it, or a newer one."
        )
    files, settings = content.get("files"), content.get("settings")
    if not isinstance(files, dict) or not isinstance(settings, dict):
        raise RecordError(f"{path} lacks the list of files or the settings: it is damaged.")
    for name, size in files.items():
        inside = Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder))
        if not inside or "\0" in name or not isinstance(size, int):
            raise RecordError(f"{path} names {name!r}, which is no file of this checkpoint: it was tampered with.")
    return content


def step_of(folder: Path) -> int:
    """The optimizer step that a checkpoint was taken after.

    Raises:
        RecordError: Its `trainer_state.json` is damaged.
        OSError: It cannot be read.
    """
    step = _json_object(folder / TRAINER_STATE).get("global_step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise RecordError(f"{folder / TRAINER_STATE} names no step: it is damaged.")
    return step


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = from_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is no text: it is damaged.") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} holds no JSON object: it is damaged.")
    return content


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _numbered(run: Path) -> list[tuple[int, Path]]:
    """The folders with a checkpoint's name, in the order of their steps; complete or not."""
    if not run.is_dir():
        return []
    named = [(re.fullmatch(r"checkpoint-(\d{1,18})", path.name, re.ASCII), path) for path in run.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())
