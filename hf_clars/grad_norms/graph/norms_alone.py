"""Each sample's squared gradient norm at an operation, where nothing but the norm is asked for.

That is where one parameter, and no other use of it, is the operand. The gradient itself, [B, *shape], is not made where
the norm costs less: for matrix products (ghost norms, `rules/costs.py`) and for tables that are looked up.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.graph.bags import bag_squares
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.nodes import Kind, factors, lookups
from hf_clars.grad_norms.graph.walk import Use
from hf_clars.grad_norms.rules.costs import cheapest_form
from hf_clars.grad_norms.rules.linear import linear_squared_norm, linear_use

_KEEP_NORMS = ("TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "ToCopyBackward")
"""Operations on one parameter that change neither its numbers nor how many there are."""


def norms_alone(
    use: Use, grads: Sequence[Tensor | None], layouts: Sequence[Layout | None], batch: int, kept: int
) -> Tensor | None:
    """Each sample's gradient norm of the one parameter that reaches a use.

    Args:
        use: The use.
        grads: Gradients of the operation's results; None where there is none.
        layouts: Which rows of each are whose.
        batch: B.
        kept: How many of the first samples are measured.

    Returns:
        [kept]; None where the gradients must be made.
    """
    squares = next((fn for name, fn in _KINDS.items() if use.node.name().startswith(name)), None)
    g, layout = grads[0], layouts[0]
    alone = squares is not None and _is_parameter(use) and all(t is None for t in grads[1:])
    if squares is None or not alone or g is None or layout is None or g.is_complex():
        return None
    found = squares(use.node, use.index, g, layout, batch, kept)
    return None if found is None else found.clamp(min=0).sqrt()


def _is_parameter(use: Use) -> bool:
    """Whether the operand is a parameter, but for the order of its numbers and their precision."""
    node: Node | None = use.child[0]
    while node is not None and node.next_functions:
        if not node.name().startswith(_KEEP_NORMS):
            return False
        node = node.next_functions[0][0]
    return len(use.leaves) == 1


def _product(node: Node, index: int, g: Tensor, layout: Layout, batch: int, kept: int) -> Tensor | None:
    found = factors(node, index, g, layout, batch, kept)
    if found is None:
        return None
    form = cheapest_form(linear_use(*found), g.device.type, replaces_weight_grad=False)
    return linear_squared_norm(*found, form)


def _lookup(node: Node, index: int, g: Tensor, layout: Layout, batch: int, kept: int) -> Tensor | None:
    found = lookups(node, index, g, layout, batch, kept)
    return None if found is None else norm_math.embedding_weight_squared_norm(*found)


_KINDS: dict[str, Kind] = {
    "MmBackward": _product,
    "AddmmBackward": _product,
    "EmbeddingBackward": _lookup,
    "EmbeddingBagBackward": bag_squares,
}
