"""Each sample's squared gradient norm at an operation, where nothing but the norm is asked for.

That is where one parameter, and no other use of it, is the operand. The gradient itself, [B, *shape], is not made where
the norm costs less: for matrix products (ghost norms, `rules/costs.py`) and for tables that are looked up. Of
somebody's own function, as a head's in chunks, it is made for one sample after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.graph.bags import bag_squares
from hf_clars.grad_norms.graph.nodes import factors, lookups, unsummed_grad, without_padding
from hf_clars.grad_norms.graph.operands import Kind, Operand
from hf_clars.grad_norms.norm_math import at_least_float32
from hf_clars.grad_norms.rules.costs import cheapest_form
from hf_clars.grad_norms.rules.linear import linear_squared_norm, linear_use
from hf_clars.grad_norms.torch_internals import saved

_KEEP_NORMS = ("TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "ToCopyBackward")
"""Operations on one parameter that change neither its numbers nor how many there are."""


def norms_alone(of: Operand, made_of: Node, *, alone: bool) -> Tensor | None:
    """Each sample's gradient norm of the one parameter that reaches an operand.

    Args:
        of: The operand.
        made_of: Where it comes from.
        alone: Whether no other parameter reaches it.

    Returns:
        [measured]; None where the gradients must be made.
    """
    if any(t is not None and t.is_complex() for t in of.grads):
        return None
    if isinstance(of.node, BackwardCFunction):
        return _one_after_the_other(of) if _is_parameter(made_of) else None
    if not (of.has_one_gradient and alone):
        return None
    squares = of.kind(_KINDS)
    if squares is not None and not _is_parameter(made_of):
        return None
    found = _added_rows(of, made_of) if squares is None else squares(of)
    return None if found is None else found.clamp(min=0).sqrt()


def _one_after_the_other(of: Operand) -> Tensor | None:
    """Somebody's own function runs once a sample: a head's gradients [B, vocabulary, width] are never together."""
    each = (of.of_each(of.stacks(slice(i, i + 1))) for i in range(of.measured))
    norms = [norm_math.squared_sum(at_least_float32(grads)) for grads in each]
    return torch.cat(norms).sqrt() if norms else None


def _is_parameter(made_of: Node) -> bool:
    """Whether an operand is a parameter, but for the order of its numbers and their precision."""
    node: Node | None = made_of
    while node is not None and node.next_functions:
        if not node.name().startswith(_KEEP_NORMS):
            return False
        node = node.next_functions[0][0]
    return True


def _added_rows(of: Operand, made_of: Node) -> Tensor | None:
    """Of a table whose rows are looked up by no data, as positions are, and added to what is.

    Each sample's gradient of the looked-up rows is summed for equal tokens, as where a rule looks up.
    """
    table, g = made_of, of.g
    if table.name().startswith("ToCopyBackward") and table.next_functions[0][0] is not None:
        table = table.next_functions[0][0]
    if not table.name().startswith("EmbeddingBackward"):
        return None
    of_parameter = table.next_functions[0][0] is not None and not table.next_functions[0][0].next_functions
    if not of_parameter or saved(table, "scale_grad_by_freq") or not of.is_batch_first:
        return None
    tokens, rows = saved(table, "indices"), unsummed_grad(of)
    if rows is None or rows.shape != g.shape or tuple(tokens.shape) != of.shape[:-1]:
        return None
    tokens = tokens.expand(g.shape[:-1]).reshape(of.batch, -1)[: of.measured]
    rows = without_padding(table, tokens, of.mine(rows.reshape(of.batch, -1, g.shape[-1])))
    return norm_math.embedding_weight_squared_norm(tokens, rows)


def _product(of: Operand) -> Tensor | None:
    found = factors(of)
    if found is None:
        return None
    form = cheapest_form(linear_use(*found), of.g.device.type, replaces_weight_grad=False)
    return linear_squared_norm(*found, form)


def _lookup(of: Operand) -> Tensor | None:
    found = lookups(of)
    return None if found is None else norm_math.embedding_weight_squared_norm(*found)


_KINDS: dict[str, Kind] = {
    "MmBackward": _product,
    "AddmmBackward": _product,
    "EmbeddingBackward": _lookup,
    "EmbeddingBagBackward": bag_squares,
}
