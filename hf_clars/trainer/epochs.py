"""The epoch, told to the training data: a resumed run sees the augmentation that it would have seen."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Call `set_epoch` of the training data at each epoch's start.

    accelerate does so for a sampler or else for the data set, but not for a data set beside a sampler on several
    processes or after a resume.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Before the epoch's iterator is made."""
        dataset = getattr(train_dataloader, "dataset", None)
        if dataset is not None and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))
