"""`ClarsFactory`: the optimizer factory that transformers' Trainer calls with the model it has at hand."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn

from hf_clars.errors import ConfigError
from hf_clars.optim.base import LayerwiseOptimizer
from hf_clars.optim.methods import METHODS


class ClarsFactory:
    """Makes a layer-wise optimizer of the model that Trainer trains; nobody has to pass the model by hand.

    ::

        Trainer(model, args, optimizer_cls_and_kwargs=(ClarsFactory, {"lr": 0.8, "eta": 1e-2}))

    It follows transformers' protocol: Trainer creates it without arguments and calls it with the model and the keyword
    arguments.
    """

    def __call__(self, model: nn.Module, *, method: str = "clars", **settings: Any) -> LayerwiseOptimizer:
        """The optimizer.

        Args:
            model: The model, as Trainer gives it.
            method: `"clars"` (default), `"signal_lars"`, `"lars"` or `"nag"`.
            settings: What the method's class takes besides the model.

        Returns:
            The optimizer, attached to the model.

        Raises:
            ConfigError: For an unknown method, or a setting that the method does not have.
        """
        if method not in METHODS:
            near = get_close_matches(method, METHODS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METHODS)}."
            raise ConfigError(f"There is no method {method!r}: {hint}")
        kind = METHODS[method].optimizer
        try:
            return kind(model, **settings)
        except TypeError as error:
            raise ConfigError(f"{kind.__name__} cannot be made with these settings: {error}.") from error
