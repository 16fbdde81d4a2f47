"""What torch.compile traces, while it does: parts of its tracer without a documented name.

They end when torch lets hooks see a trace. `tests/test_torch_internals.py` fails loudly when one changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.pytree import tensors_in


def current_trace() -> object:
    """Tells one trace of torch.compile from another, and from its next attempt; None outside of them."""
    return torch._guards.CompileContext.current_trace_id()


def trace_anew(why: str) -> None:
    """Let torch.compile begin the trace under way anew, as it does by itself: what was learned in it counts then."""
    raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason=why)


def when_traced(look: Callable[[Any], None]) -> None:
    """Let `look(traced)` see what was traced when the trace under way ends; for `uses_in_trace`."""
    traced = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output
    traced.add_cleanup_hook(lambda: look(traced))


def uses_in_trace(traced: Any) -> Iterator[tuple[Tensor, str, type | None]]:
    """What a trace makes of tensors from outside, as far as that may be differentiated.

    Args:
        traced: See `when_traced`.

    Yields:
        The tensor; the operation; the class of the module that calls it, None for the code that was compiled itself.
        What this does with parameters of its own is left out.
    """
    for node in traced.graph.nodes:
        held = node.meta.get("grapharg") if node.op == "placeholder" else None
        if held is not None and isinstance(held.example, Tensor) and held.example.requires_grad:
            for operation, caller in _uses_of(node, traced.nn_modules):
                if caller is not None or "_modules_" in node.name:
                    yield held.example, operation, caller


def _uses_of(node: Any, bodies: Mapping[str, Any]) -> Iterator[tuple[str, type | None]]:
    for user in node.users:
        operation = str(getattr(user.target, "__name__", user.target))
        if "checkpoint" in operation:  # what it runs has a graph of its own
            body, *given = user.args
            inside = [n for n in bodies[body.target].graph.nodes if n.op == "placeholder"]
            for n in (n for n, outside in zip(inside, given, strict=False) if outside is node):
                yield from _uses_of(n, bodies)
        elif any(t.requires_grad for t in tensors_in(user.meta.get("example_value"))):
            callers = list(user.meta.get("nn_module_stack", {}).values())
            yield operation, callers[-1][1] if callers else None
