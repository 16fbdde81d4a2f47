"""The row check: whose rows are whose is trusted after functions that are known to leave rows, and then looked at once.

The sum check finds what was forgotten or counted twice. Rows that were taken for another sample's add up all the same.
So in the second pass, and in each that has another number of operations, the gradients of two samples are followed to
everything that is measured, also where it was sure.
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

_MOST = 64


class Kinds:
    """Passes of other numbers of operations, up to 64: they may do other things with their rows."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, forward_pass: ForwardPass) -> bool:
        """Whether no pass was like this one. The first one is followed all the same."""
        if forward_pass.batch_size < 2 or forward_pass.backward_seen or len(self._seen) > _MOST:
            return False
        before = len(self._seen)
        self._seen.add(len(forward_pass.operations) - forward_pass.ours if before else 0)
        return 0 < before < len(self._seen)


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
            "gradient arrives in rows of others: norms may have been those of other samples so far. If the model "
            "shuffles rows in some passes only, let it do so in all of them. If not, please report it, and until then "
            f"freeze these parameters, or {WITHOUT_SAMPLES}."
        )


def _is_moved(found: Arrival, layout: Layout, shape: Sequence[int], batch: int) -> bool:
    """Whether each sample has rows to itself, and not the believed ones. Samples that depend reach each other's.

    Args:
        found: Where gradients arrived.
        layout: What is believed.
        shape: The tensor's. Its last axis tells nothing: a sample may reach a few channels alone.
        batch: B.
    """
    right = (layout.axis, layout.sizes(shape, batch))
    if right in [(la.axis, la.sizes(shape, batch)) for la in found.layouts] or found.mixed or found.guessed:
        return False
    return not found.is_shared(shape, batch, layout.axis) or any(
        la.axis not in (layout.axis, len(shape) - 1) for la in found.layouts
    )
