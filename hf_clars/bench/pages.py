"""The pages of the benchmark: each measures, prints its table, and leaves its raw figures and its picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_clars.bench import growth
from hf_clars.bench.compiled import COMPILED, measure_compiled
from hf_clars.bench.cost import measure_cost, measure_memory
from hf_clars.bench.figures import save_cost_page, save_growth_page
from hf_clars.bench.layers import LayerRow, measure_layers
from hf_clars.bench.networks import GROUP_NORM_SUFFIX, LARGE, NETWORKS, Network
from hf_clars.bench.optimizer_step import measure_optimizers
from hf_clars.bench.overhead import STACKS, measure_overhead
from hf_clars.bench.report import Rows, milliseconds, ratio_or_note, save_json, text_table
from hf_clars.bench.subset import measure_subset

USUAL = tuple(name for name in NETWORKS if name not in LARGE)

Columns = dict[str, Callable[[Any], object]]


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        networks: Names of `NETWORKS`; empty: what each page usually measures.
        rounds: How often each thing is timed.
        threads: Threads of torch.
        output: Folder of the JSON and the pictures.
        quick: Tiny sizes, to see whether everything runs; the figures then mean nothing.
    """

    networks: tuple[str, ...]
    rounds: int
    threads: int
    output: Path
    quick: bool = False

    def chosen(self, usual: Iterable[str]) -> list[Network]:
        """The networks that were named, or these if none was."""
        names = self.networks or tuple(usual)
        return [NETWORKS[name].quick() if self.quick else NETWORKS[name] for name in names]

    def rows_of(self, page: str, usual: Iterable[str], measure: Callable[[Network], Rows]) -> list[Any]:
        """Measure each network; what there is stands in the JSON after each, so that an end before the last loses one.

        Args:
            page: Its name.
            usual: The networks if none was named.
            measure: The rows of one network.
        """
        rows: list[Any] = []
        for network in self.chosen(usual):
            rows += measure(network)
            save_json(self.output, page, rows)
        return rows


def run_cost(settings: Settings) -> None:
    """Time of every way."""
    rows = settings.rows_of("cost", USUAL, lambda network: measure_cost(network, settings.rounds))
    columns: Columns = {
        "network": lambda row: row.network,
        "batch": lambda row: row.batch,
        "pixels or tokens": lambda row: row.image_size,
        "way": lambda row: row.way,
        "ms a step": lambda row: milliseconds(row.seconds),
        "first step": lambda row: row.first,
        "times the plain step (quartiles)": lambda row: ratio_or_note(row.ratio, row.note),
    }
    _finish(settings, "cost", "Time of gradient and per-sample norms", rows, columns)
    print(save_cost_page(rows, settings.output / "cost.png"))


def run_memory(settings: Settings) -> None:
    """Peak memory of every way."""
    rows = settings.rows_of("memory", USUAL, lambda network: measure_memory(network, settings.threads))
    columns: Columns = {
        "network": lambda row: row.network,
        "batch": lambda row: row.batch,
        "pixels or tokens": lambda row: row.image_size,
        "way": lambda row: row.way,
        "peak MiB": lambda row: row.mebibytes.get("peak"),
        "times the plain step's": lambda row: ratio_or_note(row.ratio, row.note),
    }
    title = "Peak memory of three steps, above what the imported program holds (weights and activations included)"
    _finish(settings, "memory", title, rows, columns)


def run_optimizer(settings: Settings) -> None:
    """Time of the optimizer step alone."""
    network = NETWORKS["resnet20" if settings.quick else "resnet-50"].resized(image_size=32, batch=2)
    rows = measure_optimizers(network, settings.rounds)
    columns: Columns = {
        "optimizer": lambda row: row.optimizer,
        "ms a step": lambda row: milliseconds(row.seconds),
        "numbers kept a weight": lambda row: row.numbers_per_weight,
        "times SGD (quartiles)": lambda row: ratio_or_note(row.ratio, row.note),
    }
    title = f"The optimizer step alone: {network.name}, {rows[0].tensors} tensors, gradients and norms ready"
    _finish(settings, "optimizer", title, rows, columns)


def run_subset(settings: Settings) -> None:
    """Cost of measuring some samples of an accumulated batch."""
    sizes = {"total": 64, "micro": 8, "samples": 16} if settings.quick else {}
    rows = [measure_subset(NETWORKS["resnet20"], settings.rounds, **sizes)]
    columns: Columns = {
        "network": lambda row: row.network,
        "accumulated batch": lambda row: row.total,
        "micro-batch": lambda row: row.micro,
        "measured": lambda row: row.samples,
        "ms plain": lambda row: milliseconds(row.plain_seconds),
        "ms with norms": lambda row: milliseconds(row.seconds),
        "times plain (quartiles)": lambda row: row.ratio,
    }
    _finish(settings, "subset", "Norms of some samples of an accumulated batch", rows, columns)


def run_growth(settings: Settings) -> None:
    """How the cost changes with size."""
    axes, base = (growth.TINY_AXES, growth.TINY_BASE) if settings.quick else (growth.AXES, growth.BASE)
    rows = growth.measure_growth(settings.rounds, axes, base)
    columns: Columns = {
        "varied": lambda row: growth.UNITS[row.axis],
        "value": lambda row: row.value,
        "ms plain": lambda row: milliseconds(row.plain_seconds),
        "ms with norms": lambda row: milliseconds(row.seconds),
        "outer / gram / product": lambda row: " / ".join(str(n) for n in row.forms.values()),
        "times plain (quartiles)": lambda row: row.ratio,
    }
    fixed = ", ".join(f"{axis} {value}" for axis, value in base.items())
    _finish(settings, "growth", f"Cost against size (otherwise: {fixed})", rows, columns)
    print(save_growth_page(rows, settings.output / "growth.png"))


def run_layers(settings: Settings) -> None:
    """The cost model against the clock."""
    usual = tuple(name for name in USUAL if not name.endswith(GROUP_NORM_SUFFIX))
    rows = settings.rows_of("layers", usual, lambda network: measure_layers(network, settings.rounds))

    def milliseconds_of(seconds: Callable[[LayerRow], dict[str, float]], form: str) -> Callable[[Any], object]:
        return lambda row: seconds(row).get(form, float("nan")) * 1e3

    columns: Columns = {
        "network": lambda row: row.network,
        "layer": lambda row: row.layer,
        "alike": lambda row: row.count,
        "B": lambda row: row.use.samples,
        "T": lambda row: row.use.positions,
        "p": lambda row: row.use.width_in * math.prod(row.use.kernel),
        "d": lambda row: row.use.width_out,
        "G": lambda row: row.use.groups,
        "weight grad, ms": lambda row: row.weight_grad * 1e3,
        "gram, predicted": milliseconds_of(lambda row: row.predicted, "gram"),
        "measured": milliseconds_of(lambda row: row.measured, "gram"),
        "product, predicted": milliseconds_of(lambda row: row.predicted, "product"),
        "measured ": milliseconds_of(lambda row: row.measured, "product"),
        "taken": lambda row: row.form,
    }
    title = "The cost model, layer by layer: milliseconds beyond the ordinary weight gradient (nan: not timed)"
    _finish(settings, "layers", title, rows, columns)


def run_compiled(settings: Settings) -> None:
    """Cost in models that are compiled as a whole."""
    rows = settings.rows_of("compiled", COMPILED, lambda network: [measure_compiled(network, settings.rounds)])
    columns: Columns = {
        "network": lambda row: row.network,
        "input": lambda row: " x ".join(map(str, row.shape)),
        "ms plain, compiled": lambda row: milliseconds(row.plain_seconds),
        "ms with norms, compiled": lambda row: milliseconds(row.seconds),
        "times plain (quartiles)": lambda row: row.ratio,
        "largest error of a norm": lambda row: f"{row.largest_error:.0e}",
        "of the gradient": lambda row: f"{row.gradient_error:.0e}",
    }
    _finish(settings, "compiled", "Norms in compiled models, against the compiled plain model", rows, columns)


def run_overhead(settings: Settings) -> None:
    """The engine's own time."""
    rows = [measure_overhead(name, settings.rounds) for name in STACKS]
    columns: Columns = {
        "layers": lambda row: f"{row.depth} x {row.layers}",
        "plain, us a layer": lambda row: f"{row.plain:.0f}",
        "with norms": lambda row: f"{row.with_norms:.0f}",
        "norms cost": lambda row: f"{row.overhead:.0f}",
    }
    _finish(settings, "overhead", "The engine's own time on tiny tensors: microseconds a layer and pass", rows, columns)


PAGES: dict[str, Callable[[Settings], None]] = {
    "cost": run_cost,
    "memory": run_memory,
    "optimizer": run_optimizer,
    "subset": run_subset,
    "growth": run_growth,
    "layers": run_layers,
    "overhead": run_overhead,
    "compiled": run_compiled,
}
"""What `--pages` can name."""


def _finish(settings: Settings, page: str, title: str, rows: Rows, columns: Columns) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n## {title}\n\nOn {device}:\n\n{text_table(rows, columns)}")
    print(f"\n{save_json(settings.output, page, rows)}")
