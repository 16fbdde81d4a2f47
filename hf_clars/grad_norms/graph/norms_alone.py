"""Each sample's squared gradient norm at an operation, where nothing but the norm is asked for.

That is where one parameter, and no other use of it, is the operand. The gradient itself, [B, *shape], is not made where
the norm costs less: for matrix products (ghost norms, `rules/costs.py`) and for tables that are looked up. Of
somebody's own function, as a head's in chunks, it is made for one sample after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.graph.bags import bag_squares
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.nodes import (
    Kind,
    call_for_each,
    factors,
    lookups,
    unsummed_grad,
    without_padding,
)
from hf_clars.grad_norms.graph.walk import Use
from hf_clars.grad_norms.norm_math import at_least_float32
from hf_clars.grad_norms.rules.costs import cheapest_form
from hf_clars.grad_norms.rules.linear import linear_squared_norm, linear_use
from hf_clars.grad_norms.torch_internals import saved

_KEEP_NORMS = ("TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "ToCopyBackward")
"""Operations on one parameter that change neither its numbers nor how many there are."""


def norms_alone(
    use: Use, grads: Sequence[Tensor | None], layouts: Sequence[Layout | None], batch: int, measured: int
) -> Tensor | None:
    """Each sample's gradient norm of the one parameter that reaches a use.

    Args:
        use: The use.
        grads: Gradients of the operation's results; None where there is none.
        layouts: Which rows of each are whose.
        batch: B.
        measured: How many of the first samples are measured.

    Returns:
        [measured]; None where the gradients must be made.
    """
    if any(t is not None and t.is_complex() for t in grads):
        return None
    if isinstance(use.node, BackwardCFunction):
        return _one_after_the_other(use, grads, layouts, batch, measured) if _is_parameter(use) else None
    g, layout = grads[0], layouts[0]
    if g is None or layout is None or any(t is not None for t in grads[1:]) or len(use.leaves) != 1:
        return None
    squares = next((fn for name, fn in _KINDS.items() if use.node.name().startswith(name)), None)
    if squares is None:
        found = _added_rows(use, g, layout, batch, measured)
    else:
        found = squares(use.node, use.index, g, layout, batch, measured) if _is_parameter(use) else None
    return None if found is None else found.clamp(min=0).sqrt()


def _one_after_the_other(
    use: Use, grads: Sequence[Tensor | None], layouts: Sequence[Layout | None], batch: int, measured: int
) -> Tensor | None:
    """Somebody's own function runs once for every sample: a head's gradients [B, vocabulary, width] are never together.

    Arguments as above.
    """
    norms = []
    for i in range(measured):
        stacks = [
            None if g is None or layout is None else layout.one_sample_each(g, batch, slice(i, i + 1))
            for g, layout in zip(grads, layouts, strict=True)
        ]
        norms.append(norm_math.squared_sum(at_least_float32(call_for_each(use.node, use.index, stacks, use.shape))))
    return torch.cat(norms).sqrt() if norms else None


def _is_parameter(use: Use) -> bool:
    """Whether the operand is a parameter, but for the order of its numbers and their precision."""
    node: Node | None = use.child[0]
    while node is not None and node.next_functions:
        if not node.name().startswith(_KEEP_NORMS):
            return False
        node = node.next_functions[0][0]
    return True


def _added_rows(use: Use, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    """Of a table whose rows are looked up by no data, as positions are, and added to what is.

    Each sample's gradient of the looked-up rows is summed for equal tokens, as where a rule looks up.
    """
    table: Node | None = use.child[0]
    if table is not None and table.name().startswith("ToCopyBackward"):
        table = table.next_functions[0][0]
    if table is None or not table.name().startswith("EmbeddingBackward") or isinstance(use.node, BackwardCFunction):
        return None
    of_parameter = table.next_functions[0][0] is not None and not table.next_functions[0][0].next_functions
    if not of_parameter or saved(table, "scale_grad_by_freq") or layout != Layout() or g.shape[0] != batch:
        return None
    tokens, rows = saved(table, "indices"), unsummed_grad(use.node, use.index, [g])
    if rows is None or rows.shape != g.shape or tuple(tokens.shape) != use.shape[:-1]:
        return None
    tokens = tokens.expand(g.shape[:-1]).reshape(batch, -1)[:measured]
    rows = without_padding(table, tokens, at_least_float32(rows.reshape(batch, -1, g.shape[-1])[:measured]))
    return norm_math.embedding_weight_squared_norm(tokens, rows)


def _product(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    found = factors(node, index, g, layout, batch, measured)
    if found is None:
        return None
    form = cheapest_form(linear_use(*found), g.device.type, replaces_weight_grad=False)
    return linear_squared_norm(*found, form)


def _lookup(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    found = lookups(node, index, g, layout, batch, measured)
    return None if found is None else norm_math.embedding_weight_squared_norm(*found)


_KINDS: dict[str, Kind] = {
    "MmBackward": _product,
    "AddmmBackward": _product,
    "EmbeddingBackward": _lookup,
    "EmbeddingBagBackward": bag_squares,
}
