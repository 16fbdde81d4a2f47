"""The registry of layer rules: which code computes the per-sample gradient norms of which module class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_clars.grad_norms.norm_math import slices_of, squared_sum
from hf_clars.grad_norms.pytree import first_tensor
from hf_clars.grad_norms.torch_internals import operand_of


class LayerRule(ABC):
    """How one family of modules turns (input, output gradient) into per-sample gradients.

    A rule must give `per_sample_grads`. It should give `squared_norms` too wherever the norms are cheaper than the
    gradients themselves; the default squares the gradients. A rule that also knows the gradient of the module's input
    may offer `fuses_weight_grad`: the weight gradient is then the sum of the per-sample ones, one product for both.
    """

    #: Names of the parameters that the rule knows; None if it asks for no others than it can serve. A module that owns
    #: more (old-style weight_norm replaces `weight` by two others) goes to the general fallback.
    parameters: frozenset[str] | None = None

    #: True when all axes between the batch and the last are positions that share the weights, as in a Linear layer: a
    #: module that is called on [B * windows, ...] is then measured as [B, windows, ...].
    weight_sharing_axes: bool = False

    #: True when the module returns several tensors: `per_sample_grads` then gets a tuple of gradients as `g`, None for
    #: results without one.
    several_results: bool = False

    #: True when the rule is a Linear layer's: its weight may be a table that is looked up elsewhere too.
    is_dense_weight: bool = False

    #: Whether the methods for the backward pass read numbers of the module's tensors, besides what `save` has kept.
    reads_tensors: bool = False

    #: Whether `whole_backward`, and `input_grad`, are of the same layer as `per_sample_grads`; see `fits_gradients`.
    gives_whole_backward: bool = False
    gives_input_grad: bool = False

    def __init_subclass__(cls, **settings: Any) -> None:
        """Note which backward passes of a layer a rule has, once for its class."""
        super().__init_subclass__(**settings)
        cls.gives_whole_backward = fits_gradients(cls, "whole_backward")
        cls.gives_input_grad = fits_gradients(cls, "input_grad")

    def applies(self, module: nn.Module) -> bool:
        """Whether the rule is right for this very module; if not, the general fallback serves. Default: yes."""
        return True

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """Whether an input has the axis of a batch: some modules take a single sample without it too. Default: yes.

        Args:
            module: The module.
            x: Its input.
        """
        return True

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """What to keep from the forward pass for the backward pass. Default: the first tensor of the arguments.

        Args:
            module: The module that has just run.
            args: What it was called with, tensors detached, batch axis first.
            kwargs: The same of its keyword arguments.
            output: What it returned.
            wanted: Local names of the parameters that will be asked for.

        Returns:
            Tensors, batch axis first; handed to the other methods as `saved`.
        """
        return (first_tensor(args, kwargs),)

    def batch_axes(self, module: nn.Module, results: Sequence[Tensor]) -> list[int]:
        """The batch axis of each result, for rules with several results; the first is the input's too. Default: 0.

        Args:
            module: The module.
            results: What it returned.
        """
        return [0] * len(results)

    def take(self, saved: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
        """Keep the first `count` samples of what `save` returned. Default: of every tensor."""
        return tuple(t[:count] for t in saved)

    @abstractmethod
    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """Each sample's gradient of the module's own parameters.

        Args:
            module: The module.
            saved: What `save` returned.
            g: Gradient of the loss with respect to the module's output, [B, ...].
            wanted: Local names of the parameters asked for.

        Returns:
            {local parameter name: Tensor [B, *parameter shape]}.
        """

    def squared_norms(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """Each sample's squared gradient norm, {local parameter name: Tensor [B]}. Arguments as above."""
        return {n: squared_sum(grads) for n, grads in self.per_sample_grads(module, saved, g, wanted).items()}

    def lookup_tokens(self, saved: tuple[Tensor, ...]) -> Tensor | None:
        """The rows of its weight [B, T] that a call looked up, if the weight is a table. Default: it is not.

        Args:
            saved: What `save` returned.
        """
        return None

    def row_grads(self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor) -> Tensor:
        """What each lookup adds to its row, [B, T, width]; only for rules with `lookup_tokens`."""
        raise NotImplementedError

    def summed_grad(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, name: str, *, elements: int
    ) -> Tensor:
        """The sum of one parameter's per-sample gradients, for the sum check.

        Default: where positions share the weights, the gradient of one sample that has the positions of all; else made
        in slices of the batch.

        Args:
            module: The module.
            saved: What `save` returned.
            g: Gradient of the output, [B, ...].
            name: Local name of the parameter.
            elements: How many numbers it has.
        """
        if self.weight_sharing_axes:
            saved = tuple([t.unsqueeze(0) for t in saved])
            return self.per_sample_grads(module, saved, g.unsqueeze(0), {name})[name].squeeze(0)
        total: Tensor | None = None
        for part in slices_of(*saved, g, elements_per_sample=elements):
            found = self.per_sample_grads(module, part[:-1], part[-1], {name})[name].sum(0)
            total = found if total is None else total + found
        assert total is not None
        return total

    @property
    def squares_without_grads(self) -> bool:
        """Whether `squared_norms` is more than the squares of `per_sample_grads`."""
        return type(self).squared_norms is not LayerRule.squared_norms

    def fuses_weight_grad(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """Whether the weight gradient should come from the per-sample gradients of this call. Default: no.

        A rule that says yes is asked for `per_sample_grads` with the module's input alone as `saved`, and for
        `input_grad`. It is not asked at all if it inherits that, and has `per_sample_grads` of its own; nor in compiled
        code, where nothing would compare what a rule of yours gives with autograd's gradients.
        """
        return False

    def supplies_backward(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """Whether `whole_backward` should take the place of autograd's backward pass of this call. Default: no.

        A rule that inherits `whole_backward`, and has `per_sample_grads` of its own, is not asked.
        """
        return False

    def whole_backward(
        self,
        module: nn.Module,
        saved: tuple[Tensor, ...],
        weight: Tensor,
        g: Tensor,
        *,
        input_wanted: bool,
        measured: int | None = None,
    ) -> WholeBackward:
        """The layer's whole backward pass; only for rules that supply it. A pure function of its arguments.

        Args:
            module: The module, for its settings (stride, padding ...).
            saved: What `operands` returned.
            weight: The weight, in the precision that the module computed in.
            g: Gradient of the output.
            input_wanted: Whether the input's gradient is asked for.
            measured: How many of the first samples get norms; all give gradient. Default: all.

        Returns:
            Gradients and these samples' squared norms.
        """
        raise NotImplementedError

    def operands(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """What `whole_backward` needs of the forward pass, the input first. Default: the input as it was used."""
        return (operand_of(output, x),)

    def weight_as_used(self, module: nn.Module, weight: Tensor, output: Tensor) -> Tensor:
        """The weight in the precision that the module computed in, if that is to be had. Default: as it is.

        Args:
            module: The module that has just run.
            weight: Its weight.
            output: What it returned.
        """
        return weight

    def input_grad(self, module: nn.Module, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        """Gradient of the loss with respect to the module's input; only for rules that take over.

        Args:
            module: The module.
            x: Its input.
            weight: Its weight, in the precision that the module computed in.
            g: Gradient of its output.

        Returns:
            The shape of `x`.
        """
        raise NotImplementedError


def fits_gradients(rule_type: type[LayerRule], backward: str) -> bool:
    """Whether a rule's backward method is that of the layer whose samples' gradients it gives.

    A rule that inherits the method, and takes the gradients in another way (through an activation, or of a weight that
    is stored transposed), serves another layer. Then autograd's own backward pass is watched.

    Args:
        rule_type: Class of the rule.
        backward: "whole_backward" or "input_grad".
    """
    places = {name: i for i, cls in reversed(list(enumerate(rule_type.__mro__))) for name in vars(cls)}
    return places[backward] <= places["per_sample_grads"]


@dataclass(frozen=True)
class WholeBackward:
    """What a layer's backward pass gives.

    Attributes:
        input_grad: Gradient of the input, in its shape; None if it was not asked for.
        grads: Gradient of each parameter, by local name.
        squares: The measured samples' squared gradient norm of each parameter, [measured] each.
    """

    input_grad: Tensor | None
    grads: dict[str, Tensor]
    squares: dict[str, Tensor]


def is_shipped(rule: LayerRule) -> bool:
    """Whether a rule is this package's, whose gradients tests compare with autograd's."""
    return type(rule).__module__.startswith(__name__.rpartition(".")[0])


_RULES: dict[type[nn.Module] | str, LayerRule] = {}
"""By class, or by the full name of a class that may not be installed, or that is defined again."""


def _name(module_type: type | str) -> str:
    return module_type if isinstance(module_type, str) else f"{module_type.__module__}.{module_type.__qualname__}"


def register_rule(
    *module_types: type[nn.Module] | str, override: bool = False
) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Class decorator: use this rule for these module classes and for subclasses that keep their `forward`.

    Args:
        module_types: Module classes; or full names, for classes of packages that may not be installed. A name that
            begins with "*" stands for all classes whose name ends like it: `applies` must then tell the right ones.
        override: Replace a rule that a class has already. Default False. A class that is defined again under the name
            of the rule, as in a notebook cell that is run twice, replaces it in any case.

    Returns:
        The decorator.

    Raises:
        ValueError: If a class has another rule already.
    """

    def decorate(rule_type: type[LayerRule]) -> type[LayerRule]:
        rule = rule_type()
        for module_type in module_types:
            known = _RULES.get(module_type) or _RULES.get(_name(module_type))
            if known is not None and not override and _name(type(known)) != _name(rule_type):
                raise ValueError(
                    f"{_name(module_type)} already has the rule {type(known).__name__}: subclass the module, or say "
                    "register_rule(..., override=True)."
                )
            _RULES[module_type] = rule
        return rule_type

    return decorate


def _by_ending(cls: type) -> LayerRule | None:
    endings = (key for key in _RULES if isinstance(key, str) and key.startswith("*"))
    return next((_RULES[key] for key in endings if cls.__name__.endswith(key[1:])), None)


def find_rule(module: nn.Module) -> LayerRule | None:
    """The rule for a module, or None when only the general fallback can serve it.

    The classes are searched along the method resolution order, because FSDP2 and others rename classes. A subclass with
    a `forward` of its own computes something else and gets no inherited rule, nor does a module whose `forward` was
    replaced, or whose parameters are not those that the rule knows.
    """
    if "forward" in vars(module):
        return None
    for cls in type(module).__mro__:
        rule = _RULES.get(cls) or _RULES.get(_name(cls)) or _by_ending(cls)
        if rule is not None:
            own_forward = getattr(type(module), "forward", None) is not getattr(cls, "forward", None)
            names = {name for name, _ in module.named_parameters()}
            unknown = rule.parameters is not None and not names <= rule.parameters
            return None if own_forward or unknown or not rule.applies(module) else rule
    return None


def unregister_rule(*module_types: type[nn.Module] | str) -> None:
    """Take back the rules of these classes; trackers that exist keep theirs.

    Args:
        module_types: As for `register_rule`.

    Raises:
        ValueError: If a class has no rule.
    """
    for module_type in module_types:
        found = [key for key in (module_type, _name(module_type)) if _RULES.pop(key, None) is not None]
        if not found:
            raise ValueError(f"{_name(module_type)} has no rule of its own.")


def registered_rules() -> dict[str, LayerRule]:
    """A copy of the registry: {full class name: rule}."""
    return {_name(key): rule for key, rule in _RULES.items()}
