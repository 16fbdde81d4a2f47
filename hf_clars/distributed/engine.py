"""Who holds the tensors of an optimizer's groups: what an optimizer asks, and the answers where nobody else does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hf_clars.distributed.shards import LocalNorms, local_norms
from hf_clars.distributed.zero_marks import is_flat_piece


@dataclass(frozen=True)
class GroupTensors:
    """What an optimizer finds in its groups.

    Attributes:
        weights: Tensors that train now, each once.
        weight_layers: Layer index of each.
        grads: Gradients that have come.
        grad_layers: Layer index of each.
        own: Parameters of the first layer, as the model has them.
    """

    weights: Sequence[Tensor]
    weight_layers: Sequence[int]
    grads: Sequence[Tensor]
    grad_layers: Sequence[int]
    own: Sequence[nn.Parameter]


class TensorHolder(ABC):
    """Who holds weights and gradients.

    Attributes:
        in_pieces: Whether it hands over pieces of the model's parameters, a part of them at each call of `step()`.
        calls: How often `step()` is called for one update.
    """

    in_pieces: bool
    calls: int

    @property
    @abstractmethod
    def gradient_scale(self) -> float:
        """What gradients are multiplied with between `backward()` and `step()`, beside what changes `p.grad`."""

    @abstractmethod
    def dropped_a_batch(self) -> bool:
        """Whether a step was skipped, for gradients that are not finite, since this was last asked."""

    @abstractmethod
    def local_norms(self, found: GroupTensors, layers: int, *, foreach: bool = True) -> LocalNorms:
        """Norms [K] of what this process holds; asked in the first `step()` of an update.

        Args:
            found: What is in the groups.
            layers: Number of layers K.
            foreach: Take all norms in one multi-tensor operation.
        """


class Groups(TensorHolder):
    """The groups themselves hold all of it: whole tensors, or the DTensors of FSDP2."""

    in_pieces = False
    calls = 1
    gradient_scale = 1.0

    def dropped_a_batch(self) -> bool:
        """See `TensorHolder`: `step()` itself tells."""
        return False

    def local_norms(self, found: GroupTensors, layers: int, *, foreach: bool = True) -> LocalNorms:
        """See `TensorHolder`."""
        # DeepSpeed's flat pieces may be there before the optimizer was told about its engine.
        first = next(iter(found.weights), None)
        return local_norms(
            found.weights,
            found.weight_layers,
            found.grads,
            found.grad_layers,
            layers,
            flat=first is not None and first.dim() == 1 and is_flat_piece(first, found.own),
            foreach=foreach,
        )
