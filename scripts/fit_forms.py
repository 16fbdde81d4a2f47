"""From measured times of the forms on a GPU to the file that the package ships: times by shape, and the cost model.

    python scripts/fit_forms.py H100.json [GPU.json] --output hf_clars/grad_norms/rules/h100.json

The first file is the study's (sections "forms in torch", "kernels"), the second what `hf-clars bench --gpu` writes; its
stage "forms" replaces times of the same shapes. A time is the least of the tiles and repetitions that were measured.
The model's constants are a least-squares fit of relative errors, none below what the card's measured speeds allow.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np

from hf_clars.grad_norms.rules.costs import Form, Kind, WeightUse, amounts

Times = dict[Kind, dict[str, dict[Form, float]]]
"""Milliseconds by kind, `str(WeightUse)` and form."""

KINDS: tuple[Kind, ...] = ("linear", "convolution", "pointwise", "torch", "torch beside")
KERNELS_OF: dict[Kind, tuple[Kind, ...]] = dict.fromkeys(("convolution", "pointwise"), ("convolution", "pointwise"))
"""These share their kernels, and are fitted together."""

CAPABILITY = "9.0"
"""Compute capability of the study's card, an H100: its JSON does not tell. Cards of the same one may take its times."""

FEW_CHANNELS = 16
"""Below this a convolution has one kernel only: nothing to choose."""


def main() -> None:
    """Parse, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's JSON")
    parser.add_argument("kit", type=Path, nargs="?", help="the JSON of `hf-clars bench --gpu`")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    study = json.loads(args.study.read_text(encoding="utf-8"))
    kit = json.loads(args.kit.read_text(encoding="utf-8")) if args.kit else None
    args.output.write_text(json.dumps(shipped(study, kit), indent=1) + "\n", encoding="utf-8")


def shipped(study: dict[str, Any], kit: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of the file.

    Args:
        study: The study's JSON.
        kit: The kit's JSON, of the same card; None: there is none.

    Raises:
        ValueError: The kit ran on another card.
    """
    if kit and kit["machine"]["card"] != study["card"]:
        raise ValueError(f"The kit ran on {kit['machine']['card']!r}, the study on {study['card']!r}: use one card's.")
    times = times_of(study)
    for kind, by_use in (kit["stages"].get("forms", {}).get("times", {}) if kit else {}).items():
        times[kind] |= by_use
    about = {name: study[name] for name in ("card", "torch", "triton")}
    card = {"machine": about, "capability": CAPABILITY}
    speeds = {name: study[name] for name in ("bf16 TFLOP/s", "copy TB/s")}
    return (
        card | {"speeds": speeds, "float32": float32_ratio(study), "model": model_of(times, speeds)} | {"times": times}
    )


def model_of(times: Times, speeds: dict[str, float]) -> dict[str, Any]:
    """The fitted constants.

    Args:
        times: By kind, use and form.
        speeds: "bf16 TFLOP/s" and "copy TB/s".
    """
    model: dict[str, Any] = {}
    for kind in KINDS:
        found: dict[Form, list[tuple[WeightUse, float]]] = {}
        for name, forms in (row for other in KERNELS_OF.get(kind, (kind,)) for row in times[other].items()):
            use = WeightUse.named(name)
            for form, ms in forms.items():
                if kind.startswith("torch") or use.width_in >= FEW_CHANNELS:
                    found.setdefault(form, []).append((use, ms))
        own = {form for forms in times[kind].values() for form in forms} - {"grouped"}
        model[kind] = {form: fitted(kind, form, rows, speeds) for form, rows in found.items() if form in own}
    return model


def fitted(kind: Kind, form: Form, rows: Iterable[tuple[WeightUse, float]], speeds: dict[str, float]) -> dict[str, Any]:
    """Milliseconds a unit of each amount: non-negative beyond the card's speeds, with the least relative errors."""
    table = [(amounts(kind, form, use), ms) for use, ms in rows]
    names = list(table[0][0])
    a = np.array([[amount[name] for name in names] for amount, _ in table]) / np.array([[ms] for _, ms in table])
    least = {"product": 1 / speeds["bf16 TFLOP/s"], "pairs": 1 / speeds["bf16 TFLOP/s"]}
    least |= dict.fromkeys(("matrices", "patches", "operands"), 1 / speeds["copy TB/s"])
    floor = np.array([least.get(name, 0.0) for name in names])
    left, above = [i for i in range(len(names)) if a[:, i].any()], np.zeros(len(names))
    while left:
        solved = np.linalg.lstsq(a[:, left], 1 - a @ floor, rcond=None)[0]
        if (solved >= 0).all():
            above[left] = solved
            break
        left.pop(int(np.argmin(solved * np.linalg.norm(a[:, left], axis=0))))
    return {name: float(f"{value:.5g}") for name, value in zip(names, floor + above, strict=True)}


def times_of(study: dict[str, Any]) -> Times:
    """Every form's milliseconds in the study: weight gradient and norms together, or beside it the norms alone."""
    times: Times = {kind: {} for kind in KINDS}
    by_torch = study["forms in torch (batch of 128 for convolutions)"]
    for name, ms in by_torch.items():
        if not name.startswith("bn"):
            use = _use_of(name)[1]
            gram = ms.get("gram f32")
            _add(times, "torch beside", use, gram=gram, product=ms.get("product"))
            gram = gram and ms["wgrad"] + gram
            _add(times, "torch", use, gram=gram, product=ms.get("product"), grouped=ms.get("grouped x"))
    for name, ms in study["kernels, first timing"].items():
        if not name.startswith("triton bn"):
            kind, use = _use_of(name.removeprefix("triton "))
            gram = _least(ms, "gram")
            plain = min(ms["wgrad"], by_torch[name.removeprefix("triton ")]["wgrad"])
            _add(times, kind, use, gram=gram and plain + gram, product=_least(ms, "ptr", "tma", "conv"))
    in_networks = study["kernels, choice in whole networks (weight gradient and norms together)"]
    for name, entry in in_networks.items():  # these replace the first timings
        kind, use = _use_in_network(_tuple_in(name))
        ms, rows = entry["ms"], None
        if kind != "linear":
            rows = _least(ms, "tma")
            ms = {form: time for form, time in ms.items() if not form.startswith("tma")}
        _add(times, kind, use, gram=_least(ms, "gram"), product=_least(ms, "fused", "flat", "tma"), rows=rows)
    return times


def _add(times: Times, kind: Kind, use: WeightUse, **forms: float | None) -> None:
    found = {cast(Form, form): round(ms, 4) for form, ms in forms.items() if ms}
    times[kind].setdefault(str(use), {}).update(found)


def _least(ms: dict[str, float], *beginnings: str) -> float | None:
    return min((t for name, t in ms.items() if name.startswith(beginnings) and "err" not in name), default=None)


def _tuple_in(text: str) -> Any:
    """What "('conv', (256, 512, 7, 7))" says, as lists."""
    return json.loads(text.translate(str.maketrans("()'", '[]"')))


def _use_of(name: str) -> tuple[Kind, WeightUse]:
    """Of "linear (B, T, in, out)", "conv (in, out, kernel, stride, side)"."""
    family, shape = name.split(" ", 1)
    numbers = _tuple_in(shape)
    if family == "linear":
        return "linear", _linear(*numbers)
    width_in, width_out, kernel, stride, side = numbers
    return _convolution(128, width_in, width_out, kernel, stride, side)


def _use_in_network(key: tuple[Any, ...]) -> tuple[Kind, WeightUse]:
    """Of ("linear", B, T, in, out), ("conv", (B, in, side, side), out, kernel, stride)."""
    if key[0] == "linear":
        return "linear", _linear(*key[1:])
    (samples, width_in, side, _), width_out, kernel, stride = key[1:]
    return _convolution(samples, width_in, width_out, kernel, stride, side)


def _linear(samples: int, positions: int, width_in: int, width_out: int) -> WeightUse:
    return WeightUse(samples, positions, width_in, width_out, element_size=2)


def _convolution(samples: int, width_in: int, width_out: int, k: int, stride: int, side: int) -> tuple[Kind, WeightUse]:
    positions = ((side + 2 * (k // 2) - k) // stride + 1) ** 2
    use = WeightUse(samples, positions, width_in, width_out, 1, side**2 if k > 1 else 0, (k, k), element_size=2)
    return "pointwise" if k == stride == 1 else "convolution", use


def float32_ratio(study: dict[str, Any]) -> float:
    """How much longer torch's Gram form takes in float32 than in bfloat16: the median where it is long."""
    entries = study["forms in torch (batch of 128 for convolutions)"].values()
    ratios = [ms["gram f32"] / ms["gram"] for ms in entries if ms.get("gram f32", 0) > 1]
    return round(float(np.median(ratios)), 3)


if __name__ == "__main__":
    main()
