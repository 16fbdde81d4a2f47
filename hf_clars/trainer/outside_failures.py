"""Failures of other processes (data-loader workers, other ranks), said in one paragraph with what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from hf_clars.distributed import world_size
from hf_clars.errors import DataError, HfClarsError


class ProcessLostError(HfClarsError, RuntimeError):
    """Another process of the run has ended or hangs, and this one cannot go on without it."""


RESUME = "Checkpoints are complete: go on with --resume_from_checkpoint true."


@contextmanager
def outside_failures_explained(ddp_timeout: int) -> Iterator[None]:
    """Within this, failures that other processes caused are raised as one paragraph.

    Args:
        ddp_timeout: Seconds after which a process that does not answer is given up, for the message.

    Raises:
        DataError: A worker has met bad data, or has died.
        ProcessLostError: Another rank has ended, or has not answered for `ddp_timeout`.
    """
    try:
        yield
    except HfClarsError as error:
        text = str(error)
        if not text.startswith("Caught "):
            raise
        # torch hands on what a worker raised with the worker's traceback as message; its last line is our sentence.
        raise type(error)(text.strip().splitlines()[-1].split(": ", 1)[-1]) from None
    except (ConnectionError, EOFError) as error:  # a worker died while it was handing over a batch
        with suppress(RuntimeError):  # torch says it too, as soon as the system tells of the worker's end
            time.sleep(1)
        raise _worker_died(error) from error
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text):
            raise _worker_died(error) from error
        if world_size() > 1 and _is_of_a_collective(error):
            raise ProcessLostError(
                f"Another process of this run has ended, or did not answer for {ddp_timeout} s (--ddp_timeout): look "
                f"at what it printed. This one ends too ({text.splitlines()[0][:200]}). {RESUME}"
            ) from error
        raise


def _worker_died(error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"A data-loading worker died ({reason}). Often memory or /dev/shm ran out: lower "
        f"dataloader_num_workers or the batch of a pass, or give the container more shared memory. {RESUME}"
    )


# What gloo says where it does not name its source file: which message a rank gets depends on which of its pairs
# notices first that the other side is gone.
_OF_GLOO = (
    "gloo",
    "pair closure",
    "wait timeout",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
)


def _is_of_a_collective(error: RuntimeError) -> bool:
    """NCCL has exceptions of its own; gloo raises plain RuntimeError, which is known by its words only."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in _OF_GLOO)
