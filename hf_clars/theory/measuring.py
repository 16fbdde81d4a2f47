"""What both estimators need: batches, their loss, and a copy of the model, so that it stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from hf_clars.errors import DataError
from hf_clars.grad_norms.pytree import tensors_in

Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of models that compute their own, as transformers' do: `model(**batch)["loss"]`.

    Args:
        model: The model.
        batch: Its keyword arguments, labels among them.

    Returns:
        The mean loss of the batch, 0-dim.
    """
    return model(**batch)["loss"]


def count_rows(batch: Any) -> int:
    """Number of samples: length of the first tensor of a batch.

    Args:
        batch: Tensors in any nesting, the batch axis first.

    Raises:
        DataError: If there is no such tensor.
    """
    first = next((t for t in tensors_in(batch) if t.dim() > 0), None)
    if first is None:
        raise DataError(f"A batch must hold a tensor with one row a sample, but this one is a {type(batch).__name__}.")
    return len(first)


def check_not_empty(samples: int, batches: Iterable[Any]) -> None:
    """Raise if nothing was measured.

    Args:
        samples: How many samples were seen.
        batches: Where they came from.

    Raises:
        DataError: If there were none.
    """
    if samples == 0:
        raise DataError(
            f"There is nothing to measure on: {type(batches).__name__} gave no batch with samples. An iterator can be "
            "read only once: give a list of batches or a DataLoader."
        )


def copy_to_measure(model: nn.Module) -> nn.Module:
    """Return a copy to take gradients of.

    The model keeps its gradients and running statistics, and an optimizer that measures norms while `backward()` runs
    sees nothing: its hooks do nothing in a copy.

    Args:
        model: The model, not wrapped for data parallelism.
    """
    copied = copy.deepcopy(model)
    copied.zero_grad(set_to_none=True)
    return copied
