"""Parameter groups: one for every layer, so that launchers which flatten or shard a group keep its rate apart.

The names of group entries beyond torch's own are constants here; they survive `state_dict` and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from hf_clars.layers import LayerMode, ParamLayer, param_layers

LAYER = "layer"  # str: the layer's name
ADAPTIVE = "adaptive"  # bool: False trains the layer at lr itself, without eta and trust ratio
FROZEN = "frozen"  # bool: True holds the layer's rate at zero (FC freeze)


def layer_groups(
    model: nn.Module | Iterable[Any],
    *,
    layers: LayerMode,
    params: Iterable[dict[str, Any]] | None,
    scale_norm_and_bias: bool,
) -> tuple[list[ParamLayer], list[dict[str, Any]]]:
    """Build one parameter group a layer.

    Args:
        model: A module; or, for methods that need no hooks, parameters, (name, parameter) pairs or groups as torch
            takes them: every tensor is then a layer.
        layers: See `param_layers`.
        params: Groups of the model's parameters with settings of their own. A layer that two groups share is split.
        scale_norm_and_bias: False marks layers of biases and normalisation weights as not adaptive.

    Returns:
        (the layers, their groups), in the same order.

    Raises:
        ValueError: If nothing is trainable, or a group holds a parameter that is not the model's, or twice.
        TypeError: For complex parameters.
    """
    if isinstance(model, nn.Module):
        partition = param_layers(model, layers=layers, split_norm_and_bias=not scale_norm_and_bias)
        paired = _split_by_groups(partition, params) if params is not None else [(p, {}) for p in partition]
    else:
        paired = _layers_of_tensors(model)
    if not paired:
        raise ValueError("There is nothing to train: no parameter has requires_grad=True.")
    groups = []
    for layer, settings in paired:
        _check_real(layer)
        adaptive = scale_norm_and_bias or not layer.norm_or_bias
        groups.append({"params": list(layer.params), LAYER: layer.name, ADAPTIVE: adaptive, **settings})
    return [layer for layer, _ in paired], groups


def _check_real(layer: ParamLayer) -> None:
    for name, param in zip(layer.param_names, layer.params, strict=True):
        if param.is_complex():
            raise TypeError(
                f"The parameter {name} is complex ({param.dtype}), and layer rates are for real ones: keep its real "
                "and imaginary part as a real parameter [..., 2], and use torch.view_as_complex(...) of it."
            )


def _split_by_groups(
    partition: list[ParamLayer], params: Iterable[dict[str, Any]]
) -> list[tuple[ParamLayer, dict[str, Any]]]:
    known = {p for layer in partition for p in layer.params}
    group_of: dict[nn.Parameter, int] = {}
    settings: list[dict[str, Any]] = []
    for i, group in enumerate(params):
        members = list(group["params"])
        for p in (m[1] if isinstance(m, tuple) else m for m in members):
            if p.requires_grad and p not in known:
                raise ValueError(
                    f"Group {i} holds a trainable parameter of shape {tuple(p.shape)} that is not in the model."
                )
            if p in group_of:
                raise ValueError(f"A parameter of shape {tuple(p.shape)} is in group {group_of[p]} and in group {i}.")
            group_of[p] = i
        settings.append({key: value for key, value in group.items() if key != "params"})
    paired = []
    for layer in partition:
        used = sorted({group_of[p] for p in layer.params if p in group_of})
        for i in used:
            members = [(p, n) for p, n in zip(layer.params, layer.param_names, strict=True) if group_of.get(p) == i]
            name = layer.name if len(used) == 1 else f"{layer.name} (group {i})"
            part = ParamLayer(name, tuple(p for p, _ in members), tuple(n for _, n in members), layer.norm_or_bias)
            paired.append((part, settings[i]))
    return paired


def _layers_of_tensors(params: Iterable[Any]) -> list[tuple[ParamLayer, dict[str, Any]]]:
    """Layers from what torch's optimizers take: tensors, named tensors, or groups of either."""
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    paired: list[tuple[ParamLayer, dict[str, Any]]] = []
    for group in groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        for member in group["params"]:
            name, p = member if isinstance(member, tuple) else (f"param_{len(paired)}", member)
            if p.requires_grad:
                # Without the module only the shape tells: a vector is a bias or a normalisation weight.
                paired.append((ParamLayer(name, (p,), (name,), norm_or_bias=p.dim() <= 1), settings))
    return paired


def validate_settings(group: dict[str, Any]) -> None:
    """Refuse a group's settings that cannot work.

    Args:
        group: A parameter group, or the defaults.

    Raises:
        ValueError: Naming the setting and what is allowed.
    """
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (lambda v: v >= 0, "at least 0"),
        "eta": (lambda v: v > 0, "above 0"),
        "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "weight_decay": (lambda v: v >= 0, "at least 0"),
        "trust_clip": (lambda v: v is None or v > 0, "above 0, or None for no bound"),
    }
    for name, (valid, allowed) in rules.items():
        if name in group and not valid(group[name]):
            raise ValueError(f"{name}={group[name]!r} cannot work: it must be {allowed}.")
