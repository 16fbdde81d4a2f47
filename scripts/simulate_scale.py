"""The rates' share of step time on 8 to 4,096 devices: `python scripts/simulate_scale.py --help`."""

import argparse
from collections.abc import Callable

import torch

from hf_clars.bench.report import machine, text_table
from hf_clars.bench.scale import MODELS, Network, ShareRow, measure, shares

DESCRIPTION = """\
How much of a training step the layer rates take on many devices. Compute a step and the sizes of all messages are
measured on the device at hand; the times of all-reduces are computed from the bandwidth and the latency given here, and
nothing is assumed to overlap. With --step-ms compute that was measured on another device takes the place of this one's.
"""
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
