"""The row check: whose rows are whose is trusted after functions that are known to leave rows, and then looked at once.

The sum check finds what was forgotten or counted twice. Rows that were taken for another sample's add up all the same.
So one pass after the first follows the gradients of two samples to everything that is measured, also where it was sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, BatchAxisError
from hf_clars.grad_norms.forward_pass import ForwardPass
from hf_clars.grad_norms.graph.layout import Arrival, Layout, two_of
from hf_clars.grad_norms.graph.places import place_of
from hf_clars.grad_norms.graph.proofs import Proofs
from hf_clars.grad_norms.graph.taint import MOVED
from hf_clars.grad_norms.graph.walk import GraphWalk, Use


def check_rows(
    proofs: Proofs,
    forward_pass: ForwardPass,
    outputs: Sequence[Tensor],
    walk: GraphWalk,
    layouts_of: Callable[[Use, int], Sequence[Layout | None] | None],
    name_of: Callable[[nn.Parameter], str],
) -> None:
    """Follow two samples' gradients to all that is measured.

    Args:
        proofs: Asks the graph.
        forward_pass: The pass, with more than one sample.
        outputs: What the model returned.
        walk: What was found in its graph.
        layouts_of: Whose rows are whose in a use's results, with B samples; None where that is not known.
        name_of: A parameter's name.

    Raises:
        BatchAxisError: If one sample's gradient arrives in rows that were taken for another's.
    """
    batch = forward_pass.batch_size
    trusted: list[tuple[str, GradientEdge, Layout]] = []
    for call in forward_pass.uses.rule_calls:
        if not call.cancelled and call.plan.moved != MOVED and call.plan.x_depends_on_data:
            trusted += [(str(call.hooked), edge, call.plan.layout) for edge in call.edges[:1]]
    for use in walk.uses:
        for i, layout in enumerate((layouts_of(use, batch) or ()) if use.moved != MOVED else ()):
            if layout is not None:
                names = ", ".join(sorted(name_of(p) for p in use.leaves.values()))
                trusted.append((names, GradientEdge(use.node, i), layout))
    suspects = [(what, place_of(edge), layout) for what, edge, layout in trusted]
    for samples in (two_of(batch), range(batch)):
        places = [place for _, place, _ in suspects]
        found = proofs.layouts(forward_pass, outputs, walk, places, samples, ()) if places else None
        pairs = zip(suspects, found or (), strict=False)
        suspects = [s for s, arrival in pairs if arrival is not None and _is_moved(arrival, s[2], s[1][1], batch)]
    for what, _, _ in suspects[:1]:
        raise BatchAxisError(
            f"{what}: its rows were taken for the batch's {batch} samples in their order, but one sample's "
            "gradient arrives in rows of others: norms so far are those of other samples. A function that is "
            "known to leave rows where they are has moved them. Please report this model, and until then freeze "
            f"these parameters, or {WITHOUT_SAMPLES}."
        )


def _is_moved(found: Arrival, layout: Layout, shape: Sequence[int], batch: int) -> bool:
    """Whether each sample has rows to itself, and not the believed ones. Rows of samples that depend are reached by all.

    Args:
        found: Where gradients arrived.
        layout: What is believed.
        shape: The tensor's. Its last axis tells nothing: a sample may reach a few channels alone.
        batch: B.
    """
    if layout in found.layouts or found.mixed or found.guessed or not found.rows:
        return False
    reached = torch.stack([rows[layout.axis] for rows in found.rows.values()]).sum(0)
    alone = int(reached.max()) < 2 and int(reached.sum()) <= len(found.rows) * (shape[layout.axis] // batch)
    return alone or any(la.axis not in (layout.axis, len(shape) - 1) for la in found.layouts)
