"""Each sample's gradient of a table that `embedding_bag` looks up: bags of tokens, of any length each."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.graph.operands import Operand
from hf_clars.grad_norms.norm_math import at_least_float32

_MEAN, _MAX = 1, 2


def bag_grads(of: Operand) -> Tensor | None:
    """Each sample's gradient of the table, from the bags' [bags, width].

    Returns:
        [measured, rows, width]; None for what only the operation itself can tell: another operand, counts of the batch.
    """
    if not _is_plain(of):
        return None
    g, owners = at_least_float32(of.g), _owners(of)
    grads = g.new_zeros(of.batch, int(of.saved("weight_sym_argsize_0")), g.shape[1])
    if of.saved("mode") == _MAX:
        columns = torch.arange(g.shape[1], device=g.device).expand_as(g)
        places = (owners[:, None].expand_as(g), of.saved("result3").clamp(min=0), columns)
        return grads.index_put_(places, _of_full_bags(of, g), accumulate=True)[: of.measured]
    bags, tokens, rows = _lookups(of, g)
    return grads.index_put_((owners[bags], tokens), rows, accumulate=True)[: of.measured]


def bag_squares(of: Operand) -> Tensor | None:
    """Each sample's squared gradient norm, [measured], without the tables. None as for `bag_grads`."""
    if not _is_plain(of) or (of.saved("mode") == _MAX and len(of.g) != of.batch):
        return None
    g, owners = at_least_float32(of.g), _owners(of)
    if of.saved("mode") == _MAX:  # each column of a bag is one number of the table
        return norm_math.squared_sum(_of_full_bags(of, g))[: of.measured]
    bags, tokens, rows = _lookups(of, g)
    return norm_math.ragged_lookup_squared_norm(owners[bags], tokens, rows, of.batch)[: of.measured]


def _is_plain(of: Operand) -> bool:
    return of.index == 0 and of.layout.axis == 0 and not of.saved("scale_grad_by_freq")


def _owners(of: Operand) -> Tensor:
    """The sample of each bag."""
    sizes = of.layout.sizes(of.g.shape, of.batch)
    assert sizes is not None
    return torch.arange(len(of.g), device=of.g.device) // sizes[1] % of.batch


def _of_full_bags(of: Operand, g: Tensor) -> Tensor:
    """Gradients of bags in which no token counts lead nowhere."""
    return g * (of.saved("result2") > 0).unsqueeze(1)


def _lookups(of: Operand, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bag and the token of each lookup [N], and what it adds to its row [N, width]."""
    tokens, offsets, weights = (of.saved(name) for name in ("indices", "offsets", "per_sample_weights"))
    places = torch.arange(len(tokens), device=g.device)
    bags = torch.bucketize(places, offsets[: len(g)], right=True) - 1  # a last offset may be the end of the tokens
    if of.saved("mode") == _MEAN:
        g = g / of.saved("result2").clamp(min=1).unsqueeze(1)
    rows = g[bags]
    if weights is not None:
        rows = rows * weights.unsqueeze(1)
    padding = of.saved("padding_idx")  # without one it is the largest number there is
    if padding < int(of.saved("weight_sym_argsize_0")):
        rows = rows * (tokens != padding).unsqueeze(1)
    return bags, tokens, rows
