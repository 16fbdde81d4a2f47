"""A study's YAML file: common settings, networks and arms, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from hf_clars.errors import ConfigError
from hf_clars.records.files import nearest
from research.study.methods import method_of
from research.study.plan import Arm, Extend, Study
from research.study.settings import RunSettings

SECTIONS = ("about", "common", "networks", "batch_sizes", "arms", "seeds", "held_out", "extend")


def read_study(path: Path, *, dataset: str | None = None, networks: Sequence[str] = ()) -> Study:
    """Read a study.

    Args:
        path: YAML with `common` settings, `networks` and `arms` (each {name: settings}; an arm may have `tune` and
            `values`), `batch_sizes`, `seeds`, and for tuned studies `held_out` and `extend`. Where a setting is given
            twice, arms win over networks, networks over common.
        dataset: Instead of the file's data set.
        networks: Only these; empty: all.

    Returns:
        The study, every run's settings checked.

    Raises:
        ConfigError: If the file cannot be read or has something unknown or missing.
    """
    content = _read(path)
    chosen = content["networks"]
    for name in networks:
        if name not in chosen:
            raise ConfigError(f"{path} has no network {name!r}.{nearest(name, chosen)}")
    arms = []
    batch_sizes = content.get("batch_sizes") or [None]
    for network in networks or chosen:
        for batch_size in batch_sizes:
            for name, own in content["arms"].items():
                values = {**content.get("common", {}), **(chosen[network] or {}), **(own or {})}
                if dataset is not None:
                    values["dataset"] = dataset
                if "batch_size" in (own or {}) and batch_size != batch_sizes[0]:
                    continue  # an arm with a batch size of its own runs once
                if batch_size is not None:
                    values.setdefault("batch_size", batch_size)
                arms.append(_arm(name, network, values, f"{path}: {network}, {name}"))
    study = Study(
        about=str(content.get("about", path.stem)),
        arms=tuple(arms),
        seeds=tuple(content.get("seeds", [0])),
        held_out=int(content.get("held_out", 0)),
        extend=_extend(content.get("extend", "never"), path),
    )
    if not study.held_out and any(arm.tune for arm in study.arms):
        raise ConfigError(f"{path} tunes values but holds no images out to choose by: set held_out.")
    return study


def _extend(value: Any, path: Path) -> Extend:
    if value not in get_args(Extend):
        raise ConfigError(f"{path}: extend is {value!r}; choose one of {', '.join(get_args(Extend))}.")
    return value


def _arm(name: str, network: str, values: dict[str, Any], where: str) -> Arm:
    tune, grid = values.pop("tune", None), values.pop("values", [])
    if (tune is None) != (not grid) or (tune and len(grid) < 2):
        raise ConfigError(f"{where}: tune names the setting, values lists at least two of it; give both or neither.")
    if tune in values:
        raise ConfigError(f"{where}: {tune} is tuned and set: leave one out.")
    base = RunSettings.of(values, where)
    method_of(base)
    arm = Arm(name, network, base, tune, tuple(sorted(float(value) for value in grid)))
    if tune is not None:
        RunSettings.of({**values, tune: arm.values[0]}, where)
    return arm


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The study {path} cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold the sections {', '.join(SECTIONS)}.")
    for section in content:
        if section not in SECTIONS:
            raise ConfigError(f"{path} has an unknown section, {section!r}.{nearest(section, SECTIONS)}")
    for section in ("networks", "arms"):
        if not isinstance(content.get(section), dict) or not content[section]:
            raise ConfigError(f"{path} has no {section}: name at least one.")
    return content
