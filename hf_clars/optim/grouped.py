"""A torch optimizer that knows the layers inside its parameter groups: groups, names, settings, states, copies."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_clars.distributed import on_device
from hf_clars.grad_norms.torch_traces import uncompiled
from hf_clars.layers import LayerMode, ParamLayer
from hf_clars.optim.groups import ADAPTIVE, FROZEN, HELD, model_groups, tensor_layers, validate_settings
from hf_clars.optim.layer_book import LayerBook
from hf_clars.optim.state_names import arranged


class GroupedOptimizer(Optimizer):
    """Keeps the caller's groups as they are, and the partition into layers beside them.

    Args:
        model: A module, or what `torch.compile` returned for it, or what torch's optimizers take.
        defaults: Settings that a group may have.
        layers: See `hf_clars.param_layers`.
        params: Groups of the model's parameters; None: one for every layer.
        scale_norm_and_bias: False marks layers of biases and normalisation weights as not adaptive.

    Raises:
        ValueError: For settings out of range, or groups that do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        *,
        layers: LayerMode,
        params: Iterable[Any] | None,
        scale_norm_and_bias: bool,
    ) -> None:
        validate_settings(defaults)
        model = uncompiled(model) if isinstance(model, nn.Module) else model
        self._model = model if isinstance(model, nn.Module) else None
        self._partitioned: LayerMode = layers
        self._scale_norm_and_bias = scale_norm_and_bias
        self._created = False
        groups: Iterable[Any]
        if isinstance(model, nn.Module):
            self._book, groups = model_groups(
                model, layers=layers, params=params, scale_norm_and_bias=scale_norm_and_bias
            )
        else:
            self._book, groups = LayerBook(), model
        super().__init__(groups, {ADAPTIVE: True, FROZEN: False, **defaults})
        self._created = True
        # ZeRO shows `step()` one group at a time; the rates need the settings of all.
        self._all_groups = self.param_groups

    # ---- groups and layers -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do.

        Args:
            param_group: `params`, and settings that differ from the defaults. With a model: parameters of it that are
                in no group yet, after `params=` has named others.

        Raises:
            ValueError: For parameters that are not the model's, or in a group already, or settings out of range.
        """
        validate_settings(param_group)
        if self._model is None:
            super().add_param_group(param_group)
            first = sum(map(len, self._book.rows))
            layers, adaptive = tensor_layers(self.param_groups[-1], first, self._scale_norm_and_bias)
            self._book.add(layers, adaptive, self.param_groups[-1]["params"])
            return
        if not self._created:  # while the optimizer is created: the layers are known
            super().add_param_group(param_group)
            return
        group, layers = self._new_layers(param_group)
        super().add_param_group(group)
        adaptive = [self._scale_norm_and_bias or not layer.norm_or_bias for layer in layers]
        self._book.add(layers, adaptive, self.param_groups[-1]["params"])
        self._new_partition()

    def _new_layers(self, param_group: dict[str, Any]) -> tuple[dict[str, Any], list[ParamLayer]]:
        """A group of parameters of the model that were in none, by name, and its layers."""
        assert self._model is not None
        try:
            book, (group,) = model_groups(
                self._model,
                layers=self._partitioned,
                params=[param_group],
                scale_norm_and_bias=self._scale_norm_and_bias,
            )
        except ValueError as error:
            raise ValueError(
                f"{error} Only parameters of the model that a layer-wise optimizer was created with can be added to "
                "it. Create a new one."
            ) from error
        taken, number = {layer.name for layer in self._book.layers}, len(self.param_groups)
        layers = [
            replace(layer, name=f"{layer.name} (group {number})") if layer.name in taken else layer
            for layer in book.layers
        ]
        return group, layers

    def _new_partition(self) -> None:
        """Subclasses that watch what trains are told that it is more than before."""

    def _training(self) -> list[nn.Parameter]:
        """The parameters that train now."""
        return [p for layer in self._book.shown_layers for p in layer.params if p.requires_grad]

    @property
    def partition(self) -> list[ParamLayer]:
        """The layers that train, in the order of every measured vector."""
        return self._book.shown_layers

    @property
    def layer_names(self) -> list[str]:
        """Name of each layer that trains, in the order of every measured vector.

        Frozen layers are in `param_groups`, and not here. One that is unfrozen comes to the end, from the first step
        on that it takes part in.
        """
        return [self._book.layers[row].name for row in self._book.shown]

    def layer_group(self, name: str) -> dict[str, Any]:
        """The parameter group of a layer.

        Args:
            name: Its name.

        Raises:
            KeyError: If there is no such layer.
        """
        for group, layer in zip(self._layer_settings(), self._book.layers, strict=True):
            if layer.name == name:
                return group
        raise KeyError(name)

    def layers_of(self, group: dict[str, Any]) -> list[str]:
        """Names of the layers of one of the parameter groups, frozen ones too."""
        number = next(g for g, known in enumerate(self._all_groups) if known is group)
        return [self._book.layers[row].name for row in self._book.rows_in(number)]

    # ---- states and copies -------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Momentum goes to the parameter, or layer, of the name that is stored with it.

        Args:
            state_dict: From `state_dict()` of an optimizer for the same layers, whatever its groups. Without names
                (parameters that were given without a model), the order tells, as in torch's optimizers.

        Raises:
            ValueError: If the state is of layers that this optimizer does not have, or lacks some that train.
        """
        super().load_state_dict(self.arranged_state(state_dict))
        self._all_groups = self.param_groups

    def arranged_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state in the order of this optimizer's groups, by the names that are stored in it.

        Args:
            state_dict: As for `load_state_dict`.

        Raises:
            ValueError: As there.
        """
        return arranged(state_dict, self.param_groups, self._book)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._refuse_copies()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_copies()
        own = {name: value for name, value in self.__dict__.items() if not name.startswith("_optimizer_")}
        return own  # but for the hooks that others have placed, as torch's optimizers do

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._all_groups = self.param_groups

    def _refuse_copies(self) -> None:
        if self._model is not None:
            raise TypeError(
                f"This {type(self).__name__} has hooks on its model, which cannot be copied or pickled with it. Copy "
                f"or save optimizer.state_dict(), create a {type(self).__name__} for the other model and load it there."
            )

    # ---- settings of the layers ------------------------------------------------------------------------------------

    def _layer_settings(self) -> list[dict[str, Any]]:
        """The group of each layer."""
        return [self._all_groups[g] for g in self._book.group_of]

    def _adaptive(self) -> list[bool]:
        """Whether each layer is scaled by its norms."""
        settings = self._layer_settings()
        return [own and bool(group[ADAPTIVE]) for own, group in zip(self._book.adaptive, settings, strict=True)]

    def _frozen(self) -> list[bool]:
        """Whether each layer's rate is held at zero."""
        names = [layer.name for layer in self._book.layers]
        settings = self._layer_settings()
        return [bool(g[FROZEN]) or name in g.get(HELD, ()) for name, g in zip(names, settings, strict=True)]

    def _per_layer(self, values: Sequence[float], like: Tensor) -> Tensor | float:
        """A K-vector of host numbers; one number when they are all equal.

        They are filled in on a device, each where it holds: a copy from the host would be waited for, and cannot be
        captured in a graph.
        """
        first, *others = dict.fromkeys(values)
        if not others:
            return first
        if like.device.type == "cpu":
            return torch.tensor(values, dtype=like.dtype)
        found = torch.full((len(values),), first, dtype=like.dtype, device=like.device)
        for other in others:
            found.masked_fill_(on_device(tuple(value == other for value in values), like.device), other)
        return found

    def _where_adaptive(self, factor: Tensor) -> Tensor:
        """A factor [K] of the rates; 1 for layers that train at `lr` itself."""
        adaptive = self._adaptive()
        if all(adaptive):
            return factor
        wanted = self._per_layer([float(on) for on in adaptive], factor)
        return torch.where(torch.as_tensor(wanted, device=factor.device) > 0, factor, 1.0)

    def _rates(self, ratio: Tensor) -> Tensor:
        """gamma_k = lr * eta * ratio_k; lr alone for layers that are not scaled, 0 for frozen ones."""
        settings = zip(self._layer_settings(), self._adaptive(), self._frozen(), strict=True)
        factors = [0.0 if held else (g.get("eta", 1.0) if on else 1.0) for g, on, held in settings]
        given = [group["lr"] for group in self._layer_settings()]
        rates = self._where_adaptive(ratio)
        if not any(isinstance(lr, Tensor) for lr in given):
            scales = [float(lr) * factor for lr, factor in zip(given, factors, strict=True)]
            return rates * self._per_layer(scales, ratio)
        each = given[0] if all(lr is given[0] for lr in given) else torch.stack([_scalar(lr, ratio) for lr in given])
        return rates * self._per_layer(factors, ratio) * each.to(ratio)

    def _clips(self, like: Tensor) -> Tensor | float | None:
        """The layers' bounds on the trust ratio; None when none has one."""
        clips = [group["trust_clip"] for group in self._layer_settings()]
        if all(clip is None for clip in clips):
            return None
        return self._per_layer([float("inf") if clip is None else clip for clip in clips], like)

    def _weight_decays(self, like: Tensor) -> Tensor | float:
        return self._per_layer([group["weight_decay"] for group in self._layer_settings()], like)


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A rate as a tensor, 0-dim; a number is not copied to the device, but filled in there."""
    return value.to(like).reshape(()) if isinstance(value, Tensor) else like.new_full((), value)
