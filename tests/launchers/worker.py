"""Train all that is asked of the launcher that started this process: `accelerate launch ... worker OUT KIND WHICH`.

WHICH is "usual" or "every": every model with every method, and nothing else. A third argument is a folder of one
process, whose checkpoint data parallelism is to go on from.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_clars import ClarsTrainer
from tests.launchers.cases import BATCH, BF16, CHECKPOINTED, MIDDLE, Case, cases, run, save_weights
from tests.launchers.cpu_fsdp import CpuFsdpTrainer
from tests.launchers.extras import train_extras
from tests.lean import keep_imports
from tests.undrawn import draw_nothing

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


def build_nothing():
    """DeepSpeed builds a library for sums at inference when it starts: a minute of C++, which training does not use."""
    backend = importlib.import_module("deepspeed.comm.torch")  # what the package calls `torch` is torch itself
    assert callable(backend.build_shm_op)
    backend.build_shm_op = lambda: None


def main(out, kind, which, one=None):
    torch.set_num_threads(1)
    draw_nothing()
    keep_imports()
    if kind.startswith("zero"):
        build_nothing()
    world, out = int(os.environ["WORLD_SIZE"]), Path(out)

    def train(case, name, processes=world, mixed_in=(), **changes):
        unset_hf_deepspeed_config()  # what a run before has left would have ZeRO 3 draw other first weights
        trainer_class = TRAINERS.get(kind, ClarsTrainer)
        if mixed_in:
            trainer_class = type(trainer_class.__name__, (*mixed_in, trainer_class), {})
        folder = out / name.replace(" ", "_")
        trainer = run(case, folder, processes, trainer_class=trainer_class, **changes)
        assert trainer.args.total_batch_size == BATCH
        finish(trainer, folder)
        print(name, flush=True)

    for case in cases(every=which == "every"):
        saved = which == "usual" and (case.model, case.method, case.accumulation) in CHECKPOINTED
        train(case, case.name, **({"save_strategy": "steps", "save_steps": MIDDLE} if saved else {}))
    if which == "usual":
        train(BF16, "bf16", bf16=True)
        resume(out, kind, one, train)
        train_extras(out, kind, train)
    dist.barrier()


def resume(out, kind, one, train):
    """Go on from the launcher's own checkpoints and, under data parallelism, from that of one process."""
    for case in (Case(*given) for given in CHECKPOINTED[: 2 if kind == "ddp" else 1]):
        train(case, f"{case.name} resumed", resume=out / case.name / f"checkpoint-{MIDDLE}")
    if kind == "ddp":
        train(Case(*CHECKPOINTED[0]), "from one", resume=Path(one) / f"checkpoint-{MIDDLE}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # Two CPU processes sometimes abort while the interpreter shuts down, after all work is done.
    os._exit(0)
