"""Hooks that stay with the model they were placed on.

A copied or unpickled model (an EMA, a saved module) takes its hooks along, and they would feed the original's norms.
These become inert in the copy instead. A hook whose owner is paused does nothing either, so that a model can be looked
at between two steps (evaluated, differentiated, mapped) as if it had no hooks. And an error in a hook may be taken by
the owner, so that it does not end what the user does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_clars.grad_norms.torch_internals import ends_recomputation


class InertHook:
    """What a `BoundHook` is in a copy of its model: it does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


class TracedHook(Protocol):
    """What a compiler sees of a hook."""

    def ready(self, *args: Any) -> bool:
        """Whether it can do the hook's work."""

    def __call__(self, *args: Any) -> Any:
        """Do it."""


def _idle(owner: Any) -> bool:
    return getattr(owner, "paused", False) and not getattr(owner, "repeats", False)


class BoundHook:
    """A hook method that is not copied or pickled with the module that holds it, and does not keep its owner alive.

    An error in it goes to the owner's `take_error`, if there is such a thing (and it is not None), in place of whoever
    called the module.

    Args:
        method: A bound method, called with `first` and whatever torch passes to the hook.
        first: Arguments before torch's.
        traced: What takes its place while a compiler looks on, if that is ready: its `ready()` says so. Otherwise the
            compiled code is left for the method.
        keep_owner: Whether the hook keeps the method's owner alive. Default False: the hook does nothing once the
            owner is gone, as after `optimizer = CLARS(model)` was run a second time in a notebook.
    """

    def __init__(
        self, method: Callable[..., Any], *first: Any, traced: TracedHook | None = None, keep_owner: bool = False
    ) -> None:
        self.method: Callable[[], Callable[..., Any] | None]
        self.method = (lambda: method) if keep_owner else weakref.WeakMethod(method)
        self.first = first
        self.traced = traced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, if its owner is there and not paused (has no true attribute `paused`, or `repeats` too)."""
        if torch.compiler.is_compiling():
            if self.traced is not None and self.traced.ready(*args):
                return self.traced(*args, **kwargs)
            return self._outside(args, kwargs)
        method = self.method()
        if method is None or _idle(method.__self__):  # type: ignore[attr-defined]
            return None  # before all else: so it is in most steps of a run that is measured now and then
        return self._run(method, args, kwargs)

    @torch.compiler.disable(
        reason="hf_clars: the model that is measured was not called as a whole, or a hook here cannot be compiled: "
        "call the model, or compile without fullgraph=True"
    )
    def _outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Between two pieces of compiled code."""
        method = self.method()
        if method is None or _idle(method.__self__):  # type: ignore[attr-defined]
            return None
        method.__self__.meets_compiler = True  # type: ignore[attr-defined]
        return self._run(method, args, kwargs)

    @torch.compiler.disable(reason="hf_clars: called between two pieces of compiled code")
    def _run(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return method(*self.first, *args, **kwargs)
        except Exception as error:
            owner = method.__self__  # type: ignore[attr-defined]
            take_error = getattr(owner, "take_error", None)
            if take_error is None or ends_recomputation(error):
                raise
            take_error(error)
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


@contextmanager
def others_paused(model: nn.Module) -> Iterator[None]:
    """What happens to a model inside is no business of those that have hooks on its modules now: trackers, guards."""
    hooks = [h for m in model.modules() for held in (m._forward_pre_hooks, m._forward_hooks) for h in held.values()]
    methods: list[Any] = [hook.method() for hook in hooks if isinstance(hook, BoundHook)]
    owners = list({id(m.__self__): m.__self__ for m in methods if m is not None}.values())
    before = [getattr(owner, "paused", False) for owner in owners]
    for owner in owners:
        owner.paused = True
    try:
        yield
    finally:
        for owner, paused in zip(owners, before, strict=True):
            owner.paused = paused


class PlacedHooks:
    """Hooks that can be taken off and put back, in the order in which they were placed. It is true while it has any."""

    def __init__(self) -> None:
        self._placed: list[tuple[Callable[..., RemovableHandle], Callable[..., Any], dict[str, Any]]] = []
        self._handles: list[RemovableHandle] = []

    def add(self, register: Callable[..., RemovableHandle], hook: Callable[..., Any], **settings: Any) -> None:
        """Place a hook.

        Args:
            register: torch's method that does it, of a module or a tensor.
            hook: The hook.
            settings: For the method.
        """
        self._placed.append((register, hook, settings))
        self._handles.append(register(hook, **settings))

    def lift(self) -> None:
        """Take them off for now."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def place(self) -> None:
        """Put back what was taken off, but on parameters that have been frozen since: they take no hook."""
        if not self._handles:
            self._handles = [register(hook, **told) for register, hook, told in self._placed if _takes_hooks(register)]

    def remove(self) -> None:
        """Take them off for good."""
        self.lift()
        self._placed.clear()

    def __bool__(self) -> bool:
        return bool(self._placed)


def kind_of_hook(name: str) -> type[BoundHook]:
    """A class of hooks with compiled code of its own.

    torch.compile compiles a model's hooks by themselves, keeps a few variants of one function, and gives up beyond
    these: hooks of several kinds on one model must not share the function.

    Args:
        name: Of the class.
    """
    code = BoundHook.__call__.__code__.replace(co_name=name)
    return type(name, (BoundHook,), {"__call__": FunctionType(code, globals(), name)})


PassBegins, PassEnds, ModelReturns = (kind_of_hook(n) for n in ("PassBegins", "PassEnds", "ModelReturns"))


def _takes_hooks(register: Any) -> bool:
    owner = register.__self__  # whose method it is
    return not isinstance(owner, torch.Tensor) or owner.requires_grad
