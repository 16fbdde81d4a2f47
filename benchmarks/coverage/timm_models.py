"""The smallest model of every family of timm."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks.coverage.subject import B, NotRunnable, Subject, stir

MOST = 40_000_000
LARGE = 5_000_000  # more parameters than this, and the image is smaller: bf16 is slow on a CPU
# What makes a model small whose family has no small one; each is tried.
_NARROW: tuple[dict[str, Any], ...] = (
    {"embed_dim": 64, "depth": 2, "num_heads": 4},
    {"channel_multiplier": 0.25},
    {"mlp_ratio": 0.125},
)
# Parts of names that small models have, smallest first.
_SMALL = (
    "test_",
    "zepto",
    "atto",
    "femto",
    "pico",
    "nano",
    "_xxt",
    "_xt",
    "_xxs",
    "_xs",
    "tiny",
    "_t",
    "small",
    "_s",
    "_b0",
)


def names() -> list[str]:
    """Timm's families: its modules of models."""
    import timm

    return [m for m in timm.list_modules() if timm.list_models(module=m)]


def build(name: str) -> Subject:
    """The smallest model of a family that runs on small images.

    Raises:
        NotRunnable: If none runs.
    """
    import timm

    warnings.simplefilter("ignore")
    counts: list[tuple[int, str]] = []
    for model_name in sorted(timm.list_models(module=name), key=_guess)[:6]:
        try:
            with torch.device("meta"):
                counts.append((sum(p.numel() for p in timm.create_model(model_name).parameters()), model_name))
        except Exception:  # not every model can be made without storage
            counts.append((MOST, model_name))
    failures: list[str] = []
    for count, model_name in sorted(counts):
        narrow = {} if count <= MOST else _narrow(model_name)
        if narrow is None:
            failures.append(f"{model_name}: {count / 1e6:.0f} million parameters")
            continue
        for side, settings in _attempts(timm.create_model(model_name).default_cfg, large=count > LARGE):
            try:
                torch.manual_seed(0)
                model = timm.create_model(model_name, num_classes=5, **narrow, **settings).float().train()
                stir(model)
                batch = {"": (torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(3)),)}
                with torch.no_grad():
                    model(*batch[""])
                words = "".join(f", {k}={v}" for k, v in narrow.items())
                return Subject(model, batch, note=f"{model_name}, {side} pixels{words}")
            except Exception as error:
                failures.append(
                    f"{model_name}, {side} pixels: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
                )
    raise NotRunnable(failures[0])


def _narrow(name: str) -> dict[str, Any] | None:
    """Settings under which a model is small enough."""
    import timm

    for settings in _NARROW:
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in timm.create_model(name, num_classes=5, **settings).parameters())
        except Exception:  # it takes no such settings
            continue
        if count <= MOST:
            return settings
    return None


def _guess(name: str) -> tuple[int, int, str]:
    rank = next((i for i, part in enumerate(_SMALL) if part in name), len(_SMALL))
    return rank, len(name), name


def _attempts(cfg: Any, large: bool) -> list[tuple[int, dict[str, Any]]]:
    own = cfg["input_size"][-1]
    sides = [s for s in ((32,) if large else ()) + (64, 96, 112, 128) if s < own]
    return [(s, {"img_size": s}) for s in sides] + [(s, {}) for s in sides] + [(own, {})]
