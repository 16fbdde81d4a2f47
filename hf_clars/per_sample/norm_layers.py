"""Normalisations: the cheap mode measures them alone, and BatchNorm couples samples.

The noise scale of the normalisation layers follows the whole model's.

Source: Gray, Samsi et al., "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale
in Transformers" (2024). How well it holds is a matter of the model: `docs/useful-batch-size.md` has what we found.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from hf_clars.errors import ConfigError
from hf_clars.layers import BATCH_NORM_MODULES, NORM_MODULES, ParamLayer

logger = logging.getLogger(__name__)


def norm_layers(model: nn.Module, layers: Sequence[ParamLayer]) -> list[ParamLayer]:
    """Those layers of a partition that are normalisations: torch's, and classes with "Norm" in their name.

    Args:
        model: The module.
        layers: Its partition.

    Returns:
        The layers, in their order.

    Raises:
        ConfigError: If there are none.
    """
    modules = dict(model.named_modules())
    found = [layer for layer in layers if _is_norm(_owner(modules, layer))]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no trainable normalisation layer, so norm_layers_only has nothing to measure: "
            "leave it out."
        )
    return found


def _owner(modules: dict[str, nn.Module], layer: ParamLayer) -> nn.Module | None:
    return modules.get(layer.param_names[0].rpartition(".")[0])


def _is_norm(module: nn.Module | None) -> bool:
    named = module is not None and any("Norm" in kind.__name__ for kind in type(module).__mro__)
    return isinstance(module, NORM_MODULES) or named


class Coupling:
    """Whether a BatchNorm in training mode makes each sample's gradient depend on the others.

    Args:
        model: The module.
        tell: Whether to say once what that means for the noise scale.
    """

    def __init__(self, model: nn.Module, *, tell: bool) -> None:
        self._batch_norms = [(n, m) for n, m in model.named_modules() if isinstance(m, BATCH_NORM_MODULES)]
        self._tell = tell

    def none(self) -> bool:
        """Whether there is none now."""
        name = next((n or type(m).__name__ for n, m in self._batch_norms if m.training), None)
        if name is not None and self._tell:
            self._tell = False
            logger.warning(
                "%s is a BatchNorm in training mode, which makes each sample's gradient depend on the others: norms "
                "and R_k are measured, but noise scale and share of signal would be wrong, and are left out. They need "
                "GroupNorm or LayerNorm, or BatchNorm in evaluation mode.",
                name,
            )
        return name is None
