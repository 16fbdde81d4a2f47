"""Trackio's own x axis counts optimizer steps: transformers lets it count the calls, so each report took a step."""

from __future__ import annotations

from typing import Any

import trackio
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TrackioCallback
from transformers.integrations.integration_utils import rewrite_logs

OF_THE_WHOLE_RUN = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
"""What transformers leaves out too: one value a run is no curve."""


class StepTrackioCallback(TrackioCallback):
    """transformers' callback, with each value at the optimizer step that it belongs to.

    Loss, evaluation and layer rates of one step share that step, and a run that resumes goes on where it was.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send the values of one step."""
        # Private: whether `setup` has begun a run, which an evaluation after training does anew. If the name goes,
        # tests/test_live_view.py fails, and transformers may take a step itself by then.
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            curves = {key: value for key, value in (logs or {}).items() if key not in OF_THE_WHOLE_RUN}
            trackio.log({**rewrite_logs(curves), "train/global_step": state.global_step}, step=int(state.global_step))
