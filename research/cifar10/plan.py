"""Which runs the study does, in order of importance, and which of them are the best of their kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from research.cifar10.train import Settings

Row = dict[str, Any]
#: What tells one method from another: everything but rate and seed.
KIND = ("network", "batch", "method", "n", "decay", "warmup", "schedule", "epochs", "width")


def kind(row: Row) -> tuple[Any, ...]:
    """What a run shares with those at other rates and seeds."""
    return tuple(row[k] for k in KIND)


@dataclass
class Done:
    """Finished runs."""

    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, files: Iterable[Path]) -> Done:
        """Those of some files of one JSON a line."""
        return cls([json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()])

    def add(self, row: Row) -> None:
        """One more."""
        self.rows.append(row)

    def ok(self) -> Iterator[Row]:
        """Those that ended with an accuracy."""
        return (row for row in self.rows if row.get("accuracy") is not None)

    def has(self, settings: Settings) -> bool:
        """Whether a run has been done."""
        wanted = vars(settings)
        return any(all(row.get(k) == v for k, v in wanted.items()) for row in self.ok())

    def best(self, **fixed: Any) -> Settings | None:
        """The best run of seed 0 among those with some settings; None if there is none."""
        rows = [r for r in self.ok() if r["seed"] == 0 and all(r[k] == v for k, v in fixed.items())]
        if not rows:
            return None
        best = max(rows, key=lambda r: r["accuracy"])
        return Settings(**{k: best[k] for k in Settings.__dataclass_fields__})


def _grid(rates: Iterable[float], **fixed: Any) -> list[Settings]:
    return [Settings(rate=rate, **fixed) for rate in rates]


def _tuning(done: Done) -> list[Settings]:
    """ResNet-8: the method and its rival over rates."""
    runs = _grid((0.064, 0.032, 0.128, 0.256, 0.016), method="signal_lars")
    runs += _grid((0.064, 0.032, 0.128), method="lars", warmup=3.0)
    runs += _grid((0.032, 0.064, 0.128), method="lars", warmup=5.0)
    runs += _grid((0.032, 0.064, 0.016), method="lars", warmup=1.0) + _grid((0.032, 0.016), method="lars")
    return runs


def _tuning_deeper(done: Done) -> list[Settings]:
    """ResNet-20, at the rates around those that were best on ResNet-8."""
    runs = _grid((0.064, 0.128, 0.032), method="signal_lars", network="resnet20")
    for warmup in (3.0, 5.0):
        runs += _grid((0.064, 0.032), method="lars", warmup=warmup, network="resnet20")
    return runs


def _rivals(done: Done, network: str) -> list[Settings]:
    ours = done.best(method="signal_lars", network=network, batch=2048, n=16.0)
    theirs = [done.best(method="lars", network=network, batch=2048, warmup=w) for w in (1.0, 3.0, 5.0)]
    scored = [(t, _score(done, t)) for t in theirs if t is not None]
    rival = max(scored, key=lambda pair: pair[1])[0] if scored else None
    return [s for s in (ours, rival) if s is not None]


def _score(done: Done, s: Settings) -> float:
    return max(r["accuracy"] for r in done.ok() if r["seed"] == 0 and r["rate"] == s.rate and kind(r) == kind(vars(s)))


def _seeds(network: str, seeds: tuple[int, ...], factors: tuple[float, ...]) -> Callable[[Done], list[Settings]]:
    def runs(done: Done) -> list[Settings]:
        best = _rivals(done, network)
        return [replace(s, rate=s.rate * f, seed=seed) for f in factors for seed in seeds for s in best]

    return runs


def _baselines(done: Done) -> list[Settings]:
    """One share for the whole network, other n and averages, CLARS and mNAG with and without warmup."""
    runs = _grid((0.064, 0.128), method="signal_lars whole")
    runs += _grid((0.064,), method="signal_lars", n=4.0) + _grid((0.128, 0.064), method="signal_lars", n=64.0)
    runs += _grid((0.064,), method="signal_lars", decay=0.8) + _grid((0.064,), method="signal_lars", decay=0.99)
    runs += _grid((1.6,), method="nag", warmup=3.0) + _grid((0.4,), method="nag")
    return runs + _grid((0.16,), method="clars", schedule="constant")


def _other_batches(done: Done) -> list[Settings]:
    """N = B / 128 and n = 16 at 512 and 8,192, with the rate of 2,048 first; the rival there was measured before."""
    runs = []
    for rates in ((0.064,), (0.032, 0.128)):
        for batch, n in ((512, 4.0), (8192, 64.0), (512, 16.0), (8192, 16.0)):
            runs += _grid(rates, method="signal_lars", batch=batch, n=n)
    for batch in (512, 8192):
        runs += _grid((0.064, 0.032), method="lars", warmup=3.0, batch=batch)
    return runs


def stages(*, tiny: bool = False) -> list[Callable[[Done], list[Settings]]]:
    """The stages, most important first; a run that is done already is left out.

    Args:
        tiny: Runs of a few steps.
    """
    plan: list[Callable[[Done], list[Settings]]] = [
        _tuning,
        _tuning_deeper,
        _seeds("resnet8", (1, 2, 3, 4, 5), (1.0,)),
        _seeds("resnet20", (1, 2, 3), (1.0,)),
        _seeds("resnet8", (1, 2), (2.0, 0.5)),
        _other_batches,
        _baselines,
        _seeds("resnet20", (4, 5), (1.0,)),
        _seeds("resnet8", (3, 4, 5), (2.0, 0.5)),
        _seeds("resnet20", (1, 2), (2.0, 0.5)),
    ]

    def new(stage: Callable[[Done], list[Settings]]) -> Callable[[Done], list[Settings]]:
        def runs(done: Done) -> list[Settings]:
            made = [_shrunk(s) for s in stage(done)] if tiny else stage(done)
            return [s for i, s in enumerate(made) if not done.has(s) and s not in made[:i]]

        return runs

    return [new(stage) for stage in (plan[:2] + plan[5:7] if tiny else plan)]


def stages_of(path: Path) -> list[Callable[[Done], list[Settings]]]:
    """The stages of a file: under `stages`, each a list of settings with several `rates`, over what is `common`.

    Args:
        path: YAML.
    """
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))

    def stage(entries: list[dict[str, Any]]) -> Callable[[Done], list[Settings]]:
        def runs(done: Done) -> list[Settings]:
            made = [s for e in entries for s in _grid(e["rates"], **plan["common"], **_without(e, "rates"))]
            return [s for s in made if not done.has(s)]

        return runs

    return [stage(entries) for entries in plan["stages"]]


def _without(entry: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k != key}


def _shrunk(s: Settings) -> Settings:
    return replace(s, batch=64, chunk=32, epochs=1, width=4, network="resnet8")
