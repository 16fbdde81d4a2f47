"""Which runs the study does, in order of importance; what a stage does follows from what is done.

A plan is made of parts, each for one question: "verdict" (the rule's first two clauses), "one-setting" (its third),
"baselines", "variants" and "batches" (tuned once, at B = 512). A part that a machine's time does not allow goes on from
its kept runs at the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from research.cifar10.choosing import RATES, SEEDS, Row, Runs, json_lines, ours, rivals
from research.cifar10.settings import BASE_BATCH, Settings
from research.cifar10.verdict import third_clause_settings

Stage = Callable[["Done"], list[Settings]]

FROM_THE_MIDDLE = (0.064, 0.032, 0.128, 0.016, 0.256, 0.008, 0.512)  # the seven rates, the likely first
PLAIN_RATES = (0.4, 0.8, 0.2, 1.6, 0.1, 3.2, 0.05)  # of Nesterov, and of AdaScale times S
CLARS_RATES = (0.16, 0.32, 0.08, 0.64, 0.04, 1.28, 0.02)
LAMB_RATES = (0.01, 0.005, 0.02, 0.0025, 0.04, 0.00125, 0.08)
MIDDLE = (0.064, 0.128, 0.032)


class Done:
    """Finished runs, as they come."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.runs = Runs(rows)

    @classmethod
    def read(cls, files: Iterable[Path]) -> Done:
        """Those of some files of one JSON a line; a last line that a killed run has cut off is passed over."""
        return cls(row for path in files for row in json_lines(path))

    def add(self, row: Row) -> None:
        """One more."""
        self.runs.accuracy |= Runs([row]).accuracy


def _at(rates: Iterable[float], candidates: Iterable[Settings]) -> list[Settings]:
    return [replace(c, rate=rate) for rate in rates for c in candidates]


def _fixed(settings: Sequence[Settings]) -> Stage:
    return lambda done: list(settings)


def _tuning(network: str) -> Stage:
    """The method and its rival at seven rates each, the likely ones first."""
    return _fixed(_at(FROM_THE_MIDDLE, ours(network=network) + rivals(network=network)))


def _seeds_of(groups: Sequence[Sequence[Settings]], factors: Sequence[float] = (1.0,)) -> Stage:
    """The deciding seeds of the best of each group, at its best rate times each factor."""

    def runs(done: Done) -> list[Settings]:
        best = [s for s in (done.runs.best(group) for group in groups) if s is not None]
        return [replace(s, rate=s.rate * f, seed=seed) for f in factors for seed in SEEDS for s in best]

    return runs


def _both(network: str, factors: Sequence[float] = (1.0,)) -> Stage:
    return _seeds_of((ours(network=network), rivals(network=network)), factors)


def verdict_stages() -> list[Stage]:
    """The first two clauses of the rule: 116 runs, of which those of ResNet-20 take about 2.3 times as long."""
    return [
        _tuning("resnet8"),
        _both("resnet8"),
        _tuning("resnet20"),
        _both("resnet20"),
        _both("resnet8", (2.0, 0.5)),
        _both("resnet20", (2.0, 0.5)),
    ]


def one_setting_stages() -> list[Stage]:
    """The third clause: every rate at the other batch sizes, then the settings that decide, on their seeds."""
    tuned = [_tuned_at(batch) for batch in (512, 8192)]
    plain = _fixed(_at(FROM_THE_MIDDLE, [Settings("lars", 0.064)]))
    return [*tuned, plain, _seeds_that_decide]


def _tuned_at(batch: int) -> Stage:
    candidates = ours(batch=batch) + rivals(batch=batch) + [Settings("lars", 0.064, batch=batch)]
    return _fixed(_at(FROM_THE_MIDDLE, candidates))


def _seeds_that_decide(done: Done) -> list[Settings]:
    """Those that the rule, applied to what is there, says are missing: see `research.cifar10.verdict`."""
    return [replace(s, seed=seed) for s in third_clause_settings(done.runs) for seed in SEEDS]


def baselines() -> list[tuple[Settings, Sequence[float]]]:
    """What else there is, each with its seven rates: the budget is equal."""
    plain = Settings("lars", 0.064)
    scale = 2048 / BASE_BATCH
    found: list[tuple[Settings, Sequence[float]]] = [
        (plain, FROM_THE_MIDDLE),
        (replace(plain, method="tvlars", schedule="tvlars"), FROM_THE_MIDDLE),
        (replace(plain, method="vr_lars"), FROM_THE_MIDDLE),
        (replace(plain, method="signal_lars", share="network"), FROM_THE_MIDDLE),
        (replace(plain, method="nag"), PLAIN_RATES),
        (replace(plain, method="nag", warmup=3.0), PLAIN_RATES),
        (replace(plain, method="adascale", decay=1 - scale / 1000), tuple(4 * r for r in PLAIN_RATES)),
        (replace(plain, method="lamb"), LAMB_RATES),
    ]
    schedules = ("poly-2", "constant", "cosine", "steps")
    return [*found, *((replace(plain, method="clars", schedule=schedule), CLARS_RATES) for schedule in schedules)]


def baseline_stages() -> list[Stage]:
    """Seven rates of each, then five seeds at the best."""
    tuned = [replace(s, rate=rates[i]) for i in range(len(RATES)) for s, rates in baselines()]
    return [_fixed(tuned), _seeds_of([[s] for s, _ in baselines()])]


def variants() -> list[Settings]:
    """Other n, powers and averages; the derived factor, with momentum on both sides of 0.9."""
    one = ours()[0]
    found = [replace(one, n=n) for n in (4.0, 64.0)]  # B / 128 is 16 at B = 2,048
    found += [replace(one, power=p) for p in (0.5, 2.0)] + [replace(one, decay=d) for d in (0.8, 0.95, 0.98, 0.99)]
    for momentum in (0.9, 0.8, 0.95):
        n = (1 + momentum) / (1 - momentum)  # derived
        found += [replace(one, form="sum", power=0.5, n=round(n, 6), momentum=momentum)]
        found += [replace(one, momentum=momentum)] if momentum != 0.9 else []
    return [*found, replace(one, form="sum", n=10.0), replace(one, form="sum", power=0.5, n=50.0)]


def variant_stages() -> list[Stage]:
    """Three rates of each, then three seeds at the best; n = B / 128 at the other batch sizes."""
    other = [replace(ours()[0], n=batch / BASE_BATCH, batch=batch) for batch in (512, 8192)]

    def seeds(done: Done) -> list[Settings]:
        best = [done.runs.best([v]) for v in variants()]
        return [replace(s, seed=seed) for s in best if s is not None for seed in SEEDS[:3]]

    return [_fixed(_at(MIDDLE, variants() + other)), seeds]


BATCHES, TUNED_AT, MOST_EPOCHS = (128, 256, 512, 1024, 2048, 4096, 8192), 512, 48


def batch_stages() -> list[Stage]:
    """One setting for many batch sizes: tuned at 512, then run at all others as it is; and each tuned there.

    At equal samples (12 epochs), and at equal steps as far as 48 epochs go. A rate relative to the weights is kept as
    it is; Nesterov's is scaled with B.
    """
    plain = Settings("lars", 0.064, batch=TUNED_AT)
    methods = [replace(plain, method="signal_lars"), plain, replace(plain, warmup=3.0)]
    methods += [replace(plain, method="clars", schedule="constant")]
    nesterov = replace(plain, method="nag", warmup=3.0)
    tuned = _at(FROM_THE_MIDDLE, methods) + _at([r / 4 for r in PLAIN_RATES], [nesterov])

    def everywhere(done: Done) -> list[Settings]:
        best = [s for s in (done.runs.best([m]) for m in [*methods, nesterov]) if s is not None]
        at = [moved(s, batch) for batch in BATCHES for s in best]
        steps = [replace(s, epochs=s.epochs * s.batch // TUNED_AT) for s in at]
        return at + [s for s in steps if 1 <= s.epochs <= MOST_EPOCHS]

    def envelope(done: Done) -> list[Settings]:
        return [s for b in BATCHES for s in _at(FROM_THE_MIDDLE, [moved(m, b) for m in methods])]

    return [_fixed(tuned), everywhere, envelope]


def moved(s: Settings, batch: int) -> Settings:
    """A setting at another batch size, untuned: only Nesterov's rate is scaled with B."""
    rate = s.rate * batch / s.batch if s.method == "nag" else s.rate
    return replace(s, batch=batch, rate=rate, chunk=min(s.chunk, batch))


PARTS: dict[str, Callable[[], list[Stage]]] = {
    "verdict": verdict_stages,
    "one-setting": one_setting_stages,
    "baselines": baseline_stages,
    "variants": variant_stages,
    "batches": batch_stages,
}


def stages(parts: Iterable[str] = tuple(PARTS), *, tiny: bool = False) -> list[Stage]:
    """The stages of some parts, in this order; a run that is done already is left out.

    Args:
        parts: Names in `PARTS`.
        tiny: Two runs of a few steps from each stage; stages that rest on others find nothing.
    """
    plan = [stage for part in parts for stage in PARTS[part]()]

    def new(stage: Stage) -> Stage:
        def runs(done: Done) -> list[Settings]:
            made = [_shrunk(s) for s in stage(done)[:2]] if tiny else stage(done)
            return [s for s in dict.fromkeys(made) if s not in done.runs]

        return runs

    return [new(stage) for stage in plan]


def stages_of(path: Path) -> list[Stage]:
    """The stages of a file: under `stages`, each a list of settings with several `rates`, over what is `common`.

    Args:
        path: YAML.
    """
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))

    def stage(entries: list[dict[str, Any]]) -> Stage:
        def runs(done: Done) -> list[Settings]:
            made = [Settings(**plan["common"], **_without_rates(e), rate=rate) for e in entries for rate in e["rates"]]
            return [s for s in made if s not in done.runs]

        return runs

    return [stage(entries) for entries in plan["stages"]]


def _without_rates(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k != "rates"}


def _shrunk(s: Settings) -> Settings:
    return replace(s, batch=64, chunk=32, epochs=1, width=4, network="resnet8")
