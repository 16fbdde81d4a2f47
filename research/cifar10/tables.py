"""The study's tables: what ran in one place, and the prototype's runs beside the product's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_clars.hub.markdown import table
from research.cifar10.choosing import Row, Runs, Seeds
from research.cifar10.settings import Settings, kind

MAKERS = {"prototype": "a prototype on an H100", "product": "the product's classes"}
DEVICES = {"cuda": "a GPU", "cpu": "a CPU"}
Key = tuple[Any, ...]


def named(s: Settings) -> str:
    """A method in words, with its warmup and schedule."""
    power = {1.0: "-1", 0.5: "-1/2", 2.0: "-2"}.get(s.power, f"-{s.power:g}")
    gain = f"SignalLARS, n = {s.n:g}" + ("" if s.power == 1 else f", power {s.power:g}")
    name = {
        "signal_lars": gain if s.form == "gain" else f"LARS x [1 + {s.n - 1:g} s]^({power})",
        "lars_times_ratio": f"LARS x R^{s.power:g}",
        "lars": "LARS",
        "clars": "CLARS",
        "nag": "Nesterov",
        "lamb": "LAMB",
        "tvlars": "TVLARS",
        "adascale": "AdaScale, whole network",
        "vr_lars": "VR-LARS",
    }[s.method]
    more = ["one s for the network"] if s.share == "network" else []
    more += [f"average {s.decay:g}"] if s.decay != 0.9 and s.method == "signal_lars" else []
    more += [f"momentum {s.momentum:g}"] if s.momentum != 0.9 else []
    more += [s.schedule] if s.schedule not in ("poly-2", "tvlars") else []
    more += [f"warmup {s.warmup:g}"] if s.warmup else []
    return ", ".join([name, *more])


def place(row: Row) -> Key:
    """What runs must share to stand in one table."""
    return tuple(row[k] for k in ("made_by", "device", "network", "width", "epochs", "batch"))


def heading(key: Key) -> str:
    """A table's heading."""
    made_by, device, network, width, epochs, batch = key
    maker = MAKERS[made_by] + (f" on {DEVICES[device]}" if made_by == "product" else "")
    name = {"resnet8": "ResNet-8", "resnet20": "ResNet-20"}[network]
    return f"{name} of width {width}, B = {batch:,}, {epochs} epochs: by {maker}"


def method_table(rows: Sequence[Row]) -> str:
    """One line a method, best first.

    Args:
        rows: Of one place.
    """
    runs = Runs(rows)
    lines = []
    for s in {kind(s): s for s in runs.accuracy}.values():
        best = runs.best([replace(s, seed=0)])
        if best is None:
            continue
        found = runs.seeds(best, range(6))
        assert found is not None
        tried = runs.rates(best)
        at = [tried.get(best.rate * f) for f in (2.0, 0.5)]
        edge = " (an edge)" if len(tried) > 1 and best.rate in (min(tried), max(tried)) else ""
        lines.append(
            (-found.mean, [named(best), f"{best.rate:g}{edge}", _accuracy(found), *map(number, at), str(len(tried))])
        )
    header = ["method", "best rate a", "accuracy, %: mean (range; seeds)", "at 2 a", "at a / 2", "rates tried"]
    return table(header, [cells for _, cells in sorted(lines)])


def _accuracy(found: Seeds) -> str:
    if len(found.values) == 1:
        return f"{found.mean:.1f}"
    return f"{found.mean:.1f} ({min(found.values):.1f}-{max(found.values):.1f}; {len(found.values)})"


def number(value: float | None) -> str:
    """A cell of a table: an accuracy in percent, or that there is none."""
    return "-" if value is None else f"{value:.1f}"


def agreement(rows: Sequence[Row]) -> str:
    """Settings that both the prototype and the product's classes ran, side by side.

    A repeat agrees if its mean is within three standard deviations of the prototype's seeds, of which it takes three.
    """
    given = Runs(r for r in rows if r["made_by"] == "prototype")
    lines = []
    for device, where in DEVICES.items():
        own = Runs(r for r in rows if r["made_by"] == "product" and r["device"] == device)
        for s in sorted({replace(s, seed=0) for s in own.accuracy} & set(given.accuracy), key=repr):
            theirs, ours = given.seeds(s, range(6)), own.seeds(s, range(6))
            assert theirs is not None
            if ours is None:
                continue
            setting = [named(s), s.network, f"{s.batch:,}", f"{s.rate:g}", where]
            lines.append([*setting, _accuracy(theirs), _accuracy(ours), *_distance(ours.mean, theirs.values)])
    if not lines:
        return "No setting of the prototype has been repeated with the product's classes yet."
    header = ["method", "network", "B", "a", "on", "prototype, %", "product, %", "apart, in its deviations", "agrees"]
    return table(header, lines)


def _distance(found: float, seeds: Sequence[float]) -> tuple[str, str]:
    if len(seeds) < 3 or not (deviation := statistics.stdev(seeds)):
        return "-", "too few seeds"
    apart = (found - statistics.fmean(seeds)) / deviation
    return f"{apart:+.1f}", "yes" if abs(apart) <= 3 else "no"
