"""Parameters with several owners in compiled code: a table that is looked up and is a Linear layer's weight too.

With A the Linear layer's gradient of a sample and E the lookup's, the norm is that of A + E:
||A||^2 + ||E||^2 + 2 sum_s <A[token_s], e_s>. The last term needs both. So the lookup gives the Linear layer one more
input, a link [B, T, width] of zeros, whose "gradient" is A[token_s]: it comes back to where e_s is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.norm_math import at_least_float32
from hf_clars.grad_norms.registry import LayerRule
from hf_clars.grad_norms.torch_internals import no_autocast

if TYPE_CHECKING:
    from hf_clars.grad_norms.compiled.calls import CompiledCall
    from hf_clars.grad_norms.hooked_modules import HookedModule


def has_one_user(param: nn.Parameter, owners: list[HookedModule]) -> bool:
    """Whether one module alone uses a parameter: others may own it, as BERT's head owns its last layer's bias."""
    with_rule = [h for h in owners if h.rule is not None]
    read = [set(getattr(getattr(h.module.forward, "__code__", None), "co_names", h.params)) for h in owners]
    names = [{n for n, p in h.params.items() if p is param} for h in owners]
    others = [n & r for h, n, r in zip(owners, names, read, strict=True) if h.rule is None]
    return len(with_rule) == 1 and not any(others)


def is_tied_head(owners: list[HookedModule]) -> bool:
    """Whether a parameter is a table that is looked up, and a Linear layer's weight."""
    rules = [h.rule for h in owners]
    looked_up = [r for r in rules if r is not None and type(r).lookup_tokens is not LayerRule.lookup_tokens]
    dense = [r for r in rules if r is not None and r.is_dense_weight]
    return len(owners) == 2 and len(looked_up) == len(dense) == 1


class Tie:
    """What the two modules share while the model is called.

    Attributes:
        tokens: What was looked up, [B, T].
        link: See above.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.link: Tensor | None = None

    def forget(self) -> None:
        """The model returns."""
        self.tokens = self.link = None


class TiedLookup(torch.autograd.Function):
    """Identity on what was looked up [B, T, width], and the link."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, call: CompiledCall, names: tuple[str, ...], row: Tensor, use: Tensor, *saved: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The forward pass; see the class."""
        ctx.call, ctx.names, ctx.batch = call, names, row.shape[0]
        ctx.save_for_backward(*saved)
        return y.clone(), torch.zeros_like(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor, at_tokens: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; see the class."""
        saved, call = ctx.saved_tensors, ctx.call
        with no_autocast(g.device.type):
            (squares,) = call.squares(ctx.names, saved, g, ctx.batch)
            rows = call.rule.row_grads(call.module, saved, at_least_float32(g))
            both = (rows * at_least_float32(at_tokens).view(rows.shape)).flatten(1).sum(1)
        squares = squares + 2 * both.to(squares.dtype)
        return g, None, None, squares, squares.new_ones(1), *(None for _ in saved)


class Linked(torch.autograd.Function):
    """Identity on the Linear layer's output [B, T, vocabulary], which takes the link."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, link: Tensor, tokens: Tensor, x: Tensor) -> Tensor:
        """The forward pass; see the class."""
        ctx.save_for_backward(tokens, x)
        ctx.link_dtype = link.dtype
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; see the class."""
        tokens, x = ctx.saved_tensors
        with no_autocast(g.device.type):
            wide = at_least_float32(g).flatten(1, -2)  # [B, T', vocabulary]
            chosen = wide.gather(2, tokens.flatten(1).unsqueeze(1).expand(-1, wide.shape[1], -1))
            rows = chosen.mT @ at_least_float32(x).flatten(1, -2)
        return g, rows.view(*tokens.shape, -1).to(ctx.link_dtype), None, None
