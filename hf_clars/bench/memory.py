"""One way of one network in a process of its own: `python -m hf_clars.bench.memory --network resnet20 --way hf_clars`.

Prints one line of JSON, in MiB:

- `baseline`: resident memory after everything was imported and used once on a tiny network, before the model is built;
- `before_step`: with the model, its batch and the way set up;
- `highest`: the highest resident memory during three steps, the operating system's own figure (VmHWM on Linux);
- `peak`: `highest` - `baseline`, so weights, gradients, activations and what the way adds, but no imported code. The
  tables divide a way's `peak` by that of the plain step;
- `ru_maxrss`: what `getrusage` says. It is not used where there is VmHWM: Linux starts it, in a new process, at the
  memory of the one that started it.

On CUDA these are torch's figures for the device, and what torch's allocator held at its highest.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from hf_clars.bench.check import refusal, try_way
from hf_clars.bench.networks import NETWORKS, Network, device
from hf_clars.bench.peers import WAYS
from hf_clars.bench.ways import Way

STEPS = 3
MIB = 2**20
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> int:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description="Peak memory of one way of one network, as JSON.")
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--batch", type=int, help="images a step (default: the network's)")
    parser.add_argument("--image-size", type=int, help="side of the images (default: the network's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = NETWORKS[args.network]
    network = network.resized(image_size=args.image_size or network.image_size, batch=args.batch or network.batch)
    print(json.dumps(measure(WAYS[args.way], network)))
    return 0


def measure(way_class: type[Way], network: Network) -> dict[str, float | str]:
    """The figures of this module's description; only "note" where the way refuses."""
    way, note = try_way(lambda: way_class(_tiny_network(), torch.randn(2, 3, 8, 8).to(device()), _two_labels()))
    if way is None:
        return {"note": note}
    way.close()
    del way
    baseline = _held()
    try:
        way = way_class(network.build(), *network.data())
        before_step = _held()
        _forget_highest()
        for _ in range(STEPS):
            way.step()
    except Exception as error:  # whatever another library refuses with
        return {"note": refusal(error)}
    highest = _highest()
    return {
        "peak": highest - baseline,
        "baseline": baseline,
        "before_step": before_step,
        "highest": highest,
        "ru_maxrss": _ru_maxrss(),
    }


def _tiny_network() -> nn.Module:
    """Something of every kind of layer, so that what libraries load at first use is in the baseline."""
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4, 2)).to(device())


def _two_labels() -> torch.Tensor:
    return torch.tensor([0, 1], device=device())


def _held() -> float:
    """Memory held now, in MiB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / MIB
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve the steps unseen
    return _status("VmRSS") or _ru_maxrss()


def _forget_highest() -> None:
    """Begin a new record, where the system lets us; building a model may have held more than a step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def _highest() -> float:
    """The highest memory held, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB
    return _status("VmHWM") or _ru_maxrss()


def _status(field: str) -> float:
    """A figure of Linux about this process, in MiB; 0 where there is none."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), 0.0)


def _ru_maxrss() -> float:
    """In MiB; the system counts in KiB, but macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
