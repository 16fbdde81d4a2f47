"""One call of a module, and what is needed to differentiate it sample by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge


@dataclass(eq=False)
class ModuleCall:
    """One call of a module: what is needed to differentiate it sample by sample.

    Attributes:
        module: The module.
        path: Its name in the model, for messages.
        args: Detached arguments.
        kwargs: Detached keyword arguments.
        outputs: Detached differentiable outputs, by their place among all tensors it returned.
        axes: The batch axis of each of them.
        edges: Where these outputs come from in the graph; emptied when the pass is over.
        params: The parameters to differentiate, by their name in the module.
        training: The mode it ran in.
        batch_size: Length of the batch axis. Inputs of another length are shared by all samples.
        count: How many of the first samples are wanted.
        precision: The lowest that it computed in.
        autocast: The type that autocast computed with, if it was on.
        replayable: False where an engine's hooks would gather and split weights again if the module were called.
    """

    module: nn.Module
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: dict[int, Tensor]
    axes: list[int]
    edges: list[GradientEdge]
    params: dict[str, nn.Parameter]
    training: bool
    batch_size: int
    count: int
    precision: torch.dtype
    autocast: torch.dtype | None
    replayable: bool = True
