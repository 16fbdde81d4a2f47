"""Which runs of a study can be done now: grid, extension of the grid, final seeds.

Every arm (a method on a network at a batch size) has the same budget: a grid of values over its own rate, each run once
with some training images held out; where the best value of any arm lies at an edge of its grid, two more values for
*every* arm (beyond the edge, or between the neighbours of an inner best); then some seeds at the chosen value, trained
on all training images and evaluated on the test images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from research.study.settings import RunSettings

Stage = Literal["grid", "extension", "final"]
Extend = Literal["never", "edge", "always"]
Lookup = Callable[[str], dict[str, Any] | None]
"""key -> result, or None while there is none."""

GRID_SEED = 0


@dataclass(frozen=True)
class Run:
    """A run and its place in the study."""

    arm: Arm
    stage: Stage
    value: float | None
    settings: RunSettings


@dataclass(frozen=True, eq=False)
class Arm:
    """One method on one network at one batch size.

    Attributes:
        name: As in the file.
        network: As in the file.
        base: Settings, without the value that is tuned.
        tune: The setting that is tuned; None: nothing.
        values: Its grid, increasing.
    """

    name: str
    network: str
    base: RunSettings
    tune: str | None
    values: tuple[float, ...]

    def at(self, value: float | None, **changes: Any) -> RunSettings:
        """The settings at a value of the tuned setting."""
        tuned = {} if self.tune is None else {self.tune: value}
        return self.base.replace(**tuned, **changes)


@dataclass(frozen=True)
class Study:
    """A parsed study.

    Attributes:
        about: One line.
        arms: In the order of the file, networks outermost.
        seeds: Of the final runs.
        held_out: Training images that the grid is judged on.
        extend: Whether grids are extended: "never", at an "edge" of any arm of the group, or "always".
    """

    about: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    held_out: int
    extend: Extend

    @property
    def groups(self) -> list[list[Arm]]:
        """Arms that are compared with each other: the same network and batch size."""
        found: dict[tuple[str, int], list[Arm]] = {}
        for arm in self.arms:
            found.setdefault((arm.network, arm.base.batch_size), []).append(arm)
        return list(found.values())

    def known_runs(self, result: Lookup) -> list[Run]:
        """All runs that are certain by now, finished ones too, in the order in which to do them.

        Args:
            result: Looks a result up.

        Returns:
            The runs.
        """
        runs: list[Run] = []
        for group in self.groups:
            grids = {arm: self._grid(arm, arm.values, "grid") for arm in group}
            all_grids = [run for grid in grids.values() for run in grid]
            runs += all_grids
            if self.extend != "never" and not _finished(all_grids, result):
                continue
            if self._extends([grid for grid in grids.values() if grid], result):
                for arm, grid in grids.items():
                    grids[arm] = grid + self._grid(arm, two_more(grid, result), "extension")
                    runs += grids[arm][len(grid) :]
            for arm, grid in grids.items():
                if _finished(grid, result):
                    runs += self._final(arm, best(grid, result).value if grid else None)
        return runs

    def _extends(self, grids: Sequence[Sequence[Run]], result: Lookup) -> bool:
        return self.extend == "always" or (self.extend == "edge" and any(at_edge(grid, result) for grid in grids))

    def most_runs(self) -> int:
        """How many runs the study takes at most."""
        more = 0 if self.extend == "never" else 2
        grid = sum(len(arm.values) + more for arm in self.arms if arm.tune)
        return grid + len(self.arms) * len(self.seeds)

    def _grid(self, arm: Arm, values: Sequence[float], stage: Stage) -> list[Run]:
        if arm.tune is None:
            return []
        changes = {"seed": GRID_SEED, "held_out": self.held_out}
        return [Run(arm, stage, value, arm.at(value, **changes)) for value in values]

    def _final(self, arm: Arm, value: float | None) -> list[Run]:
        return [Run(arm, "final", value, arm.at(value, seed=seed, held_out=0)) for seed in self.seeds]


# ---- selection -----------------------------------------------------------------------------------------------------


def score(run: Run, result: Lookup) -> float:
    """What a grid run is chosen by: the last epoch's accuracy on the held-out images; -1 if it diverged."""
    found = result(run.settings.key)
    assert found is not None
    return -1.0 if found["diverged_at"] is not None else float(found["accuracy"][-1])


def best(grid: Sequence[Run], result: Lookup) -> Run:
    """The run of the highest score; of equals, the smallest value.

    Args:
        grid: Finished runs of one arm.
        result: Looks a result up.

    Returns:
        The run.
    """
    return min(grid, key=lambda run: (-score(run, result), run.value))


def at_edge(grid: Sequence[Run], result: Lookup) -> bool:
    """Whether the best value is the smallest or the largest that was tried."""
    values = [run.value for run in grid]
    return best(grid, result).value in (min(values), max(values))  # type: ignore[type-var]


def two_more(grid: Sequence[Run], result: Lookup) -> list[float]:
    """Two values to try next: beyond the edge that is best, or half-way (in logarithm) to both neighbours of the best.

    Args:
        grid: Finished runs of one arm, at two values at least.
        result: Looks a result up.

    Returns:
        The values.
    """
    values = sorted(run.value for run in grid if run.value is not None)
    ratio = values[1] / values[0]
    chosen = best(grid, result).value
    assert chosen is not None
    if chosen == values[0]:
        found = [chosen / ratio**2, chosen / ratio]
    elif chosen == values[-1]:
        found = [chosen * ratio, chosen * ratio**2]
    else:
        found = [chosen / math.sqrt(ratio), chosen * math.sqrt(ratio)]
    return [float(f"{value:.4g}") for value in found]


def _finished(runs: Sequence[Run], result: Lookup) -> bool:
    return all(result(run.settings.key) is not None for run in runs)
