"""Times that were measured before: the file on disk, and what it holds for."""

from __future__ import annotations

import json
import logging
import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_clars.errors import ConfigError
from hf_clars.grad_norms.rules.costs import Form, forms_of

Times = dict[str, dict[str, dict[Form, float]]]
"""Milliseconds by kind, shapes and form."""

PLACE, SECONDS = "HF_CLARS_FORMS", "HF_CLARS_MEASURE_FORMS"
"""Environment variables: the file (default `~/.cache/hf_clars/forms.json`), and how long may be measured."""

_DRIVER = Path("/proc/driver/nvidia/version")

logger = logging.getLogger(__name__)


@cache
def machine() -> dict[str, str]:
    """What times hold for: versions of torch, Triton and the driver, and the card; "none" and "unknown" are values."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    try:
        numbers = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        numbers = None
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    driver = numbers[0] if numbers else "unknown"
    return {"torch": torch.__version__, "triton": triton, "driver": driver, "card": card}


@cache
def capability() -> str:
    """The card's compute capability, as "9.0"; "none" without a CUDA card."""
    if not torch.cuda.is_available() or torch.version.cuda is None:  # ROCm's numbers are another thing
        return "none"
    return "{}.{}".format(*torch.cuda.get_device_capability())


def seconds_allowed() -> float:
    """What the environment allows to measure, in seconds; default 0.

    Raises:
        ConfigError: It is no number.
    """
    given = os.environ.get(SECONDS) or "0"
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"{SECONDS}={given!r}: give the seconds that may be spent, as {SECONDS}=20.") from None


def place() -> Path | None:
    """Where the file is; None if there is no home and no place was given."""
    if given := os.environ.get(PLACE):
        return Path(given)
    try:
        return Path.home() / ".cache" / "hf_clars" / "forms.json"
    except RuntimeError:
        return None


def read() -> Times:
    """The times on disk. Those of other versions or of another card are ignored, and it is said."""
    path = place()
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        then, times = content["machine"], _checked(content["times"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is ignored: it is no file of measured forms (%s). Delete it.", path, error)
        return {}
    here = machine()
    other = [f"{name} {then.get(name)}, here {value}" for name, value in here.items() if then.get(name) != value]
    if other:
        logger.warning("%s is ignored: it holds for another machine (%s).", path, "; ".join(other))
        return {}
    return times


def _checked(times: Any) -> Times:
    for kind, by_use in times.items():
        for forms in by_use.values():
            if not all(form in forms_of(kind) and float(ms) > 0 for form, ms in forms.items()):
                raise ValueError(f"{forms} are no times of forms")
    return dict(times)


def write(times: Times) -> None:
    """Keep times on disk, in a file that is whole or absent; where that fails it is said, and training goes on.

    Args:
        times: All of them.
    """
    path = place()
    if path is None:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"machine": machine(), "times": times}, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.warning("Measured forms cannot be kept in %s (%s): give another place in %s.", path, error, PLACE)
