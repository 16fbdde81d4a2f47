"""The rule of verdict.yaml, applied to kept runs: `python -m research.cifar10.verdict --runs runs.parquet`.

Best rates and warmups are chosen on seed 0, among seven rates each; five other seeds decide. Where a clause needs runs
that are not there it is open, and they are named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from research.cifar10.choosing import RATES, SEEDS, Row, Runs, Seeds, ours, rivals
from research.cifar10.settings import Settings

NETWORKS, BATCHES = ("resnet8", "resnet20"), (512, 2048, 8192)
MARGIN = 0.5
MET, NOT_MET, OPEN = "met", "not met", "open"


@dataclass(frozen=True)
class Clause:
    """One way to be better.

    Attributes:
        name: What it asks for.
        state: `MET`, `NOT_MET` or `OPEN`.
        found: What the runs say.
        missing: Runs that the rule needs and that are not there.
    """

    name: str
    state: str
    found: list[str]
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """The rule's answer.

    Attributes:
        clauses: Each way to be better.
    """

    clauses: list[Clause]

    @property
    def state(self) -> str:
        """Whether it is "better" or "not better", or "open"."""
        states = {clause.state for clause in self.clauses}
        if MET in states:
            return "better"
        return OPEN if OPEN in states else "not better"


def decide(rows: Iterable[Row]) -> Verdict:
    """Apply the rule.

    Args:
        rows: Kept runs, of one maker; those of other settings than the rule's are passed over.
    """
    runs = Runs(row for row in rows if in_setting(row))
    return Verdict([_above(runs), _as_good_and_safer(runs), _one_setting(runs)])


def in_setting(row: Row) -> bool:
    """Whether a run is of the rule's setting: 12 epochs, width 16, bf16 on a GPU, and so on."""
    s = Settings.of(row)
    same = replace(Settings("lars", 1.0), network=s.network, batch=s.batch)
    names = ("epochs", "width", "chunk", "weight_decay")
    return row.get("device") == "cuda" and all(getattr(s, n) == getattr(same, n) for n in names)


# ---- what the clauses rest on --------------------------------------------------------------------------------


def _described(s: Settings) -> str:
    name = {"signal_lars": "SignalLARS", "lars": "LARS"}.get(s.method, s.method)
    return f"{name} with {s.warmup:g} epochs of warmup" if s.warmup else f"{name} without warmup"


def _untuned(runs: Runs, candidates: Sequence[Settings]) -> list[str]:
    """Candidates that were not tried at seven rates on seed 0."""
    counts = {_described(c): len(runs.rates(c)) for c in candidates}
    place = f"{candidates[0].network}, B = {candidates[0].batch:,}"
    return [f"{place}: {name} at {len(RATES)} rates ({count} there)" for name, count in counts.items() if count < 7]


def _deciding(runs: Runs, s: Settings, missing: list[str]) -> Seeds | None:
    """A setting on the deciding seeds; what lacks is added to `missing`."""
    found = runs.seeds(s)
    count = len(found.values) if found else 0
    if count < len(SEEDS):
        where = f"{s.network}, B = {s.batch:,}: {_described(s)} at {s.rate:g}"
        missing.append(f"{where} on {len(SEEDS)} seeds beside seed 0 ({count} there)")
    return found


@dataclass(frozen=True)
class _Pair:
    """Ours and the rival at some multiple of their best rates on one network; None where no run is."""

    network: str
    ours: Seeds | None
    rival: Seeds | None
    missing: list[str]

    def __str__(self) -> str:
        return f"{self.network}: SignalLARS {_shown(self.ours)}, the rival {_shown(self.rival)}"


def _shown(seeds: Seeds | None) -> str:
    if seeds is None:
        return "not run on the deciding seeds"
    low, high = seeds.interval
    rate = f"a = {seeds.settings.rate:g}"
    warm = f", warmup {seeds.settings.warmup:g}" if seeds.settings.warmup else ""
    return f"{seeds.mean:.2f} ({low:.2f} to {high:.2f}; {len(seeds.values)} seeds, {rate}{warm})"


def _pair(runs: Runs, network: str, multiple: float = 1.0) -> _Pair:
    both: list[Seeds | None] = []
    missing: list[str] = []
    for candidates in (ours(network=network), rivals(network=network)):
        missing += _untuned(runs, candidates)
        best = runs.best(candidates)
        both.append(None if best is None else _deciding(runs, replace(best, rate=best.rate * multiple), missing))
    return _Pair(network, both[0], both[1], missing)


def _over_networks(name: str, runs: Runs, multiples: Sequence[float], holds: Callable[..., bool]) -> Clause:
    """A clause that must hold on every network; one where it fails on all of its runs is enough to refute it."""
    found, missing, states = [], [], []
    for network in NETWORKS:
        pairs = [_pair(runs, network, multiple) for multiple in multiples]
        lacking = list(dict.fromkeys(text for pair in pairs for text in pair.missing))
        found += [
            f"{pair}" + ("" if multiple == 1 else f" [at {multiple:g} times the best rate]")
            for pair, multiple in zip(pairs, multiples, strict=True)
        ]
        missing += lacking
        states.append(OPEN if lacking else (MET if holds(*pairs) else NOT_MET))
    return Clause(name, _joined(states), found, missing)


def _joined(states: Sequence[str]) -> str:
    if NOT_MET in states:
        return NOT_MET
    return OPEN if OPEN in states else MET


# ---- the clauses ---------------------------------------------------------------------------------------------


def _above(runs: Runs) -> Clause:
    def holds(at_best: _Pair) -> bool:
        assert at_best.ours is not None
        assert at_best.rival is not None
        apart = at_best.ours.interval[0] > at_best.rival.interval[1]
        return apart and at_best.ours.mean >= at_best.rival.mean + MARGIN

    name = f"at least {MARGIN} points above the rival on both networks, with intervals that do not overlap"
    return _over_networks(name, runs, (1.0,), holds)


def _as_good_and_safer(runs: Runs) -> Clause:
    def holds(at_best: _Pair, *others: _Pair) -> bool:
        assert at_best.ours is not None
        assert at_best.rival is not None
        good = at_best.ours.mean >= at_best.rival.mean - MARGIN
        for other in others:
            assert other.ours is not None
            assert other.rival is not None
            lost, rival_lost = at_best.ours.mean - other.ours.mean, at_best.rival.mean - other.rival.mean
            good = good and lost <= rival_lost / 2
        return good

    name = f"within {MARGIN} points of the rival on both networks, and half its loss at most at twice and half the rate"
    return _over_networks(name, runs, (1.0, 2.0, 0.5), holds)


def _one_setting(runs: Runs) -> Clause:
    missing: list[str] = []
    for batch in BATCHES:
        plain = [Settings(method="lars", rate=RATES[3], batch=batch)]
        for candidates in (ours(batch=batch), rivals(batch=batch), plain):
            missing += _untuned(runs, candidates)
    envelope = {s.batch: _deciding(runs, s, missing) for s in _envelope(runs)}
    found = [f"envelope at B = {b:,}: {_described(e.settings)} {_shown(e)}" for b, e in envelope.items() if e]
    gaps = []
    for kinds in (ours, rivals):
        chosen = _one_for_all(runs, kinds)
        name = "LARS with warmup" if kinds is rivals else "SignalLARS"
        if chosen is None:
            missing.append(f"{name}: one setting at all of B = {', '.join(f'{b:,}' for b in BATCHES)}")
            found.append(f"{name}: no setting was run at all three")
            continue
        at = [(envelope.get(b), _deciding(runs, replace(chosen, batch=b), missing)) for b in BATCHES]
        both = [(e, s) for e, s in at if e and s and len(e.values) == len(s.values) == len(SEEDS)]
        gaps.append(max((e.mean - s.mean for e, s in both), default=0.0))
        where = f"{gaps[-1]:.2f} points below the envelope at most" if len(both) == len(BATCHES) else "seeds lack"
        found.append(f"{name} at {chosen.rate:g}: {where}")
    state = OPEN if missing else (MET if gaps[0] <= MARGIN < gaps[1] else NOT_MET)
    sizes = ", ".join(f"{b:,}" for b in BATCHES)
    name = (
        f"one setting within {MARGIN} points of the envelope at B = {sizes} (ResNet-8), and LARS with warmup has none"
    )
    return Clause(name, state, found, list(dict.fromkeys(missing)))


def third_clause_settings(runs: Runs) -> list[Settings]:
    """What the deciding seeds of the third clause are of: the envelope, and one setting of each method everywhere.

    Args:
        runs: Kept runs.
    """
    chosen = [_one_for_all(runs, kinds) for kinds in (ours, rivals)]
    return _envelope(runs) + [replace(s, batch=b) for s in chosen if s is not None for b in BATCHES]


def _envelope(runs: Runs) -> list[Settings]:
    """The best of all methods and rates at each batch size, on seed 0."""
    best = (max(_at(runs, batch), key=lambda s: (runs.accuracy[s], -s.rate), default=None) for batch in BATCHES)
    return [s for s in best if s is not None]


def _at(runs: Runs, batch: int) -> list[Settings]:
    return [s for s in runs.accuracy if (s.network, s.batch, s.seed) == ("resnet8", batch, 0)]


def _one_for_all(runs: Runs, kinds: Callable[..., list[Settings]]) -> Settings | None:
    """The setting that is nearest to the envelope where it is farthest, on seed 0; None if none ran everywhere."""
    best = {s.batch: runs.accuracy[s] for s in _envelope(runs)}
    farthest: dict[Settings, float] = {}
    for candidate in kinds():
        for rate in RATES:
            at = [replace(candidate, rate=rate, batch=batch) for batch in BATCHES]
            if all(s in runs for s in at):
                farthest[replace(candidate, rate=rate)] = max(best[s.batch] - runs.accuracy[s] for s in at)
    return min(farthest, key=lambda s: (farthest[s], s.rate), default=None)


# ---- words ---------------------------------------------------------------------------------------------------

HEADLINES = {
    "better": "By the rule, SignalLARS without warmup is better than LARS with a tuned warmup.",
    "not better": "By the rule, SignalLARS is not better than LARS with a tuned warmup.",
    "open": "The verdict is open: the rule needs runs that do not exist yet.",
}


def words(verdict: Verdict) -> str:
    """The verdict as markdown: its headline, each clause with what was found, and the runs that lack.

    Args:
        verdict: Of `decide`.
    """
    parts = [f"**{HEADLINES[verdict.state]}**"]
    for number, clause in enumerate(verdict.clauses, 1):
        lines = [f"{number}. {clause.name[0].upper()}{clause.name[1:]}: **{clause.state}**."]
        parts.append("\n".join(lines + [f"   - {text}" for text in clause.found]))
    missing = dict.fromkeys(text for clause in verdict.clauses for text in clause.missing)
    if missing and verdict.state == OPEN:
        parts += ["Runs that the rule needs and that do not exist:", "\n".join(f"- {text}" for text in missing)]
    return "\n\n".join(parts)


def main() -> int:
    """Print the verdict of a file of runs."""
    from research.cifar10.rows import MADE_BY, read_runs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("model_cards/cifar10/runs.parquet"), help="kept runs")
    parser.add_argument("--made-by", choices=MADE_BY, default="product", help="whose runs count (default: product)")
    args = parser.parse_args()
    print(words(decide(row for row in read_runs(args.runs) if row["made_by"] == args.made_by)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
