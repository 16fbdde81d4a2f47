"""How DeepSpeed's ZeRO marks the parameters that it holds.

Private names: `_hp_mapping` and `_z3_optimizer`, by which DeepSpeed marks the parameters that it has partitioned. They
end when DeepSpeed says in public whether it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_clars.distributed.shards import is_split


def keeps_gradients_elsewhere(param: nn.Parameter) -> bool:
    """Whether an engine that splits weights or gradients holds this parameter: its `grad` is None in between then."""
    return is_split(param) or is_zeros(param)


def is_zeros(param: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO holds this parameter's gradient, in pieces of its own."""
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def zero_optimizer(param: nn.Parameter, engine: Any = None) -> Any | None:
    """DeepSpeed's ZeRO optimizer that holds this parameter; None where nothing tells it.

    Args:
        param: Any that trains, held by ZeRO.
        engine: DeepSpeed's engine, or an optimizer of accelerate around ZeRO's. Under ZeRO 1 and 2 it is needed.
    """
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

    found = getattr(param, "_z3_optimizer", engine)
    while found is not None and not isinstance(found, DeepSpeedOptimizer):
        found = getattr(found, "optimizer", None)
    return found


def whole_gradient(param: nn.Parameter) -> Tensor | None:
    """A ZeRO parameter's averaged gradient, between `backward()` and `step()`; all processes must ask."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(param)


def whole_shape(param: Any) -> tuple[int, ...]:
    """A parameter's shape, also while ZeRO-3 has put its values aside."""
    return tuple(getattr(param, "ds_shape", param.shape))


def is_flat_piece(tensor: Tensor, params: Sequence[nn.Parameter]) -> bool:
    """Whether a group's tensor is DeepSpeed's flat piece of the group's parameters, and not one of them."""
    return any(hasattr(p, "_hp_mapping") for p in params) and all(tensor is not p for p in params)


def trains_without(params: Sequence[nn.Parameter], groups: Sequence[dict[str, Any]]) -> bool:
    """Whether ZeRO has partitioned a model for another optimizer: it would have put its pieces into these groups."""
    partitioned = {p for p in params if hasattr(p, "_z3_optimizer") or getattr(p, "_hp_mapping", None) is not None}
    return bool(partitioned) and any(t in partitioned for group in groups for t in group["params"])
