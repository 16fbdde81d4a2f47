"""Proof that the hooks see every use of every trainable parameter.

A parameter that is used functionally (`F.linear(x, embedding.weight)`) reaches the loss by a way that no module hook
sees, and its norm would be silently too small. So the autograd graph of the first forward pass is walked once, and each
parameter's edges in it are counted against the uses that the hooks captured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, UncoveredParameterError


def uses_in_graph(
    outputs: Iterable[Tensor], leaves: Mapping[nn.Parameter, nn.Parameter]
) -> tuple[Counter[nn.Parameter], set[Node]]:
    """Count the operations that use each parameter on the way to the outputs.

    Args:
        outputs: Tensors of a forward pass.
        leaves: Leaf tensors to look for, and the parameter that each stands for.

    Returns:
        {parameter: number of operations in the outputs' graph that take it}, without those that are not used; and all
        operations in that graph.
    """
    leaf_of = {torch.autograd.graph.get_gradient_edge(t).node: p for t, p in leaves.items() if t.requires_grad}
    uses: Counter[nn.Parameter] = Counter()
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node in leaf_of:
                uses[leaf_of[node]] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return uses, seen


def check_coverage(
    outputs: Iterable[Tensor],
    captured: Mapping[nn.Parameter, int],
    names: Mapping[nn.Parameter, str],
    in_use: Mapping[nn.Parameter, nn.Parameter],
    located: Iterable[tuple[nn.Parameter, Node]] = (),
) -> None:
    """Raise unless the hooks captured every use.

    Args:
        outputs: Output tensors of the model's forward pass.
        captured: How many uses of each parameter the hooks captured in that pass.
        names: The parameters to check, with their names.
        in_use: Tensors that an engine lets modules compute with instead, and the parameter that each stands for.
        located: Captured uses of which the operation is known. Those that do not lead to the outputs do not count: a
            module may use a parameter for a result that is thrown away, and the model the same parameter elsewhere.

    Raises:
        UncoveredParameterError: Naming each parameter that the graph uses more often than the hooks saw.
    """
    uses, reached = uses_in_graph(outputs, {**{p: p for p in names}, **{t: p for t, p in in_use.items() if p in names}})
    counted = Counter(captured)
    counted.subtract(p for p, node in located if node not in reached)
    missed = [f"{names[p]} (used {n} times, {counted[p]} seen)" for p, n in uses.items() if n > counted[p]]
    if missed:
        raise UncoveredParameterError(
            "These trainable parameters are used in the model by a way that no module hook sees, so their per-sample "
            f"gradient norms would be wrong: {'; '.join(sorted(missed))}. Call the module that owns the weight instead "
            f"of using its tensor, or set requires_grad=False on it, or {WITHOUT_SAMPLES}."
        )
