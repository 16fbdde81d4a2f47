"""CLARS in fp16 under ZeRO 1, 2 and 3, with DeepSpeed's loss scale.

DeepSpeed refuses fp16 on CPUs, although all that it needs runs there: its accelerator is told so, here only.
"""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from hf_clars import CLARS
from tests.launchers.cases import BATCH, MODELS, Images

RATE, ACCUMULATION = 1.0, 2
STATIC = {"loss_scale": 1024}
# Doubled after two good steps; a skipped one halves it at once.
DYNAMIC = {"loss_scale": 0, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1}
SPOILED = {"static": (1,), "dynamic": (1, 2)}  # batches whose gradients overflow
BATCHES = 6


def batch(number):
    """Images and classes of one batch; the same in every process."""
    images = Images()
    rows = slice(number * BATCH, (number + 1) * BATCH)
    return images.x[rows], images.y[rows]


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).logits.float(), y)


def reference(model_name, skipped=()):
    """One process in float32 that never sees the batches in `skipped`: its measures, and weights after each batch."""
    model = MODELS[model_name]()
    optimizer = CLARS(model, RATE)
    measured, weights = [], []
    for number in range(BATCHES):
        if number not in skipped:
            optimizer.zero_grad()
            loss_of(model, *batch(number)).backward()
            optimizer.step()
        measured.append(optimizer.last_step.stacked())
        weights.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))
    optimizer.remove_hooks()
    return measured, weights


def whole_weights(model):
    params = list(model.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=hasattr(params[0], "ds_id")):
        return torch.cat([p.detach().reshape(-1).float().clone() for p in params])


def train(model_name, stage, scale):
    """The same under DeepSpeed; each process has half of every batch, in two passes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = BATCH // world // ACCUMULATION
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": True, **(STATIC if scale == "static" else DYNAMIC)},
    }
    model = MODELS[model_name]()
    optimizer = CLARS(model, RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.attach_engine(engine)
    found = {"measures": [], "weights": [], "scale": [], "skipped": [], "before": whole_weights(model)}
    for number in range(BATCHES):
        x, y = (t.chunk(world)[rank] for t in batch(number))
        spoil = 1e6 if number in SPOILED[scale] else 1.0
        found["scale"].append(engine.optimizer.loss_scale)
        for part_x, part_y in zip(x.split(micro), y.split(micro), strict=True):
            engine.backward(loss_of(engine, part_x.half(), part_y) * spoil)
            engine.step()
        found["measures"].append(optimizer.last_step.stacked() if optimizer.last_step else None)
        found["weights"].append(whole_weights(model))
        found["skipped"].append(engine.skipped_steps)
    optimizer.remove_hooks()
    return found


def train_all(out):
    """Every stage, model and kind of scale; what each process found is left as `fp16.RANK.pt`."""
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo")
    results = {}
    for stage in (1, 2, 3):
        for model_name in ("group norm", "vit"):
            for scale in ("static", "dynamic"):
                results[stage, model_name, scale] = train(model_name, stage, scale)
                print(stage, model_name, scale, flush=True)
    torch.save(results, Path(out) / f"fp16.{dist.get_rank()}.pt")
