"""Differentiating for the norms' sake: no tracker takes note of it, and the model stays as it is.

A reversible layer runs its modules again inside its backward function, and calls `backward()` there: each time its part
of the graph is differentiated, its parameters' gradients grow. Checkpointing runs modules again too, and BatchNorm's
running statistics move on. That must happen in the user's backward pass alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_clars.grad_norms.torch_internals import hooks_on_gradients, inside_backward

_under_way: set[quietly] = set()
"""Our own differentiations, in all threads: hooks of all trackers must do nothing in these."""

_looks: set[quietly] = set()
"""Those of them that only look where gradients go."""


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


class looking(quietly):
    """The same, where only the way of gradients is looked at: hooks of the model's own on tensors are left out too."""

    __slots__ = ()

    def __enter__(self) -> None:
        _looks.add(self)
        super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        _looks.discard(self)


def left_out_of_looks(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A hook on a tensor that runs in the user's backward pass alone: it may take itself off, or keep what it sees."""

    def run(g: Tensor) -> Any:
        return None if _looks and differentiating() else hook(g)

    return run


@contextmanager
def undisturbed(model: nn.Module | None, *, runs_again: bool) -> Iterator[None]:
    """Keep `p.grad`, hooks on gradients and buffers out of what happens inside.

    Args:
        model: All that could be reached; None: nothing.
        runs_again: Whether modules may run again inside, as under checkpointing, and change their buffers.
    """
    params = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    held: list[tuple[nn.Parameter, Tensor | None]] = [(p, p.grad) for p in params]
    buffers = list(model.buffers()) if model is not None and runs_again else []
    before = [(b, b.detach().clone()) for b in buffers]
    with without_hooks(params):
        for p in params:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in held:
                p.grad = grad
            for b, value in before:
                b.data.copy_(value)  # as BatchNorm does it: what a graph has saved counts as unchanged


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
