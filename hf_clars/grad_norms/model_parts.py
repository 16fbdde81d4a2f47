"""What a model is made of, and the refusal of norms that were attached to another one.

A model may be taken apart between two steps: a head is replaced, an adapter added, a weight pruned, a layer thawed. Its
hooks would then measure what is no longer there, and miss what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from hf_clars.distributed import is_split
from hf_clars.grad_norms.errors import UncoveredParameterError
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.registry import find_rule
from hf_clars.grad_norms.torch_internals import registered_in

_TRAINS = attrgetter("requires_grad")


class ModelParts:
    """The modules of a model, their classes and parameters, as they were when it was last looked at.

    It is asked in every forward pass, so that no line of Python runs for each module. Objects are known by their `id`:
    modules and parameters are kept here or in the measured layers, so that no other object gets the number.

    Args:
        model: The model.
        hooked: The modules whose parameters are measured.
        measured: These parameters. Where they are not all that train, others are not asked for.
        engine_swaps: Whether an engine puts parameters of its own into the modules: then nothing can be told.
    """

    def __init__(
        self,
        model: nn.Module,
        hooked: Sequence[HookedModule],
        measured: Container[nn.Parameter],
        engine_swaps: Callable[[], bool],
    ) -> None:
        self._model, self._hooked, self._measured, self._engine_swaps = model, hooked, measured, engine_swaps
        self._whole = not any(p.requires_grad for _, p in self._unmeasured())
        self._look()

    def _look(self) -> None:
        modules = list(self._model.modules())
        params, children = zip(*map(registered_in, modules), strict=True)
        self._params, self._children = list(params), list(children)
        self._owners = [h.module for h in self._hooked if h.params]
        self._vars = [vars(module) for module in self._owners]
        self._others = [p for _, p in self._unmeasured()] if self._whole else []
        self._tree = [dict(held) for held in children]
        self._seen = self._now()

    def _unmeasured(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters by name. What `functional_call` puts in their place while it runs is none."""
        found = self._model.named_parameters()
        return [(name, p) for name, p in found if isinstance(p, nn.Parameter) and p not in self._measured]

    def _now(self) -> tuple[list[Any], ...]:
        held = map(id, chain.from_iterable(map(dict.values, self._params)))
        forwards = map(dict.get, self._vars, repeat("forward"))
        return [*chain.from_iterable(self._params)], [*held], [*map(type, self._owners)], [*forwards]

    def refuse_changes(self) -> None:
        """Raise if norms would not be those of the model as it is now.

        Raises:
            UncoveredParameterError: Naming what is no part of the model any more, computes something else, or is new.
        """
        if self._children == self._tree and self._now() == self._seen and not any(map(_TRAINS, self._others)):
            return
        if not self._engine_swaps():
            wrong = self._what_is_wrong()
            if wrong:
                more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise UncoveredParameterError(
                    f"{'; '.join(wrong[:3])}{more}. Attach the norms once the model is complete: norms.remove(), or "
                    "remove_hooks() of the optimizer, and then PerSampleGradNorms or the optimizer anew."
                )
        self._look()

    def _what_is_wrong(self) -> list[str]:
        modules = dict(self._model.named_modules(remove_duplicate=False))
        wrong = [f"{h}: {what}" for h in self._hooked if h.params and (what := self._change_of(h, modules))]
        if self._whole:
            new = (name for name, p in self._unmeasured() if p.requires_grad)
            wrong += [f"{name}: trains, and did not when the norms were attached" for name in new]
        return wrong

    def _change_of(self, hooked: HookedModule, modules: Mapping[str, nn.Module]) -> str:
        """What was done to a module since it was hooked; "" for nothing that matters."""
        module, there = hooked.module, modules.get(hooked.path)
        if module not in modules.values():
            return "was taken out of the model, or replaced, after the norms were attached"
        if there is not module and any(there is h.module for h in self._hooked if h.params):
            return "another module has its name since the norms were attached"
        owned = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, param in hooked.params.items():
            now = owned.get(name)
            if now is None or (now is not param and isinstance(now, nn.Parameter) and now.requires_grad):
                return f"its {name} was taken out, or replaced, after the norms were attached"
        if find_rule(module) is not hooked.rule:
            return "its class, its forward or its parameters were changed after the norms were attached"
        return ""


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
