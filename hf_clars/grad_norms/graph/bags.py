"""Each sample's gradient of a table that `embedding_bag` looks up: bags of tokens, of any length each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.norm_math import at_least_float32
from hf_clars.grad_norms.torch_internals import saved

_MEAN, _MAX = 1, 2


def bag_grads(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    """Each sample's gradient of the table.

    Args:
        node: The operation, not yet run backward.
        index: Which operand.
        g: Gradient of the bags [bags, width].
        layout: Whose bags are whose.
        batch: B.
        measured: How many of the first samples are measured.

    Returns:
        [measured, rows, width]; None for what only the operation itself can tell: another operand, counts of the batch.
    """
    if not _is_plain(node, index, layout):
        return None
    g, owners = at_least_float32(g), _owners(g, layout, batch)
    grads = g.new_zeros(batch, int(saved(node, "weight_sym_argsize_0")), g.shape[1])
    if saved(node, "mode") == _MAX:
        columns = torch.arange(g.shape[1], device=g.device).expand_as(g)
        places = (owners[:, None].expand_as(g), saved(node, "result3").clamp(min=0), columns)
        return grads.index_put_(places, _of_full_bags(node, g), accumulate=True)[:measured]
    bags, tokens, rows = _lookups(node, g)
    return grads.index_put_((owners[bags], tokens), rows, accumulate=True)[:measured]


def bag_squares(node: Node, index: int, g: Tensor, layout: Layout, batch: int, measured: int) -> Tensor | None:
    """Each sample's squared gradient norm, [measured], without the tables. Arguments and None as for `bag_grads`."""
    if not _is_plain(node, index, layout) or (saved(node, "mode") == _MAX and len(g) != batch):
        return None
    g, owners = at_least_float32(g), _owners(g, layout, batch)
    if saved(node, "mode") == _MAX:  # each column of a bag is one number of the table
        return norm_math.squared_sum(_of_full_bags(node, g))[:measured]
    bags, tokens, rows = _lookups(node, g)
    return norm_math.ragged_lookup_squared_norm(owners[bags], tokens, rows, batch)[:measured]


def _is_plain(node: Node, index: int, layout: Layout) -> bool:
    return index == 0 and layout.axis == 0 and not saved(node, "scale_grad_by_freq")


def _owners(g: Tensor, layout: Layout, batch: int) -> Tensor:
    """The sample of each bag."""
    sizes = layout.sizes(g.shape, batch)
    assert sizes is not None
    return torch.arange(len(g), device=g.device) // sizes[1] % batch


def _of_full_bags(node: Node, g: Tensor) -> Tensor:
    """Gradients of bags in which no token counts lead nowhere."""
    return g * (saved(node, "result2") > 0).unsqueeze(1)


def _lookups(node: Node, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bag and the token of each lookup [N], and what it adds to its row [N, width]."""
    tokens, offsets, weights = (saved(node, name) for name in ("indices", "offsets", "per_sample_weights"))
    places = torch.arange(len(tokens), device=g.device)
    bags = torch.bucketize(places, offsets[: len(g)], right=True) - 1  # a last offset may be the end of the tokens
    if saved(node, "mode") == _MEAN:
        g = g / saved(node, "result2").clamp(min=1).unsqueeze(1)
    rows = g[bags]
    if weights is not None:
        rows = rows * weights.unsqueeze(1)
    padding = saved(node, "padding_idx")  # without one it is the largest number there is
    if padding < int(saved(node, "weight_sym_argsize_0")):
        rows = rows * (tokens != padding).unsqueeze(1)
    return bags, tokens, rows
