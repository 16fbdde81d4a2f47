"""The kernels as operations of `torch.library`: eager code calls them, and compiled code keeps them whole.

Each runs its Triton kernel where that works, and elsewhere its twin in `reference.py`: on other devices, in other
precisions, and where Triton cannot compile or launch it. That is said once, by the kernel's name. A compiler sees only
shapes (`custom_op`, not `triton_op`): what fails must fail where it can be caught, when it is launched.

All is given dense, in float32 but for gradients of inputs, which have the input's type. Operands may be in any memory
format: what a kernel does not take is copied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.kernels import reference, runs_kernels
from hf_clars.grad_norms.torch_traces import is_compiling

logger = logging.getLogger(__name__)
_failed: set[str] = set()


def _run(file: str, name: str, x: Tensor, *args: Any) -> Any:
    """The kernel of that name where it works, else its twin."""
    if runs_kernels(x) and name not in _failed and x.numel():
        try:
            with torch.cuda.device_of(x):  # Triton launches on the current device, whichever it is
                return getattr(import_module(f"hf_clars.grad_norms.kernels.{file}"), name)(x, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's, the assembler's, the driver's: they have no class in common
            _failed.add(name)
            logger.warning(
                f"The GPU kernel {name} fails in this installation of Triton and is replaced by plain torch, which is "
                f"slower but gives the same: {type(error).__name__}: {str(error)[:500]}"
            )
    return getattr(reference, name)(x, *args)


def failed() -> set[str]:
    """Names of the kernels that did not compile or start, and that plain torch stands in for."""
    return set(_failed)


class _Operation:
    """A function that compiled code sees as one operation; eager code calls it as it is, which is quicker.

    Attributes:
        whole: The operation.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.whole = torch.library.custom_op(f"hf_clars::{function.__name__}", function, mutates_args=())
        self.register_fake = self.whole.register_fake

    def __call__(self, *args: Any) -> Any:
        return self.whole(*args) if is_compiling() else self._function(*args)


def _operation(function: Callable[..., Any]) -> _Operation:
    return _Operation(function)


def _floats(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


@_operation
def linear_product(x: Tensor, g: Tensor, bias: bool, measured: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias gradient of a Linear layer and samples' squared norms of both, out of one product.

    Args:
        x: Inputs [B, T, d].
        g: Output gradients [B, T, p].
        bias: Whether there is a bias.
        measured: How many of the first samples get norms; all give gradient.

    Returns:
        (weight gradient [p, d], bias gradient [p] or [0], squared norms [1 or 2, measured], of the weight's gradients
        and then of the bias's if there is one).
    """
    return _run("linear", "linear_product", x, g, bias, measured)


@linear_product.register_fake
def _(x: Tensor, g: Tensor, bias: bool, measured: int) -> tuple[Tensor, Tensor, Tensor]:
    p = g.shape[2]
    return _floats(x, p, x.shape[2]), _floats(x, p if bias else 0), _floats(x, 1 + bias, measured)


@_operation
def linear_gram(x: Tensor, g: Tensor) -> Tensor:
    """Every sample's squared norms of its weight and bias gradient, without these: <X X^T, G G^T> and <1, G G^T>.

    Args:
        x: Inputs [B, T, d].
        g: Output gradients [B, T, p].

    Returns:
        [2, B].
    """
    return _run("linear", "linear_gram", x, g)


@linear_gram.register_fake
def _(x: Tensor, g: Tensor) -> Tensor:
    return _floats(x, 2, x.shape[0])


@_operation
def convolution_product(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, bias: bool, measured: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weight and bias gradient of a convolution and samples' squared norms of both, out of one product.

    Args:
        x: Inputs [B, C, H, W]; a format other than channels_last is copied into it, as for `g`.
        g: Output gradients [B, P, H', W'].
        kernel: Height and width of the kernel, as are the others.
        stride: Steps between outputs.
        padding: Zeros added on both sides.
        dilation: Spacing of the taps.
        groups: Of channels; with one input channel each (depthwise) the samples' gradients are made, which are small.
        bias: Whether there is a bias.
        measured: How many of the first samples get norms; all give gradient.

    Returns:
        (weight gradient [P, *kernel, C / groups], bias gradient [P] or [0], squared norms [1 or 2, measured], of the
        weight's gradients and then of the bias's if there is one).
    """
    name = "convolution_product"
    return _run("convolution", name, x, g, kernel, stride, padding, dilation, groups, bias, measured)


@convolution_product.register_fake
def _(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, bias: bool, measured: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = g.shape[1]
    weight = _floats(x, p, *kernel, x.shape[1] // groups)
    return weight, _floats(x, p if bias else 0), _floats(x, 1 + bias, measured)


@_operation
def convolution_gram(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Every sample's squared norms of its weight and bias gradient, [2, B], without these. Arguments as above."""
    return _run("convolution", "convolution_gram", x, g, kernel, stride, padding, dilation, groups)


@convolution_gram.register_fake
def _(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    return _floats(x, 2, x.shape[0])


@_operation
def channel_sums(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Sums over a sample's positions of g and of g * x_hat, x_hat = (x - mean) * rstd, for each channel.

    Args:
        x: Input [B, C, ...], dense or in channels_last.
        g: Gradient of the output; copied into the format of `x`.
        mean: [C] of the batch (BatchNorm); or [B, groups] of each sample's groups of channels (GroupNorm).
        rstd: 1 / standard deviation, likewise.

    Returns:
        [2, B, C].
    """
    return _run("normalization", "channel_sums", x, g, mean, rstd)


@channel_sums.register_fake
def _(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return _floats(x, 2, *x.shape[:2])


@_operation
def channel_norm_backward(
    x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole backward pass of BatchNorm or GroupNorm, whose statistics depend on the input.

    Each sample's sums are partial sums that the input's gradient needs anyway.

    Args:
        x: Input [B, C, ...], dense or in channels_last.
        g: Gradient of the output; copied into the format of `x`.
        weight: [C].
        mean: As for `channel_sums`: [C] for BatchNorm, [B, groups] for GroupNorm.
        rstd: 1 / standard deviation, likewise.

    Returns:
        (gradient of the input, gradients of bias and weight [2, C], squared norms of the samples' gradients of bias
        and weight [2, B]).
    """
    return _run("normalization", "channel_norm_backward", x, g, weight, mean, rstd)


@channel_norm_backward.register_fake
def _(x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _floats(x, 2, x.shape[1]), _floats(x, 2, x.shape[0])


@_operation
def row_sums(x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """Sums over a sample's rows of g and of g * x_hat, x_hat = (x - mean) * rstd with statistics of each row.

    Args:
        x: Input [B, T, C].
        g: Gradient of the output, likewise.
        mean: [B, T], float32; None: nothing is taken off (RMSNorm).
        rstd: [B, T], float32.

    Returns:
        [2, B, C].
    """
    return _run("normalization", "row_sums", x, g, mean, rstd)


@row_sums.register_fake
def _(x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    return _floats(x, 2, x.shape[0], x.shape[2])


@_operation
def root_mean_square_dx(x: Tensor, g: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of an RMSNorm's input [B, T, C], in its type. Arguments as for `row_sums`, and the weight [C]."""
    return _run("normalization", "root_mean_square_dx", x, g, weight, rstd)


@root_mean_square_dx.register_fake
def _(x: Tensor, g: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
