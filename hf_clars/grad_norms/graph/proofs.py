"""Asks a pass's graph whose rows are whose: one sample after the other, or all at once what is believed already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hf_clars.grad_norms.forward_pass import ForwardPass, quietly
from hf_clars.grad_norms.graph.layout import Arrival, Layout, prove, stay
from hf_clars.grad_norms.graph.places import inner_roots, place_of
from hf_clars.grad_norms.graph.walk import GraphWalk
from hf_clars.grad_norms.pytree import differentiable_in
from hf_clars.grad_norms.undisturbed import undisturbed

Place = tuple[GradientEdge, tuple[int, ...]]


class Proofs:
    """Where samples' gradients arrive.

    Args:
        is_split: Whether an engine gathers weights for the backward pass, which one of our own would confuse.
    """

    def __init__(self, is_split: Callable[[], bool]) -> None:
        self._is_split = is_split
        self._all_at_once = True

    def layouts(
        self,
        forward_pass: ForwardPass,
        outputs: Sequence[Tensor],
        walk: GraphWalk,
        places: Sequence[Place],
        samples: Sequence[int],
        believed: Sequence[Layout | None],
    ) -> list[Arrival | None] | None:
        """The layouts of some places.

        Args:
            forward_pass: The pass.
            outputs: What the model returned.
            walk: What was found in its graph.
            places: What to look at.
            samples: Whose gradients are followed.
            believed: What to ask first, of all samples at once; empty to leave that out.

        Returns:
            For each place where the gradients arrived; None if the graph cannot be asked.
        """
        batch = forward_pass.batch_size
        whole = [t for t in differentiable_in(outputs) if t.dim() and t.shape[0] == batch]
        if batch < 2 or walk.once or self._is_split() or any(t.is_meta for t in outputs):
            return None
        roots = [(torch.autograd.graph.get_gradient_edge(t), t.detach()) for t in whole]
        checks: list[Place] = []
        if not roots:
            roots = inner_roots(outputs, batch)
            checks = [
                place_of(c.edges[0])
                for c in forward_pass.rule_calls
                if c.edges and c.proven and not c.cancelled and c.on_given
            ]
            if not roots or not checks:
                return None
        asked = [*places, *checks]
        wanted = [*believed, *(Layout() for _ in checks)]
        sure = [(edge, la) for (edge, shape), la in zip(asked, wanted, strict=False) if la and la.sizes(shape, batch)]
        at_once = self._all_at_once and len(believed) > 0 and len(sure) == len(asked)
        try:
            with quietly(), undisturbed(forward_pass.params()):
                if at_once and stay(roots, sure, batch, walk.couplings):
                    return [Arrival([layout]) for _, layout in sure[: len(places)]]
                found = prove(roots, asked, batch, samples, walk.couplings)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None  # a graph that can be differentiated only once
        if at_once and all(f is None or la in f.layouts for f, (_, la) in zip(found, sure, strict=True)):
            self._all_at_once = False  # this model's gradients come out in other digits each time
        wrong = [f for f in found[len(places) :] if f is not None and Layout() not in f.layouts]
        return None if wrong else found[: len(places)]
