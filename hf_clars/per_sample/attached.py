"""The engine on a model, measuring some of its steps and paused between them.

This file alone knows how `PerSampleGradNorms` is driven.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.errors import HfClarsError
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.hooks import BoundHook, PlacedHooks
from hf_clars.grad_norms.resumed import Proven, expect_calls, proven_calls
from hf_clars.layers import ParamLayer
from hf_clars.per_sample.gradient import wide_dtype


class NothingMeasuredError(HfClarsError, RuntimeError):
    """A step that was to be measured gave no samples."""


@dataclass
class LocalSamples:
    """What this process measured in one step, one entry a sample in the order of the passes.

    Attributes:
        squares: ||c g_ik||^2, [K, n], c g_i being what sample i adds to `p.grad`.
        micro_batch: Number of the pass that each sample was in, [n], int64.
        row: Its place in that pass, [n], int64.
        index: Its index in the data set, [n], int64; -1 where none came with the batch.
        losses: What each pass adds to the loss that `backward()` differentiates, as far as the model told it, [passes];
            NaN where it did not.
    """

    squares: Tensor
    micro_batch: Tensor
    row: Tensor
    index: Tensor
    losses: Tensor


@dataclass
class _Pass:
    batch: int  # as the engine counts them
    samples: int
    index: Tensor | None
    loss: Tensor | None


class _ModelLoss:
    """A loss that a model returned, and what it counts in the loss that is differentiated.

    A loop divides it by its passes or multiplies it by a loss scale, or takes a loss of its own in its place. The
    gradient that arrives at it tells.
    """

    def __init__(self, loss: Tensor, batch: int) -> None:
        self._value, self.batch = loss.detach(), batch
        self._weight: Tensor | None = None
        loss.register_hook(self._arrived)

    def _arrived(self, weight: Tensor) -> None:
        self._weight = weight.detach()

    @property
    def share(self) -> Tensor | None:
        """What it adds to the loss; None where no gradient has arrived."""
        return None if self._weight is None else self._value.float() * self._weight.float()


@dataclass
class _Open:
    """The pass that is under way."""

    index: Tensor | None = None
    losses: list[_ModelLoss] = field(default_factory=list)

    def loss(self, batch: int) -> Tensor | None:
        """What the model's losses add to the one that is differentiated; None where they have no part in it."""
        shares = [share for share in (loss.share for loss in self.losses if loss.batch == batch) if share is not None]
        return torch.stack(shares).sum() if shares else None


class AttachedNorms:
    """Measures steps of one model.

    What is learned of the model is learned once. Between two measured steps no hook is on the model; only a compiled
    one keeps them, as it must know them, and they do nothing.

    Args:
        model: The module itself, not a launcher's wrapper.
        layers: The partition to measure.
        on_error: Called once with an error that a hook of the engine raised in a forward pass, in place of letting it
            end the training; one in a backward pass is raised where results are read. None: errors pass.
        paused: Whether its first step is not measured. Default False.
        proven: As `NormMonitor` takes it.

    Attributes:
        paused: Whether it is between two measured steps.
        hooks_stay: Whether hooks stay on the model between measured steps.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ParamLayer],
        *,
        on_error: Callable[[Exception], None] | None = None,
        paused: bool = False,
        proven: Proven | None = None,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.paused = paused
        self.take_error = on_error
        self._passes: list[_Pass] = []
        self._open = _Open()
        self._norms = PerSampleGradNorms(model, layers=self.layers, loss_reduction="sum", on_error=on_error)
        expect_calls(self._norms, proven or {})
        self._own = PlacedHooks()
        self._own.add(model.register_forward_hook, BoundHook(self._note_loss))
        self.hooks_stay = True  # until a measured step has shown that the model is not compiled
        if paused:
            self._norms.pause()

    @property
    def proven(self) -> Proven:
        """As `NormMonitor.proven_calls`."""
        return proven_calls(self._norms)

    def pause(self, *, stay: bool = False) -> None:
        """A measured step is over: let go of it, and do nothing until `resume()`.

        Args:
            stay: Leave the hooks on the model, as where every step is measured: placing them takes its time.
        """
        if not self.paused:
            self.hooks_stay = stay or self._norms.meets_compiler
        self.paused = True
        self._passes.clear()
        self._open = _Open()
        self._norms.pause(lift=not self.hooks_stay)
        if not self.hooks_stay:
            self._own.lift()

    def resume(self) -> None:
        """A step that is to be measured begins."""
        self.paused = False
        self._own.place()
        self._norms.resume()

    def keep_hooks(self) -> None:
        """The model is compiled now: let it know the hooks, if they are not there, and leave them there."""
        self._norms.meets_compiler = True
        if not self.hooks_stay and self.paused:
            self.resume()
            self.pause()

    def _note_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            first = output[0] if isinstance(output, tuple) and output else output  # as Trainer takes it
            loss = first if isinstance(first, Tensor) and first.dim() == 0 else loss
            if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
                self._open.losses.append(_ModelLoss(loss, self._norms.batches))

    def note_index(self, index: Tensor | None) -> None:
        """The data set's indices of the samples of the pass that comes."""
        self._open.index = index

    def end_pass(self, loss: Tensor | None = None) -> None:
        """A backward pass of a micro-batch is done.

        Args:
            loss: What `backward()` was called on, if the loop knows better than the model.
        """
        totals, batch = self._norms.totals(), self._norms.batches
        # The loop may have cleared the gradients of passes before, as to skip a step.
        self._passes = [p for p in self._passes if p.batch == batch]
        samples = 0 if totals is None else totals.captured - sum(p.samples for p in self._passes)
        known = self._open.loss(batch) if loss is None else loss
        self._passes.append(_Pass(batch, samples, self._open.index, known))
        self._open = _Open()

    def read(self) -> LocalSamples:
        """What was measured since it was attached or resumed.

        Raises:
            HfClarsError: As the engine does, for what it cannot see.
            ValueError: If a pass had another number of samples than of indices.
        """
        self._norms.check_all_captured()
        device = self.layers[0].params[0].device
        wide = wide_dtype(device)
        per_sample = self._norms.per_sample
        if per_sample:
            squares = torch.stack([per_sample[layer.name] for layer in self.layers]).to(wide).square()
        else:
            squares = torch.zeros(len(self.layers), 0, dtype=wide, device=device)
        counts = [p.samples for p in self._passes]
        if squares.shape[1] != sum(counts):
            raise ValueError(f"{squares.shape[1]} samples were measured, but the passes had {sum(counts)}.")
        pieces = [torch.arange(n, device=device) for n in counts]
        numbers = [torch.full((n,), m, device=device) for m, n in enumerate(counts)]
        return LocalSamples(
            squares=squares,
            micro_batch=_joined(numbers, device),
            row=_joined(pieces, device),
            index=_joined([_index_of(p, device) for p in self._passes], device),
            losses=torch.stack([_loss_of(p, device) for p in self._passes]) if self._passes else torch.zeros(0),
        )

    def remove(self) -> None:
        """Take every hook off the model."""
        self.pause()
        self._norms.remove()
        self._own.remove()


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *parts])


def _index_of(one: _Pass, device: torch.device) -> Tensor:
    if one.index is None:
        return torch.full((one.samples,), -1, device=device)
    index = torch.as_tensor(one.index, device=device).to(torch.int64).reshape(-1)
    if len(index) != one.samples:
        raise ValueError(
            f"A batch came with {len(index)} indices for {one.samples} samples: give one for each sample of the pass."
        )
    return index


def _loss_of(one: _Pass, device: torch.device) -> Tensor:
    nothing = torch.full((), torch.nan, device=device)
    return nothing if one.loss is None else one.loss.detach().to(device, torch.float32)
