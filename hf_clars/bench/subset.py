"""What it costs to measure some of the samples of a large accumulated batch (the paper's J_t)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.nn import functional

from hf_clars.bench.networks import Network, logits
from hf_clars.bench.timing import Ratio, alternate, ratio
from hf_clars.grad_norms import PerSampleGradNorms


@dataclass(frozen=True)
class SubsetRow:
    """Accumulating one batch, with and without norms of its first samples.

    Attributes:
        network: Its name.
        total: Samples of the accumulated batch.
        micro: Samples of each forward and backward pass.
        samples: Samples measured.
        plain_seconds: Of each accumulated batch without norms.
        seconds: With them.
        ratio: Of the two.
    """

    network: str
    total: int
    micro: int
    samples: int
    plain_seconds: list[float]
    seconds: list[float]
    ratio: Ratio


def measure_subset(
    network: Network, rounds: int, *, total: int = 16384, micro: int = 128, samples: int = 512
) -> SubsetRow:
    """Time total / micro forward and backward passes into the same gradients, with and without `samples` measured.

    Args:
        network: Its batch is not used, its image size is.
        rounds: How often each is timed.
        total: Samples of the accumulated batch.
        micro: Samples of each pass.
        samples: Samples measured, as CLARS does it: sums only.

    Returns:
        Both times and their ratio.
    """
    sized = network.resized(image_size=network.image_size, batch=micro)
    plain, _ = _accumulation(sized, total // micro, None)
    measured, norms = _accumulation(sized, total // micro, samples)
    seconds = alternate({"plain": plain, "subset": measured}, rounds, label=f"{samples} of {total} samples")
    if norms is not None:
        norms.remove()
    pair = seconds["plain"], seconds["subset"]
    return SubsetRow(network.name, total, micro, samples, *pair, ratio(pair[1], pair[0]))


def _accumulation(
    network: Network, passes: int, samples: int | None
) -> tuple[Callable[[], None], PerSampleGradNorms | None]:
    """One accumulated batch on a model of its own; the same images in each pass, since loading is not measured."""
    model, (x, y) = network.build(), network.data()
    norms = None if samples is None else PerSampleGradNorms(model, samples=samples, keep_per_sample=False)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for _ in range(passes):
            (functional.cross_entropy(logits(model(x)), y) / passes).backward()
        if norms is not None:
            totals = norms.totals()
            if totals is None or totals.captured != min(samples or 0, passes * len(x)):
                raise RuntimeError(f"{samples} samples were to be measured, but {totals} came out.")
            norms.reset()

    return run, norms
