"""Write a checkpoint in the middle and go on from one, under a launcher: `... OUT KIND [CHECKPOINT [METHOD]]`.

Without a checkpoint, or with "own" in its place, it is the one that was just written.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.launchers.cases import MIDDLE, Case, run
from tests.launchers.worker import TRAINERS, ClarsTrainer, finish


def main(out, kind, checkpoint="own", method="clars"):
    torch.set_num_threads(1)
    case, world = Case("group norm", method, 1), int(os.environ["WORLD_SIZE"])
    trainer_class = TRAINERS.get(kind, ClarsTrainer)
    own = Path(out) / "own"
    whole = run(case, own, world, trainer_class=trainer_class, save_strategy="steps", save_steps=MIDDLE)
    finish(whole, own)
    unset_hf_deepspeed_config()
    given = own / f"checkpoint-{MIDDLE}" if checkpoint == "own" else checkpoint
    trainer = run(case, Path(out) / "resumed", world, trainer_class=trainer_class, resume=given)
    finish(trainer, Path(out) / "resumed")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
