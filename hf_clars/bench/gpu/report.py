"""From the kit's JSON to a page and a picture; on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_clars.bench.gpu.networks import NETWORKS

_WORDS = ("skipped", "error", "note")
NOTES = {
    "peers": "Weights and inputs in bf16, without autocast, images in channels_last; ratio: to the plain step of the "
    "same round, wall time; GiB: what a step holds beyond what was held before it.",
    "trainer": "Steady state on tensors that are on the device, the rows in turn; gradients are clipped in none. "
    "Trainer has torch's SGD with Nesterov momentum; `nag` is the same update through ClarsTrainer.",
}
"""Stages with a table of rows for each network, and what the table says of itself."""


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write `gpu.md`, and `gpu.png` where matplotlib is installed.

    Args:
        results: The kit's JSON.
        folder: Where to.
    """
    about, stages = results["machine"], results["stages"]
    lines = ["# What exact per-sample norms cost on a GPU", ""]
    if results["tiny"]:
        lines += ["**Tiny sizes: this shows that every stage runs, and measures nothing.**", ""]
    lines += [
        f"{about['card']}, torch {about['torch']}, Triton {about['triton']}; bf16 autocast, images in channels_last,"
    ]
    lines += ["every sample of every layer; a step is forward and backward pass.", "", *network_table(stages), ""]
    for name, figures in stages.items():
        if name not in NETWORKS:
            lines += [f"## {name}", "", *(table_of_rows(figures) if name in NOTES else _entries(figures)), ""]
            lines += [NOTES[name], ""] if name in NOTES else []
    (folder / "gpu.md").write_text("\n".join(lines), encoding="utf-8")
    _draw(stages, folder / "gpu.png", about["card"])


def network_table(stages: dict[str, Any]) -> list[str]:
    """The table of whole networks, as markdown lines.

    Args:
        stages: The stages of the kit's JSON.
    """
    lines = [
        "| network | plain, ms | with norms, ms | ratio (range) | GPU busy ratio | issue time, ms | memory ratio |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in NETWORKS:
        f = stages.get(name, {"skipped": "not run"})
        if "ratio" not in f:
            lines.append(f"| {name} | not measured: {str(f.get('error', f.get('skipped')))[-120:]!r} | | | | | |")
            continue
        memory = f["norms GiB"] / f["plain GiB"] if f.get("plain GiB") else None
        lines.append(
            f"| {name} | {f['plain ms']:.1f} | {f['norms ms']:.1f} | **{f['ratio']:.3f}** ({f['ratio low']:.2f}-"
            f"{f['ratio high']:.2f}) | {_number(f.get('busy ratio'))} | {f['plain issue ms']:.0f}, "
            f"{f['norms issue ms']:.0f} | {_number(memory)} |"
        )
    return lines


def table_of_rows(figures: dict[str, Any]) -> list[str]:
    """A table of a stage that measures several things on each of several networks, as markdown lines.

    Args:
        figures: {network: {row: figures, or why there are none}}, and what concerns the whole stage.
    """
    networks = {name: rows for name, rows in figures.items() if isinstance(rows, dict)}
    columns = list(dict.fromkeys(key for rows in networks.values() for row in rows.values() for key in row))
    columns = [key for key in columns if key not in _WORDS]
    lines = [f"| network | way | {' | '.join([*columns, 'note'])} |", "|---" * (len(columns) + 3) + "|"]
    for network, rows in networks.items():
        for way, row in rows.items():
            note = "; ".join(str(row[key]).replace("|", "/") for key in _WORDS if key in row)
            cells = [_number(row.get(key)) for key in columns]
            lines.append(f"| {network} | {way} | {' | '.join([*cells, note])} |")
    about = {name: value for name, value in figures.items() if name not in networks}
    return ([*lines, ""] if networks else []) + _entries(about)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) and value < 1000 else f"{value:.0f}"


def _entries(figures: dict[str, Any]) -> list[str]:
    return [f"- {key}: {_value(value)}" for key, value in figures.items()]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(v)}" for key, v in value.items())
    return str(value)


def _draw(stages: dict[str, Any], path: Path, card: str) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = [name for name in NETWORKS if "ratio" in stages.get(name, {})]
    figure = Figure(figsize=(7, 0.6 * len(names) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ratios = [stages[name]["ratio"] for name in names]
    bars = axes.barh(names, ratios, color="#4878a8")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max([*ratios, 1.0]))
    axes.set_xlabel("time of a step with the norms of every sample, over a plain step")
    axes.set_title(card, fontsize=10)
    figure.savefig(path, dpi=130)
