"""Each sample's gradient of an operand, from the gradient of an operation's result.

For sums, products and the like, the node's own backward function gives it before it is summed over broadcast axes. For
matrix products, convolutions and lookups it is made from what the node saved. Any other operation is differentiated
once for every sample, with the gradients of all other samples set to zero: this is the definition itself.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import Node

from hf_clars.grad_norms import convolution_math, norm_math
from hf_clars.grad_norms.graph.bags import bag_grads
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.operands import Kind, Operand, call
from hf_clars.grad_norms.norm_math import at_least_float32
from hf_clars.grad_norms.torch_internals import saved
from hf_clars.grad_norms.torch_kernels import affine_sums


def operand_grads(of: Operand) -> Tensor:
    """Each sample's gradient of one operand of an operation, [measured, *shape]."""
    if of.has_one_gradient:
        kind = of.kind(_KINDS)
        found = None if kind is None else kind(of)
        if found is not None:
            return found.reshape(of.measured, *of.shape)
        unsummed = unsummed_grad(of)
        if unsummed is not None and unsummed.shape == of.g.shape and tuple(of.g.shape) != of.shape:
            found = _summed_over_broadcast(of, unsummed)
            if found is not None:
                return found[: of.measured]
    return of.one_by_one()


def unsummed_grad(of: Operand) -> Tensor | None:
    """The gradient of an operand as the node's own backward function gives it: it may still have the result's axes."""
    return of.g if of.node.name().startswith("Expand") else call(of.node, of.grads)[of.index]


def _summed_over_broadcast(of: Operand, t: Tensor) -> Tensor | None:
    """[B, *shape] of a gradient that is not yet summed over the axes along which the operand was repeated."""
    axis, padded = of.layout.axis, [1] * (t.dim() - len(of.shape)) + list(of.shape)
    if padded[axis] != 1:
        return None  # the operand has rows of its own along the samples' axis
    first = of.layout.samples_first(at_least_float32(t), of.batch)  # [B, ..., outer, inner, ...]
    sizes = [*padded[:axis], 1, 1, *padded[axis + 1 :]]
    axes = [i + 1 for i, size in enumerate(sizes) if size == 1 and first.shape[i + 1] != 1]
    summed = first.sum(axes) if axes else first
    return summed.reshape(of.batch, *of.shape)


# ---- kinds ----------------------------------------------------------------------------------------------------------

#: What stands before w in x @ w and in b + x @ w, and w's place among the operands.
_FACTORS = {"MmBackward": ("self", 1), "AddmmBackward": ("mat1", 2)}


def factors(of: Operand) -> tuple[Tensor, Tensor] | None:
    """What w's gradients are made of, where w is the operand of x @ w or b + x @ w.

    Returns:
        x [measured, T, in] and g [measured, T, out]; None for another operand, or one that is scaled.
    """
    name, place = _FACTORS[of.node.name().rstrip("0123456789")]
    x = of.saved(name)
    if of.index != place or x is None or _is_scaled(of):
        return None
    xs, rows = of.rows(x), of.rows(of.g)
    return None if xs is None or rows is None else (xs, rows)


def _is_scaled(of: Operand) -> bool:
    return of.saved("beta") not in (1, None) or of.saved("alpha") not in (1, None)


def _mm(of: Operand) -> Tensor | None:
    """Result = x @ w."""
    found = factors(of)
    return None if found is None else found[0].mT @ found[1]


def _addmm(of: Operand) -> Tensor | None:
    """Result = b + x @ w."""
    if of.index != 0 or _is_scaled(of):
        return _mm(of)
    rows = of.rows(of.g)
    return None if rows is None else rows.sum(1)


def _convolution(of: Operand) -> Tensor | None:
    x, weight = of.saved("input"), of.saved("weight")
    if not of.is_batch_first or of.saved("transposed") or x is None or weight is None or of.index not in (1, 2):
        return None
    if of.index == 2:
        return of.mine(of.g).flatten(2).sum(2)
    spatial = x.dim() - 2
    steps = {name: tuple(of.saved(name)) for name in ("stride", "padding", "dilation")}
    settings = {name: given * (spatial // len(given)) for name, given in steps.items()}
    shape = tuple(weight.shape)
    return convolution_math.convolution_weight_grads(
        of.mine(x), of.mine(of.g), kernel_shape=shape, groups=of.saved("groups"), **settings
    )


def lookups(of: Operand) -> tuple[Tensor, Tensor] | None:
    """What a table's gradients are made of: tokens [measured, T], and what each adds to its row [measured, T, width].

    None as for `factors`.
    """
    tokens, g = of.saved("indices"), of.g
    if of.layout != Layout() or tokens is None or tokens.dim() == 0 or of.saved("scale_grad_by_freq"):
        return None
    if g.shape[0] % of.batch or tokens.shape[0] != g.shape[0]:
        return None
    tokens = tokens.reshape(of.batch, -1)[: of.measured]
    return tokens, without_padding(of.node, tokens, of.mine(g.reshape(of.batch, -1, g.shape[-1])))


def without_padding(node: Node, tokens: Tensor, g: Tensor) -> Tensor:
    """What lookups add to their rows, [B, T, width], nothing where the row is the table's padding."""
    padding = saved(node, "padding_idx")
    if isinstance(padding, int) and 0 <= padding < int(saved(node, "weight_sym_argsize_0")):
        return g * (tokens != padding).unsqueeze(-1)
    return g


def _embedding(of: Operand) -> Tensor | None:
    found = lookups(of)
    return None if found is None else norm_math.embedding_weight_grads(*found, int(of.saved("weight_sym_argsize_0")))


def _layer_norm(of: Operand) -> Tensor | None:
    x, mean, rstd = of.saved("input"), of.saved("result1"), of.saved("result2")
    if of.index not in (1, 2) or x is None or mean is None or rstd is None or of.layout.axis != 0:
        return None
    width = len(of.saved("normalized_shape"))
    if of.g.dim() <= width:
        return None
    t = at_least_float32(of.g)
    if of.index == 1:
        t = t * (at_least_float32(x) - mean) * rstd
    first = of.layout.samples_first(t, of.batch)[: of.measured]
    return first.flatten(1, first.dim() - 1 - width).sum(1)


def _channel_norm(of: Operand) -> Tensor | None:
    """Result = x_hat * w + b, channels on axis 1: batch or group normalisation called as a function."""
    x = of.saved("input")
    if of.index not in (1, 2) or x is None or of.g.dim() < 2 or not of.is_batch_first:
        return None
    g = of.mine(of.g)
    if of.index == 2:
        return g.flatten(2).sum(2) if g.dim() > 2 else g
    mean, rstd = of.saved("result1"), of.saved("result2")
    if of.saved("training") is False:  # of batch normalisation alone
        mean, rstd = of.saved("running_mean"), (of.saved("running_var") + of.saved("eps")).rsqrt()
    if mean is None or not mean.numel():
        return None
    mean, rstd = (t[: of.measured] if t.dim() > 1 else t for t in (mean, rstd))
    return affine_sums(of.mine(x), g, at_least_float32(mean), at_least_float32(rstd))[0]


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
