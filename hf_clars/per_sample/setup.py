"""What a monitor does before its first step: settings are checked, it is the only one, the log is begun."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from hf_clars.distributed import sum_over_ranks, world_size
from hf_clars.errors import ConfigError
from hf_clars.grad_norms.torch_traces import uncompiled
from hf_clars.layers import LayerMode, ParamLayer, as_layers
from hf_clars.per_sample.log import PerSampleLog


class Watcher(Protocol):
    """What is asked of the monitor that watches a model already."""

    run: object
    every: int

    def close(self) -> None:
        """Stop."""


WATCHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watcher]] = weakref.WeakKeyDictionary()
"""Models, and the monitor at work on each."""


def watcher_of(model: nn.Module) -> Watcher | None:
    """The monitor at work on a model."""
    found = WATCHED.get(model)
    return None if found is None else found()


def make_room(model: nn.Module, run: object) -> nn.Module:
    """Close the monitor of another run of a model: that run has ended with an error, or lost its callback.

    Returns:
        The module to watch: where the model is what `torch.compile` returned, the one inside.

    Raises:
        ConfigError: If a monitor of this run, or of no known one, watches the model, or it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"The model is a {type(model).__name__}, and no torch module: give the one that is trained.")
    model = uncompiled(model)
    other = watcher_of(model)
    if other is None:
        return model
    if run is None or other.run is None or other.run is run:
        raise ConfigError(
            f"Another monitor measures this {type(model).__name__} already, every {other.every} steps: use that one, "
            "with the smaller `every` of the two, or close() it first."
        )
    other.close()
    return model


def any_process(here: bool, device: torch.device) -> bool:
    """Whether something is so in any process; all must ask."""
    if world_size() == 1:
        return here
    return bool(sum_over_ranks(torch.tensor([float(here)], device=device)) > 0)


def check_settings(
    *, every: int, top_k: int, decay: float, flush_every: int, layers: object, index_column: str
) -> None:
    """Raise `ConfigError` for settings that cannot work."""
    if not _whole(every) or every < 1:
        raise ConfigError(f"every={every!r} measures no step: give 1 for each step, 50 for each fiftieth.")
    if not _whole(top_k) or top_k < 0:
        raise ConfigError(f"top_k={top_k!r}: give how many samples to name, or 0 for none.")
    if not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ConfigError(f"decay={decay!r} cannot work: it must be in [0, 1].")
    if not _whole(flush_every) or flush_every < 1:
        raise ConfigError(f"flush_every={flush_every!r}: give a positive number of measured steps.")
    if not isinstance(index_column, str) or not index_column:
        raise ConfigError(f"index_column={index_column!r}: give the name of a column.")
    ready = isinstance(layers, Sequence) and all(isinstance(layer, ParamLayer) for layer in layers)
    if layers not in ("module", "tensor") and not (ready and layers):
        raise ConfigError(f"layers={layers!r}: give 'module', 'tensor', or layers that hf_clars.param_layers has made.")


def partition_of(model: nn.Module, layers: LayerMode | Sequence[ParamLayer]) -> list[ParamLayer]:
    """The layers to measure.

    Raises:
        ConfigError: If a parameter is not the model's, or in two of them: its norms would be missing, or count twice.
        ValueError: As `as_layers`.
    """
    found = as_layers(model, layers)
    left = dict.fromkeys(model.parameters())
    for layer in found:
        for name, param in zip(layer.param_names, layer.params, strict=True):
            if param not in left:
                raise ConfigError(f"layers= has {name}, which is no parameter of this model, or in another layer too.")
            del left[param]
    return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def log_in(
    folder: str | Path | None, names: list[str], settings: dict[str, Any], first_step: int
) -> PerSampleLog | None:
    """The log of the process that writes: begun, or continued after a step; None for the others."""
    if folder is None or (world_size() > 1 and torch.distributed.get_rank() > 0):
        return None
    if first_step:
        return PerSampleLog.resume(folder, first_step, layers=names, settings=settings)
    return PerSampleLog.create(folder, layers=names, settings=settings)
