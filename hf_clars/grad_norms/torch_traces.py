"""What torch.compile traces, while it does: parts of its tracer without a documented name.

They end when torch lets hooks see a trace. `tests/test_torch_traces.py` fails loudly when one changes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, guard_or_true

from hf_clars.grad_norms.pytree import tensors_in

_NEVER = 2**50
"""Rows that no tensor has."""

UnknownLength = GuardOnDataDependentSymNode
"""The error where a trace is asked for a length that a run alone knows."""


def _is_compiling() -> bool:
    """Whether this is traced, or runs while what was traced is compiled: torch before 2.14 tells the first alone."""
    return torch.compiler.is_compiling() or current_trace() is not None


is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, "_compile_session_context") else _is_compiling
"""Whether code is traced, or compiled."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The module itself, of what `torch.compile` returned for it: hooks on that are outside of what is traced."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def current_trace() -> object:
    """Tells one trace of torch.compile from another, and from its next attempt; None outside of them."""
    return torch._guards.CompileContext.current_trace_id()


def trace_anew(why: str) -> None:
    """Let torch.compile begin the trace under way anew, as it does by itself: what was learned in it counts then."""
    raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason=why)


def at_root_of_trace() -> bool:
    """Whether the trace under way is not inside of a function that gets a graph of its own, as with checkpointing."""
    tracer = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
    return tracer is not None and bool(tracer.output.is_root_tracer())  # torch 2.8 runs hooks outside of traces too


def root_of_trace() -> CodeType | None:
    """The code in which the trace under way began."""
    tracer = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
    root = None if tracer is None else tracer.output.root_tx
    return None if root is None else root.f_code


def resumes() -> bool:
    """Whether what is traced goes on after a graph break."""
    root = root_of_trace()
    return root is not None and root.co_name.startswith("torch_dynamo_resume_in")


def before_compiling(change: Callable[[Any], Callable[[Any], Any] | None]) -> None:
    """Let `change(traced)` change what was traced, a graph module, and return what is to be put around its code."""
    output = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output
    compiler: Callable[..., Any] = output.compiler_fn  # type: ignore[assignment]  # it is None in exports only

    @functools.wraps(compiler)
    def changed(traced: Any, inputs: Any, **settings: Any) -> Any:
        try:
            around = change(traced)
        except torch._dynamo.exc.RestartAnalysis:
            output.root_tx.speculation_log.clear()  # it holds where the code went that is traced anew
            raise
        compiled = compiler(traced, inputs, **settings)
        return compiled if around is None else around(compiled)

    output.compiler_fn = changed


def compile_anew(why: str) -> NoReturn:
    """As `trace_anew`, when the trace has ended and what was traced is compiled."""
    raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(restart_reason=why)


def rows_are_unknown(x: Tensor) -> bool:
    """Whether how many rows a tensor has is known to a run alone, as where rows are picked by a mask of the data."""
    return guard_or_true(x.shape[0] == _NEVER)


def value_of(node: Any) -> Any:
    """What stands for a node's value in a trace: a tensor without numbers, or what is no tensor."""
    return node.meta.get("example_value")


def trains(node: Any) -> bool:
    """Whether a gradient may come to a node's value, also to complex numbers."""
    return any(t.requires_grad for t in tensors_in(value_of(node)))


def held_by(node: Any) -> Any:
    """What a trace took from outside at an input; None for numbers."""
    held = node.meta.get("grapharg")
    return None if held is None else held.example


def is_from_model(node: Any, parameters: Iterable[Any]) -> bool:
    """Whether an input of a trace is held by the module that these inputs, parameters, are reached from."""

    def name(of: Any) -> str:
        held = of.meta.get("grapharg")
        found = "" if held is None else held.source.name
        return found if isinstance(found, str) else str(found())  # a method in older versions of torch

    roots = {name(p).partition("._modules[")[0].partition("._parameters[")[0] for p in parameters}
    return any(name(node).startswith(f"{root}.") for root in roots)


@contextmanager
def fake_values(like: Tensor) -> Iterator[None]:
    """Compute on what stands for tensors in a trace; what cannot be done there is not logged as an error of torch's."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with like.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
            yield
    finally:
        log.disabled = disabled


def is_whole_function(node: Any) -> bool:
    """Whether a node calls a function with a graph of its own, as of what is checkpointed."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def opened(node: Any) -> tuple[Any, list[Any]]:
    """The operations that a function of torch's in a trace is made of.

    Args:
        node: The call.

    Returns:
        A graph with a value for each node, and the nodes whose tensors it takes. Its output is a tuple.
    """
    inputs = [n for n in node.all_input_nodes if isinstance(value_of(n), Tensor)]

    def call(*tensors: Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: given[n] if n in given else value_of(n))
        return tuple(node.target(*args, **kwargs))

    values = [value_of(n) for n in inputs]
    with values[0].fake_mode:
        graph = make_fx(call, pre_dispatch=True)(*(t.detach() for t in values)).graph
    for n in graph.nodes:
        n.meta = {"example_value": n.meta.get("val")}
        for t in tensors_in(value_of(n)):
            t.requires_grad_(t.is_floating_point())
    return graph, inputs


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention` as products and a softmax: its kernels have no gradient of a sample's mask."""
    return torch._scaled_dot_product_attention_math(*args, **kwargs)[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch's, which cannot be done for each of a symbolic number of samples."""
    y = x @ weight.mT
    return y if bias is None else y + bias


def layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As torch's; the same holds for it."""
    x = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(x, [-1 - i for i in range(len(shape))], correction=0, keepdim=True)
    y = (x - mean) * (variance + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


#: Functions that cannot be done for each of a symbolic number of samples, and what stands for them.
OF_ANY_BATCH: dict[str, Callable[..., Tensor]] = {"linear": linear, "layer_norm": layer_norm}


def when_traced(look: Callable[[Any], None]) -> None:
    """Let `look(traced)` see what was traced when the trace under way ends; for `uses_in_trace`."""
    traced = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output
    traced.add_cleanup_hook(lambda: look(traced))


def uses_in_trace(graph: Any, bodies: Mapping[str, Any]) -> Iterator[tuple[Tensor, str, type | None]]:
    """What a trace makes of tensors from outside, as far as that may be differentiated.

    Args:
        graph: Of the trace.
        bodies: Functions with graphs of their own that it calls, by name.

    Yields:
        The tensor; the operation; the class of the module that calls it, None for the code that was compiled itself.
        What this does with parameters of its own is left out.
    """
    for node in graph.nodes:
        held = node.meta.get("grapharg") if node.op == "placeholder" else None
        if held is not None and isinstance(held.example, Tensor) and held.example.requires_grad:
            for operation, caller in _uses_of(node, bodies):
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
