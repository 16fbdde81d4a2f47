"""Several uses of a parameter in compiled code: a sample's gradients add up before its norm is taken.

A trace of the model shows how often each parameter is used. Where that is more than once, the model is traced anew,
with code made for it:

- **linked**: a table that is looked up several times, or looked up and a Linear layer's weight in the end. Each look-up
  hands out a link of zeros [B, T, width], and each later use takes the links of all look-ups before it. The "gradient"
  of a link is what the later uses add to the rows that were looked up. So each look-up knows the inner products:
  ||E1 + E2||^2 = ||E1||^2 + ||E2||^2 + 2 <E1, E2>. No sample's whole table ever exists.
- **summed**: any other parameter. Its uses share zeros [B, *shape], and the "gradient" of these is the sum of each
  sample's gradients.

Each row's count is delivered once in both, so that a use that was missed is told as ever.

- **bare**: what no module with a rule uses, or not only such a module. See `bare_uses.py`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.hooks import BoundHook
from hf_clars.grad_norms.registry import LayerRule
from hf_clars.grad_norms.torch_traces import (
    at_root_of_trace,
    before_compiling,
    current_trace,
    root_of_trace,
    trace_anew,
    uses_in_trace,
    when_traced,
)

ONCE, LINKED, SUMMED, BARE = range(4)

#: What a pass hands to the modules, by their receiver: rows [K, B], counts [K, 1], and these one by one. It hangs on no
#: module: of what does, a compiler makes code for one size alone.
HANDED: dict[int, tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]] = {}

_uses: weakref.WeakValueDictionary[str, Uses] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class Uses:
    """How often each parameter is used, as traces of the model have shown it.

    Args:
        ways: How each parameter is used, as far as that is known.
        hooked: The modules that use them.
        compiling: Is called with what was traced, before that is compiled.

    Attributes:
        name: By which traced code knows it: a compiler takes numbers for what may change.
        ways: `ONCE`, `LINKED`, `SUMMED` or `BARE` for each parameter. The compiler guards it in code that has read it.
        hooked: As given.
        several: Whether there is one that is `LINKED` or `SUMMED`.
        outside: Parameters that are used without their modules: name and operation.
        known: By a module's name, and its parameter's: the parameter's row, and how the module uses it.
    """

    def __init__(self, ways: Sequence[int], hooked: Sequence[HookedModule], compiling: Callable[[Any], Any]) -> None:
        self.name = str(next(_numbers))
        _uses[self.name] = self
        self.ways = tuple(ways)
        self._compiling = compiling
        self.several = LINKED in ways
        self.outside: dict[nn.Parameter, str] = {}
        self.hooked = hooked
        self.known: dict[str, dict[str, tuple[int, str]]] = {}
        self._watched: object = None
        self._trace: object = None
        self._kinds: dict[int, list[str]] = {}
        self._called: dict[str, Sequence[int]] = {}
        self._done: list[str] = []

    def note(self, path: str, rows: Sequence[int], kinds: Sequence[str]) -> None:
        """A module is called in a trace, which begins anew if its code is not made for that.

        Args:
            path: Its name.
            rows: Of its parameters.
            kinds: How it uses each.
        """
        if not self._follow():
            return
        again = [path, *(done for done in self._done if path.startswith(f"{done}."))] if path in self._called else []
        self._called[path] = rows
        for row, kind in zip(rows, kinds, strict=True):
            self._kinds.setdefault(row, []).append(kind)
        ways = list(self.ways)
        for row in rows:
            ways[row] = max(ways[row], _way_of(self._kinds[row]))
        # What has returned, and is called again, will call all inside again: one more trace for all of that.
        inside = (p for p in self._called if any(p.startswith(f"{whole}.") for whole in again))
        for row in (row for p in inside for row in self._called[p]):
            ways[row] = max(ways[row], _way_of(2 * self._kinds[row]))
        if ways != list(self.ways):
            self.ways, self.several = tuple(ways), True
            trace_anew("hf_clars: a parameter is used several times")

    def watch(self) -> bool:
        """A module is called in a trace: see what that trace is when it ends. Whether this is the first call in it."""
        if current_trace() == self._watched or not at_root_of_trace():
            return False
        self._watched = current_trace()
        when_traced(self._look)
        before_compiling(self._compiling)
        return True

    def _look(self, traced: Any) -> None:
        self.outside |= self.used_outside(traced.graph, traced.nn_modules)

    def used_outside(self, graph: Any, bodies: Mapping[str, Any]) -> dict[nn.Parameter, str]:
        """The parameters that a traced graph uses without the modules that own them, and in which operation."""
        found = {}
        for tensor, operation, caller in uses_in_trace(graph, bodies):
            owners = [(h, n) for h in self.hooked for n, p in h.params.items() if p is tensor]
            if owners and caller not in [type(h.module) for h, _ in owners]:
                hooked, name = owners[0]
                found[hooked.params[name]] = f"{hooked.full_name(name)} (in {operation})"
        return found

    def measure_bare(self, rows: Collection[int]) -> None:
        """Parameters are to be measured where they are used; what is traced for another way is no longer right."""
        self.ways = tuple(BARE if i in rows else way for i, way in enumerate(self.ways))

    def note_done(self, path: str) -> None:
        """A module with others inside returns in a trace."""
        if self._follow():
            self._done.append(path)

    def _follow(self) -> bool:
        trace = current_trace()
        if trace != self._trace:
            self._trace = trace
            for seen in (self._kinds, self._called, self._done):
                seen.clear()
        return trace is not None


def _way_of(kinds: list[str]) -> int:
    if len(kinds) < 2:
        return ONCE
    return LINKED if set(kinds[:-1]) == {"lookup"} and kinds[-1] != "other" else SUMMED


@torch.compiler.assume_constant_result
def note_uses(name: str, path: str, params: Sequence[str]) -> bool:
    """`Uses.note`, of that with this name; it is called when a model is traced, and not by the code.

    Where the code of modules that are alike is shared, numbers are no constants to a compiler. Names are.

    Args:
        name: The `Uses`'.
        path: The module's.
        params: Of its parameters.
    """
    uses = _uses[name]
    found = [uses.known[path][param] for param in params]
    uses.note(path, [row for row, _ in found], [kind for _, kind in found])
    return True


@torch.compiler.assume_constant_result
def watch_trace(name: str) -> bool:
    """`Uses.watch`, in the same way."""
    return bool(_uses[name].watch())


@torch.compiler.assume_constant_result
def note_done(name: str, path: str) -> bool:
    """`Uses.note_done`, in the same way."""
    _uses[name].note_done(path)
    return True


@torch.compiler.assume_constant_result
def note_bare(name: str, path: str, params: Sequence[str]) -> bool:
    """`Uses.measure_bare`, in the same way."""
    uses = _uses[name]
    if current_trace() is not None:  # else the compiler has left the code that calls this
        uses.measure_bare([uses.known[path][param][0] for param in params])
        trace_anew("hf_clars: a parameter is measured where it is used")
    return True


@torch.compiler.assume_constant_result
def hook_is_alone() -> bool:
    """Whether a hook is traced without the module that it is on."""
    return root_of_trace() is BoundHook.__call__.__code__


def looks_up(rule: LayerRule | None) -> bool:
    """Whether a rule's module looks rows of a table up."""
    return rule is not None and type(rule).lookup_tokens is not LayerRule.lookup_tokens


def kind_of_use(rule: LayerRule, name: str) -> str:
    """What a rule's module does with a parameter: "lookup", "dense" (a Linear layer's weight) or "other"."""
    if looks_up(rule):
        return "lookup"
    return "dense" if rule.is_dense_weight and name == "weight" else "other"


def expected_way(param: nn.Parameter, owners: Sequence[HookedModule]) -> int:
    """How a parameter will most likely be used, so that a model with tied tables is traced once.

    Args:
        param: The parameter.
        owners: The modules that have it.
    """
    kinds = [kind_of_use(h.rule, n) for h in owners if h.rule is not None for n, p in h.params.items() if p is param]
    return LINKED if len(kinds) > 1 and kinds.count("dense") <= 1 and "other" not in kinds else ONCE


def can_be_compiled(hooked: HookedModule) -> bool:
    """Whether a rule measures a module's calls in compiled code."""
    rule = hooked.rule
    return rule is not None and not rule.several_results and type(rule).batch_axes is LayerRule.batch_axes


def measured(owners: Mapping[nn.Parameter, Sequence[HookedModule]]) -> list[nn.Parameter]:
    """The parameters that compiled code can measure: all who use them, and all that these use beside, have rules.

    Args:
        owners: The modules that own each parameter. BERT's head owns its last layer's bias, and does not use it.
    """

    def fits(hooked: HookedModule, param: nn.Parameter, others: Collection[nn.Parameter]) -> bool:
        if can_be_compiled(hooked):
            return all(p in others for p in hooked.params.values())
        read = getattr(getattr(hooked.module.forward, "__code__", None), "co_names", hooked.params)
        return hooked.rule is None and not any(p is param and name in read for name, p in hooked.params.items())

    known = {p for p, of in owners.items() if any(can_be_compiled(h) for h in of)}
    while True:
        left = {p for p in known if all(fits(h, p, known) for h in owners[p])}
        if len(left) == len(known):
            return [p for p in owners if p in left]
        known = left


def bare_ones(
    owners: Mapping[nn.Parameter, Sequence[HookedModule]], with_rules: Sequence[nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Of the other parameters, those that are measured where they are used; and those that a compiler cannot follow."""
    rest = [p for p in owners if p not in set(with_rules)]
    stopped = {p for p in rest if any(h.rule is not None and not can_be_compiled(h) for h in owners[p])}
    return [p for p in rest if p not in stopped], [p for p in rest if p in stopped]


class Links:
    """What the uses of a table share while the model is called.

    Attributes:
        linked: Whether there are several in this pass.
        tokens: What was looked up so far, [B, T] each.
        zeros: The links, [B, T, width] each.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The model returns."""
        self.linked = False
        self.tokens: tuple[Tensor, ...] = ()
        self.zeros: tuple[Tensor, ...] = ()
