"""Train all cases under the launcher that started this process: `accelerate launch ... worker.py OUT KIND`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_clars import ClarsTrainer
from tests.launchers.cases import BATCH, BF16, LOADERS, Case, cases, run, save_weights
from tests.launchers.cpu_fsdp import CpuFsdpTrainer

TRAINERS = {"fsdp2": CpuFsdpTrainer}


def gathered(trainer):
    """The trained weights, whole, on every process."""
    if trainer.is_deepspeed_enabled:
        from deepspeed import zero

        params = list(trainer.model.parameters())
        with zero.GatheredParameters(params, enabled=hasattr(params[0], "ds_id")):
            return {n: t.detach().clone() for n, t in trainer.model.state_dict().items()}
    state = trainer.model.state_dict()
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in state.items()}


def train_with_other_loaders(out):
    """The loaders' ways of sharing a batch; with split batches a device is told the whole batch."""
    case, world = Case("group norm", "clars", 4), int(os.environ["WORLD_SIZE"])
    for name, changes in LOADERS.items():
        folder = Path(out) / name.replace(" ", "_")
        processes = 1 if name == "split batches" else world
        trainer = run(case, folder, processes, **changes)
        assert trainer.args.total_batch_size == BATCH
        if trainer.is_world_process_zero():
            save_weights(trainer.model.state_dict(), folder)


def main(out, kind, which="usual"):
    torch.set_num_threads(1)
    for case in cases(every=which == "every"):
        folder = Path(out) / case.name
        unset_hf_deepspeed_config()  # what a run before has left would have ZeRO 3 draw other first weights
        trainer = run(case, folder, int(os.environ["WORLD_SIZE"]), trainer_class=TRAINERS.get(kind, ClarsTrainer))
        state = gathered(trainer)
        if trainer.is_world_process_zero():
            save_weights(state, folder)
        print(case.name, flush=True)
    unset_hf_deepspeed_config()
    folder = Path(out) / "bf16"
    trainer = run(
        BF16, folder, int(os.environ["WORLD_SIZE"]), trainer_class=TRAINERS.get(kind, ClarsTrainer), bf16=True
    )
    state = gathered(trainer)
    if trainer.is_world_process_zero():
        save_weights(state, folder)
    if kind == "ddp":
        train_with_other_loaders(out)
    dist.barrier()
    sys.stdout.flush()
    # Two CPU processes sometimes abort while the interpreter shuts down, after all work is done.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
