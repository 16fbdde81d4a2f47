"""Other libraries beside ours, on networks that they run: they refuse BatchNorm that couples the samples of a batch."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from hf_clars.bench.check import check_way, refusal, try_way
from hf_clars.bench.gpu.measuring import Figures, device, peak, so_far, wall_ms
from hf_clars.bench.networks import NETWORKS, Network
from hf_clars.bench.peers import WAYS
from hf_clars.bench.ways import HfClars, Plain, Way

PACKAGES = {"opacus ghost": "opacus", "opacus hooks": "opacus", "backpack": "backpack"}
"""What a way needs beside torch."""

SIZES = {"resnet-50-gn": (224, 64), "vit-b16": (224, 64), "gpt2": (512, 8)}
"""{network of `hf_clars.bench.networks`: (side of the images, or tokens; samples a step)}."""

SECONDS, MOST_ROUNDS = 4.0, 15
"""How long the ways of one network are timed, and how often at most."""

Data = tuple[nn.Module, Tensor, Tensor]


def peers(tiny: bool) -> Figures:
    """Every way to per-sample norms on the same networks, over the plain step: wall time and peak memory.

    On a GPU weights and inputs are bf16 and images are in channels_last, without autocast, which not every library's
    hooks know. Another library is first compared with autograd, in float32 on two small samples: what it gets wrong is
    said, and not timed.

    Args:
        tiny: Small sizes.

    Returns:
        {network and batch: {way: figures, or its error}}.
    """
    figures: Figures = {}
    for network in _networks(tiny):
        rows = figures[f"{network.name} B{network.batch}"] = {}
        measure(network, rows, partial(so_far, figures), seconds=0.5 if tiny else SECONDS)
    return figures


def _networks(tiny: bool) -> list[Network]:
    if tiny:
        return [NETWORKS[name].quick() for name in ("resnet20-gn", "vit-b16", "gpt2")]
    return [NETWORKS[name].resized(image_size=size, batch=batch) for name, (size, batch) in SIZES.items()]


def measure(network: Network, rows: Figures, say: Callable[[], None], *, seconds: float) -> None:
    """Measure one network. A way that fails is a row with its error; the others go on without it.

    Args:
        network: With its batch.
        rows: Filled: {way: figures}.
        say: Called whenever there is more in them.
        seconds: How long steps are timed.
    """
    running: dict[str, Way] = {}
    data = _data(network)
    for name, way_class in WAYS.items():
        package = PACKAGES.get(name)
        if package and find_spec(package) is None:
            rows[name] = {"skipped": f"{package} is not installed"}
            continue
        way, rows[name] = _set_up(way_class, network, data)
        if way is not None:
            running[name] = way
        _free()
        say()
    if Plain.name in running:
        _time(running, rows, say, seconds=seconds)
    for way in running.values():
        way.close()
    running.clear()
    _free()


def _data(network: Network) -> Data:
    with torch.device(device()):  # a large model is made there much sooner
        model = network.build()
    x, y = network.data()
    if device().type == "cuda":
        model = model.bfloat16()
        if x.is_floating_point():
            model = model.to(memory_format=torch.channels_last)
            x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    return model, x, y


def _set_up(way_class: type[Way], network: Network, data: Data) -> tuple[Way | None, Figures]:
    """The way after a few steps, and its row so far; None for the way where it failed."""
    row: Figures = {}
    if way_class not in (Plain, HfClars):  # these have tests, and are measured in any case
        verdict = check_way(way_class, network.quick())
        if not verdict.good:
            return None, {"error": verdict.note}
        row = {"note": verdict.note} if verdict.note else {}
    model, x, y = data
    way, refused = try_way(lambda: way_class(copy.deepcopy(model), x, y))
    if way is None:
        return None, row | {"error": refused}
    try:
        way.step()
        return way, row | {"GiB": peak(way.step)}
    except Exception as error:  # whatever another library fails with, and what finds no memory
        return None, row | {"error": refusal(error)}


def _time(running: dict[str, Way], rows: Figures, say: Callable[[], None], *, seconds: float) -> None:
    """Rounds in which each way steps once: the median of each, and of its ratio to the plain step of the same round."""
    times: dict[str, list[float]] = {name: [] for name in running}
    end = time.perf_counter() + seconds
    while not times[Plain.name] or (time.perf_counter() < end and len(times[Plain.name]) < MOST_ROUNDS):
        for name in list(running):
            try:
                times[name].append(wall_ms(running[name].step))
            except Exception as error:
                rows[name]["error"] = refusal(error)
                del running[name], times[name]
                _free()
                if name == Plain.name:
                    return
        for name, own in times.items():
            rows[name] |= _ratios(own, times[Plain.name])
            if (memory := rows[name]["GiB"]) and (plain := rows[Plain.name]["GiB"]):
                rows[name]["memory ratio"] = memory / plain
        say()


def _ratios(own: list[float], plain: list[float]) -> Figures:
    each = [ms / other for ms, other in zip(own, plain, strict=True)]
    figures = {"ms": statistics.median(own), "ratio": statistics.median(each), "rounds": len(each)}
    return figures | {"ratio low": min(each), "ratio high": max(each)}


def _free() -> None:
    """Give back what hooked models held, which are cycles, and what failed steps left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
