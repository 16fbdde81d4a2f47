"""A Trainer whose loss is one mean over the accumulated batch, whoever computes it; see `loss_scale.py`.

Private name: `_loss_shifts_labels`, by which Trainer knows that a loss leaves the first label out. It ends when Trainer
documents it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.trainer.loss_scale import ItemCount, LossScale, count_items, predicts_next, with_number
from hf_clars.trainer.optimizers import layerwise
from hf_clars.trainer.sharing import SharingTrainer


class WeightedLosses(SharingTrainer):
    """A Trainer that weights each pass's loss by the pass's share of the batch, unless it is such a share already.

    Args:
        args: As in `Trainer`.
        kwargs: As in `Trainer`.
    """

    _users_scale: bool | None = None
    _finite_loss: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._scale = LossScale()
        super().__init__(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the passes of one update and count their items over all processes.

        Args:
            epoch_iterator: Yields inputs.
            num_batches: Passes of this update.
            device: Where to count.

        Returns:
            (inputs of each pass, the number of items as `Trainer` counts them).
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed after its last step: Trainer would take one more
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.zeros((), device=device)
        for batch in batches:
            items = items + self._count(batch)
        self._scale.begin_batch(self.accelerator.reduce(items, reduction="sum"), number)
        return batches, self._scale.number

    def _count(self, inputs: Any) -> Tensor:
        # Beside the names, Trainer's own word, which is not documented: it also knows of models of pictures and text.
        shifted = predicts_next(self.model) or getattr(self, "_loss_shifts_labels", False)
        return count_items(inputs, shifted).to(self.args.device)

    @property
    def loss_is_scaled_for_ga(self) -> bool:  # a plain attribute in Trainer
        """As in `Trainer`, where it can be set; if it is not, what the loss was made of tells."""
        return self._scale.scaled if self._users_scale is None else self._users_scale

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        self._users_scale = value

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of a pass. `training_step` weights it by the pass's share of the batch, whoever computed it.

        A method that overrides this may return a mean too, or something that it has divided by `num_items_in_batch`.

        Args:
            model: The model, wrapped or not.
            inputs: Its inputs.
            return_outputs: Return (loss, outputs).
            num_items_in_batch: For `compute_loss_func`; no model is asked to divide by it.

        Returns:
            The loss, a scalar, or (loss, outputs). A share of the batch's loss where `loss_is_scaled_for_ga` is set.
        """
        function, number = self.compute_loss_func, ItemCount.of(num_items_in_batch)
        if function is not None:
            self.compute_loss_func = partial(with_number, function, number)
        try:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        finally:
            self.compute_loss_func = function
        if function is None or number is None or not number.use:
            loss = self._scale.of_model(loss, self.loss_is_scaled_for_ga)
        elif self.args.average_tokens_across_devices:  # the number is that of all processes
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One pass. Where its loss is not finite, and so the step will not be taken, the last finite one is logged.

        Trainer's running sum would be NaN from there on; the step itself is reported by `NonFiniteCallback`. A pass
        without a single label adds nothing to what is logged.

        Args:
            model: As `Trainer` passes it.
            inputs: Likewise.
            num_items_in_batch: Likewise.

        Returns:
            The loss to log, 0-dim; found without waiting for the device.
        """
        items = self._count(inputs)
        with self._scale.one_pass(items, self.accelerator.num_processes) as divisor:
            # Trainer divides a loss that is not scaled by this; a number on the device is not waited for.
            self.current_gradient_accumulation_steps = divisor  # type: ignore[assignment]
            loss = super().training_step(model, inputs, num_items_in_batch)
        loss = torch.where(items.to(loss.device) > 0, loss, 0.0)
        optimizer = layerwise(self.optimizer)
        if optimizer is None:
            return loss
        before = torch.zeros_like(loss) if self._finite_loss is None else self._finite_loss
        self._finite_loss = torch.where(loss.isfinite(), loss, before)
        return self._finite_loss
