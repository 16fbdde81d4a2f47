"""Differentiating for the norms' sake leaves parameters as they are, whatever somebody's own backward function does.

A reversible layer runs its modules again inside its backward function, and calls `backward()` there: each time its part
of the graph is differentiated, its parameters' gradients grow. That must happen in the user's backward pass alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from hf_clars.grad_norms.torch_internals import hooks_on_gradients


@contextmanager
def undisturbed(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep `p.grad`, and hooks on gradients, out of what happens inside.

    Args:
        params: All parameters that could be reached.
    """
    held: list[tuple[nn.Parameter, Tensor | None]] = [(p, p.grad) for p in params if p.requires_grad]
    hooks = [(found, dict(found)) for p, _ in held for found in hooks_on_gradients(p)]
    for p, _ in held:
        p.grad = None
    for found, _ in hooks:
        found.clear()
    try:
        yield
    finally:
        for p, grad in held:
            p.grad = grad
        for found, before in hooks:
            found.update(before)
