"""Runs beside the usual cases: what users put around a model, and how a loader shares the samples out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from transformers import TrainerCallback

from hf_clars.records import RecordError
from tests.launchers.cases import Case, Images, run, save_weights

PLAIN, VIT = Case("group norm", "clars", 4), Case("vit", "clars", 4)
CHECKPOINTING = {
    "checkpointing": (VIT, {"gradient_checkpointing": True}),
    "reentrant checkpointing": (
        VIT,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
}
# Under data parallelism; each must give the numbers of one process without it.
AROUND = {
    **CHECKPOINTING,
    "compiled": (PLAIN, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "split batches": (PLAIN, {"accelerator_config": {"split_batches": True}}),
    "tokens not averaged": (PLAIN, {"average_tokens_across_devices": False}),
    "dispatch batches": (PLAIN, {"accelerator_config": {"dispatch_batches": True}}),
}
SHARDED = ("zero2", "fsdp2")  # run with checkpointing and with losses of the user's own too
# Settings with which one process, too, gets other numbers. Two epochs of 40 samples are updates of 32, 8, 32 and 8
# samples, of which the small ones have a quarter of the passes.
CHANGED = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "uneven": {
        "max_steps": -1,
        "num_train_epochs": 2,
        "dataloader_drop_last": False,
        "data": Subset(Images(), range(40)),
    },
}


WEIGHTS = torch.tensor([0.2, 1.0, 3.0])  # of the classes


class WeightedMean:
    """What users put before a trainer's own `compute_loss`: class weights, and the mean of a pass."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = (WEIGHTS[labels] * cross_entropy(outputs.logits, labels, reduction="none")).mean()
        return (loss, outputs) if return_outputs else loss


class WeightedShare:
    """The same, divided by the number of items in the whole batch where that is given."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        each = WEIGHTS[labels] * cross_entropy(outputs.logits, labels, reduction="none")
        loss = each.mean() if num_items_in_batch is None else each.sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


OWN_LOSSES = {"weighted mean": WeightedMean, "weighted share": WeightedShare}


class Averaging(TrainerCallback):
    """Keeps an exponential moving average of the weights, as users do."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


def average_of(averaging):
    """The averaged weights; the average itself must be a model that computes."""
    with torch.no_grad():
        averaging.average(Images().x[:4])
    return averaging.average.module.state_dict()


def full_disk(out):
    """The first process cannot write a checkpoint: what each process raises is left as `full_disk.RANK`."""
    rank, write = os.environ["RANK"], Path.write_text

    def full(path, *args, **kwargs):
        if rank == "0" and path.name == "training_args.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *args, **kwargs)

    Path.write_text = full
    try:
        run(PLAIN, out / "full_disk", 2, save_strategy="steps", save_steps=2)
    except RecordError as error:
        said = str(error)
    else:
        said = "nothing was raised"
    finally:
        Path.write_text = write
    (out / f"full_disk.{rank}").write_text(said)


def train_extras(out, kind, train):
    """Everything beside the usual cases that a launcher is to run.

    Args:
        out: Folder.
        kind: Launcher.
        train: (case, name, **what `run` takes) trains and saves in a folder of that name.
    """
    for name, (case, changes) in (AROUND if kind == "ddp" else CHECKPOINTING if kind in SHARDED else {}).items():
        # With split batches a device is told the whole batch.
        train(case, name, **({"processes": 1} if name == "split batches" else {}), **changes)
        torch._dynamo.reset()
    for name, own in OWN_LOSSES.items() if kind in ("ddp", *SHARDED) else ():
        train(PLAIN, name, mixed_in=(own,))
    if kind == "zero2":
        from tests.launchers import deepspeed_fp16

        deepspeed_fp16.train_all(out)
    if kind != "ddp":
        return
    for name, changes in CHANGED.items():
        train(PLAIN, name, **changes)
    averaging = Averaging()
    train(PLAIN, "averaged", callbacks=[averaging])
    rank = os.environ["RANK"]
    Path(out, f"average.{rank}").mkdir()
    save_weights(average_of(averaging), Path(out, f"average.{rank}"))
    full_disk(out)
