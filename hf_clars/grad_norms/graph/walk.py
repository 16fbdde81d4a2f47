"""Finding the places where a graph uses parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_clars.distributed import whole_shape
from hf_clars.grad_norms.compiled.functions import NODES
from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, BatchAxisError
from hf_clars.grad_norms.torch_internals import (
    BATCH_NORM_NODES,
    COMPILED,
    TRACED,
    dtype_at,
    number_of,
    results_of,
    shape_at,
)

Edge = tuple[Node, int]
Signature = tuple[object, ...]

_ONCE = ("CheckpointFunction", COMPILED)
SPREADS = ("ExpandBackward", "RepeatBackward")
"""Operations by which what is made of parameters may be given to each sample."""


@dataclass(eq=False)
class Region:
    """The part of the graph that a rule's module made, from its output back to its input.

    Attributes:
        params: The parameters that the rule measures in it.
        end: Where the module's input comes from; None if that has no gradient.
    """

    params: set[nn.Parameter]
    end: Node | None


@dataclass(eq=False)
class Use:
    """An operand of an operation, made of parameters alone, where the result belongs to samples.

    Attributes:
        node: The operation.
        index: Which operand.
        child: Where the operand comes from: a parameter, or what some operations made of parameters.
        leaves: The parameters that reach it, as the graph knows them, each with the measured parameter.
        key: The same for the same use in every pass.
        moved: Where the rows of what it is used on are; see `DataTaint`.
    """

    node: Node
    index: int
    child: Edge
    leaves: dict[Tensor, nn.Parameter]
    key: Signature
    moved: int = 0

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The operand's shape."""
        return shape_of(*self.child)

    @cached_property
    def look(self) -> Signature:
        """What it has in common with the same use in other passes, and perhaps with others."""
        return (self.key, tuple(len(s) for s in self.result_shapes))

    @cached_property
    def result_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the operation's results."""
        return [shape_at(self.node, i) or () for i in range(results_of(self.node))]

    def coarsest(self, dtype: torch.dtype) -> torch.dtype:
        """The coarsest of a type and those that the operand was computed in: under autocast a part may be in bf16."""
        stack, seen = [self.child[0]], {self.child[0]}
        while stack:
            node = stack.pop()
            here = [dtype_at(node, i) for i in range(results_of(node))] if node.next_functions else []
            dtype = max((dtype, *(d for d in here if d.is_floating_point)), key=lambda d: torch.finfo(d).eps)
            below = {child for child, _ in node.next_functions if child is not None} - seen
            seen |= below
            stack += below
        return dtype


def shape_of(node: Node, output: int) -> tuple[int, ...]:
    """Shape of an operand, or of a parameter, also of one that ZeRO has put aside."""
    variable = getattr(node, "variable", None)
    if variable is None:
        return shape_at(node, output) or ()
    return whole_shape(variable)


@dataclass(eq=False)
class GraphWalk:
    """One look at a pass's graph.

    Args:
        param_of: The measured parameter of a leaf; None for a parameter that is not measured; a KeyError says that the
            leaf is data.
        regions: By the node of a rule's module's output.
        is_data: Whether an operation, all of whose known operands are made of parameters, takes data too.
        is_whole: Whether an operation that looks as if it spread a value over the samples is known not to.
        batch: B.
        measured_by_itself: Names of operations whose parameters are measured by their own backward function.
        moved_at: Where the rows of a use's operation are, by that and by the use's key.
        compiled: The parameters that compiled code measures where it uses them; elsewhere it does not.
        earlier: Numbers of the operations of calls before, as where each step of a loop is a call, and hands on a
            state: their uses are known, and what they gave is data here.

    Attributes:
        uses: What was found.
        couplings: BatchNorm's operations.
        once: Whether a part of the graph can be differentiated only once, or not by the engine alone.
        lost: Operations that look as if they took parameters alone, although a rule's call is made on what they give.
        bare: What of the model's results looks so, each with the parameters that it is made of.
    """

    param_of: Callable[[Tensor], nn.Parameter | None]
    regions: Mapping[Node, Region]
    is_data: Callable[[Node, Signature], bool]
    is_whole: Callable[[Signature], bool]
    batch: int
    measured_by_itself: Sequence[str]
    moved_at: Callable[[Node, Signature], int]
    compiled: set[nn.Parameter] = field(default_factory=set)
    earlier: Sequence[range] = ()
    uses: list[Use] = field(default_factory=list)
    couplings: list[Node] = field(default_factory=list)
    once: bool = False
    lost: set[Node] = field(default_factory=set)
    bare: list[tuple[Tensor, list[nn.Parameter]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._own: dict[Node, Signature | None] = {}
        self._leaves: dict[Node, dict[Tensor, nn.Parameter]] = {}
        self._covered: dict[Node, set[nn.Parameter]] = {}

    def run(self, outputs: Iterable[Tensor]) -> None:
        """Visit everything below what the model returned."""
        for root in outputs:
            if root.grad_fn is not None:
                self._visit(root.grad_fn)
                leaves = self._leaves.get(root.grad_fn)
                if leaves:
                    self.bare.append((root, list(leaves.values())))

    def saw(self, node: Node) -> bool:
        """Whether anything that the model returned is made of what an operation gave."""
        return node in self._own

    def _visit(self, root: Node) -> None:
        """Depth first, children before parents, without recursion."""
        stack: list[tuple[Node, bool]] = [(root, False)]
        own = self._own
        while stack:
            node, children_done = stack.pop()
            if children_done:
                self._close(node)
                continue
            if node in own:
                continue
            own[node] = None
            if self._is_earlier(node):
                continue
            region = self.regions.get(node)
            if region is not None:
                self._cover(node, region)
            elif self.compiled and node.name().startswith(COMPILED):
                self._covered.setdefault(node, set()).update(self.compiled)
            elif self.compiled and node.name().startswith((TRACED, *NODES)):
                self._cover(node, Region(self.compiled, None))
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None and child not in own]

    def _cover(self, node: Node, region: Region) -> None:
        stack = [node]
        while stack:
            inner = stack.pop()
            known = self._covered.setdefault(inner, set())
            if region.params <= known:
                continue
            known |= region.params
            below = [child for child, _ in inner.next_functions if child is not None and child is not region.end]
            stack += [child for child in below if not self._is_earlier(child)]

    def _is_earlier(self, node: Node) -> bool:
        return bool(self.earlier) and any(number_of(node) in numbers for numbers in self.earlier)

    def _close(self, node: Node) -> None:
        children = node.next_functions
        if not children:
            self._close_leaf(node)
            return
        name = node.name()
        if name.startswith(BATCH_NORM_NODES):
            self.couplings.append(node)
        elif name.startswith(_ONCE):
            self.once = True
        own = [(i, child, k) for i, (child, k) in enumerate(children) if child is not None and self._own[child]]
        if not own:
            return
        covered = self._covered.get(node, set())
        if name in self.measured_by_itself:
            self.lost |= {child for _, child, _ in own if not covered >= set(self._leaves[child].values())}
            return
        parts = tuple(None if child is None else self._own[child] for child, _ in children)
        all_own = len(own) == sum(child is not None for child, _ in children)
        signature = (name, *parts)
        unspread = all_own and node not in self.regions and not self._parts(node, name, signature)
        if unspread and not self.is_data(node, signature):
            self._own[node] = signature
            self._leaves[node] = {v: p for _, child, _ in own for v, p in self._leaves[child].items()}
            return
        for i, child, k in own:
            leaves = {v: p for v, p in self._leaves[child].items() if p not in covered}
            if leaves:
                key = (name, i, self._own[child])
                self.uses.append(Use(node, i, (child, k), leaves, key, self.moved_at(node, key)))

    def _close_leaf(self, node: Node) -> None:
        variable = getattr(node, "variable", None)
        if variable is None:
            return
        try:
            param = self.param_of(variable)
        except KeyError:
            return
        self._own[node] = (id(variable) if param is None else id(param),)
        self._leaves[node] = {} if param is None else {variable: param}

    def _parts(self, node: Node, name: str, signature: Signature) -> bool:
        """Whether an operation spreads what is made of parameters over the samples: there they part."""
        if not name.startswith(SPREADS) or self.batch < 2:
            return False
        child, k = node.next_functions[0]
        shape, before = shape_at(node) or (), shape_of(child, k) if child is not None else ()
        if not shape or shape[0] != self.batch:
            return False
        return (len(before) < len(shape) or before[0] == 1) and not self.is_whole(signature)


def refuse(use: Use, names: str, batch: int) -> BatchAxisError:
    """The error for a use whose operation shows no samples, and that no module around could be asked for."""
    shapes = ", ".join(str(s) for s in use.result_shapes)
    return BatchAxisError(
        f"{names}: used by {use.node.name()} with results of shape {shapes}, in which the {batch} samples of the batch "
        "have no rows of their own, and no module around it returns the batch. Return the batch from a module around "
        f"it, freeze the parameter, register a rule for its module, or {WITHOUT_SAMPLES}. Samples are the rows of the "
        "first tensor that the model is called with. If that holds the parts of all samples together, as the nodes of "
        "all graphs, or a single sample, as the first of a list of images, call the model with a tensor of one row a "
        "sample before it, as each graph's number of nodes, or each image's place in the list."
    )
