"""Parameters -> layers: the partition that every rate and every norm in this package is computed over.

The paper gives each layer k one learning rate but leaves "layer" to the reader ("the parameters of layer k"). Here a
layer is the set of parameters that one module owns directly (a convolution's weight and bias together), or each tensor
on its own, as most LARS codes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

LayerMode = Literal["module", "tensor"]

BATCH_NORM_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""In training mode they couple the samples of a batch."""

NORM_MODULES: tuple[type[nn.Module], ...] = (
    *BATCH_NORM_MODULES,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class ParamLayer:
    """One layer of the partition.

    Attributes:
        name: Path of the owning module (`encoder.stages.0.conv1`; the model's class name when the model itself owns
            the parameters), or the parameter's full name when each tensor is a layer.
        params: The layer's parameters: the trainable ones, unless frozen ones were asked for too.
        param_names: Their full names in the model, in the same order.
        norm_or_bias: True when every tensor is a bias or belongs to a normalisation module.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    param_names: tuple[str, ...]
    norm_or_bias: bool = False

    def with_params(self, new_of: Mapping[nn.Parameter, nn.Parameter]) -> ParamLayer:
        """The same layer of other parameters, where a launcher has put them in the place of these."""
        return replace(self, params=tuple(new_of.get(p, p) for p in self.params))

    def without(self, left_out: Set[nn.Parameter]) -> ParamLayer:
        """The same layer without some of its parameters."""
        kept = [(p, n) for p, n in zip(self.params, self.param_names, strict=True) if p not in left_out]
        return replace(self, params=tuple(p for p, _ in kept), param_names=tuple(n for _, n in kept))


@dataclass(frozen=True)
class _Owned:
    """A parameter and the module that owns it."""

    module_path: str
    local_name: str
    param: nn.Parameter
    in_norm_module: bool

    @property
    def full_name(self) -> str:
        return f"{self.module_path}.{self.local_name}" if self.module_path else self.local_name

    @property
    def norm_or_bias(self) -> bool:
        return self.in_norm_module or self.local_name == "bias" or self.local_name.endswith("_bias")


def _owned_parameters(model: nn.Module, frozen: bool) -> Iterable[_Owned]:
    """Yield each parameter once: a tied weight belongs to the first module that holds it."""
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if (frozen or param.requires_grad) and param not in seen:
                seen.add(param)
                yield _Owned(path, name, param, isinstance(module, NORM_MODULES))


def param_layers(
    model: nn.Module,
    *,
    layers: LayerMode = "module",
    split_norm_and_bias: bool = False,
    frozen: bool = False,
) -> list[ParamLayer]:
    """Partition a model's parameters into layers.

    Args:
        model: Any module.
        layers: `"module"` (default): all parameters that one module owns directly are one layer. `"tensor"`: each
            tensor is a layer.
        split_norm_and_bias: With `"module"`, put biases into a layer apart from their weight
            (`conv1.bias` beside `conv1`), so that they can be treated differently. Default False.
        frozen: Take parameters with `requires_grad=False` too. Default False: they are in no layer.

    Returns:
        The layers in the order of `model.named_modules()`; every parameter that is taken is in exactly one of them.

    Raises:
        ValueError: If `layers` is neither `"module"` nor `"tensor"`.
    """
    if layers not in ("module", "tensor"):
        raise ValueError(f"layers={layers!r} is not a partition: use 'module' (one layer a module) or 'tensor'.")
    groups: dict[str, list[_Owned]] = {}
    for owned in _owned_parameters(model, frozen):
        groups.setdefault(_layer_name(model, owned, layers, split_norm_and_bias), []).append(owned)
    return [
        ParamLayer(
            name=name,
            params=tuple(o.param for o in members),
            param_names=tuple(o.full_name for o in members),
            norm_or_bias=all(o.norm_or_bias for o in members),
        )
        for name, members in groups.items()
    ]


def as_layers(model: nn.Module, layers: LayerMode | Sequence[ParamLayer]) -> list[ParamLayer]:
    """The layers that were asked for, by the name of a partition or as a ready one.

    Args:
        model: Any module.
        layers: `"module"`, `"tensor"`, or what `param_layers` has made.

    Raises:
        ValueError: For anything else.
    """
    if isinstance(layers, str):
        return param_layers(model, layers=layers)
    if not all(isinstance(layer, ParamLayer) for layer in layers):
        raise ValueError(
            f"layers={layers!r}: give 'module', 'tensor', or layers that hf_clars.param_layers has made. For some "
            "alone: [layer for layer in hf_clars.param_layers(model) if layer.name in names]."
        )
    return list(layers)


def _layer_name(model: nn.Module, owned: _Owned, layers: LayerMode, split_norm_and_bias: bool) -> str:
    if layers == "tensor":
        return owned.full_name
    if split_norm_and_bias and owned.norm_or_bias and not owned.in_norm_module:
        return owned.full_name
    return owned.module_path or type(model).__name__
