"""Stopping a run so that it can go on: on a signal or at a time limit, after a checkpoint, with its own exit code."""

from __future__ import annotations

import logging
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clars.distributed import world_size
from hf_clars.errors import HfClarsError

RESUME_ME = 75
"""Exit code of a run that was stopped and can be resumed: EX_TEMPFAIL of sysexits.h, "try again later"."""

SIGNALS = ("SIGTERM", "SIGINT")

_REASONS = ("", "the time limit", *SIGNALS)

logger = logging.getLogger(__name__)


class RunInterruptedError(HfClarsError):
    """The run was asked to stop, and has; the message says how to resume it."""


class StopCallback(TrainerCallback):
    """Stop after a checkpoint when a signal comes or the time is up.

    The step that is being taken is finished, a checkpoint is written, and `RunInterruptedError` leaves `train()`. A
    second signal acts as it would without this callback. All processes stop after the same step, whichever of them was
    signalled: at the end of each step they start to exchange one number, and read it at the end of the next.

    Args:
        max_hours: Stop when so much time has passed since this object was made; 0: never. Leave room for one step and
            one checkpoint before a scheduler's own limit.
    """

    def __init__(self, max_hours: float = 0.0) -> None:
        # Not the time of day, which may be set while the run goes on.
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else None
        self._reason = 0  # index into _REASONS
        self._handlers: dict[str, Any] = {}
        self._group: Any = None
        self._exchange: tuple[dist.Work, torch.Tensor] | None = None
        self._stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen for signals until training ends."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {name: signal.signal(getattr(signal, name), self._asked_to_stop) for name in SIGNALS}
        if world_size() > 1:
            # On the host, so that no device is waited for.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._reason = _REASONS.index(name)
        logger.warning(
            "%s: this step is finished and a checkpoint is written. A second one ends the run at once.", name
        )
        self._stop_listening()

    def _stop_listening(self) -> None:
        for name, handler in self._handlers.items():
            signal.signal(getattr(signal, name), handler)
        self._handlers = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint if it is time to stop; the last step of a run ends it anyway."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = self._reason or 1
        agreed = self._reason if self._group is None else self._largest_of_last_step()
        if agreed and state.global_step < state.max_steps:
            self._reason, self._stopping = agreed, True
            control.should_save = True
            control.should_evaluate = False

    def _largest_of_last_step(self) -> int:
        """The largest reason that any process had at the end of the step before; starts to exchange today's."""
        largest = 0
        if self._exchange is not None:
            work, value = self._exchange
            work.wait()
            largest = int(value)
        mine = torch.tensor(self._reason)
        self._exchange = (dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True), mine)
        return largest

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave training, once the checkpoint is there.

        Raises:
            RunInterruptedError: If it is time to stop.
        """
        if not self._stopping:
            return
        self._stop_listening()
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        found = (
            f"{folder} is complete" if folder.is_dir() else "No checkpoint could be written now; older ones are there"
        )
        raise RunInterruptedError(
            f"Stopped after step {state.global_step} of {state.max_steps} because of {_REASONS[self._reason]}. "
            f"{found}: give the same command again with --resume_from_checkpoint true, and the run goes on as if it "
            "had not stopped."
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave signals to others again."""
        self._stop_listening()
        if self._exchange is not None:
            self._exchange[0].wait()
            self._exchange = None
