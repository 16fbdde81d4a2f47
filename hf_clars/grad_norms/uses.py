"""Who uses which parameter in one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.hooked_modules import CallPlan, HookedModule
from hf_clars.grad_norms.pytree import tensors_in
from hf_clars.grad_norms.registry import LayerRule
from hf_clars.grad_norms.undisturbed import differentiating


@dataclass(eq=False, slots=True)
class RuleUse:
    """A call of a module that a rule measures: what is known of it when the module has run.

    Attributes:
        plan: How it is measured.
        repeats: Whether activation checkpointing makes a call again that is measured already.
        tokens: The rows of its weight that an embedding looked up, [B, T].
        places: Where its results come from in the graph, until the forward pass ends: (operation, which result).
        input_node: Where its input comes from.
        fused: Whether its weight gradient comes from this engine.
        given_rows: Whose rows are whose in its results, if that is known from what the model was called with.
        proven: Whether its rows are known to belong to samples as the plan says.
        cancelled: Whether they turned out not to.
        fired: Whether its gradient has come.
    """

    plan: CallPlan
    repeats: bool = False
    tokens: Tensor | None = None
    places: tuple[tuple[Node, int], ...] = ()
    input_node: Node | None = None
    proven: bool = True
    fused: bool = False
    given_rows: Layout | None = None
    cancelled: bool = False
    fired: bool = False

    @property
    def hooked(self) -> HookedModule:
        """The module, and what is known of it."""
        return self.plan.hooked

    @property
    def rule(self) -> LayerRule:
        """The module's rule."""
        return self.plan.rule

    @property
    def wanted(self) -> dict[str, nn.Parameter]:
        """Parameters to measure, by local name."""
        return self.plan.wanted

    @property
    def rows_per_sample(self) -> int:
        """Rows of the module's first axis that make up one sample."""
        return self.plan.rows_per_sample

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.plan.hooked.module

    def place(self, output: Any, x: Tensor) -> None:
        """Note where its results and its input are in the graph."""
        if self.places:
            pass  # it is watched at a place of its own
        elif isinstance(output, Tensor):
            self.places = ((output.grad_fn, output.output_nr),) if output.grad_fn is not None else ()
        else:
            self.places = tuple((t.grad_fn, t.output_nr) for t in tensors_in(output) if t.grad_fn is not None)
        self.input_node = x.grad_fn

    @property
    def edges(self) -> list[GradientEdge]:
        """Where its results come from in the graph, until the forward pass ends."""
        return [GradientEdge(*place) for place in self.places]

    def in_words(self) -> str:
        """How it is measured, for people."""
        how = "with the weight gradient, from one product" if self.fused else "beside the ordinary backward pass"
        rows = f", {self.rows_per_sample} rows a sample" if self.rows_per_sample > 1 else ""
        proof = ""
        if self.hooked.calls.get(self.plan.key) == "observed":
            proof = ", proven by following one sample's gradient"
        return f"{type(self.rule).__name__} of {self.hooked}: {how}{rows}{proof}"

    def leave_graph(self) -> None:
        """Let go of its places in the graph."""
        self.places, self.input_node = (), None


class Waiting(Protocol):
    """A hook on an operation of the graph, at which uses are measured."""

    @property
    def waits(self) -> Any:
        """What is measured when the gradient comes; None from then on."""

    def free_graph(self) -> None:
        """Let go of the graph."""


class Uses:
    """The uses of parameters, and the places in the graph at which they are measured.

    Attributes:
        times: How often each parameter is used.
        several: Parameters with more than one use.
        rule_calls: Calls of modules that rules measure.
        in_graph: Hooks on the operations that other uses are measured at.
        compiled: Parameters that compiled code measures.
        without_grad: How often a module was called without gradients: reentrant checkpointing will call it again.
        moved_without_grad: Those that were called so on rows that were given other places.
        recomputed: How often a module is still to be called again. Its parameters are counted already.
        returns: Parameters whose gradient an operation of somebody's own will return, which runs backward now.
    """

    def __init__(self) -> None:
        self.times: Counter[nn.Parameter] = Counter()
        self.several: set[nn.Parameter] = set()
        self.rule_calls: list[RuleUse] = []
        self.in_graph: list[Waiting] = []
        self.compiled: set[nn.Parameter] = set()
        self.without_grad: Counter[HookedModule] = Counter()
        self.moved_without_grad: set[HookedModule] = set()
        self.recomputed: Counter[HookedModule] = Counter()
        self.returns: set[nn.Parameter] = set()

    def add(self, param: nn.Parameter) -> None:
        """Count a use of a parameter."""
        times = self.times[param] = self.times.get(param, 0) + 1
        if times > 1:
            self.several.add(param)

    def forget(self, param: nn.Parameter) -> None:
        """Take back a use that was counted."""
        self.times[param] -= 1
        if self.times[param] < 2:
            self.several.discard(param)

    def note_recomputation(self) -> None:
        """The forward pass ends: what was called without gradients will be called again, and is counted now."""
        for hooked, times in self.without_grad.items():
            self.recomputed[hooked] += times
            for param in list(hooked.trainable().values()) * times:
                self.add(param)

    def returning(self, node: Node, params: Iterable[nn.Parameter]) -> None:
        """An operation of somebody's own is about to run backward, and will return the gradients of some parameters."""
        mine = set(params) - self.returns
        self.returns |= mine

        def done(*_: object) -> None:
            if not differentiating():
                self.returns -= mine

        node.register_hook(done)

    def free_graph(self) -> bool:
        """Drop what no gradient came through, so that the graph and its hooks do not keep each other.

        Returns:
            Whether a use in the graph was waiting.
        """
        waiting = any(arrival.waits for arrival in self.in_graph)
        for arrival in self.in_graph:
            arrival.free_graph()
        self.in_graph.clear()
        self.leave_graph()
        return waiting

    def leave_graph(self) -> None:
        """Let go of the places at which rules measure: they were needed to look through the graph."""
        for call in self.rule_calls:
            call.leave_graph()
