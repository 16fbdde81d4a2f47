"""The only place that uses parts of torch without a documented Python name.

Each has a slower public substitute or a plain reason; `tests/test_torch_internals.py` fails loudly when one changes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_clars.grad_norms.torch_traces import is_compiling

NO_BACKWARD = -1

BATCH_NORM_NODES = ("NativeBatchNormBackward", "CudnnBatchNormBackward", "MiopenBatchNormBackward")
_LAYER_NORM_NODES = ("NativeLayerNormBackward",)
_GROUP_NORM_NODES = ("NativeGroupNormBackward",)
# Between a normalisation and its module's output stand at most a view, an activation and a dropout.
_NODES_TO_SEARCH = 4


def inside_backward() -> bool:
    """Whether a backward pass is running in this thread: a forward now is activation checkpointing's recomputation."""
    return backward_number() != NO_BACKWARD


def backward_number() -> int:
    """Tells one backward pass in this thread from another; `NO_BACKWARD` outside of them."""
    return torch._C._current_graph_task_id()


def is_asked_for(leaf: Tensor) -> bool:
    """Whether the backward pass that runs in this thread gives a leaf its gradient."""
    return _is_run(torch.autograd.graph.get_gradient_edge(leaf).node)


def gives_none(leaves: Iterable[Tensor]) -> bool:
    """Whether the operation that runs backward in this thread takes some leaves, and none is given its gradient."""
    node, wanted = torch._C._current_autograd_node(), set(map(id, leaves))
    children = () if node is None else (child for child, _ in node.next_functions if child is not None)
    taken = [child for child in children if id(getattr(child, "variable", None)) in wanted]
    return bool(taken) and not any(map(_is_run, taken))


def _is_run(node: torch.autograd.graph.Node) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad was asked for this leaf, and does not say so
        return True


def operations_recorded() -> int:
    """How many operations this thread has recorded for backward passes; each gets the next number."""
    number: int = torch.autograd._get_sequence_nr()
    return number


def number_of(node: torch.autograd.graph.Node) -> int:
    """Which of the recorded operations one is, from 0 on; leaves have a number that none of them gets."""
    number: int = node._sequence_nr()
    return number


def registered_in(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dictionaries that hold a module's own parameters and children; `named_parameters` runs Python for each."""
    return module._parameters, module._modules


def inside_function_transform() -> bool:
    """Whether torch.func (`grad`, `vmap`, `jvp`) is at work, whose gradients never come to `p.grad`."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place."""
    return tensor._version


def hooks_on_gradients(tensor: Tensor) -> list[dict[int, Any]]:
    """The hooks that run when a leaf's gradient comes, and after it was added to `.grad`: dictionaries in use."""
    return [hooks for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks) if hooks]


def saved_tensors_are_packed() -> bool:
    """Whether saved tensors go through hooks now (checkpointing, offload): then a graph's tensors must not be read."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def saves_packed(node: torch.autograd.graph.Node) -> bool:
    """Whether what an operation saved went through such hooks: it can be read but once a backward pass."""
    found = (getattr(node, name) for name in dir(type(node)) if name.startswith("_raw_saved_"))
    each = (saved for t in found for saved in (t if isinstance(t, tuple | list) else (t,)))
    return any(getattr(saved, "unpack_hook", None) is not None for saved in each)


def ends_recomputation(error: BaseException) -> bool:
    """Whether an exception is activation checkpointing's own: it has the last of the tensors that it runs again for."""
    return isinstance(error, torch.utils.checkpoint._StopRecomputationError)


class StorageReference(StorageWeakRef):
    """A tensor's memory, by a key that is not given away while the reference lives. The memory may go all the same."""

    @property
    def key(self) -> int:
        """The same for all tensors on this memory."""
        return int(self.cdata)


def unwrapped(t: Tensor) -> Tensor:
    """What a tensor stands for under `torch.vmap`: all samples."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def storage_of(t: Tensor) -> StorageReference | None:
    """Where a tensor's values are; None if it has no memory of its own (it stands in for others)."""
    try:
        return StorageReference(unwrapped(t).untyped_storage())
    except (RuntimeError, NotImplementedError):
        return None


NOTHING = nullcontext()
"""A context that does nothing."""

COMPILED = "CompiledFunction"
"""How the name of compiled code's place in the graph begins."""

TRACED = "ApplyTemplate"
"""As that, of a function in code that was traced and left as it is (`backend="eager"`)."""


def unseen_by_modes() -> AbstractContextManager[Any]:
    """No mode, and no class of tensors, sees the functions that are called inside; without it each call is Python's."""
    return torch._C.DisableTorchFunction()


_has_autocast = functools.cache(torch.amp.is_autocast_available)  # takes as long as a small product


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Outside any autocast region that backward() may have been called in: norms are in float32 at least."""
    known = device in ("cpu", "cuda") or _has_autocast(device)  # torch 2.8 cannot trace the question
    on = known and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else NOTHING


def no_grad() -> AbstractContextManager[Any]:
    """`torch.no_grad()`, which takes its time also where gradients are off, as in a backward pass."""
    return torch.no_grad() if torch.is_grad_enabled() else NOTHING


def is_view(t: Tensor) -> bool:
    """Whether a tensor is a view of another: an in-place operation then gives it another place in the graph."""
    return t._is_view()


def batch_statistics(x: Tensor, output: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / standard deviation) of each channel over a batch, [C] each.

    Taken from the graph of the BatchNorm that has just run, or computed once more where that is not to be had.

    Args:
        x: The BatchNorm's input [B, C, ...].
        output: Its output, or an activation's after it.
        eps: Added to the variance.
    """
    found = _statistics_in_graph(x, output, BATCH_NORM_NODES, (x.shape[1],))
    if found is None:
        _, mean, rstd = torch.native_batch_norm(x.detach(), None, None, None, None, True, 0.0, eps)
        return mean, rstd
    return found


def group_statistics(x: Tensor, output: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / standard deviation) of each sample's channel groups, [B, groups] each; as `batch_statistics`."""
    found = _statistics_in_graph(x, output, _GROUP_NORM_NODES, (x.shape[0], groups))
    if found is None:
        var, mean = torch.var_mean(x.detach().reshape(x.shape[0], groups, -1), dim=2, correction=0)
        return mean, (var + eps).rsqrt()
    return found


def _statistics_in_graph(
    x: Tensor, output: Tensor, kinds: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor] | None:
    """What the normalisation of `x` saved for its own backward pass."""
    if is_compiling() or saved_tensors_are_packed():
        return None  # a compiler finds by itself what is computed twice
    node = output.grad_fn
    for steps in range(_NODES_TO_SEARCH):
        if node is None:
            return None
        if node.name().startswith(kinds):
            mean, rstd = getattr(node, "_saved_result1", None), getattr(node, "_saved_result2", None)
            if mean is None or rstd is None or not mean.numel() == rstd.numel() == math.prod(shape):
                return None
            # The node of the output itself is the right one; one further back could be that of a layer before.
            if steps and not _is_of(node, x):
                return None
            return (mean, rstd) if mean.shape == shape else (mean.view(shape), rstd.view(shape))
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def _is_of(node: torch.autograd.graph.Node, x: Tensor) -> bool:
    """Whether a node's input is this tensor."""
    of = getattr(node, "_saved_input", None)
    return of is not None and of.data_ptr() == x.data_ptr() and of.shape == x.shape


def layer_statistics(x: Tensor, output: Tensor, dims: int, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / standard deviation) over the last `dims` axes, kept as axes of length 1; as `batch_statistics`."""
    shape = (*x.shape[: x.dim() - dims], *(1,) * dims)
    found = _statistics_in_graph(x, output, _LAYER_NORM_NODES, shape)
    if found is None or found[0].dtype in (torch.float16, torch.bfloat16):
        exact = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
        var, mean = torch.var_mean(exact, dim=tuple(range(-dims, 0)), correction=0, keepdim=True)
        return mean, (var + eps).rsqrt()
    return found


_OPERANDS = {
    "AddmmBackward0": "_saved_mat1",
    "MmBackward0": "_saved_self",
    "ConvolutionBackward0": "_saved_input",
}


def operand_of(output: Tensor, x: Tensor) -> Tensor:
    """A module's input as it was multiplied: under autocast the copy in the lower precision, which the graph holds.

    Args:
        output: The module's output, at most two views away from the product.
        x: The module's input.

    Returns:
        The shape of `x`; `x` itself, in the type of the output, where the graph holds no such tensor.
    """
    if x.dtype == output.dtype:
        return x
    held = _saved_by_product(output, _OPERANDS)
    fits = held is not None and held.numel() == x.numel()
    return held.detach().view(x.shape) if held is not None and fits else x.detach().to(output.dtype)


_WEIGHTS = {"AddmmBackward0": "_saved_mat2", "MmBackward0": "_saved_mat2", "ConvolutionBackward0": "_saved_weight"}


def weight_of(output: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
    """A module's weight as it was multiplied: under autocast the copy in the lower precision, which the graph holds.

    Args:
        output: The module's output, at most two views away from the product.
        weight: The weight.
        transposed: Whether the product took it so.

    Returns:
        The shape of `weight`; `weight` itself where the graph holds no such copy.
    """
    held = None if weight.dtype == output.dtype else _saved_by_product(output, _WEIGHTS)
    held = held.mT if held is not None and transposed else held
    return held.detach() if held is not None and held.shape == weight.shape else weight


def _saved_by_product(output: Tensor, names: Mapping[str, str]) -> Tensor | None:
    """What the product behind an output saved under one of these names, in the type of the output."""
    node = None if is_compiling() or saved_tensors_are_packed() else output.grad_fn
    for _ in range(3):
        if node is None:
            return None
        name = names.get(node.name())
        if name is not None:
            held: Tensor | None = getattr(node, name, None)
            return held if held is not None and held.dtype == output.dtype else None
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def product_before_view(output: Tensor) -> torch.autograd.graph.Node | None:
    """The matrix product of which a Linear layer's output over positions is a view, in the graph; None if it is not.

    The gradient that arrives there is the output's, in another shape. An operation that works on the output in place
    changes the view's place in the graph, and leaves this one.
    """
    view = output.grad_fn
    if view is None or view.name() not in ("ViewBackward0", "UnsafeViewBackward0"):
        return None
    product = view.next_functions[0][0]
    return product if product is not None and product.name() in ("AddmmBackward0", "MmBackward0") else None


def saved(node: torch.autograd.graph.Node, name: str) -> Any:
    """What an operation saved for its backward pass under a name; None if it did not, or has freed it."""
    value = getattr(node, f"_saved_{name}", None)
    return value.detach() if isinstance(value, Tensor) else value


def leaves_below(node: torch.autograd.graph.Node) -> set[Tensor]:
    """The leaves from which a value is made."""
    stack, seen = [node], {node}
    leaves: set[Tensor] = set()
    while stack:
        here = stack.pop()
        variable = getattr(here, "variable", None)
        if variable is not None:
            leaves.add(variable)
        for child, _ in here.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return leaves


def shape_at(node: torch.autograd.graph.Node, output: int = 0) -> tuple[int, ...] | None:
    """Shape of what an operation of the graph returned; None where the node does not say.

    Args:
        node: The operation's place in the graph.
        output: Which of its results.
    """
    known = getattr(node, "_input_metadata", ())
    says = output < len(known) and not known[output].is_nested_tensor  # its rows have shapes of their own
    return tuple(known[output].shape) if says else None


def is_jagged(node: torch.autograd.graph.Node) -> bool:
    """Whether an operation of the graph returned a nested tensor that is made in Python, which few functions take."""
    return any(m.is_nested_tensor and not m.is_cpp_nested_tensor for m in getattr(node, "_input_metadata", ()))


def dtype_at(node: torch.autograd.graph.Node, output: int = 0) -> torch.dtype:
    """Type of what an operation of the graph returned, for nodes with a `shape_at`."""
    dtype: torch.dtype = node._input_metadata[output].dtype
    return dtype


def results_of(node: torch.autograd.graph.Node) -> int:
    """How many results an operation of the graph has."""
    return len(getattr(node, "_input_metadata", ()))
