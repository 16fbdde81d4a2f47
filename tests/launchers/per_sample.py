"""Run by a launcher: a plain Trainer with AdamW and the callback, whose measures each process leaves in a folder."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import deepspeed
import torch
from torch import nn
from transformers import Trainer

from hf_clars.per_sample import PerSampleNormsCallback, with_index
from tests.trainer_kit import Images, Plain, plain_args


class Head(Plain):
    """Says that it takes no num_items_in_batch, as Trainer wants of such a head."""

    accepts_loss_kwargs = False


class Heard(logging.Handler):
    """Keeps what is said."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


class Low(Head):
    """Takes images in the precision of its weights."""

    def forward(self, pixel_values, labels=None):
        logits = super().forward(pixel_values.to(self.conv.weight.dtype))["logits"].float()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def fp16(stage):
    """DeepSpeed's settings for fp16: a loss scale that doubles after each step, in the middle of it."""
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 1, "hysteresis": 1},
    }


def measures(folder, world, *, model=Head, settings=None, **wanted):
    """Three steps of 16 samples in two passes; what the last one measured, and what was said."""
    heard = Heard()
    logging.getLogger("hf_clars.per_sample").addHandler(heard)
    callback = PerSampleNormsCallback(every=1, top_k=16, **wanted)
    args = plain_args(
        folder,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-3,
        **(settings or {}),
    )
    trainer = Trainer(model(), args, train_dataset=with_index(Images()), callbacks=[callback])
    trainer.train()
    last = None if callback.monitor is None else callback.monitor.last
    scale = callback._loss_scale
    return {"last": last, "said": heard.said, "steps": trainer.state.global_step, "scale": scale}


if __name__ == "__main__":
    out, rank, stage = Path(sys.argv[1]), int(os.environ["RANK"]), int(sys.argv[2])
    found = {"norms": measures(out / "norms", 2, noise_scale=False, strict=True), "noise": measures(out / "noise", 2)}
    # DeepSpeed refuses fp16 on CPUs, although all that it needs runs there: its accelerator is told so, here only.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    low = {"fp16": True, "deepspeed": fp16(stage)}
    found["fp16"] = measures(out / "fp16", 2, model=Low, settings=low, noise_scale=False, strict=True)
    torch.save(found, out / f"{rank}.pt")
