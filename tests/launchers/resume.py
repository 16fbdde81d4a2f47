"""Write a checkpoint in the middle and go on from one, under a launcher: `... resume.py OUT KIND [CHECKPOINT]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.launchers.cases import MIDDLE, Case, run, save_weights
from tests.launchers.worker import TRAINERS, ClarsTrainer, gathered


def main(out, kind, checkpoint=None):
    torch.set_num_threads(1)
    case, world = Case("group norm", "clars", 1), int(os.environ["WORLD_SIZE"])
    trainer_class = TRAINERS.get(kind, ClarsTrainer)
    own = Path(out) / "own"
    run(case, own, world, trainer_class=trainer_class, save_strategy="steps", save_steps=MIDDLE)
    unset_hf_deepspeed_config()
    given = own / f"checkpoint-{MIDDLE}" if checkpoint is None else checkpoint
    trainer = run(case, Path(out) / "resumed", world, trainer_class=trainer_class, resume=given)
    state = gathered(trainer)
    if trainer.is_world_process_zero():
        save_weights(state, Path(out) / "resumed")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
