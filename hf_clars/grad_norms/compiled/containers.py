"""What stands for the hooks of a model, and of modules without a rule, in compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_clars.grad_norms.compiled.calls import CompiledCalls
from hf_clars.grad_norms.errors import UncoveredParameterError


class CompiledContainer:
    """A module with parameters inside, none its own that a rule serves; a hook that does nothing in compiled code.

    Args:
        state: The tracker's.
        missing: Its parameters that compiled calls do not measure, in words.
    """

    def __init__(self, state: CompiledCalls, missing: str) -> None:
        self.state = state
        self.missing = missing

    def ready(self, *args: Any) -> bool:
        """Whether the modules inside can do their work."""
        idle = self.state.paused or not torch.is_grad_enabled()
        return idle or (self.state.measures and not self.missing)

    def refuse(self) -> None:
        """See `TracedHook`."""
        if self.missing:
            raise not_compiled(self.missing)

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


class CompiledModel:
    """The model's own hooks in compiled code.

    Args:
        state: The tracker's.
        begins: Whether it is the hook before the model's forward, or one after it.
    """

    def __init__(self, state: CompiledCalls, *, begins: bool) -> None:
        self.state = state
        self.begins = begins

    def ready(self, *args: Any) -> bool:
        """Whether the model may be compiled as a whole."""
        return self.state.whole or self.state.paused or not torch.is_grad_enabled()

    def refuse(self) -> None:
        """See `TracedHook`."""
        if self.begins and not self.state.whole:
            raise not_compiled(self.state.reason)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], rest: Any, *output: Any) -> None:
        """A pass begins, or ends."""
        if self.begins:
            self.state.begin(args, rest)
        else:
            self.state.end()


def not_compiled(names: str) -> UncoveredParameterError:
    """The error for parameters that cannot be measured in compiled code."""
    return UncoveredParameterError(
        f"{names}: no layer rule measures this in compiled code. Compile only the parts of the model whose parameters "
        "all have rules (as model.layers[0].compile()), register a rule (README of grad_norms), freeze these "
        "parameters, or run the model without torch.compile."
    )


def ran_outside(what: object) -> UncoveredParameterError:
    """The error for a module that runs outside compiled code in a pass that began inside."""
    return UncoveredParameterError(
        f"{what} ran outside compiled code in a pass that began inside, as where a part of it cannot be compiled: "
        "compile the parts of the model that can be, one by one (as model.layers[0].compile()), run one forward and "
        "backward pass without torch.compile first, or run the model without it."
    )
