"""Kept runs, and which of them are chosen: by seed 0, for the other seeds to decide."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from research.cifar10.settings import Settings, kind

Row = Mapping[str, Any]

RATES = tuple(0.008 * 2**k for k in range(7))
"""The seven rates of methods whose rate is relative to the weights."""

WARMUPS = (1.0, 3.0, 5.0)
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Seeds:
    """Accuracies in percent of one setting.

    Attributes:
        settings: With seed 0.
        values: One a seed.
    """

    settings: Settings
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """The mean minus and plus two standard errors; of one value, itself."""
        if len(self.values) < 2:
            return self.mean, self.mean
        error = statistics.stdev(self.values) / math.sqrt(len(self.values))
        return self.mean - 2 * error, self.mean + 2 * error


class Runs:
    """Finished runs by their settings.

    Args:
        rows: Kept runs; those that ended with an error are left out.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.accuracy: dict[Settings, float] = {}
        for row in rows:
            if row.get("accuracy") is not None:
                self.accuracy[Settings.of(row)] = row["accuracy"]

    def __contains__(self, settings: Settings) -> bool:
        return settings in self.accuracy

    def rates(self, settings: Settings) -> dict[float, float]:
        """{rate: accuracy} of the settings' seed, at every rate that was run."""
        wanted = (kind(settings), settings.seed)
        return {s.rate: a for s, a in self.accuracy.items() if (kind(s), s.seed) == wanted}

    def best(self, candidates: Iterable[Settings]) -> Settings | None:
        """The candidate, at its best rate, that is best on its seed; None if none was run."""
        tried = [replace(c, rate=rate) for c in candidates for rate in self.rates(c)]
        return max(tried, key=lambda s: (self.accuracy[s], -s.rate), default=None)

    def seeds(self, settings: Settings, seeds: Sequence[int] = SEEDS) -> Seeds | None:
        """The setting on those of some seeds that were run; None if none was."""
        found = [replace(settings, seed=seed) for seed in seeds]
        values = tuple(self.accuracy[s] for s in found if s in self.accuracy)
        return Seeds(replace(settings, seed=0), values) if values else None


def ours(**fixed: Any) -> list[Settings]:
    """The product's SignalLARS as it comes, without warmup; the rate is a placeholder."""
    return [Settings(method="signal_lars", rate=RATES[3], **fixed)]


def rivals(**fixed: Any) -> list[Settings]:
    """LARS with each of the rule's warmups."""
    return [Settings(method="lars", rate=RATES[3], warmup=warmup, **fixed) for warmup in WARMUPS]


def json_lines(path: Path) -> Iterable[Row]:
    """The rows of a file of one JSON a line, without a line that was cut off."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
