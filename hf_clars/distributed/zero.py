"""What DeepSpeed's ZeRO hands to an optimizer: flat fp32 pieces, one group after the other.

ZeRO 1 and 2 call `step()` once for each parameter group, ZeRO 3 once for each sub-group, and at the first of these
calls the gradients of the others are not yet where an optimizer looks for them. A layer's norms need all pieces at
once, so they are read from the engine. DeepSpeed has public functions for single tensors (`safe_get_full_grad` and the
like), but each is a collective of its own, once a parameter; so this file, and no other, reads the names that these
functions are built on, and `tests/test_launchers_agree.py` fails loudly when one of them changes. That ends when
DeepSpeed hands out all pieces at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_clars.distributed.collectives import world_size
from hf_clars.distributed.engine import GroupTensors, TensorHolder
from hf_clars.distributed.shards import LocalNorms, local_norms
from hf_clars.errors import HfClarsError


class UnsupportedEngineError(HfClarsError, RuntimeError):
    """An engine setting under which layer norms would be wrong."""


def is_partitioned(engine: Any) -> bool:
    """Whether an engine, or a wrapper inside it, makes flat pieces of parameter groups (ZeRO)."""
    while engine is not None:
        if any(hasattr(engine, name) for name in _STAGES):
            return True
        engine = getattr(engine, "optimizer", None)
    return False


def check_one_layer_a_group(engine: Any, groups: Sequence[Collection[int]]) -> None:
    """Check that ZeRO, if that is inside the engine, can tell layers apart.

    Args:
        engine: DeepSpeed's engine.
        groups: For each parameter group, the rows of the layers that train in it.

    Raises:
        UnsupportedEngineError: If a group that becomes one flat piece holds several layers.
    """
    several = next((number for number, rows in enumerate(groups) if len(set(rows)) > 1), None)
    if several is not None and is_partitioned(engine):
        raise UnsupportedEngineError(
            f"Group {several} holds more than one layer, and DeepSpeed makes one flat piece of it, of which "
            "layers cannot be told apart: leave params= out, or give a group for each layer."
        )


def check_all_at_once(shown: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], sizes: Sequence[int]) -> None:
    """Check that a call of `step()` is for all of an optimizer's groups.

    Args:
        shown: The groups that it is for.
        groups: All of them.
        sizes: How many tensors each of them was given.

    Raises:
        UnsupportedEngineError: If it is for a part, as under ZeRO.
    """
    emptied = any(size and not group["params"] for size, group in zip(sizes, groups, strict=True))
    if emptied or len(shown) < len(groups):
        raise UnsupportedEngineError(
            "step() was called with a part of the layers, as DeepSpeed's ZeRO does, but this optimizer does not "
            "know its engine: call optimizer.attach_engine(engine) after deepspeed.initialize or "
            "accelerator.prepare, or use ClarsTrainer."
        )


def zero_pieces(
    engine: Any, optimizer: torch.optim.Optimizer, layer_of_group: Sequence[int] | None = None
) -> ZeroPieces | None:
    """The pieces of a model under ZeRO; None for an engine that does not partition, or shows everything at once.

    Args:
        engine: DeepSpeed's engine.
        optimizer: The optimizer inside.
        layer_of_group: The row of the one layer that trains in each parameter group. Default: the group's number.

    Returns:
        The pieces, or None.

    Raises:
        UnsupportedEngineError: If the optimizer is not inside the engine, if a part of the engine was given, or under
            settings that are not supported: optimizer offload, gradient clipping, or partitions over a part of the
            processes.
    """
    zero = engine
    while getattr(zero, "optimizer", None) is not optimizer:
        zero = getattr(zero, "optimizer", None)
        if zero is None:
            raise UnsupportedEngineError(
                f"This {type(optimizer).__name__} is not inside the engine that was given: another optimizer trains "
                "the model. Give DeepSpeed the optimizer itself, and attach what deepspeed.initialize returned for it."
            )
    kind = next((kind for name, kind in _STAGES.items() if hasattr(zero, name)), None)
    if kind is None:
        return None
    if not hasattr(engine, "skipped_steps"):  # a wrapped optimizer
        raise UnsupportedEngineError(
            f"{type(engine).__name__} does not tell which steps DeepSpeed skips (an overflow in fp16), whose norms "
            "must not count: give attach_engine the engine itself, which is the first of what deepspeed.initialize "
            "returns, or the model that accelerator.prepare returns."
        )
    rows = range(len(optimizer.param_groups)) if layer_of_group is None else layer_of_group
    return kind(zero, engine, rows)


class ZeroPieces(TensorHolder):
    """The pieces that this process holds.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        engine: The engine around it.
        layer_of_group: The row of each parameter group's layer.

    """

    in_pieces = True

    def __init__(self, zero: Any, engine: Any, layer_of_group: Sequence[int]) -> None:
        self.zero = zero
        self._layer_of_group = list(layer_of_group)
        self._engine, self._skipped = engine, engine.skipped_steps
        self.calls = len(self._weights())
        if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
            raise UnsupportedEngineError(
                "DeepSpeed's optimizer offload is on, which keeps gradients where layer norms cannot be taken: remove "
                "offload_optimizer from the DeepSpeed configuration."
            )
        if getattr(zero, "clip_grad", 0.0) > 0:
            raise UnsupportedEngineError(
                f"DeepSpeed clips gradients at {zero.clip_grad} (1.0 where its configuration does not say, or says "
                '"auto" in an accelerate loop), layer by layer and after the norms that rates rest on were measured: '
                'set "gradient_clipping": 0 in the '
                "DeepSpeed configuration."
            )

    @property
    def gradient_scale(self) -> float:
        """What the engine multiplies gradients with after `backward()`: it takes its loss scale (fp16) out.

        A dynamic scale has been moved on by the time of `step()`, and DeepSpeed (0.19.8) divides by the new one: in the
        steps at which the scale doubles, gradients and norms alike come out half as large, and rates twice, so that
        the update is what it should be.
        """
        return 1.0 / float(self.zero.loss_scale)

    def dropped_a_batch(self) -> bool:
        """See `TensorHolder`: DeepSpeed skips steps by itself."""
        before, self._skipped = self._skipped, self._engine.skipped_steps
        return self._skipped != before

    def local_norms(self, found: GroupTensors, layers: int, *, foreach: bool = True) -> LocalNorms:
        """See `TensorHolder`; the pieces are read from the engine, whatever is in the groups."""
        weights, weight_layers = self._flattened(self._weights())
        ready = [piece.grad for piece in self._flat()]
        grads: list[Tensor] = []
        grad_layers: list[int] = []
        for number, grad in enumerate(ready):
            pieces = self._waiting_gradients(number) if grad is None else self._parts_of(number, grad)
            scale = self.gradient_scale if grad is None else 1.0  # the engine has unscaled what it hands over
            grads += [piece if scale == 1.0 else piece.float() * scale for piece in pieces]
            grad_layers += [self._layer_of_group[self._group(number)]] * len(pieces)
        return local_norms(weights, weight_layers, grads, grad_layers, layers, flat=True, foreach=foreach)

    def _flattened(self, pieces: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[int]]:
        flat = [tensor for group in pieces for tensor in group]
        return flat, [self._layer_of_group[self._group(number)] for number, group in enumerate(pieces) for _ in group]

    def _weights(self) -> list[list[Tensor]]:
        """The real parts of each flat piece: padding is not always zero."""
        return [self._parts_of(number, piece.detach()) for number, piece in enumerate(self._flat())]

    @abstractmethod
    def _flat(self) -> list[Tensor]:
        """The flat pieces, in the order of the calls."""

    @abstractmethod
    def _group(self, number: int) -> int:
        """The parameter group of a call."""

    @abstractmethod
    def _parts_of(self, number: int, flat: Tensor) -> list[Tensor]:
        """What of a flat piece, or of its gradient, is real."""

    @abstractmethod
    def _waiting_gradients(self, number: int) -> list[Tensor]:
        """Averaged gradients of a call that is still to come, without padding."""


class _Zero2Pieces(ZeroPieces):
    """ZeRO 1 and 2: one flat partition a group, padded with zeros at the end."""

    def __init__(self, zero: Any, engine: Any, layer_of_group: Sequence[int]) -> None:
        super().__init__(zero, engine, layer_of_group)
        if any(dist.get_world_size(group) != world_size() for group in zero.real_dp_process_group):
            raise UnsupportedEngineError(
                "DeepSpeed partitions this model over a part of the processes (experts, pipeline or tensor "
                "parallelism), and layer norms are summed over all of them: use plain data parallelism."
            )

    def _flat(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def _group(self, number: int) -> int:
        return number

    def _parts_of(self, number: int, flat: Tensor) -> list[Tensor]:
        return [flat]

    def _waiting_gradients(self, number: int) -> list[Tensor]:
        return [t.view(-1) for t in self.zero.averaged_gradients[number]]


class _Zero3Pieces(ZeroPieces):
    """ZeRO 3: each parameter's share in a flat piece a sub-group; shares are padded with whatever memory held."""

    def _flat(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def _group(self, number: int) -> int:
        return self.zero.sub_group_to_group_id[number]

    def _parts_of(self, number: int, flat: Tensor) -> list[Tensor]:
        parts, offset = [], 0
        for share, real in self._shares(number):
            parts.append(flat.narrow(0, offset, real))
            offset += share
        return parts

    def _waiting_gradients(self, number: int) -> list[Tensor]:
        grads = self.zero.averaged_gradients[number]
        return [t.view(-1).narrow(0, 0, real) for t, (_, real) in zip(grads, self._shares(number), strict=True)]

    def _shares(self, number: int) -> list[tuple[int, int]]:
        """(elements, elements that are no padding) of each parameter's share in a sub-group."""
        rank, shares = dist.get_rank(), []
        for param in self.zero.fp16_groups[number]:
            share = param.partition_numel()
            shares.append((share, max(0, min(share, param.ds_numel - rank * share))))
        return shares


# What only the optimizer of a stage has, and the class for it.
_STAGES: dict[str, type[ZeroPieces]] = {
    "fp32_partitioned_groups_flat": _Zero3Pieces,
    "single_partition_of_fp32_groups": _Zero2Pieces,
}
