"""The rates' share of step time on 8 to 4,096 devices: `python -m benchmarks.scale --help`.

Measured here: the forward and backward pass of one device's images, the rates on the device, and how many numbers the
one all-reduce of the rates carries. Computed: the time of all-reduces, ring and tree, from a bandwidth and a latency.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_clars.bench.networks import device, logits
from hf_clars.bench.report import machine, text_table
from hf_clars.bench.timing import time_of
from hf_clars.models import build_model
from hf_clars.optim import CLARS

DESCRIPTION = """\
How much of a training step the layer rates take on many devices. Compute a step and the sizes of all messages are
measured on the device at hand; the times of all-reduces are computed from the bandwidth and the latency given here, and
nothing is assumed to overlap. With --step-ms compute that was measured on another device takes the place of this one's.
"""

Algorithm = Literal["ring", "tree"]
BYTES = 4  # float32


@dataclass(frozen=True)
class Network:
    """A link between devices.

    Attributes:
        bandwidth: Bytes a second of one device's link, each way.
        latency: Seconds until the first byte arrives.
    """

    bandwidth: float
    latency: float

    def all_reduce_seconds(self, numbers: int, devices: int, algorithm: Algorithm) -> float:
        """Time to sum a float32 vector over all devices.

        Ring: 2 (p - 1) rounds of n / p numbers. Tree: 2 log2(p) rounds of all n, up and down a binary tree; large
        messages go through a tree in pieces, one behind the other, so that their bytes count twice only.

        Args:
            numbers: Length n of the vector.
            devices: p.
            algorithm: Ring or tree.

        Returns:
            Seconds.
        """
        seconds = numbers * BYTES / self.bandwidth
        if devices == 1:
            return 0.0
        if algorithm == "ring":
            return 2 * (devices - 1) * (self.latency + seconds / devices)
        return 2 * math.ceil(math.log2(devices)) * self.latency + 2 * seconds


@dataclass(frozen=True)
class Measured:
    """What one device was measured to do.

    Attributes:
        name: The network.
        images: Images a step and device.
        parameters: Numbers that the gradient all-reduce carries.
        layers: K.
        rate_numbers: Numbers that the rates' all-reduce carries with whole weights (data parallelism).
        sharded_numbers: The same where weights are split (ZeRO, FSDP2): layer norms are summed with it.
        step_seconds: Forward and backward pass with the norms of every sample.
        rates_seconds: Norms of weights and gradients, and all rates, on the device.
    """

    name: str
    images: int
    parameters: int
    layers: int
    rate_numbers: int
    sharded_numbers: int
    step_seconds: float
    rates_seconds: float


def vit_large(num_labels: int = 1000) -> nn.Module:
    """ViT-L/16 (Dosovitskiy et al., 2021)."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            num_labels=num_labels,  # type: ignore[call-arg]
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet-50": lambda: build_model("resnet-50", num_labels=1000, image_size=224),
    "vit-large": vit_large,
}


def measure(name: str, *, images: int, image_size: int = 224, rounds: int = 3) -> Measured:
    """Measure one network on the device at hand.

    Args:
        name: Of `MODELS`.
        images: Images a step.
        image_size: Side of the images.
        rounds: Steps that are timed, after one that is not; the median counts.

    Returns:
        The figures.
    """
    torch.manual_seed(0)
    model = MODELS[name]().train().to(device())
    optimizer = CLARS(model, 0.1)
    x = torch.randn(images, 3, image_size, image_size, device=device())
    y = torch.randint(1000, (images,), device=device())

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(model(x)), y).backward()

    step_seconds, rates_seconds = [], []
    for number in range(rounds + 1):
        elapsed = time_of(step)
        rates = time_of(optimizer.layer_measures)
        if number:
            step_seconds.append(elapsed)
            rates_seconds.append(rates)
    layers, numbers = len(optimizer.layer_names), optimizer.reduction_size
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer.remove_hooks()
    return Measured(
        name,
        images,
        parameters,
        layers,
        numbers,
        numbers + 2 * layers,
        statistics.median(step_seconds),
        statistics.median(rates_seconds),
    )


@dataclass(frozen=True)
class ShareRow:
    """The rates' share of a step on so many devices.

    Attributes:
        name: The network.
        devices: How many.
        algorithm: Of the all-reduces.
        gradient_seconds: The gradients' all-reduce, not overlapped with anything.
        rates_seconds: The rates' all-reduce (split weights, the larger message) and their arithmetic.
        share: rates_seconds in (compute + gradient_seconds + rates_seconds).
    """

    name: str
    devices: int
    algorithm: Algorithm
    gradient_seconds: float
    rates_seconds: float
    share: float


def shares(
    measured: Measured, network: Network, devices: list[int], *, step_seconds: float | None = None
) -> list[ShareRow]:
    """The rates' share of the step time for each number of devices and each algorithm.

    Args:
        measured: From `measure`.
        network: The link.
        devices: Numbers of devices.
        step_seconds: Compute a step, measured on another device; None: what was measured here.

    Returns:
        One row each.
    """
    compute = measured.step_seconds if step_seconds is None else step_seconds
    rows = []
    for count in devices:
        for algorithm in ("ring", "tree"):
            gradient = network.all_reduce_seconds(measured.parameters, count, algorithm)
            summed = network.all_reduce_seconds(measured.sharded_numbers, count, algorithm)
            rates = summed + measured.rates_seconds
            rows.append(
                ShareRow(measured.name, count, algorithm, gradient, rates, rates / (compute + gradient + rates))
            )
    return rows


COLUMNS: dict[str, Callable[[ShareRow], object]] = {
    "devices": lambda row: row.devices,
    "all-reduce": lambda row: row.algorithm,
    "gradients, ms": lambda row: f"{row.gradient_seconds * 1e3:.2f}",
    "rates, ms": lambda row: f"{row.rates_seconds * 1e3:.2f}",
    "rates' share": lambda row: f"{row.share:.3%}",
}


def main() -> None:
    """Measure, compute, print."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--images", type=int, default=2, help="images a device and step (default: 2)")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512, 4096], help="(default: 8 64 512 4096)")
    parser.add_argument(
        "--bandwidth", type=float, nargs="+", default=[25e9], help="bytes a second of a link, one or more (25e9)"
    )
    parser.add_argument("--latency", type=float, default=5e-6, help="seconds (default: 5e-6)")
    parser.add_argument("--step-ms", type=float, help="compute a step in milliseconds, instead of the measured one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, value in machine().items():
        print(f"- {name}: {value}")
    for name in args.networks:
        found = measure(name, images=args.images)
        print(
            f"\n## {name}\n\nMeasured: {found.parameters:,} parameters in {found.layers} layers; the rates' all-reduce "
            f"carries {found.rate_numbers:,} numbers ({found.sharded_numbers:,} where weights are split); "
            f"{found.step_seconds * 1e3:,.0f} ms forward and backward of {found.images} images with all norms; "
            f"{found.rates_seconds * 1e3:.1f} ms for norms and rates."
        )
        step_seconds = None if args.step_ms is None else args.step_ms / 1e3
        for bandwidth in args.bandwidth:
            print(f"\nComputed with {bandwidth:g} bytes/s and {args.latency:g} s latency:\n")
            rows = shares(found, Network(bandwidth, args.latency), args.devices, step_seconds=step_seconds)
            print(text_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
