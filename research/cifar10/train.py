"""One run, with the data on the device: settings in, accuracy and curves out."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from hf_clars.models import build_model
from hf_clars.optim import LayerwiseOptimizer
from research.cifar10.methods import VRLARS, build_optimizer
from research.cifar10.settings import Settings, rate_at

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CURVE_POINTS = 36


@dataclass(frozen=True)
class Images:
    """Images on the device: training ones padded by 4 pixels, [N, 40, 40, 3] bytes; held-out ones as they are."""

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor


def _batch(images: Images, index: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of padded images, mirrored by chance, normalised; [b, 3, 32, 32] in channels_last."""
    device, count = index.device, len(index)
    along = torch.arange(32, device=device)
    offset = torch.randint(0, 9, (2, count, 1), generator=generator, device=device)
    mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
    rows, columns = offset[0] + along, offset[1] + torch.where(mirrored, 31 - along, along)
    return _normalised(images.x[index[:, None, None], rows[:, :, None], columns[:, None, :]])


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of bytes; copied to the device once, for a copy is waited for."""
    mean, std = (255 * torch.tensor(v, device=device) for v in (MEAN, STD))
    return mean, std


def _normalised(x: Tensor) -> Tensor:
    mean, std = _constants(x.device)
    return ((x.float() - mean) / std).permute(0, 3, 1, 2)


def train(s: Settings, images: Images) -> dict[str, Any]:
    """Do a run.

    Args:
        s: Its settings.
        images: The data, on the device to train on.

    Returns:
        The settings; held-out "accuracy" in percent; "diverged"; "curve": [step, loss, median s_k, median R_k] at some
        steps, NaN where a method measures none; "signal": s_k of each of "layers" at those steps; "device"; "seconds".
    """
    device, start = images.x.device, time.time()
    torch.manual_seed(s.seed)
    generator = torch.Generator(device=device).manual_seed(1000 + s.seed)
    kwargs = {"width": s.width}
    model: nn.Module = build_model(s.network, num_labels=10, image_size=32, num_channels=3, model_kwargs=kwargs)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, s)
    updates = len(images.y) // s.batch
    total, warmup_steps = updates * s.epochs, int(s.warmup * updates)
    curve: list[list[float]] = []
    signal: list[list[float]] = []
    chunk = min(s.chunk, s.batch)
    low = device.type == "cuda"
    for step in range(total):
        if step % updates == 0:
            order = torch.randperm(len(images.y), generator=generator, device=device)
        at = (step % updates) * s.batch
        loss_sum = torch.zeros((), device=device)
        optimizer.zero_grad()
        for j in range(at, at + s.batch, chunk):
            index = order[j : j + chunk]
            x = _batch(images, index, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                logits = model(x).logits
            loss = cross_entropy(logits.float(), images.y[index]) * (chunk / s.batch)
            loss.backward()
            if isinstance(optimizer, VRLARS):
                optimizer.after_pass()
            loss_sum += loss.detach()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(s, step, total, warmup_steps)
        optimizer.step()
        if step % max(1, total // CURVE_POINTS) == 0:
            curve.append([step, float(loss_sum), *_measured(optimizer)])
            signal.append(_signal(optimizer))
            if not math.isfinite(curve[-1][1]) or curve[-1][1] > 20:
                break
    diverged = not math.isfinite(curve[-1][1]) or curve[-1][1] > 20
    layers = []
    if isinstance(optimizer, LayerwiseOptimizer):
        optimizer.remove_hooks()
        layers = optimizer.layer_names
    result = {"accuracy": _accuracy(model, images, low), "diverged": diverged, "curve": curve}
    result |= {"layers": layers, "signal": signal, "device": device.type}
    return {**asdict(s), **result, "seconds": round(time.time() - start, 2)}


def _signal(optimizer: Optimizer) -> list[float]:
    """s_k of each layer; empty for a method that measures none."""
    last = getattr(optimizer, "last_step", None)
    return [] if last is None or last.signal is None else [round(v, 5) for v in last.signal.tolist()]


def _measured(optimizer: Optimizer) -> list[float]:
    """Medians over layers of s_k and R_k; NaN where a method measures none."""
    last = getattr(optimizer, "last_step", None)
    measured = (None, None) if last is None else (last.signal, last.ratio)
    return [float("nan") if v is None else float(v.median()) for v in measured]


@torch.no_grad()
def _accuracy(model: nn.Module, images: Images, low: bool) -> float:
    model.eval()
    right = 0
    for x, y in zip(images.held_out_x.split(2500), images.held_out_y.split(2500), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            right += int((model(_normalised(x)).logits.argmax(1) == y).sum())
    return 100 * right / len(images.held_out_y)
