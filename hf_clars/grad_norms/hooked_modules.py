"""The modules whose parameters are measured, and what is known of the calls of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_clars.distributed import is_split
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.taint import DataTaint, WorstPlaces
from hf_clars.grad_norms.registry import LayerRule, find_rule
from hf_clars.grad_norms.torch_internals import leaves_below

if TYPE_CHECKING:
    from hf_clars.grad_norms.rule_call import CallPlan


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


class LeavesInUse:
    """The tensors by which a graph knows the measured parameters: FSDP computes with gathered ones in their places.

    Args:
        layer_of: The measured parameters, and the layer of each.
        model: Where they, and buffers, are.
    """

    def __init__(self, layer_of: Mapping[nn.Parameter, int], model: nn.Module) -> None:
        self._layer_of = layer_of
        self._model = model
        self._params: dict[Tensor, nn.Parameter] = {}

    def begin(self) -> None:
        """A pass begins: let go of what `functional_call` has put in the place of parameters for the last one."""
        if self._params:
            self._params = {leaf: p for leaf, p in self._params.items() if isinstance(leaf, nn.Parameter)}

    def learn(self, hooked: HookedModule) -> None:
        """Look at what a module has just computed with."""
        for name, param in hooked.params.items():
            used = hooked.in_use(name)
            if used is not param:
                self._params[used] = param

    def param_of(self, leaf: Tensor) -> nn.Parameter | None:
        """The measured parameter that a leaf stands for; None for a parameter that is not measured, and for a buffer.

        Raises:
            KeyError: For data.
        """
        param = self._params.get(leaf, leaf)
        if param in self._layer_of:
            return param  # type: ignore[return-value]
        if isinstance(param, nn.Parameter) or any(leaf is b for b in self._model.buffers()):
            return None
        raise KeyError(leaf)

    def leaves(self) -> dict[nn.Parameter, Tensor]:
        """The leaf of every measured parameter."""
        used = {param: leaf for leaf, param in self._params.items()}
        return {param: used.get(param, param) for param in self._layer_of}

    def are_split(self) -> bool:
        """Whether an engine gathers them for each pass."""
        return bool(self._params) or any(hasattr(p, "ds_id") or is_split(p) for p in self._layer_of)

    def rebind(self, swapped: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know parameters by those that an engine has put in their place: {old: new}."""
        self._params = {leaf: swapped.get(p, p) for leaf, p in self._params.items()}

    def forget(self) -> None:
        """Other parameters are measured now."""
        self._params.clear()


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
