"""What a full or read-only disk raises, told apart from what else can go wrong while a run writes."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from hf_clars.errors import HfClarsError
from hf_clars.records import RecordError

DISK_ERRORS = (OSError, SafetensorError, RecordError)
"""What a full or read-only disk raises while a checkpoint is written, but for torch, whose word is RuntimeError."""

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)

_TORCHS_WRITER = ("PytorchStreamWriter", "inline_container")
"""torch.save says no more of a disk than the line of its own source that met it."""


def disk_problem(error: Exception, folder: Path) -> str | None:
    """What the disk did, in words.

    Args:
        error: That writing a file raised.
        folder: Where.

    Returns:
        The reason; None if the disk is not at fault.
    """
    if isinstance(error, RecordError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    text = " ".join(str(error).split())
    if isinstance(error, SafetensorError):
        return text if "I/O error" in text or "os error" in text else None
    if any(word in text for word in _TORCHS_WRITER):
        return f"a file could not be written to its end; the disk has {free_megabytes(folder)} MB free"
    return None


def free_megabytes(folder: Path) -> str:
    """Free space of the disk that a folder is on, or will be on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f}"


@contextmanager
def disk_failures_explained(folder: Path) -> Iterator[None]:
    """Within this, a disk that is full or cannot be written to is told in one paragraph.

    Args:
        folder: The run's.

    Raises:
        RecordError: With what to do. Other errors pass as they are.
    """
    try:
        yield
    except HfClarsError:
        raise
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise RecordError(
            f"A file of the run {folder} could not be written ({disk_problem(error, folder)}). Checkpoints are "
            "unchanged: free some space or make the folder writable, then go on with --resume_from_checkpoint true."
        ) from error


def stored_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for a safetensors file, which holds a tied weight once, under its first name.

    Args:
        tensors: A model's, by name.

    Returns:
        Those that are not the very same as an earlier one. What overlaps in part stays: it cannot be stored.
    """
    kept: dict[str, Tensor] = {}
    places: set[tuple[object, ...]] = set()
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        if tensor.numel() == 0 or place not in places:
            kept[name] = tensor
        places.add(place)
    return kept
