"""Parameter groups as torch takes them, and the layers that their tensors belong to.

`param_groups` shows what a caller gave. A model given without groups makes one group for every layer that trains, so
that launchers which flatten or shard a group keep its rate apart; what is frozen then rides along in the last of them.
The names of group entries beyond torch's own are constants here; they survive `state_dict` and DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hf_clars.layers import LayerMode, ParamLayer, param_layers
from hf_clars.optim.layer_book import LayerBook

LAYER = "layer"  # str: the layer's name, in groups that were made for one layer
ADAPTIVE = "adaptive"  # bool: False trains the group at lr itself, without eta and trust ratio
FROZEN = "frozen"  # bool: True holds the group's rate at zero
HELD = "held_layers"  # list of str: layers of the group whose rate is held at zero (FC freeze)

Named = tuple[str, nn.Parameter]


def model_groups(
    model: nn.Module,
    *,
    layers: LayerMode,
    params: Iterable[Any] | None,
    scale_norm_and_bias: bool,
) -> tuple[LayerBook, list[dict[str, Any]]]:
    """A model's layers, and its parameter groups.

    Args:
        model: The module. Its frozen parameters are taken too: they may be unfrozen later.
        layers: See `param_layers`.
        params: Groups of the model's parameters with settings of their own, or parameters. They are kept as they are;
            a layer that two groups share is split.
        scale_norm_and_bias: False marks layers of biases and normalisation weights as not adaptive.

    Returns:
        The layers, and the groups as `torch.optim.Optimizer` takes them.

    Raises:
        ValueError: If nothing is trainable, or a group holds a parameter that is not the model's, or is another's.
        TypeError: For complex parameters.
    """
    partition = param_layers(model, layers=layers, split_norm_and_bias=not scale_norm_and_bias, frozen=True)
    if params is None:
        groups = _one_a_layer(partition, scale_norm_and_bias)
        book = LayerBook.of(partition, [[p for _, p in group["params"]] for group in groups])
    else:
        groups = _named_groups(model, params)
        members = [[p for _, p in group["params"]] for group in groups]
        book = LayerBook.of(_split_by_groups(partition, members), members)
        book.adaptive = [scale_norm_and_bias or not layer.norm_or_bias for layer in book.layers]
    if (params is None or groups) and not book.shown:
        raise ValueError("There is nothing to train: no parameter has requires_grad=True.")
    return book, groups


def tensor_layers(group: dict[str, Any], first: int, scale_norm_and_bias: bool) -> tuple[list[ParamLayer], list[bool]]:
    """Layers of a group without a model: every tensor is one.

    Args:
        group: As torch keeps it.
        first: How many tensors came before; those without a name are numbered.
        scale_norm_and_bias: False marks vectors as not adaptive.

    Returns:
        (the layers, whether each is adaptive), in the order of the group's tensors.
    """
    names = group.get("param_names") or [f"param_{first + i}" for i in range(len(group["params"]))]
    # Without the module only the shape tells: a vector is a bias or a normalisation weight.
    layers = [ParamLayer(n, (p,), (n,), p.dim() <= 1) for n, p in zip(names, group["params"], strict=True)]
    return layers, [scale_norm_and_bias or not layer.norm_or_bias for layer in layers]


def _one_a_layer(partition: list[ParamLayer], scale_norm_and_bias: bool) -> list[dict[str, Any]]:
    """One group for each layer that trains; DeepSpeed refuses a group in which nothing does."""
    groups: list[dict[str, Any]] = []
    frozen: list[Named] = []
    for layer in partition:
        members = list(zip(layer.param_names, layer.params, strict=True))
        if any(p.requires_grad for _, p in members):
            adaptive = scale_norm_and_bias or not layer.norm_or_bias
            groups.append({"params": members, LAYER: layer.name, ADAPTIVE: adaptive})
        else:
            frozen += members
    if groups:
        groups[-1]["params"] += frozen
    return groups


def _named_groups(model: nn.Module, params: Iterable[Any]) -> list[dict[str, Any]]:
    """The caller's groups, each tensor with the name that it has in the model."""
    name_of = {p: name for name, p in model.named_parameters()}
    entries = list(params)
    if entries and not isinstance(entries[0], dict):
        entries = [{"params": entries}]
    group_of: dict[Tensor, int] = {}
    groups = []
    for i, group in enumerate(entries):
        members: list[Named] = []
        for p in (m[1] if isinstance(m, tuple) else m for m in members_of(group)):
            if p not in name_of:
                raise ValueError(f"Group {i} holds a parameter of shape {tuple(p.shape)} that is not in the model.")
            if group_of.setdefault(p, i) != i:
                raise ValueError(f"The parameter {name_of[p]} is in group {group_of[p]} and in group {i}.")
            members.append((name_of[p], p))
        groups.append({**group, "params": members, "param_names": [name for name, _ in members]})
    return groups


def members_of(group: dict[str, Any]) -> list[Any]:
    """What a group holds: torch takes one tensor in the place of a list of one."""
    params = group["params"]
    return [params] if isinstance(params, Tensor) else list(params)


def _split_by_groups(partition: list[ParamLayer], groups: list[list[nn.Parameter]]) -> list[ParamLayer]:
    """Layers of which each is in one group; what no group holds is left out."""
    group_of = {p: i for i, members in enumerate(groups) for p in members}
    found = []
    for layer in partition:
        used = sorted({group_of[p] for p in layer.params if p in group_of})
        for i in used:
            members = [(n, p) for n, p in zip(layer.param_names, layer.params, strict=True) if group_of.get(p) == i]
            name = layer.name if len(used) == 1 else f"{layer.name} (group {i})"
            names, params = zip(*members, strict=True)
            found.append(replace(layer, name=name, params=params, param_names=names))
    return found


def validate_settings(group: dict[str, Any]) -> None:
    """Refuse a group's settings that cannot work.

    Args:
        group: A parameter group, or the defaults.

    Raises:
        ValueError: Naming the setting and what is allowed.
    """
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (lambda v: math.isfinite(v) and v >= 0, "a finite number, at least 0"),
        "eta": (lambda v: math.isfinite(v) and v > 0, "a finite number above 0"),
        "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "weight_decay": (lambda v: math.isfinite(v) and v >= 0, "a finite number, at least 0"),
        "trust_clip": (lambda v: v is None or v > 0, "above 0, or None for no bound"),
    }
    for name, (valid, allowed) in rules.items():
        if name in group and not valid(group[name]):
            raise ValueError(f"{name}={group[name]!r} cannot work: it must be {allowed}.")
