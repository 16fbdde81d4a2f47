"""Train all cases under the launcher that started this process: `accelerate launch ... worker.py OUT KIND`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_clars import ClarsTrainer
from tests.launchers.cases import BATCH, BF16, cases, run, save_weights
from tests.launchers.cpu_fsdp import CpuFsdpTrainer
from tests.launchers.extras import train_extras

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


def finish(trainer, folder):
    """Save the weights, once."""
    state = gathered(trainer)
    if trainer.is_world_process_zero():
        save_weights(state, folder)


def main(out, kind, which="usual"):
    torch.set_num_threads(1)
    world, trainer_class = int(os.environ["WORLD_SIZE"]), TRAINERS.get(kind, ClarsTrainer)

    def train(case, name, processes=world, **changes):
        unset_hf_deepspeed_config()  # what a run before has left would have ZeRO 3 draw other first weights
        folder = Path(out) / name.replace(" ", "_")
        trainer = run(case, folder, processes, trainer_class=trainer_class, **changes)
        assert trainer.args.total_batch_size == BATCH
        finish(trainer, folder)
        print(name, flush=True)

    if which != "extras":
        for case in cases(every=which == "every"):
            train(case, case.name)
    if which != "every":
        train(BF16, "bf16", bf16=True)
        train_extras(out, kind, train)
    dist.barrier()
    sys.stdout.flush()
    # Two CPU processes sometimes abort while the interpreter shuts down, after all work is done.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
