"""FC freeze (Gotmare et al., 2018): hold a network's head while the rest trains."""

from __future__ import annotations

from torch import nn

from hf_clars.optim.base import LayerwiseOptimizer
from hf_clars.optim.groups import FROZEN, HELD, LAYER


def head_layer_names(model: nn.Module, optimizer: LayerwiseOptimizer) -> list[str]:
    """The layers that FC freeze holds when none are named.

    Args:
        model: The optimizer's model.
        optimizer: Whose layers to choose from.

    Returns:
        All Linear layers if the network has convolutions (Gotmare et al., 2018, freeze the fully connected part),
        otherwise its last layer.
    """
    modules = dict(model.named_modules())
    convolutional = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in modules.values())
    names = optimizer.layer_names
    if convolutional:
        linear = {path for path, m in modules.items() if isinstance(m, nn.Linear)}
        chosen = [n for n in names if n in linear or n.rpartition(".")[0] in linear]
        if chosen:
            return chosen
    return names[-1:]


def set_frozen(optimizer: LayerwiseOptimizer, names: list[str], frozen: bool) -> None:
    """Hold layers, or let them go.

    Args:
        optimizer: Whose groups to change.
        names: Layer names.
        frozen: True holds the rate at 0.

    Raises:
        KeyError: If a name is no layer.
    """
    for name in names:
        group = optimizer.layer_group(name)
        if group.get(LAYER) == name and optimizer.layers_of(group) == [name]:
            group[FROZEN] = frozen
        else:
            group[HELD] = sorted({*group.get(HELD, ())} - {name} | ({name} if frozen else set()))
