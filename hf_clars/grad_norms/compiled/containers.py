"""What stands for the hooks of a model, and of modules without a rule, in compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_clars.grad_norms.compiled.calls import CompiledCalls
from hf_clars.grad_norms.compiled.operations import refuse
from hf_clars.grad_norms.compiled.uses import note_done
from hf_clars.grad_norms.errors import UncoveredParameterError


class CompiledContainer:
    """A module with parameters inside, none its own that a rule serves; a hook that measures nothing.

    Args:
        state: The tracker's.
        path: Its name.
        missing: Its parameters that compiled calls do not measure, in words.
    """

    def __init__(self, state: CompiledCalls, path: str, missing: str) -> None:
        self.state = state
        self.path = path
        self.missing = missing

    def ready(self, *args: Any) -> bool:
        """Whether the modules inside can do their work, or it can be said that they cannot."""
        return bool(self.missing) or self.state.ready()

    def __call__(self, *args: Any) -> None:
        """Note that it was called, or say what cannot be measured."""
        state = self.state
        if state.within and state.measures:
            state.keep_rows()
            note_done(state.uses.name, self.path)
        if self.missing and not (state.within or state.paused) and torch.is_grad_enabled():
            state.number = refuse(state.place, state.receiver, not_compiled(self.missing, part=True), False)


class CompiledBystander:
    """A module without measured parameters in compiled code; it lets what is traced around it be seen.

    Args:
        state: The tracker's.
    """

    def __init__(self, state: CompiledCalls) -> None:
        self.state = state

    def ready(self, *args: Any) -> bool:
        """It can always do its work."""
        return True

    def __call__(self, *args: Any) -> None:
        """Note that a trace is under way."""
        if self.state.within and self.state.measures:
            self.state.keep_rows()


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
        """It can always do its work, or say that it cannot."""
        return True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], rest: Any, *output: Any) -> None:
        """A pass begins, or ends."""
        state = self.state
        if not self.begins:
            state.end()
        elif state.whole or state.paused or not torch.is_grad_enabled():
            state.begin(args, rest)
            state.keep_rows()
        else:
            state.number = refuse(state.place, state.receiver, not_compiled(state.reason, part=False), False)
            state.measures, state.within = False, True


def not_compiled(names: str, *, part: bool) -> str:
    """What is wrong with parameters that cannot be measured in compiled code, of a part or of the whole model."""
    whole = "Compile the whole model (torch.compile(model)) in the place of parts, or only" if part else "Compile only"
    return (
        f"{names}: no layer rule measures this in compiled code. {whole} parts whose parameters all have rules (as "
        "model.layers[0].compile()), register a rule (README of grad_norms), freeze these parameters, or run the model "
        "without torch.compile."
    )


def ran_outside(what: object) -> UncoveredParameterError:
    """The error for a module that runs outside compiled code in a pass that began inside."""
    return UncoveredParameterError(
        f"{what} ran outside compiled code in a pass that began inside, as where a part of it cannot be compiled: "
        "compile the parts of the model that can be, one by one (as model.layers[0].compile()), run one forward and "
        "backward pass without torch.compile first, or run the model without it. If torch has compiled it often, and "
        "given up, raise torch._dynamo.config.recompile_limit."
    )
