"""Checks of the output folder before anything is loaded or trained."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_clars.errors import HfClarsError


class OutputError(HfClarsError, OSError):
    """The output folder cannot take the run's files, or holds files that would be lost."""


def claim_output_dir(folder: str | Path, *, existing: str = "refuse", resume: bool = False) -> Path:
    """Make the run's folder, or say why it cannot be used. All processes get the same answer.

    Args:
        folder: Where the run writes.
        existing: What to do with a folder that holds files: `"refuse"` (default), or `"number"` to use
            `folder-2`, `folder-3`, ... instead.
        resume: The run continues from a checkpoint: the folder may hold files.

    Returns:
        The folder to use; it exists and can be written to.

    Raises:
        OutputError: If the folder holds files, cannot be made or cannot be written to.
    """
    state = PartialState()
    answer: list[str | Exception] = [""]
    if state.is_main_process:
        try:
            answer = [str(_claim(Path(folder), existing, resume))]
        except OutputError as error:
            answer = [error]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return Path(answer[0])


def _claim(folder: Path, existing: str, resume: bool) -> Path:
    if not resume and _holds_files(folder):
        if existing != "number":
            raise OutputError(
                f"The output folder {folder} is not empty, and nothing in it is overwritten unasked. Choose another "
                "--output_dir, continue that run with --resume_from_checkpoint true, or let runs be numbered with "
                "--existing_output number."
            )
        folder = _next_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"The output folder {folder} cannot be written to: {error.strerror or error}. Choose another "
            "--output_dir or change its permissions."
        ) from error
    return folder


LEFT_BY_A_FAILED_START = {"layer_rates", ".partial", "runs"}
"""What a run that ended before its first checkpoint leaves: a log and a tracker's files. They block no name."""


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.name not in LEFT_BY_A_FAILED_START for path in folder.iterdir())


def _next_free(folder: Path) -> Path:
    stem = re.sub(r"-\d+$", "", folder.name) or folder.name
    number = 2
    while _holds_files(folder.with_name(f"{stem}-{number}")):
        number += 1
    return folder.with_name(f"{stem}-{number}")


def check_free_space(folder: Path, needed: int) -> None:
    """Raise unless the disk has room for the run's checkpoints.

    Args:
        folder: An existing folder.
        needed: Bytes.

    Raises:
        OutputError: With what is free and what is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"The disk of the output folder {folder} has {free / 2**30:.2f} GiB free, but checkpoints of this run need "
            f"about {needed / 2**30:.2f} GiB. Free some space, choose another --output_dir, or keep fewer checkpoints "
            "with --save_total_limit."
        )


def checkpoint_bytes(parameters: int, kept: int | None) -> int:
    """What a run's checkpoints take at most: weights and one momentum buffer in float32, and the final model.

    Args:
        parameters: Number of the model's parameters and buffers.
        kept: `save_total_limit`; None and 0, which keep all, count as 3.

    Returns:
        Bytes. One checkpoint more than is kept exists while the next is written.
    """
    checkpoints = (kept or 3) + 1
    return 4 * parameters * (2 * checkpoints + 1)
