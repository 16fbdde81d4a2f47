"""Differentiating for the norms' sake: no tracker takes note of it, and parameters stay as they are.

A reversible layer runs its modules again inside its backward function, and calls `backward()` there: each time its part
of the graph is differentiated, its parameters' gradients grow. That must happen in the user's backward pass alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from hf_clars.grad_norms.torch_internals import hooks_on_gradients, inside_backward

_under_way: set[quietly] = set()
"""Our own differentiations, in all threads: hooks of all trackers must do nothing in these."""


class _Thread(threading.local):
    """What is known of a thread.

    Attributes:
        calls_models: Whether it is a user's. Those of the autograd engine call no model, and work for any thread.
        differentiations: How many of our own it has under way.
    """

    calls_models = False
    differentiations = 0


_thread = _Thread()


def note_caller() -> None:
    """A model is called in this thread: what other threads differentiate is none of its business."""
    _thread.calls_models = True


def differentiating() -> bool:
    """Whether the graph is differentiated for the norms' sake, and not by the user."""
    if not _under_way or _thread.differentiations:
        return bool(_under_way)
    return inside_backward() and not _thread.calls_models


class quietly:
    """Differentiate without any tracker taking note."""

    __slots__ = ()

    def __enter__(self) -> None:
        _under_way.add(self)
        _thread.differentiations += 1

    def __exit__(self, *_: object) -> None:
        _thread.differentiations -= 1
        _under_way.discard(self)


@contextmanager
def undisturbed(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep `p.grad`, and hooks on gradients, out of what happens inside.

    Args:
        params: All parameters that could be reached.
    """
    held: list[tuple[nn.Parameter, Tensor | None]] = [(p, p.grad) for p in params if p.requires_grad]
    with without_hooks(p for p, _ in held):
        for p, _ in held:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in held:
                p.grad = grad


@contextmanager
def without_hooks(params: Iterable[Tensor]) -> Iterator[None]:
    """Keep hooks on gradients out of what happens inside: what a user makes of a gradient is none of its norms.

    Args:
        params: Those that are differentiated by.
    """
    hooks = [(found, dict(found)) for p in params for found in hooks_on_gradients(p)]
    for found, _ in hooks:
        found.clear()
    try:
        yield
    finally:
        for found, before in hooks:
            found.update(before)
