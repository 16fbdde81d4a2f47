"""Every table and picture of the study from its kept runs: `python -m research.cifar10.report --help`.

Nothing is typed in by hand: the page, README.md, is made of what is in the parquet file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_clars.hub.markdown import table
from research.cifar10 import figures
from research.cifar10.choosing import SEEDS, Row, Runs
from research.cifar10.plan import TUNED_AT, moved
from research.cifar10.rows import MADE_BY, read_runs
from research.cifar10.settings import Settings, kind
from research.cifar10.tables import agreement, heading, method_table, named, number, place
from research.cifar10.verdict import HEADLINES, decide, in_setting, words

RULE = Path(__file__).with_name("verdict.yaml")
FULL, SMALL = (16, 12), (8, 4)  # width and epochs of ResNet-8: the study's, and what a CPU can do of it


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draw every picture that the runs allow; the names of those that were drawn."""
    given = [r for r in rows if r["made_by"] == "prototype"]
    cpu, gpu = ([r for r in rows if r["made_by"] == "product" and r["device"] == d] for d in ("cpu", "cuda"))
    names = []

    def picture(name: str, draw_to: Callable[..., None], *arguments: Any) -> None:
        draw_to(folder / name, *arguments)
        names.append(name)

    for name, group in (("rates.png", gpu or given), ("rates_cpu.png", cpu)):
        if found := _rates(group):
            picture(name, figures.plot_rates, *found)
    own = {"method": "signal_lars", "network": "resnet8", "form": "gain", "n": 16.0, "seed": 0}
    factor = {"method": "signal_lars", "network": "resnet8", "form": "sum", "n": 50.0, "power": 0.5, "seed": 0}
    for name, group, fixed, what in (
        ("shares.png", gpu or given, own if gpu else factor, "SignalLARS" if gpu else "LARS x [1 + 49 s]^(-1/2)"),
        ("shares_cpu.png", cpu, own, "SignalLARS"),
    ):
        if measured := best_by_batch(group, fixed):
            picture(name, figures.plot_shares, measured, f"{what}, {_short(next(iter(measured.values())))}")
    if shown := run_with_shares(gpu or cpu):
        title = f"Share of signal in each layer: {heading(place(shown)).split(':')[0]}"
        picture("layers.png", figures.plot_layers, shown, title)
    if lines := by_batch(gpu) or by_batch(given):
        best = envelope(gpu if by_batch(gpu) else given)
        picture("batches.png", figures.plot_batches, lines, best, "Each method tuned at each batch size, one seed")
    for name, group, size in (("one_setting.png", gpu, FULL), ("one_setting_cpu.png", cpu, SMALL)):
        if lines := one_setting(group, size):
            title = f"Tuned at B = 512, run as it is at the others: width {size[0]}, {size[1]} epochs"
            picture(name, figures.plot_batches, lines, envelope(group, size), title)
    return names


def run_with_shares(rows: Iterable[Row]) -> Row | None:
    """The most accurate run at B = 2,048 whose layers' shares of signal were measured: LARS has none."""
    kept = [r for r in rows if any(map(len, r["signal"])) and r["batch"] == 2048 and r["seed"] == 0]
    return max(kept, key=lambda r: r["accuracy"], default=None)


def _short(row: Row) -> str:
    """Network and maker, for a title."""
    network, maker = heading(place(row)).split(", B =")[0], heading(place(row)).split(": ")[1]
    return f"{network}: {maker}"


def _rates(rows: Sequence[Row]) -> tuple[Runs, list[tuple[str, Settings]], str] | None:
    """SignalLARS and LARS with each warmup and without, on ResNet-8 at B = 2,048; None below two lines of two rates."""
    here = [r for r in rows if (r["network"], r["batch"]) == ("resnet8", 2048)]
    if not here:
        return None
    first = Settings.of(here[0])
    base = Settings("lars", 1.0, epochs=first.epochs, width=first.width)
    runs = Runs(here)
    warmups = sorted({s.warmup for s in runs.accuracy if s.method == "lars" and s.warmup})
    lines = [("SignalLARS, no warmup", replace(base, method="signal_lars"))]
    lines += [(f"LARS, warmup of {w:g} of {base.epochs} epochs", replace(base, warmup=w)) for w in warmups]
    lines += [("LARS, no warmup", base)]
    title = heading(place(here[0])).replace(": by", "\nby")
    lines = [(name, s) for name, s in lines if runs.rates(s)]
    return (runs, lines, title) if sum(len(runs.rates(s)) > 1 for _, s in lines) > 1 else None


def best_by_batch(rows: Sequence[Row], fixed: dict[str, Any]) -> dict[str, Row]:
    """The best run at each batch size, of one width and so many epochs: those that ran at the most batch sizes.

    Args:
        rows: Kept runs.
        fixed: What they must be.

    Returns:
        {name for the legend: run}.
    """
    by_size: dict[tuple[int, int], dict[int, Row]] = {}
    for r in sorted((r for r in rows if all(r[k] == v for k, v in fixed.items())), key=lambda r: r["accuracy"]):
        by_size.setdefault((r["width"], r["epochs"]), {})[r["batch"]] = r
    _, best = max(by_size.items(), key=lambda item: (len(item[1]), item[0]), default=((0, 0), {}))
    return {f"B = {batch:,} ({figures.updates(r):,} updates)": r for batch, r in sorted(best.items())}


def envelope(rows: Sequence[Row], size: tuple[int, int] = FULL) -> dict[int, float]:
    """{B: the best accuracy of all methods and rates on seed 0}, of ResNet-8 of a width and so many epochs."""
    found: dict[int, float] = {}
    for s, accuracy in Runs(_of_size(rows, size)).accuracy.items():
        if s.seed == 0:
            found[s.batch] = max(accuracy, found.get(s.batch, 0.0))
    return found


def by_batch(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """{method: {B: accuracy at its best rate there}} on seed 0, of what ran at two batch sizes or more."""
    found: dict[str, dict[int, float]] = {}
    for s, accuracy in Runs(_of_size(rows, FULL)).accuracy.items():
        if s.seed == 0:
            line = found.setdefault(named(s), {})
            line[s.batch] = max(accuracy, line.get(s.batch, 0.0))
    return {name: line for name, line in sorted(found.items()) if len(line) > 1}


def one_setting(
    rows: Sequence[Row], size: tuple[int, int] = FULL, *, equal_steps: bool = False
) -> dict[str, dict[int, float]]:
    """{method: {B: accuracy at the rate that was best at B = 512}} on seed 0, of what ran at two batch sizes or more.

    Args:
        rows: Of one maker.
        size: Width and epochs of ResNet-8.
        equal_steps: As many updates at every B, in place of as many samples.
    """
    runs = Runs(rows)
    found = tuned_once(runs, size, equal_steps=equal_steps)
    return {name: {b: runs.accuracy[s] for b, s in line.items()} for name, line in found.items()}


def tuned_once(runs: Runs, size: tuple[int, int], *, equal_steps: bool) -> dict[str, dict[int, Settings]]:
    """{method: {B: its setting with seed 0 at the rate that was best at B = 512}}; see `one_setting`."""
    width, epochs = size
    known = [s for s in runs.accuracy if (s.network, s.width) == ("resnet8", width)]
    sizes = sorted({s.batch for s in known})
    found: dict[str, dict[int, Settings]] = {}
    for s in {kind(s): s for s in known if (s.batch, s.epochs) == (TUNED_AT, epochs)}.values():
        best = runs.best([replace(s, seed=0)])
        if best is not None:
            at = {b: moved(best, b) for b in sizes}
            if equal_steps:
                at = {b: replace(m, epochs=m.epochs * b // TUNED_AT) for b, m in at.items()}
            found[f"{named(best)} at {best.rate:g}"] = {b: m for b, m in at.items() if m in runs}
    return {name: line for name, line in sorted(found.items()) if len(line) > 1}


def _of_size(rows: Sequence[Row], size: tuple[int, int]) -> list[Row]:
    return [r for r in rows if (r["network"], r["width"], r["epochs"]) == ("resnet8", *size)]


def batch_table(rows: Sequence[Row], size: tuple[int, int] = FULL, *, equal_steps: bool = False) -> str:
    """One setting for many batch sizes: each method at the rate that was best at B = 512, and the best of all.

    Args:
        rows: Of one maker.
        size: Width and epochs of ResNet-8.
        equal_steps: See `one_setting`; the best of all is of equal samples, and left out.
    """
    runs, best = Runs(rows), envelope(rows, size)
    lines = tuned_once(runs, size, equal_steps=equal_steps)
    sizes = sorted({b for line in lines.values() for b in line})
    if not lines:
        return "Not run yet."
    cells = [[name, *(_over_seeds(runs, line.get(b)) for b in sizes)] for name, line in lines.items()]
    header = ["tuned at B = 512, %", *(f"B = {b:,}" for b in sizes)]
    whole = [] if equal_steps else [["the best of all, tuned there", *(number(best.get(b)) for b in sizes)]]
    return table(header, cells + whole)


def _over_seeds(runs: Runs, settings: Settings | None) -> str:
    """Seed 0's accuracy, and behind it the mean and range of all seeds where there are others."""
    found = None if settings is None else runs.seeds(settings, (0, *SEEDS))
    if settings is None or found is None or len(found.values) == 1:
        return number(None if settings is None else runs.accuracy[settings])
    spread = f"{min(found.values):.1f}-{max(found.values):.1f}"
    return f"{runs.accuracy[settings]:.1f} (of {len(found.values)} seeds {found.mean:.1f}, {spread})"


def page(rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """The study's page.

    Args:
        rows: Kept runs.
        pictures: Names of those that are beside it.
    """
    by_maker = {maker: [r for r in rows if r["made_by"] == maker] for maker in MADE_BY}
    on_gpu, on_cpu = ([r for r in by_maker["product"] if r["device"] == device] for device in ("cuda", "cpu"))
    counts = f"{len(by_maker['prototype'])} runs of a prototype on an H100, {len(by_maker['product'])} of the "
    counts += f"product's classes ({len(on_cpu)} of them on a CPU)"
    captions = {
        "rates.png": "Accuracy over the rate; hollow: other seeds.",
        "rates_cpu.png": "The same by the product's classes on a CPU: a network half as wide, a third of the epochs.",
        "shares.png": "The share of signal s_k of the median layer: it shows how long a batch size needs small steps.",
        "shares_cpu.png": "The same by the product's classes on a CPU.",
        "layers.png": "The same for every layer of one run.",
        "batches.png": "Each method at its own best rate at each batch size, below the best of all.",
        "one_setting.png": "Each method at the rate that was best at B = 512, below the best of all.",
        "one_setting_cpu.png": "The same by the product's classes on a CPU: three rates at most, 4 epochs.",
    }
    parts = [
        "# Does LARS need a warmup, if it measures how much of its gradient is signal?",
        "CIFAR-10, 45,000 images to train and 5,000 held out; how the method works and what is proven:\n"
        "[why](../../docs/why.md). This page is made by one command from `runs.parquet`:\n\n"
        "```bash\npython -m research.cifar10.report\n```",
        f"Kept: {counts}.",
        "## The verdict",
        f"The rule was written before the runs that it judges, and only those of the product's classes count:\n\n"
        f"```yaml\n{_rule()}\n```",
        _verdict(by_maker["product"]),
        "### What the rule finds in the prototype's runs",
        "They suggested the method, and so they cannot confirm it. The rule, applied to them all the same:",
        words(decide(by_maker["prototype"])),
        "## Pictures",
        *(f"![{captions[name]}]({name})\n\n{captions[name]}" for name in pictures),
        "## Do the product's classes repeat the prototype's runs?",
        "Three runs were named before they were made (`research/cifar10/repeats.yaml`), and what counts as agreement: "
        "at most three standard deviations from the prototype's seeds.",
        agreement(rows),
        "## One setting for many batch sizes",
        "The rate that was best at B = 512, used as it is at the others, 12 epochs each, one seed; below it the best "
        "of all methods, tuned there. By the product's classes (`--parts batches` of the runs' command):",
        batch_table(on_gpu),
        "The same with as many updates as at B = 512, as far as 48 epochs go:",
        batch_table(on_gpu, equal_steps=True),
        "By the product's classes on a CPU (`research/cifar10/one_setting_cpu.yaml`): a network half as wide, "
        "4 epochs each, three rates, chosen on one seed; more seeds (`one_setting_seeds.yaml`) as far as they ran:",
        batch_table(on_cpu, SMALL),
        "By the prototype, as far as its grids met:",
        batch_table(by_maker["prototype"]),
        "## All methods",
        "The best rate is that of seed 0; mean and range are over all seeds at it, seed 0 among them; the columns "
        "beside are of seed 0.",
    ]
    for key in sorted({place(r) for r in rows}, key=lambda k: (MADE_BY.index(k[0]), k[1:4], k[5])):
        parts += [f"### {heading(key)}", method_table([r for r in rows if place(r) == key])]
    return "\n\n".join(parts) + "\n"


def _verdict(rows: Sequence[Row]) -> str:
    if any(in_setting(r) for r in rows):
        return words(decide(rows))
    return (
        f"**{HEADLINES['open']}** No run of the rule's setting has been made with the product's classes: it takes a "
        "GPU. Runs on a CPU, below, are in float32 and of one to three seeds, and most of them are of a network half "
        "as wide and a third as long. On a GPU,\n\n"
        "```bash\npython -m research.cifar10.run --data train.parquet --out runs.jsonl --parts verdict one-setting\n"
        "python -m research.cifar10.rows --runs runs.jsonl && python -m research.cifar10.report\n```\n\n"
        "makes them, the most important first; a file that one session has begun is gone on with at the next."
    )


def _rule() -> str:
    lines = RULE.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def main() -> int:
    """Make the page and its pictures."""
    parser = argparse.ArgumentParser(description="Make every table and picture of the study from its kept runs.")
    parser.add_argument("--runs", type=Path, default=Path("model_cards/cifar10/runs.parquet"), help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("model_cards/cifar10"), help="a folder (%(default)s)")
    args = parser.parse_args()
    rows = read_runs(args.runs)
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = draw(rows, args.output)
    (args.output / "README.md").write_text(page(rows, pictures), encoding="utf-8")
    accuracies = [r["accuracy"] for r in rows]
    print(f"{len(rows)} runs, median accuracy {statistics.median(accuracies):.1f} %: {args.output / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
