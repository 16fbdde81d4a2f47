"""The row check: whose rows are whose is trusted after functions that are known to leave rows, and then looked at once.

The sum check finds what was forgotten or counted twice. Rows that were taken for another sample's add up all the same.
So in the second pass, and in each that has another number of operations, the gradients of two samples are followed to
everything that is measured, also where it was sure.

Where samples depend on each other, they arrive in rows of others, and rightly so. But tokens that are made of
parameters alone, as a class token for each window, may be given to other samples than those beside whose rows they were
made, and no value tells. Then they arrive in others' rows of what was joined, and in their own of the data in it. That
is asked in the first pass, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
_JOINING = ("CatBackward0", "StackBackward0", "WhereBackward0")
"""Operations in whose results some rows are made of parameters alone, beside those of the data."""


class Kinds:
    """Passes of other numbers of operations, up to 64: they may do other things with their rows."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, forward_pass: ForwardPass, walk: GraphWalk) -> bool:
        """Whether no pass was like this one. In the first the data are followed, which tells all but of joined rows."""
        if forward_pass.batch_size < 2 or forward_pass.backward_seen or len(self._seen) > _MOST:
            return False
        before = len(self._seen)
        self._seen.add(len(forward_pass.operations) - forward_pass.ours if before else 0)
        joined = any(use.node.name() in _JOINING for use in walk.uses)
        return before < len(self._seen) and (before > 0 or joined)


@dataclass
class _Trusted:
    """Rows that were taken for the samples': by which layer or parameters, where, and as which use if it is one."""

    what: str
    place: tuple[GradientEdge, tuple[int, ...]]
    layout: Layout
    use: Use | None = None


def check_rows(
    proofs: Proofs,
    forward_pass: ForwardPass,
    outputs: Sequence[Tensor],
    walk: GraphWalk,
    layouts_of: Callable[[Use, int], Sequence[Layout | None] | None],
    name_of: Callable[[nn.Parameter], str],
) -> list[Use]:
    """Follow two samples' gradients to all that is measured.

    Args:
        proofs: Asks the graph.
        forward_pass: The pass, with more than one sample.
        outputs: What the model returned.
        walk: What was found in its graph.
        layouts_of: Whose rows are whose in a use's results, with B samples; None where that is not known.
        name_of: A parameter's name.

    Returns:
        Uses whose rows were given to other samples: these have no rows of their own there.

    Raises:
        BatchAxisError: If one sample's gradient arrives in rows that were taken for another's.
    """
    batch = forward_pass.batch_size
    trusted = _trusted(forward_pass, walk, layouts_of, name_of)

    def ask(places: Sequence[tuple[GradientEdge, tuple[int, ...]]], samples: Sequence[int]) -> Sequence[Arrival | None]:
        found = proofs.layouts(forward_pass, outputs, walk, places, samples, ()) if places else None
        return found or [None for _ in places]

    moved, shared = trusted, list[_Trusted]()
    for samples in (two_of(batch), range(batch)):
        pairs = [(t, f) for t, f in zip(moved, ask([t.place for t in moved], samples), strict=True) if f is not None]
        shared = shared or [t for t, f in pairs if _is_shared(f, t.layout, t.place[1], batch)]
        moved = [t for t, f in pairs if _is_moved(f, t.layout, t.place[1], batch)]
    below = [(t.layout, place_of(edge)) for t in shared if t.use is not None for edge in _data_of(t.use, walk)]
    arrived = zip(below, ask([place for _, place in below], two_of(batch)), strict=True)
    if not any(f is not None and _is_right(f, layout, shape, batch) for (layout, (_, shape)), f in arrived):
        shared = []  # samples depend on each other
    for fault in [*moved, *(t for t in shared if t.use is None)][:1]:
        raise BatchAxisError(
            f"{fault.what}: its rows were taken for the batch's {batch} samples in their order, but one sample's "
            "gradient arrives in rows of others: norms may have been those of other samples so far. If the model "
            "shuffles rows in some passes only, let it do so in all of them. If not, please report it, and until then "
            f"freeze these parameters, or {WITHOUT_SAMPLES}."
        )
    return [t.use for t in shared if t.use is not None]


def _trusted(
    forward_pass: ForwardPass,
    walk: GraphWalk,
    layouts_of: Callable[[Use, int], Sequence[Layout | None] | None],
    name_of: Callable[[nn.Parameter], str],
) -> list[_Trusted]:
    found: list[_Trusted] = []
    for call in forward_pass.uses.rule_calls:
        if not call.cancelled and call.plan.moved != MOVED and call.plan.x_depends_on_data:
            found += [_Trusted(str(call.hooked), place_of(edge), call.plan.layout) for edge in call.edges[:1]]
    for use in walk.uses:
        for i, layout in enumerate((layouts_of(use, forward_pass.batch_size) or ()) if use.moved != MOVED else ()):
            if layout is not None:
                names = ", ".join(sorted(name_of(p) for p in use.leaves.values()))
                found.append(_Trusted(names, place_of(GradientEdge(use.node, i)), layout, use))
    return found


def _data_of(use: Use, walk: GraphWalk) -> list[GradientEdge]:
    """The other operands of a use's operation: all that are not made of parameters alone."""
    made_of_parameters = {u.index for u in walk.uses if u.node is use.node}
    operands = enumerate(use.node.next_functions)
    return [GradientEdge(node, k) for i, (node, k) in operands if node is not None and i not in made_of_parameters]


def _is_right(found: Arrival, layout: Layout, shape: Sequence[int], batch: int) -> bool:
    """Whether gradients arrived in the believed rows alone."""
    right = (layout.axis, layout.sizes(shape, batch))
    return right in [(la.axis, la.sizes(shape, batch)) for la in found.layouts]


def _is_shared(found: Arrival, layout: Layout, shape: Sequence[int], batch: int) -> bool:
    """Whether each sample's gradient arrived in rows of others too."""
    sure = not (_is_right(found, layout, shape, batch) or found.mixed or found.guessed)
    return sure and found.is_shared(shape, batch, layout.axis)


def _is_moved(found: Arrival, layout: Layout, shape: Sequence[int], batch: int) -> bool:
    """Whether each sample has rows to itself, and not the believed ones. Samples that depend reach each other's.

    Args:
        found: Where gradients arrived.
        layout: What is believed.
        shape: The tensor's. Its last axis tells nothing: a sample may reach a few channels alone.
        batch: B.
    """
    if _is_right(found, layout, shape, batch) or found.mixed or found.guessed:
        return False
    return not found.is_shared(shape, batch, layout.axis) or any(
        la.axis not in (layout.axis, len(shape) - 1) for la in found.layouts
    )
