"""Every sample's gradient norms without our code: one backward pass a sample, or one copy of the weights a sample.

**Samples apart**: the gradient of each sample's own loss, through the forward pass of the whole batch.

**Samples coupled** (train-mode BatchNorm): the definition of the project, the gradient with respect to the i-th copy of
the weights if every sample had its own. Each operation that takes a parameter, or something made of parameters alone,
runs once for each copy, and row i of the i-th result goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Norms = dict[str, Tensor]  # parameter name -> [B]


class OracleFails(Exception):
    """The oracle cannot judge this model; the words say why."""


def norm(g: Tensor) -> Tensor:
    """A gradient's norm; a sum of 100 million squares in float32 would be off by half a percent."""
    return torch.linalg.vector_norm(g, dtype=torch.float64).to(g.dtype)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def one_backward_a_sample(model: nn.Module, losses_of: Callable[[], Tensor]) -> Norms:
    """Norms of each sample's own mean loss.

    Each has a forward pass of its own too, of the whole batch: some models' graphs bear one backward pass only.

    Args:
        model: The model.
        losses_of: Runs it; gives every sample's loss [B].
    """
    named = trainable(model)
    rows = []
    losses = losses_of()
    for i in range(len(losses)):
        model.zero_grad()
        (losses_of() if i else losses)[i].backward()
        rows.append([losses.new_zeros(()) if p.grad is None else norm(p.grad) for p in named.values()])
    model.zero_grad()
    return {n: torch.stack([row[k] for row in rows]).detach() for k, n in enumerate(named)}


def one_copy_a_sample(model: nn.Module, losses_of: Callable[[], Tensor], batch: Any, rtol: float | None) -> Norms:
    """Norms with respect to each sample's own copy of the weights.

    Args:
        model: The model.
        losses_of: Runs it; gives every sample's loss [B].
        batch: What it runs on.
        rtol: How far the copies' gradients may be from adding up to the batch gradient; None: not asked.

    Raises:
        OracleFails: If the copies' gradients do not add up to the batch gradient, or an operation has no rows.
    """
    named = trainable(model)
    model.zero_grad()
    losses = losses_of()
    samples = len(losses)
    losses.sum().backward()
    whole = {n: None if p.grad is None else p.grad.clone() for n, p in named.items()}
    model.zero_grad()
    leaves = {n: [p.detach().clone().requires_grad_() for _ in range(samples)] for n, p in named.items()}
    with Copies({p: leaves[n] for n, p in named.items()}, batch, samples):
        total = losses_of().sum()
    flat = [leaf for copies in leaves.values() for leaf in copies]
    grads = torch.autograd.grad(total, flat, allow_unused=True)
    result = {}
    for k, (name, batch_grad) in enumerate(whole.items()):
        found = grads[samples * k : samples * (k + 1)]
        kept = [torch.zeros_like(named[name]) if g is None else g for g in found]
        want = torch.zeros_like(named[name]) if batch_grad is None else batch_grad
        largest = max(float(g.abs().max()) for g in kept)  # of which much may cancel
        if rtol is not None and not torch.allclose(
            torch.stack(kept).sum(0), want, rtol=rtol, atol=2 * rtol * largest + 1e-7
        ):
            raise OracleFails(f"the copies' gradients of {name} do not add up to the batch gradient")
        result[name] = torch.stack([norm(g) for g in kept]).detach()
    model.zero_grad()
    return result


class Copies(TorchFunctionMode):
    """Runs each operation on parameters once for every sample's copy of them."""

    def __init__(self, copies: dict[Tensor, list[Tensor]], batch: Any, samples: int) -> None:
        super().__init__()
        self._samples = samples
        self._copies: dict[int, list[Any]] = {id(p): found for p, found in copies.items()}
        self._data = {id(t) for t in tree_flatten(batch)[0]}
        self._alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        copied = [i for i, a in enumerate(flat) if isinstance(a, Tensor) and id(a) in self._copies]
        plain = [a for i, a in enumerate(flat) if isinstance(a, Tensor) and i not in copied]
        with_data = any(id(a) in self._data for a in plain)
        if not copied:
            result = func(*args, **kwargs)
            if with_data:
                self._note_data(result)
                if getattr(func, "__name__", "").startswith("__setitem__"):
                    self._note_data(args[0])
            return result
        if not _is_operation(func):
            return func(*args, **kwargs)
        results = []
        changes = _changes_its_argument(func)
        for i in range(self._samples):
            for k in copied:
                flat[k] = self._copies[id(tree_flatten((args, kwargs))[0][k])][i]
            own_args, own_kwargs = tree_unflatten(flat, spec)
            if changes and isinstance(own_args[0], Tensor):  # each copy changes a tensor of its own
                own_args = (own_args[0].clone(), *own_args[1:])
            returned = func(*own_args, **own_kwargs)
            results.append(own_args[0] if changes else returned)
        if changes and with_data:
            args[0].copy_(_pick(results))
            self._note_data(args[0])
            return args[0]
        if changes:
            self._copies[id(args[0])] = results
            self._alive.append((args[0], results))
            return args[0]
        if with_data:
            picked = _pick(results)
            self._note_data(picked)
            return picked
        return self._keep(results)

    def _keep(self, results: list[Any]) -> Any:
        """A result made of parameters alone: the first copy's stands for all of them."""
        flats = [tree_flatten(r)[0] for r in results]
        for parts in zip(*flats, strict=True):
            if isinstance(parts[0], Tensor):
                self._copies[id(parts[0])] = list(parts)
                self._alive.append(parts)
        return results[0]

    def _note_data(self, result: Any) -> None:
        for t in tree_flatten(result)[0]:
            if isinstance(t, Tensor):
                self._data.add(id(t))
                self._alive.append(t)


_QUESTIONS = {
    "__get__",
    "size",
    "dim",
    "numel",
    "is_floating_point",
    "stride",
    "__len__",
    "is_contiguous",
    "element_size",
}


def _is_operation(func: Any) -> bool:
    """Whether a function computes; questions about a tensor (its shape, its device) are answered by the original."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        owner = getattr(func, "__self__", None)
        return getattr(owner, "__name__", "") in ("T", "mT", "H", "mH", "real", "imag", "data")
    return name not in _QUESTIONS


def _changes_its_argument(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def _pick(results: list[Any]) -> Any:
    flats = [tree_flatten(r) for r in results]
    picked: list[Any] = []
    for parts in zip(*(f for f, _ in flats), strict=True):
        picked.append(_rows(parts) if isinstance(parts[0], Tensor) else parts[0])
    return tree_unflatten(picked, flats[0][1])


def _rows(parts: Iterable[Tensor]) -> Tensor:
    parts = list(parts)
    shape, many = tuple(parts[0].shape), len(parts)
    axis = int(len(shape) > 1 and shape[0] % many > 0 and shape[1] == many)  # 1 in a recurrent net's state
    if not shape or shape[axis] % many:
        raise OracleFails(f"an operation on a parameter gives the shape {shape}, without the batch first")
    each = shape[axis] // many
    return torch.cat([t.narrow(axis, i * each, each) for i, t in enumerate(parts)], axis)
