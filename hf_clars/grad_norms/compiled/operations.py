"""The operations by which a compiled graph meets a tracker: a pass begins, its squared norms arrive, a sum is checked.

A compiler keeps an operation of `torch.library` as it is and runs it, in Python, whenever the compiled code runs. What
happens in between is a pure function of tensors, which it may fuse and order as it likes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_clars.grad_norms.norm_math import squared_sum


class Receiver(Protocol):
    """What the operations call."""

    def compiled_pass_begins(self, batch: int, weights: Tensor | None, checked: bool) -> int:
        """A pass on so many samples begins; its number."""

    def compiled_norms_arrive(self, number: int, squares: Tensor, uses: Tensor) -> None:
        """The squared norms of pass `number`, [rows, B], and how often each row was used, [rows]."""

    def compiled_sum_arrives(self, row: int, total: Tensor, size: Tensor, dtype: torch.dtype) -> None:
        """The sum of the samples' gradients of the parameter in a row, the sum of their norms, and the precision."""

    def compiled_code_refuses(self, words: str, *, rows: bool) -> None:
        """What cannot be measured has run: say it. `rows`: because nobody knows whose rows are whose."""


_receivers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def enlist(receiver: Any) -> int:
    """A number by which compiled code knows a `Receiver`; it is forgotten with the receiver."""
    number = next(_numbers)
    _receivers[number] = receiver
    return number


@torch.library.custom_op("hf_clars::keep_rows", mutates_args=())
def keep_rows(rows: Tensor, counts: Tensor, receiver: int, given_axes: Sequence[int]) -> Tensor:
    """Nothing: a trace keeps what an operation takes, and it is found there.

    Args:
        rows: See `begin_pass`.
        counts: The same.
        receiver: The number of whom they belong to.
        given_axes: Lengths of the axes of what the model was called with, but for the batch.
    """
    return counts.clone()


@keep_rows.register_fake
def _(rows: Tensor, counts: Tensor, receiver: int, given_axes: Sequence[int]) -> Tensor:
    return torch.empty_like(counts)


#: For a compiler that captures graphs: these run in Python each time, and must stay outside.
_OUTSIDE: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("hf_clars::tell", mutates_args=(), **_OUTSIDE)
def tell(place: Tensor, receiver: int) -> Tensor:
    """Call a receiver's `compiled_model_is_called()`; returns a copy of `place`, any tensor."""
    found = _receivers.get(receiver)
    if found is not None:
        found.compiled_model_is_called()
    return place.clone()


@tell.register_fake
def _(place: Tensor, receiver: int) -> Tensor:
    return torch.empty_like(place)


class Told:
    """A model's forward pre-hook in compiled code that tells a receiver whenever the code runs.

    Args:
        receiver: Has a method `compiled_model_is_called()`; it is not kept alive.
    """

    def __init__(self, receiver: Any) -> None:
        self.receiver = enlist(receiver)
        self.place = torch.zeros(1)

    def ready(self, *args: Any) -> bool:
        """It can always do its work."""
        return True

    def __call__(self, *args: Any) -> None:
        """Tell, if there may be a backward pass. The result is kept, or a compiler would leave the operation out."""
        if torch.is_grad_enabled():
            self.place = tell(self.place, self.receiver)


@torch.library.custom_op("hf_clars::refuse", mutates_args=(), **_OUTSIDE)
def refuse(place: Tensor, receiver: int, words: str, rows: bool) -> Tensor:
    """Say what cannot be measured when the code runs: what is raised while it is compiled is hidden by the compiler.

    Returns:
        A copy of `place`, which goes on: a receiver may do no more than take note.
    """
    found = _receivers.get(receiver)
    if found is not None:
        found.compiled_code_refuses(words, rows=rows)
    return place.clone()


@refuse.register_fake
def _(place: Tensor, receiver: int, words: str, rows: bool) -> Tensor:
    return torch.empty_like(place)


refuse.register_autograd(lambda ctx, g: (g, None, None, None))


@torch.library.custom_op("hf_clars::begin_pass", mutates_args=(), **_OUTSIDE)
def begin_pass(
    leaf: Tensor, like: Tensor, weights: Tensor | None, receiver: int, rows: int, checked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A forward pass begins.

    Args:
        leaf: One number that requires a gradient, so that one comes back.
        like: A tensor [B, ...] that the model was called with.
        weights: Tokens of each sample [B], where the loss is a mean over tokens.
        receiver: Its number, see `enlist`.
        rows: How many rows of norms there are.
        checked: Whether this code hands over what the sum check compares.

    Returns:
        Zeros [rows, B], whose "gradient" will be the squared norms; zeros [rows, 1], whose "gradient" will say how
        often each row was used; the number of the pass.
    """
    found = _receivers.get(receiver)
    number = 0 if found is None else found.compiled_pass_begins(like.shape[0], weights, checked)
    squares, uses = (like.new_zeros(shape, dtype=leaf.dtype) for shape in ((rows, like.shape[0]), (rows, 1)))
    return squares, uses, torch.tensor(number)


@begin_pass.register_fake
def _(
    leaf: Tensor, like: Tensor, weights: Tensor | None, receiver: int, rows: int, checked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    squares, uses = (like.new_empty(shape, dtype=leaf.dtype) for shape in ((rows, like.shape[0]), (rows, 1)))
    return squares, uses, torch.empty((), dtype=torch.int64)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.receiver = inputs[3]
    ctx.save_for_backward(output[2])


def _end(ctx: Any, squares: Tensor, uses: Tensor, number: Tensor | None) -> tuple[Tensor | None, ...]:
    return deliver(squares, uses, ctx.saved_tensors[0], ctx.receiver), None, None, None, None, None


begin_pass.register_autograd(_end, setup_context=_remember)


@torch.library.custom_op("hf_clars::deliver", mutates_args=(), **_OUTSIDE)
def deliver(squares: Tensor, uses: Tensor, number: Tensor, receiver: int) -> Tensor:
    """The backward pass has come to where the forward pass began: hand over squared norms and uses.

    Returns:
        Zero, the gradient of the leaf: what is not used, a compiler would leave out.
    """
    found = _receivers.get(receiver)
    if found is not None:
        squares, uses = squares.detach().clone(), uses.detach().flatten().clone()
        found.compiled_norms_arrive(int(number), squares, uses)
    return torch.zeros(1, dtype=squares.dtype)


@deliver.register_fake
def _(squares: Tensor, uses: Tensor, number: Tensor, receiver: int) -> Tensor:
    return torch.empty(1, dtype=squares.dtype)


@torch.library.custom_op("hf_clars::check_sum", mutates_args=(), **_OUTSIDE)
def check_sum(norms: Tensor, total: Tensor, rows: Tensor, which: int, receiver: int, dtype: torch.dtype) -> Tensor:
    """Hand over what the sum check compares; returns a copy of `norms`, squared [B] or gradients [B, ...], to go on."""
    found = _receivers.get(receiver)
    if found is not None:
        squares = norms.detach() if norms.dim() == 1 else squared_sum(norms.detach())
        size = squares.clamp(min=0).sqrt().sum()
        found.compiled_sum_arrives(int(rows[which]), total.detach().clone(), size, dtype)
    return norms.clone()


@check_sum.register_fake
def _(norms: Tensor, total: Tensor, rows: Tensor, which: int, receiver: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(norms)


# The operators themselves: a compiler follows the Python that is around a custom operation at each call.
tell, refuse, keep_rows = (getattr(torch.ops.hf_clars, n).default for n in ("tell", "refuse", "keep_rows"))
begin_pass, check_sum = (getattr(torch.ops.hf_clars, n).default for n in ("begin_pass", "check_sum"))
