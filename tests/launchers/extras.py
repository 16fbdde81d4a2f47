"""Runs beside the usual cases: what users put around a model, and how a loader shares the samples out."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from transformers import TrainerCallback

from tests.launchers.cases import Case, Images, save_weights

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
SHARDED = ("zero2", "fsdp2")  # run with checkpointing too
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
    if kind != "ddp":
        return
    for name, changes in CHANGED.items():
        train(PLAIN, name, **changes)
    averaging = Averaging()
    train(PLAIN, "averaged", callbacks=[averaging])
    rank = os.environ["RANK"]
    Path(out, f"average.{rank}").mkdir()
    save_weights(average_of(averaging), Path(out, f"average.{rank}"))
