"""The batch gradient's norm in each layer, in the units that `backward()` left it in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_clars.distributed import (
    is_split,
    is_zeros,
    local_norms,
    local_part,
    sum_over_ranks,
    whole_gradient,
    world_size,
    zero_optimizer,
)
from hf_clars.errors import HfClarsError
from hf_clars.layers import ParamLayer
from hf_clars.optim.gradient_scale import some_of


class GradientNotHereError(HfClarsError, RuntimeError):
    """The batch gradient cannot be read, or not in the units of the samples' gradients."""


def gradient_squares(layers: Sequence[ParamLayer]) -> Tensor:
    """||g_k||^2 of `p.grad`, [K], over all processes if the weights are split over them (FSDP2).

    Args:
        layers: The partition.

    Returns:
        In float64 where the device has it; 0 for a layer without a gradient.

    Raises:
        GradientNotHereError: If there is none.
    """
    params = [(k, p) for k, layer in enumerate(layers) for p in layer.params]
    # Rows of a sparse gradient that have not been added up yet have no norm together.
    held = [
        (k, g.coalesce().values() if g.is_sparse else g) for k, g in ((k, p.grad) for k, p in params) if g is not None
    ]
    wide = wide_dtype(params[0][1].device)
    if not held:
        raise GradientNotHereError(
            "No parameter has a gradient where the batch gradient is read: read it after backward() and before "
            "zero_grad(), or set noise_scale=False to have the samples' norms alone."
        )
    norms = local_norms(
        [p.detach() for _, p in params], [k for k, _ in params], [g for _, g in held], [k for k, _ in held], len(layers)
    )
    squares = norms.grads.to(wide).square()
    return sum_over_ranks(squares) if norms.partial else squares


class BeforeZeroSteps:
    """Reads ||g_k||^2 when DeepSpeed's ZeRO is about to step, which may be inside `accelerator.backward()`.

    Only then are its pieces of the batch gradient complete, on all processes alike. While this is there, the ZeRO
    optimizer of this process has a `step` of its own, which reads first.

    Args:
        layers: The partition.
        engine: DeepSpeed's engine, or accelerate's optimizer.

    Raises:
        GradientNotHereError: If ZeRO's optimizer is not found.
    """

    def __init__(self, layers: Sequence[ParamLayer], engine: Any) -> None:
        zero = zero_optimizer(layers[0].params[0], engine)
        if zero is None:
            raise GradientNotHereError(
                "DeepSpeed's ZeRO keeps the batch gradient in pieces until it steps: give NormMonitor optimizer=, what "
                "accelerator.prepare returned or DeepSpeed's engine, or noise_scale=False for the samples' norms alone."
            )
        self._zero, self._layers = zero, layers
        self._found: Tensor | Exception | None = None
        step = zero.step

        def read_and_step(*args: Any, **kwargs: Any) -> Any:
            self.remove()
            try:
                self._found = _zeros_squares(self._layers)
            except Exception as error:  # told where it is asked for
                self._found = error
            return step(*args, **kwargs)

        zero.step = self._own = read_and_step

    def squares(self) -> Tensor:
        """||g_k||^2, [K], as it was before the step.

        Raises:
            GradientNotHereError: If ZeRO has not stepped.
        """
        if self._found is None:
            raise GradientNotHereError(
                "DeepSpeed's engine did not step in the measured step: call engine.step() inside the monitor's block."
            )
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def remove(self) -> None:
        """Give the optimizer its own `step` back."""
        if vars(self._zero).get("step") is self._own:
            del self._zero.step


def _zeros_squares(layers: Sequence[ParamLayer]) -> Tensor:
    device = layers[0].params[0].device
    squares = torch.zeros(len(layers), dtype=wide_dtype(device), device=device)
    for k, layer in enumerate(layers):
        for grad in (whole_gradient(param) for param in layer.params):
            if grad is not None:
                squares[k] += torch.linalg.vector_norm(grad.detach(), dtype=torch.float32).to(squares).square()
    return squares


def before_zero_steps(layers: Sequence[ParamLayer], engine: Any) -> BeforeZeroSteps | None:
    """What reads under DeepSpeed's ZeRO; None elsewhere."""
    return BeforeZeroSteps(layers, engine) if is_zeros(layers[0].params[0]) else None


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, but float32 on devices that have no such thing (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


class GradientProbe:
    """Tells by how much gradients were multiplied between `backward()` and now, by clipping or a loss scale.

    A trainer clips before anyone can look. Both act on all gradients alike, so a few elements of each, copied when
    `backward()` has just added to them, tell the factor; and sums, as a large table may have few rows that are not 0.
    Sparse gradients are left out: the others tell it as well.

    Args:
        params: The parameters; those that are frozen now are left out too.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._device = params[0].device
        self._params = [p for p in params if p.requires_grad]
        self._before: dict[nn.Parameter, Tensor] = {}
        self._handles: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._note) for p in self._params]

    def _note(self, param: Tensor) -> None:
        if param.grad is not None and not param.grad.is_sparse and isinstance(param, nn.Parameter):
            self._before[param] = some_of(local_part(param.grad))

    @torch.no_grad()
    def factor(self) -> Tensor:
        """What gradients were multiplied with, 0-dim; the same on all processes.

        Returns:
            NaN where nothing tells it: no gradients, all zero, or changed by something else than a factor (clipping by
            value, noise that was added).
        """
        device, wide = self._device, wide_dtype(self._device)
        split = any(is_split(p) for p in self._params)
        before, after = [torch.zeros(1, dtype=wide, device=device)], [torch.zeros(1, dtype=wide, device=device)]
        for param in self._params:
            grad = None if param.grad is None or param.grad.is_sparse else param.grad
            noted, now = self._before.get(param), None if grad is None else some_of(local_part(grad))
            # The same number of elements on every process, also where a process had no samples for a layer.
            blank = torch.zeros_like(some_of(local_part(param)) if noted is None or now is None else now)
            before.append((blank if noted is None else noted).to(wide))
            after.append((blank if now is None else now).to(wide))
        old, new = torch.cat(before), torch.cat(after)
        if not split:  # `backward()` left each process its own; data parallelism has averaged them since
            old = sum_over_ranks(old) / world_size()
        sums = torch.stack([old @ old, old @ new, new @ new])
        if split:
            sums = sum_over_ranks(sums)
        factor = sums[1] / sums[0]
        off = (sums[2] - factor * sums[1]).clamp(min=0).sqrt()
        # bfloat16 has 8 bits, and each element is rounded by itself.
        return torch.where(off <= 0.02 * sums[2].sqrt(), factor, torch.nan)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
