"""One run, with the data on the device: settings in, accuracy and curves out."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_clars.models import build_model
from hf_clars.optim import CLARS, LARS, NAG, LayerwiseOptimizer, SignalLARS

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CURVE_POINTS = 36


@dataclass(frozen=True)
class Settings:
    """What defines a run.

    Attributes:
        method: "signal_lars", "signal_lars whole" (one share for the whole network), "lars", "clars" or "nag".
        rate: The peak rate a: gamma_scale * eta.
        network: "resnet8" or "resnet20".
        batch: B.
        n: Of SignalLARS.
        decay: `signal_decay` of SignalLARS.
        warmup: Epochs of gradual warmup.
        schedule: "poly-2", "constant" or "cosine".
        seed: Of weights and order.
        epochs: Passes over the training images.
        width: Of the network.
        chunk: Samples a pass: BatchNorm's batch.
        weight_decay: Coupled.
    """

    method: str
    rate: float
    network: str = "resnet8"
    batch: int = 2048
    n: float = 16.0
    decay: float = 0.9
    warmup: float = 0.0
    schedule: str = "poly-2"
    seed: int = 0
    epochs: int = 12
    width: int = 16
    chunk: int = 512
    weight_decay: float = 5e-4


class WholeSignalLARS(SignalLARS):
    """SignalLARS with one share of signal for the whole network: is "layer-wise" needed?"""

    def _averaged(self, now: Tensor) -> Tensor:
        whole = now.sum(1, keepdim=True).expand_as(now)
        return super()._averaged(whole)


@dataclass(frozen=True)
class Images:
    """Images on the device: training ones padded by 4 pixels, [N, 40, 40, 3] bytes; held-out ones as they are."""

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor


def build_optimizer(model: nn.Module, s: Settings) -> LayerwiseOptimizer:
    """The product's optimizer for these settings."""
    common: dict[str, Any] = {"momentum": 0.9, "weight_decay": s.weight_decay}
    if s.method == "nag":
        return NAG(model, s.rate, **common)
    if s.method == "lars":
        return LARS(model, s.rate, eta=1.0, **common)
    if s.method == "clars":
        return CLARS(model, s.rate, eta=1.0, **common)
    kind = WholeSignalLARS if s.method.endswith("whole") else SignalLARS
    return kind(model, s.rate, eta=1.0, n=s.n, signal_decay=s.decay, **common)


def rate_at(s: Settings, step: int, total: int, warmup_steps: int) -> float:
    """The scheduled rate: gradual warmup times the decay."""
    left = 1 - step / total
    decay = {"poly-2": left**2, "constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * step / total))}[s.schedule]
    return s.rate * decay * (min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0)


def _batch(images: Images, index: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of padded images, mirrored by chance, normalised; [b, 3, 32, 32] in channels_last."""
    device, count = index.device, len(index)
    along = torch.arange(32, device=device)
    offset = torch.randint(0, 9, (2, count, 1), generator=generator, device=device)
    mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
    rows, columns = offset[0] + along, offset[1] + torch.where(mirrored, 31 - along, along)
    return _normalised(images.x[index[:, None, None], rows[:, :, None], columns[:, None, :]])


def _normalised(x: Tensor) -> Tensor:
    mean, std = (255 * torch.tensor(v, device=x.device) for v in (MEAN, STD))
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
    optimizer.remove_hooks()
    result = {"accuracy": _accuracy(model, images, low), "diverged": diverged, "curve": curve}
    result |= {"layers": optimizer.layer_names, "signal": signal, "device": device.type}
    return {**asdict(s), **result, "seconds": round(time.time() - start, 2)}


def _signal(optimizer: LayerwiseOptimizer) -> list[float]:
    """s_k of each layer; empty for a method that measures none."""
    last = optimizer.last_step
    return [] if last is None or last.signal is None else [round(v, 5) for v in last.signal.tolist()]


def _measured(optimizer: LayerwiseOptimizer) -> list[float]:
    last = optimizer.last_step
    assert last is not None
    return [float("nan") if v is None else float(v.median()) for v in (last.signal, last.ratio)]


@torch.no_grad()
def _accuracy(model: nn.Module, images: Images, low: bool) -> float:
    model.eval()
    right = 0
    for x, y in zip(images.held_out_x.split(2500), images.held_out_y.split(2500), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            right += int((model(_normalised(x)).logits.argmax(1) == y).sum())
    return 100 * right / len(images.held_out_y)
