"""Run by a launcher: a plain Trainer with AdamW and the callback, whose measures each process leaves in a folder."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
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


def measures(folder, world, **wanted):
    """Three steps of 16 samples in two passes; what the last one measured, and what was said."""
    heard = Heard()
    logging.getLogger("hf_clars.per_sample").addHandler(heard)
    callback = PerSampleNormsCallback(every=1, top_k=16, **wanted)
    args = plain_args(
        folder, per_device_train_batch_size=8 // world, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-3
    )
    trainer = Trainer(Head(), args, train_dataset=with_index(Images()), callbacks=[callback])
    trainer.train()
    last = None if callback.monitor is None else callback.monitor.last
    return {"last": last, "said": heard.said, "steps": trainer.state.global_step}


if __name__ == "__main__":
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    found = {"norms": measures(out / "norms", 2, noise_scale=False, strict=True), "noise": measures(out / "noise", 2)}
    torch.save(found, out / f"{rank}.pt")
