"""Measures parameters where the graph uses them, once a comparison has shown that this is right.

The first time a module is measured, the general fallback is asked, and what the graph's uses give is compared with it;
from then on calls like that one are measured by the uses alone, which cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.errors import BatchAxisError
from hf_clars.grad_norms.graph_uses import GraphUse, Operand
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.rule_call import no_autocast
from hf_clars.grad_norms.without_rule.agreement import agree, precision_now
from hf_clars.grad_norms.without_rule.watched_call import Key, WatchedCall


class DirectMeasures:
    """Knows which modules can be measured so.

    Args:
        layer_of: Layer index of every parameter.
        captured: Takes note of a use that will be measured, and returns its number in the pass.
        arrived: Takes note that its gradient has come.
        active: False while the graph is differentiated for other purposes.
        quiet: Says that it is.
    """

    def __init__(
        self,
        layer_of: dict[nn.Parameter, int],
        captured: Callable[[HookedModule, ForwardPass, dict[str, nn.Parameter], Tensor], int],
        arrived: Callable[[HookedModule, ForwardPass, int], bool],
        active: Callable[[], bool],
        quiet: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._layer_of = layer_of
        self._captured, self._arrived, self._active, self._quiet = captured, arrived, active, quiet
        self._right: dict[Key, bool] = {}

    def take(self, watched: WatchedCall) -> bool:
        """Measure a call by the uses in its graph, if that is known to be right.

        Args:
            watched: The call.

        Returns:
            Whether it is measured now.
        """
        hooked, current = watched.hooked, watched.current  # the hooks below must not hold on to the graph
        uses = watched.direct_uses
        if not uses or not self._right.get(watched.key):
            return False
        current.leave(watched.adopted)
        for use in uses:
            ticket = self._captured(hooked, current, {use.name: use.param}, watched.x)
            use.watch(current.batch_size, current.kept, self._active, partial(self._deliver, hooked, current, ticket))
        return True

    def _deliver(
        self, hooked: HookedModule, current: ForwardPass, ticket: int, operand: Operand, g: Tensor | None
    ) -> None:
        if not self._arrived(hooked, current, ticket):
            return
        if g is None:
            raise BatchAxisError(
                f"{hooked} used {operand.name} with the batch as first axis before, and now in another way: give it "
                "inputs of one layout, or freeze the parameter."
            )
        with no_autocast(g.device.type), self._quiet():
            if operand.param in current.several:
                current.add_pending(operand.param, operand.grads(g))
            else:
                current.add_squares(self._layer_of[operand.param], operand.squares(g))

    def trial(self, watched: WatchedCall) -> tuple[Trial, list[GraphUse]]:
        """A comparison with what the fallback gives for the same call; to be asked for before calls inside are adopted.

        Args:
            watched: The call.

        Returns:
            The comparison, and the uses to `follow` for it; none if its result is known or there is nothing to compare.
        """
        uses = watched.direct_uses
        key = watched.key
        if key in self._right:
            uses = []
        used = [leaf for _, leaf in watched.hooked.leaves(watched.wanted).values()]
        precision = precision_now([*watched.outputs.values(), *used])
        return Trial(len(uses), partial(self._right.setdefault, key), self._quiet, precision), uses

    def follow(self, uses: Iterable[GraphUse], current: ForwardPass, trial: Trial) -> None:
        """Have uses compared; after the fallback's own hooks are in place, so that its gradients come first.

        Args:
            uses: Of the trial.
            current: The pass.
            trial: The comparison.
        """
        for use in uses:
            use.watch(current.batch_size, current.kept, self._active, trial.receive)


@dataclass(eq=False)
class Trial:
    """A pass in which both the fallback and the graph's uses are followed.

    Attributes:
        waiting: Uses whose gradient has not come.
        conclude: Takes whether both agreed.
        quiet: Keeps hooks from taking what is differentiated inside for the pass itself.
        precision: What the module computed in.
        expected: Per-sample gradients by the fallback.
        found: The same by the uses.
    """

    waiting: int
    conclude: Callable[[bool], bool]
    quiet: Callable[[], AbstractContextManager[None]]
    precision: torch.dtype
    expected: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Tensor] = field(default_factory=dict)

    def expect(self, per_sample: dict[str, Tensor]) -> None:
        """Take the fallback's per-sample gradients, {name: [b, *shape]}."""
        self.expected = per_sample if self.waiting else {}

    def receive(self, operand: Operand, g: Tensor | None) -> None:
        """Take a use's per-sample gradients [b, *shape of the operand]; None: they cannot be told."""
        if g is None:
            self.conclude(False)
            self.waiting = 0
        if self.waiting == 0 or g is None:
            return
        with no_autocast(g.device.type), self.quiet():
            grads = operand.grads(g)
        self.found[operand.name] = self.found[operand.name] + grads if operand.name in self.found else grads
        self.waiting -= 1
        if self.waiting == 0:
            pairs = [(self.found.get(n), want) for n, want in self.expected.items()]
            self._say(_together([False if f is None else agree(f, want, self.precision) for f, want in pairs]))

    def _say(self, verdict: bool | None) -> None:
        """What could not be told in this pass is asked again in the next."""
        if verdict is not None:
            self.conclude(verdict)


def _together(verdicts: list[bool | None]) -> bool | None:
    """All agree; None as soon as one cannot be told and none disagrees."""
    if False in verdicts:
        return False
    return None if None in verdicts or not verdicts else True
