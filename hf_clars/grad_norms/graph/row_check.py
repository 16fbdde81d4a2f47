"""The row check: whose rows are whose is trusted after functions that are known to leave rows, and then looked at once.

The sum check finds what was forgotten or counted twice. Rows that were taken for another sample's add up all the same.
So one pass after the first follows the gradients of two samples to everything that is measured, also where it was sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    places = [place_of(edge) for _, edge, _ in trusted]
    found = proofs.layouts(forward_pass, outputs, walk, places, two_of(batch), ()) if places else None
    for (what, _, layout), (_, shape), arrival in zip(trusted, places, found or (), strict=False):
        if arrival is not None and _is_wrong(arrival, layout, shape[layout.axis] // batch):
            raise BatchAxisError(
                f"{what}: its rows were taken for the batch's {batch} samples in their order, but one sample's "
                "gradient arrives in rows of others: norms so far are those of other samples. A function that is "
                "known to leave rows where they are has moved them. Please report this model, and until then freeze "
                f"these parameters, or {WITHOUT_SAMPLES}."
            )


def _is_wrong(found: Arrival, layout: Layout, rows: int) -> bool:
    """Whether rows are surely not the believed ones; samples that depend on each other tell nothing.

    Args:
        found: Where gradients arrived.
        layout: What is believed.
        rows: How many of its axis are one sample's.
    """
    if layout in found.layouts or found.mixed or not found.samples:
        return False
    some = not layout.axis and found.touched > found.samples * rows
    return bool(found.layouts) or not (some or found.everywhere(layout.axis))
