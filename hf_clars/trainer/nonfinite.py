"""What a run does about steps that were held back because a loss, gradient or norm was not finite."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clars.errors import HfClarsError
from hf_clars.layers import NORM_MODULES
from hf_clars.optim import LayerMeasures, LayerwiseOptimizer
from hf_clars.trainer.optimizers import layerwise

LOOK_EVERY = 50
"""Steps between two looks at what an accelerator found: each look waits for it. On a CPU every step is looked at."""

HOPELESS = 50
"""So many held steps in a row end the run: weights that no step changes do not get better."""

STOPPED = (
    ", and nonfinite=stop ends the run. Weights and momentum are as before that step. Lower learning_rate or eta, look "
    "for bad data, or use --nonfinite skip."
)
HOPELESS_ENDS = (
    ", the last of {count} in a row: training does not get out of this. Weights and momentum are as before the first "
    "of them. Lower learning_rate or eta, or look for bad data."
)
GOES_ON = "%s; nothing was changed by it (%d such steps so far)."

logger = logging.getLogger(__name__)


class NonFiniteError(HfClarsError, ArithmeticError):
    """Training cannot go on: NaN or infinity in loss or gradients; the message names the first step and its layers."""


class NonFiniteCallback(TrainerCallback):
    """Count, report or stop at steps that were not taken.

    The optimizer holds some back itself (see `hf_clars.optim.nonfinite`).
    DeepSpeed and fp16's loss scaler do not even call an optimizer with gradients that are not finite.

    The running statistics of normalisation layers, which the forward pass of such a step has already spoiled, are put
    back too, so that nothing of the step is left.

    Args:
        policy: `"skip"` (default) warns and goes on, unless 50 steps in a row are held; `"stop"` ends the run, except
            in fp16 at the loss scaler's skips, by which it finds its scale.
    """

    def __init__(self, policy: str = "skip") -> None:
        self.policy = policy
        self.skipped_steps = 0
        self._optimizer: LayerwiseOptimizer | None = None
        self._statistics: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._last: LayerMeasures | None = None
        self._unseen: list[tuple[int, Tensor]] = []
        self._in_a_row = 0
        self._skipped_in_a_row = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the optimizer and the running statistics."""
        self._optimizer = layerwise(kwargs.get("optimizer"))
        self._last = None if self._optimizer is None else self._optimizer.last_step
        self._unseen, self._in_a_row, self._skipped_in_a_row = [], 0, 0  # of a training before
        norms = [m for m in model.modules() if isinstance(m, NORM_MODULES)] if model is not None else []
        self._statistics = [buffer for m in norms for buffer in m.buffers(recurse=False)]
        self._saved = [buffer.clone() for buffer in self._statistics]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the running statistics."""
        if self._statistics:
            # Private name: torch._foreach_copy_, explained in `multi_tensor_update` of hf_clars/optim/update.py.
            torch._foreach_copy_(self._saved, self._statistics)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put them back if the step was not taken; the device is asked, not the host.

        Raises:
            NonFiniteError: If the step was skipped around the optimizer, and the run is to stop at such steps, or they
                do not end.
        """
        if self._optimizer is None:
            return
        measures = self._optimizer.last_step
        if measures is self._last:
            self._on_skipped(args, state)
            return
        self._last, self._skipped_in_a_row = measures, 0
        if measures is None or measures.applied is None or measures.finite is None:
            return
        self._unseen.append((state.global_step + 1, measures.finite))
        if measures.applied.device.type == "cpu" and measures.applied:
            return
        for buffer, saved in zip(self._statistics, self._saved, strict=True):
            buffer.copy_(torch.where(measures.applied.to(buffer.device), buffer, saved))

    def _on_skipped(self, args: TrainingArguments, state: TrainerState) -> None:
        """The optimizer was not called for this step."""
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._saved)
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        by = "fp16's loss scaler" if args.fp16 else "DeepSpeed"
        message = f"Step {state.global_step + 1} was not taken: {by} found NaN or infinity in the gradients"
        if self.policy == "stop" and not args.fp16:
            raise NonFiniteError(message + STOPPED)
        if self._skipped_in_a_row >= HOPELESS:
            raise NonFiniteError(message + HOPELESS_ENDS.format(count=self._skipped_in_a_row))
        if state.is_world_process_zero:
            logger.warning(GOES_ON, message, self.skipped_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the steps since the last look, now and then, and before each log and checkpoint.

        Raises:
            NonFiniteError: If the run is to stop at such steps, or they do not end.
        """
        on_host = bool(self._unseen) and self._unseen[-1][1].device.type == "cpu"
        if on_host or len(self._unseen) >= LOOK_EVERY or control.should_save or control.should_log:
            self._look(state.is_world_process_zero)

    def _look(self, report: bool) -> None:
        if not self._unseen or self._optimizer is None:
            return
        steps = [step for step, _ in self._unseen]
        finite = torch.stack([row for _, row in self._unseen]).cpu()
        self._unseen.clear()
        for step, row in zip(steps, finite, strict=True):
            if row.all():
                self._in_a_row = 0
                continue
            self.skipped_steps += 1
            self._in_a_row += 1
            message = self._message(step, row)
            if self.policy == "stop":
                raise NonFiniteError(message + STOPPED)
            if self._in_a_row >= HOPELESS:
                raise NonFiniteError(message + HOPELESS_ENDS.format(count=self._in_a_row))
            if report:
                logger.warning(GOES_ON, message, self.skipped_steps)

    def _message(self, step: int, finite: Tensor) -> str:
        assert self._optimizer is not None
        names = [name for name, fine in zip(self._optimizer.layer_names, finite.tolist(), strict=True) if not fine]
        more = f" and {len(names) - 3} more layers" if len(names) > 3 else ""
        return f"Step {step} was not taken: NaN or infinity in the gradient norms of {', '.join(names[:3])}{more}"
