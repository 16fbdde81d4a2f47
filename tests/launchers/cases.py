"""The models, data and settings that every launcher trains, and how a finished run is written down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from hf_clars import ClarsTrainer, ClarsTrainingArguments, LayerRateLog
from hf_clars.models import build_model

BATCH, STEPS, SIDE, CLASSES = 32, 6, 8, 3
SUBSET = 8
MIDDLE = 3  # the step after which checkpoints are resumed


class Images(Dataset):
    """STEPS batches of random images in a fixed order."""

    def __init__(self, order=None):
        generator = torch.Generator().manual_seed(0)
        # Of 20 batches, as tolerances for float16 were chosen on.
        self.x = torch.randn(BATCH * 20, 1, SIDE, SIDE, generator=generator)[: BATCH * STEPS]
        self.y = torch.randint(0, CLASSES, (BATCH * 20,), generator=generator)[: BATCH * STEPS]
        self.order = range(len(self.y)) if order is None else order

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"pixel_values": self.x[self.order[i]], "labels": self.y[self.order[i]]}


def frozen_batch_norm():
    """ResNet-8 whose BatchNorms keep their statistics, so that samples are not coupled over processes."""
    torch.manual_seed(0)
    model = build_model("resnet8", num_labels=CLASSES, image_size=SIDE, num_channels=1, model_kwargs={"width": 4})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, m=module: m
            module.training = False
    return model


def group_norm():
    """The small CNN, with average for max pooling.

    Max pooling is discontinuous where two values of a window are equal up to rounding, and the order in which processes
    add decides which of them gets the gradient: in one run of these a window's were 6e-8 apart (float64 sided with the
    processes), and what came after differed by 1e-4.
    """
    torch.manual_seed(0)
    settings = {"widths": [4, 8], "norm": "group"}
    model = build_model("clars-cnn", num_labels=CLASSES, image_size=SIDE, num_channels=1, model_kwargs=settings)
    (place,) = (i for i, module in enumerate(model.features) if isinstance(module, nn.MaxPool2d))
    model.features[place] = nn.AvgPool2d(2, ceil_mode=True)
    return model


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=SIDE,
            patch_size=4,
            num_channels=1,
            num_labels=CLASSES,
        )
    )


MODELS = {"frozen batch norm": frozen_batch_norm, "group norm": group_norm, "vit": vit}
METHODS = {
    "clars": {"method": "clars", "norm_samples": 0},
    "clars subset": {"method": "clars", "norm_samples": SUBSET},
    "signal_lars": {"method": "signal_lars", "norm_samples": 0, "eta": 0.003},
    "lars": {"method": "lars", "eta": 0.003},
    "nag": {"method": "nag", "learning_rate": 0.02},
}


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    method: str
    accumulation: int

    @property
    def name(self):
        return f"{self.model}-{self.method}-{self.accumulation}".replace(" ", "_")


BF16 = Case("group norm", "clars", 4)
CHECKPOINTED = [("group norm", method, 1) for method in ("clars", "signal_lars")]  # cases that write one in the middle


def cases(accumulations=(1, 4), *, every=False):
    """Every model with CLARS on all samples, and the other methods on one model, or on every model too."""
    if every:
        return [Case(model, method, a) for model in MODELS for method in METHODS for a in accumulations]
    pairs = [(m, "clars") for m in MODELS] + [("group norm", method) for method in METHODS if method != "clars"]
    return [Case(model, method, a) for model, method in pairs for a in accumulations]


def arguments(case, folder, processes, **changes):
    settings = {
        "per_device_train_batch_size": BATCH // processes // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "max_steps": STEPS,
        "learning_rate": 1.0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 0,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "lr_scheduler_type": "polynomial",
        **METHODS[case.method],
        **changes,
    }
    return ClarsTrainingArguments(str(folder), **settings)


def run(
    case, folder, processes, *, data=None, model=None, trainer_class=ClarsTrainer, resume=None, callbacks=(), **changes
):
    """Train one case, from a checkpoint if one is given, and return the trainer."""
    model = MODELS[case.model]() if model is None else model
    args = arguments(case, folder, processes, **changes)
    data = Images() if data is None else data
    trainer = trainer_class(model, args, train_dataset=data, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def subset_order(case, processes):
    """An order for one process in which the first samples of each batch are those that the processes measure."""
    micro = BATCH // processes // case.accumulation
    first = [rank * micro + i for rank in range(processes) for i in range(SUBSET // processes)]
    batch = first + [i for i in range(BATCH) if i not in first]
    return [step * BATCH + i for step in range(STEPS) for i in batch]


def weights_file(folder):
    return Path(folder) / "weights.safetensors"


def save_weights(state, folder):
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in state.items()}, weights_file(folder))


def floor_of(name):
    """How far two outcomes may lie apart on an absolute scale.

    A key's bias in attention has no gradient but rounding noise, so that weights need a floor. A share of signal is a
    difference of two numbers near 1, exact on that scale.
    """
    return 1e-5 if name == "log signal" else 1e-6 if name.startswith("weight ") else 0


def outcome(folder):
    """{name: array} of everything that must agree: the log's quantities and the final weights."""
    log = LayerRateLog.open(folder)
    found = {f"log {q}": log[q] for q in log.quantities}
    found["log steps"] = np.asarray(log.steps)
    return found | {f"weight {n}": t.float().numpy() for n, t in load_file(weights_file(folder)).items()}, log.layers
