"""One measured step, over all micro-batches and processes: what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_clars.distributed import sum_over_ranks, world_size
from hf_clars.per_sample.attached import LocalSamples

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the samples' whole-network gradient norms."""


@dataclass(frozen=True)
class StepMeasures:
    """One step's norms, the same on every process. A sample's gradient is B times what it adds to `p.grad`.

    Attributes:
        step: Number of the step, from 1.
        samples: B, over all passes and processes.
        independent: 1; 0 where BatchNorm in training mode coupled the samples, so that noise and signal cannot be told.
        batch_square: ||g_k||^2, [K]; NaN where the batch gradient was not read.
        sample_square: Mean of ||g_ik||^2 over samples, [K].
        sample_norm: Mean of ||g_ik||, [K].
        quantiles: Of the whole-network norms ||g_i||, [5], see `QUANTILES`.
        loss: The loss whose gradient the batch gradient is, 0-dim: the sum over passes, the mean over processes. NaN
            where it is not made of a loss that the model returned.
        top_norm: The largest whole-network norms, [k], falling; NaN beyond the number of samples.
        top_share: Their part of sum_i ||g_i||^2, [k].
        top_index: The data set's index of each, [k], int64; -1 where unknown.
        top_rank: The process that had it, [k], int64.
        top_micro_batch: The pass it was in on that process, from 0, [k], int64.
        top_row: Its place in that pass, [k], int64.
    """

    step: int
    samples: int
    independent: int
    batch_square: Tensor
    sample_square: Tensor
    sample_norm: Tensor
    quantiles: Tensor
    loss: Tensor
    top_norm: Tensor
    top_share: Tensor
    top_index: Tensor
    top_rank: Tensor
    top_micro_batch: Tensor
    top_row: Tensor

    def on_host(self) -> StepMeasures:
        """The same on the CPU: the one copy off the device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in values.items()}
        return StepMeasures(**moved)

    @property
    def finite(self) -> bool:
        """Whether all norms are numbers."""
        return bool(torch.isfinite(self.sample_square).all())

    @property
    def ratio(self) -> Tensor:
        """R_k = ||g_k|| / mean_i ||g_ik||, [K], at most 1; NaN for a layer without a gradient."""
        return self.batch_square.sqrt() / self.sample_norm


@torch.no_grad()
def step_measures(
    step: int,
    local: LocalSamples,
    batch_square: Tensor | None,
    *,
    top_k: int,
    independent: bool = True,
    loss_scale: float = 1.0,
) -> StepMeasures:
    """Add up what the processes measured. Every process must call it.

    Args:
        step: Number of the step.
        local: This process's samples.
        batch_square: ||g_k||^2 of the batch gradient in the units that `backward()` left it in, [K]; None: not read.
        top_k: How many of the samples with the largest norms to name.
        independent: Whether no layer coupled the samples.
        loss_scale: What the loss was multiplied with (fp16).

    Returns:
        The measures, on the device.
    """
    ranks = world_size()
    counts = _counts(local)
    samples = sum(counts)
    # Data parallelism averages gradients over processes: sample i adds c g_i / ranks, and its gradient is B times that.
    unit = samples / ranks / loss_scale
    norms = local.squares.sqrt() * unit
    layers, wide = len(norms), norms.dtype
    losses = local.losses.to(wide)
    own = torch.cat([norms.sum(1), norms.square().sum(1), losses.sum()[None]])
    sums = sum_over_ranks(own.to(norms))
    means, squares = sums[:layers] / max(samples, 1), sums[layers : 2 * layers] / max(samples, 1)
    whole, places = _gathered(norms.square().sum(0).sqrt(), local, counts)
    k = min(top_k, len(whole))
    top = whole.topk(k) if k else None
    levels = torch.tensor(QUANTILES, dtype=wide, device=whole.device)
    missing = top_k - k
    chosen = places[:, top.indices] if top is not None else places[:, :0]
    top_norm = top.values if top is not None else whole[:0]
    share = top_norm.square() / whole.square().sum().clamp(min=torch.finfo(wide).tiny)
    places = torch.nn.functional.pad(chosen, (0, missing), value=-1)
    unread = torch.full_like(means, torch.nan)
    return StepMeasures(
        step=step,
        samples=samples,
        independent=int(independent),
        batch_square=unread if batch_square is None else batch_square.to(means) / loss_scale**2,
        sample_square=squares,
        sample_norm=means,
        quantiles=_quantiles(whole, levels),
        loss=sums[2 * layers] / ranks / loss_scale,
        top_norm=torch.nn.functional.pad(top_norm, (0, missing), value=torch.nan),
        top_share=torch.nn.functional.pad(share, (0, missing), value=torch.nan),
        top_index=places[0],
        top_rank=places[1],
        top_micro_batch=places[2],
        top_row=places[3],
    )


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """As `torch.quantile`, which refuses more than 16 million values, and none; interpolated between neighbours."""
    if not len(values):
        return torch.full_like(levels, torch.nan)
    ordered = values.sort().values
    place = levels * (len(ordered) - 1)
    low, high = place.floor().long(), place.ceil().long()
    return torch.lerp(ordered[low], ordered[high], place - low)


def _counts(local: LocalSamples) -> list[int]:
    """Samples of each process."""
    own = local.squares.shape[1]
    if world_size() == 1:
        return [own]
    number = torch.tensor([own], device=local.squares.device)
    found = [torch.zeros_like(number) for _ in range(world_size())]
    dist.all_gather(found, number)
    return torch.cat(found).tolist()


def _gathered(norms: Tensor, local: LocalSamples, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Whole-network norms of all processes' samples, [B], and (index, rank, micro-batch, row) of each, [4, B]."""
    rank = dist.get_rank() if world_size() > 1 else 0
    places = torch.stack([local.index, torch.full_like(local.index, rank), local.micro_batch, local.row])
    if world_size() == 1:
        return norms, places
    missing = max(counts) - len(norms)
    own = torch.nn.functional.pad(norms, (0, missing))
    own_places = torch.nn.functional.pad(places, (0, missing)).contiguous()
    all_norms = [torch.zeros_like(own) for _ in counts]
    all_places = [torch.zeros_like(own_places) for _ in counts]
    dist.all_gather(all_norms, own)
    dist.all_gather(all_places, own_places)
    return (
        torch.cat([x[:n] for x, n in zip(all_norms, counts, strict=True)]),
        torch.cat([x[:, :n] for x, n in zip(all_places, counts, strict=True)], dim=1),
    )
