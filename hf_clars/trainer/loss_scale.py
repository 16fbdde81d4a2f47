"""One mean over the whole accumulated batch, whatever the model's head does with the number of items.

Trainer divides the loss by the number of accumulated passes for a model whose forward takes no `**kwargs`, and leaves
it to the model otherwise (passing `num_items_in_batch`). Many image heads take `**kwargs` and ignore that number: their
gradient comes out k times too large. Here no model is asked: its own mean loss is weighted by the share of the batch's
items that the pass holds, which also is exact when the last pass is smaller.

The same holds for a loss of the user's own (`compute_loss_func`, or a `compute_loss` that is overridden): a mean is
weighted. One that divides by `num_items_in_batch` is a share already; the number itself tells, by `ItemCount`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_clars.errors import ConfigError

IGNORED_LABEL = -100
CAUSAL = frozenset(name for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in np.atleast_1d(value))
"""The classes that transformers lists as predicting the next token."""


def predicts_next(model: Any) -> bool:
    """Whether a model predicts each next label: transformers' causal language models, whatever adapters they have."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decodes = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    return type(inner).__name__.removeprefix("FSDP") in CAUSAL and not decodes


def count_items(inputs: Mapping[str, Any], shifted: bool = False) -> Tensor:
    """Items that a pass's mean loss is over: labels other than -100, or samples where labels are no class numbers.

    Args:
        inputs: The model's inputs.
        shifted: The model predicts the next label, so that the first of each row is none. Default False.

    Returns:
        0-dim float tensor on the labels' device, so that nothing waits for it.
    """
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 0:
        if shifted and labels.dim() > 1:
            given = inputs.get("shift_labels")
            labels = given if isinstance(given, Tensor) else labels[..., 1:]
        return (labels != IGNORED_LABEL).sum().float()
    first = next((t for t in inputs.values() if isinstance(t, Tensor) and t.dim() > 0), None)
    return torch.tensor(float(1 if first is None else first.shape[0]))


class ItemCount(Tensor):
    """A number of items that knows whether something was divided by it, or it became a plain number.

    What is derived from it otherwise (moved, clamped) knows too.
    """

    uses = frozenset(
        """div div_ divide true_divide floor_divide mul mul_ multiply reciprocal pow item tolist __truediv__
        __rtruediv__ __rdiv__ __div__ __itruediv__ __idiv__ __floordiv__ __rfloordiv__ __mul__ __rmul__
        __imul__ __pow__ __int__ __float__ __index__""".split()  # noqa: SIM905 - a list would be one word a line
    )
    use: list[bool]

    @classmethod
    def of(cls, number: Any) -> ItemCount | None:
        """The number, not yet used; one that is an `ItemCount` already as it is, and None for what is no tensor."""
        if isinstance(number, ItemCount) or not isinstance(number, Tensor):
            return number if isinstance(number, ItemCount) else None
        count = number.as_subclass(cls)
        count.use = []
        return count

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take note of what is done with the number."""
        counts = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, ItemCount)]
        result = super().__torch_function__(func, types, args, kwargs or {})
        use = next((count.__dict__["use"] for count in counts if "use" in count.__dict__), None)
        if use is None:
            return result
        used = getattr(func, "__name__", "") in cls.uses
        if used:
            use.append(True)
        if not isinstance(result, ItemCount):
            return result
        if used:
            return result.as_subclass(Tensor)
        result.use = use
        return result


class LossScale:
    """How the loss of one pass becomes its share of the accumulated batch's.

    Attributes:
        number: `num_items_in_batch`, as Trainer counts it; None where it counts none.
    """

    def __init__(self) -> None:
        self.number: ItemCount | None = None
        self._batch: Tensor | None = None
        self._divisor: Tensor | None = None
        self._gave_mean = False

    def begin_batch(self, items: Tensor, number: Tensor | int | None) -> None:
        """Take note of an accumulated batch.

        Args:
            items: Those of all its passes, on all processes.
            number: As Trainer counts.
        """
        self._batch = items
        self.number = ItemCount.of(number)

    @contextmanager
    def one_pass(self, items: Tensor, processes: int) -> Iterator[Tensor]:
        """Within this, `scaled` and `share_of` are about one pass.

        Args:
            items: Of the pass, on this process.
            processes: Over which data parallelism averages gradients: each gives its share times their number.

        Returns:
            What its mean loss is to be divided by, 0-dim; infinite for a pass without items.
        """
        batch = items if self._batch is None else self._batch
        self._divisor = batch.clamp(min=1) / (items.to(batch) * processes)
        self._gave_mean = False
        if self.number is not None:
            self.number.use.clear()
        try:
            yield self._divisor
        finally:
            self._divisor = None

    @property
    def used(self) -> bool:
        """Whether this pass's loss was divided by `num_items_in_batch`."""
        return self.number is not None and bool(self.number.use)

    @property
    def scaled(self) -> bool:
        """Whether the loss of this pass is a share already.

        Raises:
            ConfigError: It is the sum of a share and of a mean.
        """
        if self._gave_mean and self.used:
            raise ConfigError(
                "compute_loss adds something that it divides by num_items_in_batch to what super().compute_loss "
                "returns, which is the mean of one pass. Set loss_is_scaled_for_ga = True in the class, and it returns "
                "the pass's share of the batch; or add a mean, and everything is scaled afterwards."
            )
        return self.used

    def of_model(self, loss: Tensor, scaled: bool) -> Tensor:
        """The mean loss of a pass as who asked for it wants it.

        Args:
            loss: The mean; outside of `one_pass`, as in evaluation, it stays one.
            scaled: Whether what is made of it counts as a share.
        """
        if self._divisor is None:
            return loss
        if scaled:
            return loss / self._divisor.to(loss.device)
        self._gave_mean = True
        return loss


def with_number(function: Callable[..., Tensor], number: Any, outputs: Any, labels: Any, **_: Any) -> Tensor:
    """Call a user's loss function with the number of items, which Trainer's `compute_loss` was not given."""
    return function(outputs, labels, num_items_in_batch=number)
