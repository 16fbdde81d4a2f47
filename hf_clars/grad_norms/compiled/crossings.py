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
from hf_clars.grad_norms.torch_internals import version
from hf_clars.grad_norms.undisturbed import quietly

Edge = tuple[Any, int]


class Crossings:
    """What pieces of compiled code hand each other.

    Args:
        receiver: The number of whom they tell.
    """

    def __init__(self, receiver: int) -> None:
        self._receiver = receiver
        self._key = f"hf_clars {receiver}"
        self._without_gradient = WeakTensorKeyDictionary()

    def place_of(self, t: Tensor, batch: int) -> Any:
        """Where the samples seem to be in what a piece is called with: a place, None (in no axis), or `LOST`."""
        before, place = self._mark_of(t)
        if before == version(t) or t.grad_fn is None:
            return place if before == version(t) else LOST
        known = set(self._marks_below(t).values())
        fit = [
            p for p in (Place(), *known) if isinstance(p, Place) and t.shape[p.axis : p.axis + 1] == (p.length(batch),)
        ]
        return fit[0] if known and fit else LOST

    def _stays(self, t: Tensor, place: Place, batch: int) -> bool:
        """Whether they are there in this pass: each sample's rows are made of its own alone."""
        before, marked = self._mark_of(t)
        if before == version(t) or t.grad_fn is None:
            return bool(before == version(t) and marked == place)
        known = self._marks_below(t)
        if self.place_of(t, batch) is LOST or LOST in known.values():
            return False
        root = Root(GradientEdge(t.grad_fn, t.output_nr), t.detach(), Layout(place.axis, place.outer))
        places = [(GradientEdge(*edge), Layout(p.axis, p.outer)) for edge, p in known.items() if p is not None]
        try:
            with quietly():
                return stay([root], places, batch, ())
        except RuntimeError:  # the graph can be differentiated only once
            return False

    def _marks_below(self, t: Tensor) -> dict[Edge, Any]:
        """What a tensor was made of, where it left compiled code."""
        found: dict[Edge, Any] = {}
        todo: list[Edge] = [(t.grad_fn, t.output_nr)]
        seen = {*todo}
        while todo:
            node, number = todo.pop()
            mark = node.metadata.get(self._key, {}).get(number)
            if mark is not None:
                found[node, number] = mark[1]
                continue
            below = {edge for edge in node.next_functions if edge[0] is not None} - seen
            seen |= below
            todo += below
        return found

    def _mark_of(self, t: Tensor) -> Any:
        if t.grad_fn is None:
            return self._without_gradient.get(t, (None, LOST))
        return t.grad_fn.metadata.get(self._key, {}).get(t.output_nr, (None, LOST))

    def _mark(self, t: Tensor, place: Any) -> None:
        if isinstance(place, Place) and not (isinstance(place.outer, int) and isinstance(place.inner, int)):
            place = LOST  # as it depends on lengths that only a run knows
        if t.grad_fn is None:
            self._without_gradient[t] = (version(t), place)
        else:
            t.grad_fn.metadata.setdefault(self._key, {})[t.output_nr] = (version(t), place)

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
        words = f"{names}: {_ELSEWHERE}"

        def run(*args: Any) -> Any:
            for i, place in taken.items():
                if isinstance(place, Place) and not self._stays(args[i], place, args[rows].shape[1]):
                    torch.ops.hf_clars.refuse(args[i], self._receiver, words, True)
            results = compiled(*args)
            for t, place in zip(results, returned, strict=True):
                if isinstance(t, Tensor):
                    self._mark(t, place)
            return results

        return run


_ELSEWHERE = (
    "is used in compiled code on what uncompiled code has made, and that gave samples other places, or mixed them: "
    "nobody knows which rows belong to which. Let it leave each sample's rows in their place, compile the whole model "
    "with fullgraph=True, or run it without torch.compile."
)
