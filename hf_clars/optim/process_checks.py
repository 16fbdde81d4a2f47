"""Whether processes that were started together train together, asked once, at the first step of a loop of one's own.

`ClarsTrainer` asks before it begins. In other loops nobody does, and a model that no one has wrapped trains in every
process by itself.
"""

from __future__ import annotations

import os
import warnings

from torch import Tensor

from hf_clars.distributed import world_size
from hf_clars.errors import HfClarsError
from hf_clars.optim.gradient_scale import GradientScale

WAY_OUT = (
    "wrap the model (accelerator.prepare, DistributedDataParallel, fully_shard), call the wrapped one, and give each "
    "process samples of its own."
)


class TrainsAloneError(HfClarsError, RuntimeError):
    """Processes that share norms do not share gradients."""


def check_gradients_are_shared(scale: GradientScale, sample: Tensor | None) -> None:
    """Look whether data parallelism has averaged the gradients; waits for the device.

    Args:
        scale: Of the optimizer's model.
        sample: The mean of `scale.local_sample()` over processes, where a step knows it.

    Raises:
        TrainsAloneError: If norms were taken over all processes, and gradients were not.
    """
    if world_size() == 1:
        _check_processes_know_each_other()
        return
    if sample is not None and bool(scale.is_own(sample, others=True)):
        raise TrainsAloneError(
            f"There are {world_size()} processes, but each trains this model by itself: its gradients are those of its "
            f"own samples, while norms are taken over all processes. To train one model, {WAY_OUT}"
        )
    if bool(scale.is_own(None, others=False)):
        warnings.warn(
            f"There are {world_size()} processes, and this one's gradients are those of its own samples: either each "
            f"trains the model by itself, or all have the same samples. To train one model, {WAY_OUT}",
            stacklevel=2,
        )


def _check_processes_know_each_other() -> None:
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdigit() and int(started) > 1:
        warnings.warn(
            f"{started} processes were started, but this one knows of no other, and trains the whole model by itself. "
            "Call torch.distributed.init_process_group, or create accelerate's Accelerator (on a machine without GPUs "
            f"Accelerator(cpu=True)), and {WAY_OUT}",
            stacklevel=2,
        )
