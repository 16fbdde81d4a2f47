"""What a monitor does before its first step: settings are checked, the log is begun, processes agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_clars.distributed import sum_over_ranks, world_size
from hf_clars.errors import ConfigError
from hf_clars.per_sample.log import PerSampleLog


def any_process(here: bool, device: torch.device) -> bool:
    """Whether something is so in any process; all must ask."""
    if world_size() == 1:
        return here
    return bool(sum_over_ranks(torch.tensor([float(here)], device=device)) > 0)


def check_settings(*, every: int, top_k: int, decay: float, flush_every: int) -> None:
    """Raise `ConfigError` for settings that cannot work."""
    if every < 1:
        raise ConfigError(f"every={every} measures no step: give 1 for each step, 50 for each fiftieth.")
    if top_k < 0:
        raise ConfigError(f"top_k={top_k}: give how many samples to name, or 0 for none.")
    if not 0 <= decay <= 1:
        raise ConfigError(f"decay={decay} cannot work: it must be in [0, 1].")
    if flush_every < 1:
        raise ConfigError(f"flush_every={flush_every}: give a positive number of measured steps.")


def log_in(
    folder: str | Path | None, names: list[str], settings: dict[str, Any], first_step: int
) -> PerSampleLog | None:
    """The log of the process that writes: begun, or continued after a step; None for the others."""
    if folder is None or (world_size() > 1 and torch.distributed.get_rank() > 0):
        return None
    if first_step:
        return PerSampleLog.resume(folder, first_step, layers=names, settings=settings)
    return PerSampleLog.create(folder, layers=names, settings=settings)
