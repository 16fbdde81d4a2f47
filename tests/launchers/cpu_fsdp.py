"""FSDP2 on CPU processes: accelerate falls back to plain data parallelism there, although all parts of it run."""

from __future__ import annotations

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from hf_clars import ClarsTrainer


class CpuFsdpTrainer(ClarsTrainer):
    """ClarsTrainer that is told, after accelerate has looked for GPUs, that FSDP2 is what was launched."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from what the launcher was told
        self.is_fsdp_enabled = True
