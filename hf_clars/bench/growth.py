"""How this package's cost, as a ratio to the plain step, changes with batch, image size, width and depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hf_clars.bench.layers import chosen_forms
from hf_clars.bench.networks import Network
from hf_clars.bench.timing import Ratio, alternate, ratio
from hf_clars.bench.ways import HfClars, Plain
from hf_clars.grad_norms.rules.costs import Form
from hf_clars.models import CifarResNetConfig, CifarResNetForImageClassification

AXES: dict[str, tuple[int, ...]] = {
    "batch": (8, 16, 32, 64, 128),
    "image_size": (16, 24, 32, 48, 64),
    "width": (8, 16, 32, 64),
    "depth": (8, 14, 20, 32, 44),
}
"""What is varied, one at a time; the rest is as in `BASE`."""

UNITS = {
    "batch": "batch (images)",
    "image_size": "image side (pixels)",
    "width": "width (channels of the first stage)",
    "depth": "depth (layers)",
}
"""Labels of the axes."""

BASE = {"batch": 32, "image_size": 32, "width": 16, "depth": 14}

TINY_AXES: dict[str, tuple[int, ...]] = {
    "batch": (2, 3, 4, 6),
    "image_size": (8, 12, 16, 20),
    "width": (4, 6, 8, 12),
    "depth": (8, 14, 20, 26),
}
TINY_BASE = {"batch": 2, "image_size": 8, "width": 4, "depth": 8}
"""For trying the benchmark itself."""


@dataclass(frozen=True)
class GrowthRow:
    """One point of one axis.

    Attributes:
        axis: What was varied.
        value: Its value.
        plain_seconds: Of each plain step.
        seconds: Of each step with norms.
        ratio: Of the two.
        forms: How many layers' norms took each form.
    """

    axis: str
    value: int
    plain_seconds: list[float]
    seconds: list[float]
    ratio: Ratio
    forms: dict[Form, int]


def measure_growth(
    rounds: int, axes: Mapping[str, tuple[int, ...]] = AXES, base: Mapping[str, int] = BASE
) -> list[GrowthRow]:
    """Time residual networks for small images (BatchNorm, depth 6n + 2) with and without norms.

    Args:
        rounds: How often each point is timed.
        axes: {axis: values}, of "batch", "image_size", "width" and "depth".
        base: The value of each axis while another is varied.

    Returns:
        One row a value of an axis.
    """
    return [
        _measure_point(rounds, axis, value, {**base, axis: value}) for axis, values in axes.items() for value in values
    ]


def _measure_point(rounds: int, axis: str, value: int, shape: Mapping[str, int]) -> GrowthRow:
    def make(image_size: int, num_labels: int) -> nn.Module:
        config = CifarResNetConfig(depth=shape["depth"], width=shape["width"], image_size=image_size)
        config.num_labels = num_labels
        return CifarResNetForImageClassification(config)

    network = Network(f"{axis} {value}", make, shape["image_size"], shape["batch"], num_labels=10)
    ways = [way_class(network.build(), *network.data()) for way_class in (Plain, HfClars)]
    seconds = alternate({way.name: way.step for way in ways}, rounds, label=network.name)
    for way in ways:
        way.close()
    plain, own = seconds[Plain.name], seconds[HfClars.name]
    return GrowthRow(axis, value, plain, own, ratio(own, plain), chosen_forms(network))
