"""The states of the random generators, as plain values and tensors that need no pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from hf_clars.records import RecordError


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators as plain values and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned.

    Args:
        states: By generator.

    Raises:
        RecordError: They are not such states.
    """
    try:
        random.setstate(states["python"])
        kind, keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(states["torch"])
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if devices and len(states.get("cuda", [])) == devices:
            torch.cuda.set_rng_state_all(states["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RecordError(
            f"The states of the random generators do not fit ({error}): the checkpoint is damaged."
        ) from error
