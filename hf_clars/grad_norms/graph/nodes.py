"""Each sample's gradient of an operand, from the gradient of an operation's result.

For sums, products and the like, the node's own backward function gives it before it is summed over broadcast axes. For
matrix products, convolutions and lookups it is made from what the node saved. Any other operation is differentiated
once for every sample, with the gradients of all other samples set to zero: this is the definition itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from hf_clars.grad_norms import convolution_math, norm_math
from hf_clars.grad_norms.graph.bags import bag_grads
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.norm_math import MAX_ELEMENTS, at_least_float32
from hf_clars.grad_norms.torch_internals import dtype_at, saved, shape_at
from hf_clars.grad_norms.torch_kernels import affine_sums

Grads = Sequence[Tensor | None]
Kind = Callable[[Node, int, Tensor, Layout, int, int], Tensor | None]


def operand_grads(
    node: Node,
    index: int,
    grads: Grads,
    layouts: Sequence[Layout | None],
    shape: Sequence[int],
    batch: int,
    measured: int,
) -> Tensor:
    """Each sample's gradient of one operand of an operation.

    Args:
        node: The operation's place in the graph, not yet run backward.
        index: Which operand.
        grads: Gradients of its results; None where there is none.
        layouts: Which rows of each are whose.
        shape: Of the operand.
        batch: B.
        measured: How many of the first samples are measured.

    Returns:
        [measured, *shape].
    """
    g, layout = grads[0], layouts[0]
    if len([t for t in grads if t is not None]) == 1 and g is not None and layout is not None:
        kinds = () if g.is_complex() else _KINDS.items()
        kind = next((fn for name, fn in kinds if node.name().startswith(name)), None)
        found = None if kind is None else kind(node, index, g, layout, batch, measured)
        if found is not None:
            return found.reshape(measured, *shape)
        unsummed = unsummed_grad(node, index, grads)
        if unsummed is not None and unsummed.shape == g.shape and tuple(g.shape) != tuple(shape):
            found = _summed_over_broadcast(unsummed, layout, shape, batch)
            if found is not None:
                return found[:measured]
    return _one_by_one(node, index, grads, layouts, shape, batch, measured)


def _call(node: Node, grads: Grads) -> tuple[Tensor | None, ...]:
    if isinstance(node, BackwardCFunction):
        return _call_own(node, grads)
    result = node(*grads)  # type: ignore[operator]
    return result if isinstance(result, tuple) else (result,)


def _call_own(node: Any, grads: Grads) -> tuple[Tensor | None, ...]:
    """As `_call`, of somebody's own `torch.autograd.Function`, whose backward has a result for every argument.

    The graph has a place for each argument that is a tensor, and leads on from those that need a gradient. autograd may
    promise zeros in the place of gradients that are not there, and so do we.
    """
    given = []
    for i, g in enumerate(grads):
        shape = shape_at(node, i) if g is None else None
        fill = shape is not None and dtype_at(node, i).is_floating_point
        some = next(t for t in grads if t is not None)
        given.append(some.new_zeros(shape or (), dtype=dtype_at(node, i)) if fill else g)
    result = node.apply(*given)
    results = result if isinstance(result, tuple) else (result,)
    wanted = iter([t for t, needed in zip(results, node.needs_input_grad, strict=False) if needed])
    return tuple(None if before is None else next(wanted) for before, _ in node.next_functions)


def _summed_over_broadcast(t: Tensor, layout: Layout, shape: Sequence[int], batch: int) -> Tensor | None:
    """[B, *shape] of a gradient that is not yet summed over the axes along which the operand was repeated."""
    padded = [1] * (t.dim() - len(shape)) + list(shape)
    if padded[layout.axis] != 1:
        return None  # the operand has rows of its own along the samples' axis
    t = at_least_float32(t)
    first = layout.samples_first(t, batch)  # [B, ..., outer, inner, ...]
    sizes = [*padded[: layout.axis], 1, 1, *padded[layout.axis + 1 :]]
    axes = [i + 1 for i, size in enumerate(sizes) if size == 1 and first.shape[i + 1] != 1]
    summed = first.sum(axes) if axes else first
    return summed.reshape(batch, *shape)


def _one_by_one(
    node: Node,
    index: int,
    grads: Grads,
    layouts: Sequence[Layout | None],
    shape: Sequence[int],
    batch: int,
    measured: int,
) -> Tensor:
    elements = sum(g.numel() for g in grads if g is not None)
    step = max(1, MAX_ELEMENTS // max(1, elements))
    parts = []
    for start in range(0, measured, step):
        samples = slice(start, min(start + step, measured))
        stacks = [
            None if g is None or layout is None else layout.one_sample_each(g, batch, samples)
            for g, layout in zip(grads, layouts, strict=True)
        ]
        parts.append(call_for_each(node, index, stacks, shape))
    some = next(g for g in grads if g is not None)
    return torch.cat(parts) if parts else some.new_zeros(0, *shape)


def call_for_each(node: Node, index: int, stacks: Grads, shape: Sequence[int]) -> Tensor:
    """An operation's backward function for a stack of gradients: [b, *shape] of one operand.

    Args:
        node: The operation.
        index: Which operand.
        stacks: [b, *shape of the result] for each result, None where there is no gradient.
        shape: Of the operand.
    """
    given = [t for t in stacks if t is not None]

    def one(*grads: Tensor) -> Tensor:
        rest = iter(grads)
        found = _call(node, [None if t is None else next(rest) for t in stacks])[index]
        return grads[0].new_zeros(tuple(shape)) if found is None else found.sum_to_size(tuple(shape))

    # Own functions may look at values, write in place or start kernels; distances of a stack are wrong in torch 2.14.
    if isinstance(node, BackwardCFunction) or node.name().startswith("CdistBackward"):
        return torch.stack([one(*(t[i] for t in given)) for i in range(len(given[0]))])
    try:
        return torch.vmap(one)(*given)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return torch.stack([one(*(t[i] for t in given)) for i in range(len(given[0]))])


# ---- kinds ----------------------------------------------------------------------------------------------------------


def _rows(t: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    """[measured, T, width] of a matrix [N, width] whose rows are laid out by samples."""
    if layout.axis != 0 or t.dim() != 2 or layout.sizes(t.shape, batch) is None:
        return None
    return at_least_float32(layout.samples_first(t, batch).flatten(1, 2)[:measured])


#: What stands before w in x @ w and in b + x @ w, and w's place among the operands.
_FACTORS = {"MmBackward": ("self", 1), "AddmmBackward": ("mat1", 2)}


def factors(
    node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int
) -> tuple[Tensor, Tensor] | None:
    """What w's gradients are made of, where w is the operand of x @ w or b + x @ w.

    Args:
        node: The operation.
        index: Which operand.
        g: Gradient of the result [N, out].
        layout: Whose rows are whose.
        batch: B.
        measured: How many of the first samples are measured.

    Returns:
        x [measured, T, in] and g [measured, T, out]; None for another operand, or one that is scaled.
    """
    name, place = _FACTORS[node.name().rstrip("0123456789")]
    x = saved(node, name)
    if index != place or x is None or _is_scaled(node):
        return None
    xs, rows = _rows(x, layout, batch, measured), _rows(g, layout, batch, measured)
    return None if xs is None or rows is None else (xs, rows)


def _is_scaled(node: Node) -> bool:
    return saved(node, "beta") not in (1, None) or saved(node, "alpha") not in (1, None)


def _mm(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    """Result = x @ w."""
    found = factors(node, index, g, layout, batch, measured)
    return None if found is None else found[0].mT @ found[1]


def _addmm(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    """Result = b + x @ w."""
    if index != 0 or _is_scaled(node):
        return _mm(node, index, g, layout, batch, measured)
    rows = _rows(g, layout, batch, measured)
    return None if rows is None else rows.sum(1)


def _convolution(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    x, weight = saved(node, "input"), saved(node, "weight")
    if layout != Layout() or g.shape[0] != batch or saved(node, "transposed") or x is None or weight is None:
        return None
    g = at_least_float32(g[:measured])
    if index == 2:
        return g.flatten(2).sum(2)
    if index != 1:
        return None
    spatial = x.dim() - 2
    settings = {
        name: tuple(saved(node, name)) * (spatial // len(saved(node, name)))
        for name in ("stride", "padding", "dilation")
    }
    return convolution_math.convolution_weight_grads(
        at_least_float32(x[:measured]), g, kernel_shape=tuple(weight.shape), groups=saved(node, "groups"), **settings
    )


def unsummed_grad(node: Node, index: int, grads: Grads) -> Tensor | None:
    """The gradient of an operand as the node's own backward function gives it: it may still have the result's axes."""
    return grads[0] if node.name().startswith("Expand") else _call(node, grads)[index]


def lookups(
    node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int
) -> tuple[Tensor, Tensor] | None:
    """What a table's gradients are made of: tokens [measured, T], and what each adds to its row [measured, T, width].

    Arguments and None as for `factors`.
    """
    tokens = saved(node, "indices")
    if layout != Layout() or tokens is None or tokens.dim() == 0 or saved(node, "scale_grad_by_freq"):
        return None
    if g.shape[0] % batch or tokens.shape[0] != g.shape[0]:
        return None
    tokens = tokens.reshape(batch, -1)[:measured]
    return tokens, without_padding(node, tokens, at_least_float32(g.reshape(batch, -1, g.shape[-1])[:measured]))


def without_padding(node: Node, tokens: Tensor, g: Tensor) -> Tensor:
    """What lookups add to their rows, [B, T, width], nothing where the row is the table's padding."""
    padding = saved(node, "padding_idx")
    if isinstance(padding, int) and 0 <= padding < int(saved(node, "weight_sym_argsize_0")):
        return g * (tokens != padding).unsqueeze(-1)
    return g


def _embedding(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    found = lookups(node, index, g, layout, batch, measured)
    rows = int(saved(node, "weight_sym_argsize_0"))
    return None if found is None else norm_math.embedding_weight_grads(*found, rows)


def _layer_norm(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    x, mean, rstd = saved(node, "input"), saved(node, "result1"), saved(node, "result2")
    if index not in (1, 2) or x is None or mean is None or rstd is None or layout.axis != 0:
        return None
    width = len(saved(node, "normalized_shape"))
    if g.dim() <= width:
        return None
    t = at_least_float32(g)
    if index == 1:
        t = t * (at_least_float32(x) - mean) * rstd
    first = layout.samples_first(t, batch)[:measured]
    return first.flatten(1, first.dim() - 1 - width).sum(1)


def _channel_norm(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    """Result = x_hat * w + b, channels on axis 1: batch or group normalisation called as a function."""
    x = saved(node, "input")
    if index not in (1, 2) or layout != Layout() or x is None or g.dim() < 2 or len(g) != batch:
        return None
    g = at_least_float32(g[:measured])
    if index == 2:
        return g.flatten(2).sum(2) if g.dim() > 2 else g
    mean, rstd = saved(node, "result1"), saved(node, "result2")
    if saved(node, "training") is False:  # of batch normalisation alone
        mean, rstd = saved(node, "running_mean"), (saved(node, "running_var") + saved(node, "eps")).rsqrt()
    if mean is None or not mean.numel():
        return None
    mean, rstd = (t[:measured] if t.dim() > 1 else t for t in (mean, rstd))
    return affine_sums(at_least_float32(x[:measured]), g, at_least_float32(mean), at_least_float32(rstd))[0]


_KINDS: dict[str, Kind] = {
    "AddmmBackward": _addmm,
    "MmBackward": _mm,
    "NativeBatchNormBackward": _channel_norm,
    "CudnnBatchNormBackward": _channel_norm,
    "NativeGroupNormBackward": _channel_norm,
    "ConvolutionBackward": _convolution,
    "EmbeddingBackward": _embedding,
    "EmbeddingBagBackward": bag_grads,
    "NativeLayerNormBackward": _layer_norm,
}
