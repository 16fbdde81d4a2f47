"""The modules whose parameters are measured, what is known of the calls of each, and how they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.taint import DataTaint, WorstPlaces
from hf_clars.grad_norms.registry import LayerRule, find_rule, is_shipped
from hf_clars.grad_norms.torch_internals import leaves_below

FIRST_AXIS = Layout()

MOST_PLANS = 512
"""Plans that a module keeps: texts may have any length, and each length is another look."""


class HookedModule:
    """A module with measured parameters of its own or inside, and the rule for it.

    Args:
        path: Its name in the model.
        module: The module.
        layers: Its own measured parameters' layers by local name; none for a mere container.

    Attributes:
        params: The same parameters by local name.
        rule: The rule that serves it, if any does.
        calls: How calls of each layout are measured: "certain", "observed" (proven by one sample's gradient)
            or "graph" (their rows belong to no sample: measured where the graph uses the parameters).
        expected: Layouts that were known to be right in the run that this one resumes. They are proven anew, and the
            weight's gradient is taken as it was there, so that it is rounded as it was.
        own_dims: Numbers of axes with which it was called on tensors that are made of parameters alone.
        data_dims: The same for tensors that depend on the data.
        left_to_graph: The same for calls that are left to the graph: others may look as those that are not.
        moved: By the same numbers of axes, where the rows of such tensors were at worst.
        moved_results: Numbers of its results whose rows may be anywhere.
        plans: How calls are measured, by what they look like; None: where the graph uses the parameters. See
            `with_rule.py`.
    """

    def __init__(self, path: str, module: nn.Module, layers: dict[str, int]) -> None:
        self.path = path
        self.module = module
        self.layers = layers
        self.params = {n: p for n, p in module.named_parameters(recurse=False) if n in layers}
        self.rule: LayerRule | None = find_rule(module) if layers else None
        self.calls: dict[tuple[int, ...], str] = {}
        self.expected: set[tuple[int, ...]] = set()
        self.own_dims: set[int] = set()
        self.data_dims: set[int] = set()
        self.moved = WorstPlaces()
        self.moved_results: set[int] = set()
        self.plans: dict[tuple[Any, ...], CallPlan | None] = {}
        self.left_to_graph: set[int] = set()
        self._layouts: dict[int, Layout | None] = {}

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__name__})"

    @property
    def was_seen(self) -> bool:
        """Whether an uncompiled pass has shown what it is called on."""
        return bool(self.calls or self.data_dims or self.own_dims)

    def full_name(self, name: str) -> str:
        """A parameter's name in the model."""
        return f"{self.path}.{name}" if self.path else name

    def in_use(self, name: str) -> nn.Parameter:
        """The tensor that the module computes with now; FSDP puts another one in the recorded one's place.

        Args:
            name: A parameter's name in this module.
        """
        used = self.module._parameters.get(name)  # a tenth of what the module's `__getattr__` takes
        return getattr(self.module, name) if used is None else used

    def is_made(self, name: str) -> bool:
        """Whether the tensor that the module computes with now is made of parameters, as `functional_call` gives it."""
        used = self.in_use(name)
        return used.grad_fn is not None and self.params[name] in leaves_below(used.grad_fn)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Its own measured parameters that are not frozen now, by local name."""
        return {n: p for n, p in self.params.items() if self.in_use(n).requires_grad}

    def moved_at(self, x: Tensor, taint: DataTaint | None, moves_rows: bool) -> int:
        """Where the rows of an input are: 0, `BROUGHT_BACK` or `MOVED`.

        Args:
            x: The input.
            taint: Tells it, in passes that follow the data; others know it from these.
            moves_rows: Whether the model gives rows other places. What was never seen may then be anywhere.
        """
        return self.moved.at(x.dim(), taint, lambda t: t.moved(x), moves_rows=moves_rows)

    def layout_of(self, x: Tensor, taint: DataTaint | None) -> Layout | None:
        """Which rows of an input that has no gradient are surely whose; None: not known.

        Args:
            x: The input.
            taint: Tells it, in passes that follow the data; others know it from these, by the number of axes.
        """
        if x.dim() < 2 or x.requires_grad:
            return None
        if taint is None:
            return self._layouts.get(x.dim())
        layout = taint.layout_of(x)
        if taint.batch > 1:
            self._layouts[x.dim()] = layout if self._layouts.get(x.dim(), layout) == layout else None
        return layout

    def settle(self, key: tuple[int, ...], how: str) -> None:
        """Measure calls of a layout so from now on; what is once left to the graph stays there."""
        if self.calls.get(key) != "graph":
            self.calls[key] = how
        if how == "graph":
            self.left_to_graph.add(key[1] if key[0] < 2 else len(key))

    def keep_plan(self, look: tuple[Any, ...], plan: CallPlan | None) -> None:
        """Measure calls that look like this by this plan from now on."""
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        self.plans[look] = plan

    def rebind(self, swapped: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know parameters by those that an engine has put in their place: {old: new}."""
        self.params = {n: swapped.get(p, p) for n, p in self.params.items()}
        self.plans.clear()


@dataclass(eq=False, slots=True)
class CallPlan:
    """How calls of a module that look alike are measured: decided at the first, and kept.

    Attributes:
        hooked: The module.
        rule: Its rule.
        wanted: Parameters to measure, by local name.
        rows_per_sample: Rows of the module's first axis that make up one sample; 1 unless the model folds something
            into it.
        key: What their layout is known by.
        axes: The batch axis of each result.
        layout: Which rows of the output should be whose.
        way: How the weight gradient comes from this engine, from a `RuleCall`, the input and the output; None where the
            ordinary backward pass is watched.
        x_depends_on_data: Whether the input is known to depend on what the model was called with.
        proven: Whether rows are known to belong to samples as `rows_per_sample` says.
        moved: Where rows of the batch are, see `DataTaint`. If they may be anywhere, each pass must prove it anew.
        lasts: Whether calls that look alike may follow it too.
        shipped: Whether the rule is this package's.
        folded: Whether rows of a sample are measured one by one, and their gradients added up.
        by_squares: Whether the rule has squared norms without the gradients.
        size: Numbers that `wanted` have.
    """

    hooked: HookedModule
    rule: LayerRule
    wanted: dict[str, nn.Parameter]
    rows_per_sample: int
    key: tuple[int, ...] = ()
    axes: Sequence[int] = (0,)
    layout: Layout = FIRST_AXIS
    way: Callable[..., Tensor] | None = None
    x_depends_on_data: bool = False
    proven: bool = True
    moved: int = 0
    lasts: bool = False
    shipped: bool = field(init=False)
    folded: bool = field(init=False)
    by_squares: bool = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.shipped = is_shipped(self.rule)
        self.folded = self.rows_per_sample > 1 and not self.rule.weight_sharing_axes
        self.by_squares = not self.folded and self.rule.squares_without_grads
        self.size = sum(p.numel() for p in self.wanted.values())

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.hooked.module


def folded_rows(x: Tensor, output: Tensor, batch_size: int) -> int | None:
    """How many rows of the first axis there are for each sample, if they can be evenly shared."""
    first = x.shape[0] if x.dim() else 0
    if batch_size and first >= batch_size and first % batch_size == 0 and output.dim() and output.shape[0] == first:
        return first // batch_size
    return None


def find_hooked_modules(model: nn.Module, layer_of: Mapping[nn.Parameter, int]) -> list[HookedModule]:
    """Every module that owns a measured parameter, directly or inside; a tied one is owned by several.

    Args:
        model: Where to look.
        layer_of: The measured parameters and the layer of each.

    Returns:
        In the order of `model.named_modules()`.
    """
    found = []
    for path, module in model.named_modules():
        own = {name: layer_of[p] for name, p in module.named_parameters(recurse=False) if p in layer_of}
        if own or any(p in layer_of for p in module.parameters()):
            found.append(HookedModule(path, module, own))
    return found
