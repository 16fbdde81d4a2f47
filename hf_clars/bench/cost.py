"""Time and memory of every way, for one network."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from hf_clars.bench.check import Verdict, check_way, try_way
from hf_clars.bench.networks import Network
from hf_clars.bench.peers import WAYS
from hf_clars.bench.timing import Ratio, alternate, peak_memory, ratios
from hf_clars.bench.ways import Plain, Way

CHECK_BATCH = 3


@dataclass(frozen=True)
class CostRow:
    """One way of one network.

    Attributes:
        network: Its name.
        way: Its name.
        batch: Images a step.
        image_size: Side of the images, in pixels.
        seconds: Of each timed step; empty if it was not timed.
        ratio: To the plain step; None if it was not timed.
        note: Why it was not timed, or what it does not cover.
        first: Its first step, as a multiple of a usual plain one; None if it was not timed.
    """

    network: str
    way: str
    batch: int
    image_size: int
    seconds: list[float] = field(default_factory=list)
    ratio: Ratio | None = None
    note: str = ""
    first: float | None = None


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of one way of one network, see `hf_clars.bench.memory`.

    Attributes:
        network: Its name.
        way: Its name.
        batch: Images a step.
        image_size: Side of the images, in pixels.
        mebibytes: All figures of the process; empty if there are none.
        ratio: Its peak divided by the plain step's; None if there is none.
        note: Why there is none, or what the way does not cover.
    """

    network: str
    way: str
    batch: int
    image_size: int
    mebibytes: dict[str, float] = field(default_factory=dict)
    ratio: float | None = None
    note: str = ""


def verdicts(network: Network, ways: Iterable[type[Way]]) -> dict[str, Verdict]:
    """What `check_way` says of each way, on small images."""
    side = min(network.smallest, network.image_size)
    small = network.resized(image_size=side, batch=min(CHECK_BATCH, network.batch))
    return {way.name: check_way(way, small) for way in ways}


def measure_cost(network: Network, rounds: int, ways: Iterable[type[Way]] = tuple(WAYS.values())) -> list[CostRow]:
    """Time all ways of a network in turn; those that refuse, or compute something else, are not timed.

    Args:
        network: With the batch to measure.
        rounds: How often each way is timed.
        ways: Which ways; the plain step is always one of them.

    Returns:
        One row a way.
    """
    classes = _with_plain(ways)
    notes: dict[str, str] = {}
    running: dict[str, Way] = {}
    model, (x, y) = network.build(), network.data()
    for name, verdict in verdicts(network, classes.values()).items():
        notes[name] = verdict.note
        if verdict.good:
            way, note = try_way(partial(classes[name], copy.deepcopy(model), x, y))
            notes[name] = note or verdict.note
            if way is not None:
                running[name] = way
    gc.collect()  # hooked models are cycles: what the checks left would be collected while steps are timed
    seconds = alternate({name: way.step for name, way in running.items()}, rounds, label=network.name)
    found = ratios(seconds, Plain.name)
    for way in running.values():
        way.close()
    shape = network.batch, network.image_size
    usual = statistics.median(seconds[Plain.name])
    first = {name: way.first_seconds / usual for name, way in running.items()}
    return [CostRow(network.name, n, *shape, seconds.get(n, []), found.get(n), notes[n], first.get(n)) for n in classes]


def measure_memory(network: Network, threads: int, ways: Iterable[type[Way]] = tuple(WAYS.values())) -> list[MemoryRow]:
    """Peak memory of all ways of a network, each in a process of its own, one after the other.

    Args:
        network: One of `NETWORKS`, with the batch to measure.
        threads: Threads of torch in each process.
        ways: Which ways; the plain step is always one of them.

    Returns:
        One row a way.
    """
    rows: list[MemoryRow] = []
    shape = network.batch, network.image_size
    for name, verdict in verdicts(network, _with_plain(ways).values()).items():
        figures: dict[str, float] = {}
        note = verdict.note
        if verdict.good:
            figures, refused = peak_memory(network.name, name, batch=shape[0], image_size=shape[1], threads=threads)
            note = refused or note
        plain = rows[0].mebibytes if rows else figures  # the plain step comes first
        ratio = figures["peak"] / plain["peak"] if figures and plain else None
        rows.append(MemoryRow(network.name, name, *shape, figures, ratio, note))
    return rows


def _with_plain(ways: Iterable[type[Way]]) -> dict[str, type[Way]]:
    plain: type[Way] = Plain
    return {plain.name: plain, **{way.name: way for way in ways}}
