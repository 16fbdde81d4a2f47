"""Run by a launcher: a plain Trainer with AdamW and the callback, whose measures each process leaves in a folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import deepspeed
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_clars.per_sample import NormMonitor, PerSampleLog, PerSampleNormsCallback, with_index
from tests.callback_kit import accelerated_epoch
from tests.launchers.worker import build_nothing
from tests.trainer_kit import Images, Plain, plain_args

CLIPPED = {"learning_rate": 1e-3, "optim": "adamw_torch", "max_grad_norm": 1e-2}


WITHOUT_ZERO = {
    "zero_optimization": {"stage": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


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
        "gradient_clipping": "auto",
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 1, "hysteresis": 1},
    }


def measures(folder, world, *, model=Head, settings=None, **wanted):
    """Three steps of 16 samples in two passes; what they measured, and what was said."""
    heard = Heard()
    logging.getLogger("hf_clars.per_sample").addHandler(heard)
    callback = PerSampleNormsCallback(every=1, top_k=16, **wanted)
    args = plain_args(
        folder,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        max_steps=3,
        **{"learning_rate": 0.05, "optim": "sgd", **(settings or {})},
    )
    trainer = Trainer(model(), args, train_dataset=with_index(Images()), callbacks=[callback])
    trainer.train()
    last = None if callback.monitor is None else callback.monitor.last
    scale = callback._loss_scale
    log = None if callback.monitor is None else PerSampleLog.open(folder).read()
    return {"last": last, "log": log, "said": heard.said, "steps": trainer.state.global_step, "scale": scale}


def loop(world, **wanted):
    """Three steps of accelerate's loop; what was measured, and why it ended if it did."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, data = Head(), Images(48)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = DataLoader(with_index(data), batch_size=8 // world)
    wrapped, optimizer, loader = accelerator.prepare(model, sgd, batches)
    given = {"optimizer": optimizer} if wanted.pop("optimizer") else {}
    with NormMonitor(model, every=1, **given, **wanted) as monitor:
        accelerated_epoch(accelerator, wrapped, optimizer, loader, monitor)
        noise = monitor.noise.read().value
        return {"steps": monitor.step, "last": monitor.last, "ended": monitor.ended, "noise": noise}


def main(out, stage):
    """All runs of one launch."""
    torch.set_num_threads(1)
    build_nothing()
    out, rank, stage = Path(out), int(os.environ["RANK"]), int(stage)
    found = {"norms": measures(out / "norms", 2, strict=True)}
    unset_hf_deepspeed_config()
    found["loop"] = loop(2, strict=True, optimizer=True)
    found["loop without"] = loop(2, optimizer=False)
    # DeepSpeed refuses fp16 on CPUs, although all that it needs runs there: its accelerator is told so, here only.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    low = {"fp16": True, "deepspeed": fp16(stage), **CLIPPED}
    found["fp16"] = measures(out / "fp16", 2, model=Low, settings=low, strict=True)
    unset_hf_deepspeed_config()
    if stage == 1:  # once: DeepSpeed without ZeRO is the same beside any
        found["without zero"] = measures(out / "refused", 2, settings={"deepspeed": WITHOUT_ZERO})
        unset_hf_deepspeed_config()
        found["norms alone"] = measures(
            out / "alone", 2, settings={"deepspeed": WITHOUT_ZERO}, noise_scale=False, strict=True
        )
    torch.save(found, out / f"{rank}.pt")
