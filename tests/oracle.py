"""Brute force for the definition of design.md: one copy of the weights for every sample, then plain autograd.

Every module that owns parameters is run B times, the i-th time with the i-th copy of its own parameters, and row i of
the
i-th result is kept. That is slow and knows nothing of layer types, so it can judge all rules alike, train-mode
BatchNorm
included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def per_sample_grads(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], batch: int) -> dict[str, Tensor]:
    """{parameter name: [B, *shape]} of `loss_of(model)`, in float64, for trainable parameters."""
    model = copy.deepcopy(model).double()
    copies: dict[nn.Parameter, Tensor] = {
        p: p.detach().unsqueeze(0).repeat(batch, *[1] * p.dim()).requires_grad_()
        for p in model.parameters()
        if p.requires_grad
    }
    for module in model.modules():
        owners = [module]
        if isinstance(module, nn.MultiheadAttention):
            owners.append(module.out_proj)  # it takes the weights of this module without calling it
        own = [(o, n, p) for o in owners for n, p in o.named_parameters(recurse=False) if p.requires_grad]
        if own:
            _use_copies(module, own, copies, batch)
    loss_of(model).backward()
    zero = {p: torch.zeros_like(c) for p, c in copies.items()}
    return {
        n: copies[p].grad if copies[p].grad is not None else zero[p] for n, p in model.named_parameters() if p in copies
    }


def _use_copies(
    module: nn.Module,
    own: list[tuple[nn.Module, str, nn.Parameter]],
    copies: dict[nn.Parameter, Tensor],
    batch: int,
) -> None:
    original = module.forward

    def forward(*args, **kwargs):
        rows = []
        for i in range(batch):
            for owner, name, param in own:
                owner._parameters.pop(name)
                setattr(owner, name, copies[param][i])
            rows.append(original(*args, **kwargs))
            for owner, name, param in own:
                delattr(owner, name)
                owner._parameters[name] = param
        return _pick_rows(rows)

    module.forward = forward


def one_by_one(model: nn.Module, loss_of_sample: Callable[[nn.Module, int], Tensor], batch: int) -> dict[str, Tensor]:
    """{parameter name: [B, *shape]}: plain gradients of each sample's own loss; for models without BatchNorm."""
    model = copy.deepcopy(model).double()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(batch):
        found = torch.autograd.grad(loss_of_sample(model, i), list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, named.values(), strict=True)])
    return {n: torch.stack([row[k] for row in rows]) for k, n in enumerate(named)}


def _pick_rows(rows):
    if isinstance(rows[0], Tensor):
        each = max(1, len(rows[0]) // len(rows))  # tokens of all samples may lie one after the other
        return torch.cat([r[i * each : (i + 1) * each] for i, r in enumerate(rows)])
    if isinstance(rows[0], tuple):
        return tuple(_pick_rows([r[j] for r in rows]) for j in range(len(rows[0])))
    if rows[0] is None:
        return None
    keys = list(rows[0].keys())
    result = copy.copy(rows[0])
    for key in keys:
        if torch.is_tensor(rows[0][key]) and rows[0][key].dim() == 0:
            continue
        result[key] = _pick_rows([r[key] for r in rows])
    return result


def layer_norms(grads: dict[str, Tensor], layers) -> dict[str, Tensor]:
    """{layer name: [B]} from per-sample gradients."""
    return {layer.name: sum(grads[n].flatten(1).square().sum(1) for n in layer.param_names).sqrt() for layer in layers}
