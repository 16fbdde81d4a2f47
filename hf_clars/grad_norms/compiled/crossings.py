"""Between two pieces of compiled code: where the samples are in what uncompiled code hands from one to the next.

Each piece marks what it returns, and the next one takes that as it is. What uncompiled code has made of it is followed
back by gradients, in every pass. Of anything else nobody knows whose rows are whose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.weak import WeakTensorKeyDictionary

from hf_clars.grad_norms.axes.place import LOST, Place
from hf_clars.grad_norms.graph.following import stay
from hf_clars.grad_norms.graph.layout import Layout, Root
from hf_clars.grad_norms.torch_internals import BATCH_NORM_NODES, version
from hf_clars.grad_norms.undisturbed import quietly

_MOVED = (
    "is used in compiled code on what uncompiled code has made, where samples were given other places, or mixed: "
    "nobody knows which rows belong to which. Compile the whole model with fullgraph=True, or run it without "
    "torch.compile."
)


class Crossings:
    """What pieces of compiled code hand each other.

    Args:
        receiver: The number of whom they tell.
    """

    def __init__(self, receiver: int) -> None:
        self._receiver, self._key = receiver, f"hf_clars {receiver}"
        self._without_gradient = WeakTensorKeyDictionary()

    def place_of(self, t: Tensor, batch: int, *, proven: bool = False) -> Any:
        """Where the samples are in what a piece is called with.

        Args:
            t: A tensor.
            batch: B.
            proven: Whether gradients are followed. No code may run while other code is compiled.

        Returns:
            A place, None (in no axis), or `LOST`.
        """
        changes, place = self._mark_at(t, t.grad_fn, t.output_nr) or (None, LOST)
        if changes == version(t) or t.grad_fn is None:
            return place if changes == version(t) else LOST
        known, couplings = self._made_of((t.grad_fn, t.output_nr))
        fit = [p for p in (Place(), *known.values()) if p and t.shape[p.axis : p.axis + 1] == (p.length(batch),)]
        if not known or not fit or not proven:
            return fit[0] if known and fit else LOST
        root = Root(GradientEdge(t.grad_fn, t.output_nr), t.detach(), Layout(fit[0].axis, fit[0].outer))
        places = [(GradientEdge(*edge), Layout(p.axis, p.outer)) for edge, p in known.items() if p]
        try:
            with quietly():
                return fit[0] if stay([root], places, batch, couplings) else LOST
        except RuntimeError:  # the graph can be differentiated only once
            return LOST

    def _made_of(self, edge: Any) -> tuple[dict[Any, Any], list[Any]]:
        """Where what a value is made of left compiled code, with its place; nothing if one is lost; and BatchNorms."""
        found, couplings, todo, seen = {}, [], [edge], {edge}
        while todo:
            node, number = here = todo.pop()
            mark = self._mark_at(None, node, number)
            if mark is not None:
                found[here] = mark[1]
                continue
            couplings += [node] if node.name().startswith(BATCH_NORM_NODES) else []
            below = {e for e in node.next_functions if e[0] is not None} - seen
            seen |= below
            todo += below
        return {} if LOST in found.values() else found, couplings

    def _mark_at(self, t: Tensor | None, node: Any, number: int) -> Any:
        return self._without_gradient.get(t) if node is None else node.metadata.get(self._key, {}).get(number)

    def _mark(self, t: Tensor, place: Any) -> None:
        if isinstance(place, Place) and not (isinstance(place.outer, int) and isinstance(place.inner, int)):
            place = LOST  # as it depends on lengths that only a run knows
        if t.grad_fn is None:
            self._without_gradient[t] = (version(t), place)
        else:
            marks: Any = t.grad_fn.metadata
            marks.setdefault(self._key, {})[t.output_nr] = (version(t), place)

    def around(
        self, compiled: Callable[..., Any], names: str, rows: int, taken: Mapping[int, Any], returned: Sequence[Any]
    ) -> Callable[..., Any]:
        """A piece of compiled code that looks at what it is called with, and marks what it returns.

        Args:
            compiled: The code.
            names: Of the parameters that it uses.
            rows: Which of what it takes are the rows, [K, B].
            taken: Where the samples seemed to be in some of what it takes, when it was compiled.
            returned: The same of what it returns.
        """

        def run(*args: Any) -> Any:
            for i, place in taken.items():
                if place is not LOST and self.place_of(args[i], args[rows].shape[1], proven=True) != place:
                    torch.ops.hf_clars.refuse(args[i], self._receiver, f"{names}: {_MOVED}", True)
            results = compiled(*args)
            for t, place in zip(results, returned, strict=True):
                if isinstance(t, Tensor):
                    self._mark(t, place)
            return results

        return run
