"""Calls on the model's own tensors: tables and learned queries, as long as the batch only by chance.

A coordinate table [T, T, 2] goes through a small network once for all samples; learned queries [L, width] are
normalised before they are expanded. Such calls have no batch axis at all. Where T or L happens to be the batch size
they would pass for calls on samples, and a proof by gradients cannot tell: each sample's gradient reaches every row, as
it does under BatchNorm. Where the input comes from can.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.trees import memory_of


class OwnInputs:
    """Tells calls on the model's own tensors from calls on samples.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def holds(self, hooked: HookedModule, current: ForwardPass, inputs: Iterable[Tensor]) -> bool:
        """Whether a call got nothing but parameters and buffers, or what modules made of these.

        Asked only where a module around it could adopt the call, and for more than one sample.

        Args:
            hooked: The module that was called.
            current: The pass.
            inputs: All tensors that it was given.
        """
        if current.batch_size == 1 or current.implicit or not hooked.path:
            return False
        seen = False
        for t in inputs:
            if not t.dim() or t.shape[0] != current.batch_size:
                return False
            if t.grad_fn is None:
                # Looked at once: walking over the whole model takes its time.
                if (t.requires_grad, t.shape) in hooked.foreign_inputs:
                    return False
                if not self._is_own(t):
                    hooked.foreign_inputs.add((t.requires_grad, t.shape))
                    return False
            elif not current.own_results or not _made_of(t, current.own_results):
                return False
            seen = True
        return seen

    def _is_own(self, t: Tensor) -> bool:
        place = memory_of(t)
        owned = chain(self._model.parameters(), self._model.buffers())
        return place is not None and any(memory_of(own) == place for own in owned)


def _made_of(t: Tensor, results: set[torch.autograd.graph.Node]) -> bool:
    """Whether a tensor comes from some results and from parameters alone; other data has no edge in the graph."""
    stack, seen, found = [t.grad_fn], set(), False
    while stack:
        node = stack.pop()
        if node is None:
            return False
        if node in results:
            found = True
        elif node not in seen:
            seen.add(node)
            stack.extend(before for before, _ in node.next_functions)
    return found
