"""Rule for torch's recurrent nets (RNN, LSTM, GRU): their own kernels show no gradient but the weights'.

The net runs once more in the backward pass, step by step and all samples together, so that the gradients of the gates'
inputs can be had. With them each of its weights is a linear layer's over T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_clars.grad_norms.norm_math import linear_weight_grads
from hf_clars.grad_norms.pytree import tensors_in
from hf_clars.grad_norms.registry import LayerRule, register_rule

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm(gi: Tensor, gh: Tensor, state: State) -> State:
    i, f, g, o = (gi + gh).chunk(4, dim=1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gi: Tensor, gh: Tensor, state: State) -> State:
    (ir, iz, i_n), (hr, hz, hn) = gi.chunk(3, dim=1), gh.chunk(3, dim=1)
    z, n = (iz + hz).sigmoid(), (i_n + (ir + hr).sigmoid() * hn).tanh()
    return ((1 - z) * n + z * state[0],)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda gi, gh, state: (activation(gi + gh),)


def _cell(module: nn.RNNBase) -> Cell:
    if isinstance(module, nn.LSTM):
        return _lstm
    if isinstance(module, nn.GRU):
        return _gru
    return _rnn(torch.relu if module.nonlinearity == "relu" else torch.tanh)


@dataclass(eq=False)
class _Pass:
    """One layer in one direction.

    Attributes:
        suffix: Of its parameters' names.
        x: Its input [b, T, in].
        gi: What the gates get from the input [b, T, gates].
        gh: What they get from the state before, for each step [b, gates].
        before: The state before, for each step [b, H].
        made: With a projection: the cell's output, for each step [b, hidden], and its projection, for each step.
    """

    suffix: str
    x: Tensor
    gi: Tensor
    gh: list[Tensor]
    before: list[Tensor]
    made: list[tuple[Tensor, Tensor]]


@register_rule(nn.RNN, nn.LSTM, nn.GRU)
class RecurrentRule(LayerRule):
    """Saved: the input and, where it was given, the first state; each with the batch first."""

    several_results = True

    def applies(self, module: nn.Module) -> bool:
        """Not with dropout between layers: the numbers that were drawn cannot be had again."""
        assert isinstance(module, nn.RNNBase)
        return not (module.dropout and module.num_layers > 1)

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`: [T, in] is a single sample, and a packed sequence's data is [sum of T, in]."""
        return x.dim() == 3

    def batch_axes(self, module: nn.Module, results: Sequence[Tensor]) -> list[int]:
        """The states have the layers first, whatever `batch_first` says."""
        assert isinstance(module, nn.RNNBase)
        return [0 if module.batch_first else 1] + [1] * (len(results) - 1)

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """See the class."""
        assert isinstance(module, nn.RNNBase)
        x, *states = tensors_in((args, kwargs))
        return x if module.batch_first else x.transpose(0, 1), *(t.transpose(0, 1) for t in states)

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Any, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`. `g` holds the gradients of the sequence and of the last states, batch first."""
        assert isinstance(module, nn.RNNBase)
        x, *states = saved
        with torch.enable_grad():
            results, passes = _unroll(module, x, tuple(t.transpose(0, 1) for t in states))
        leaves = [t for one in passes for t in (one.gi, *one.gh, *(h for _, h in one.made))]
        by_layer = (t if t is None or i == 0 else t.transpose(0, 1) for i, t in enumerate(g))
        present = [(r, t) for r, t in zip(results, by_layer, strict=True) if t is not None]
        found = list(
            torch.autograd.grad(
                [r for r, _ in present],
                leaves,
                [t for _, t in present],
                allow_unused=True,
                materialize_grads=True,
            )
        )
        result: dict[str, Tensor] = {}
        for one in passes:
            gi, gh = found.pop(0), torch.stack([found.pop(0) for _ in one.gh], dim=1)
            result[f"weight_ih_{one.suffix}"] = linear_weight_grads(one.x.detach(), gi)
            result[f"weight_hh_{one.suffix}"] = linear_weight_grads(torch.stack(one.before, dim=1).detach(), gh)
            result[f"bias_ih_{one.suffix}"], result[f"bias_hh_{one.suffix}"] = gi.sum(1), gh.sum(1)
            if one.made:
                gp = torch.stack([found.pop(0) for _ in one.made], dim=1)
                made = torch.stack([t for t, _ in one.made], dim=1).detach()
                result[f"weight_hr_{one.suffix}"] = linear_weight_grads(made, gp)
        return {name: result[name] for name in wanted}


def _unroll(module: nn.RNNBase, x: Tensor, given: State) -> tuple[list[Tensor], list[_Pass]]:
    """All that the net returns, the sequence batch first, and its passes; `gi` and `gh` are in the graph."""
    weights = {n: p.detach().to(x.dtype) for n, p in module.named_parameters()}
    directions = 2 if module.bidirectional else 1
    sizes = [module.proj_size or module.hidden_size] + [module.hidden_size] * isinstance(module, nn.LSTM)
    starts = given or tuple(x.new_zeros(module.num_layers * directions, len(x), size) for size in sizes)
    passes, ends = [], []
    for layer in range(module.num_layers):
        states = []
        for direction in range(directions):
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            start = tuple(t[layer * directions + direction].to(x.dtype) for t in starts)
            one, sequence, last = _run(_cell(module), weights, x, start, suffix, backwards=bool(direction))
            passes.append(one)
            states.append(sequence)
            ends.append(last)
        x = torch.cat(states, dim=2)
    return [x, *(torch.stack(each) for each in zip(*ends, strict=True))], passes


def _run(
    cell: Cell, weights: Mapping[str, Tensor], x: Tensor, state: State, suffix: str, *, backwards: bool
) -> tuple[_Pass, Tensor, State]:
    """One layer in one direction: the pass, its states [b, T, H] and its last state."""
    x = x.flip(1) if backwards else x
    gi = functional.linear(x, weights[f"weight_ih_{suffix}"], weights.get(f"bias_ih_{suffix}"))
    one = _Pass(suffix, x, gi if gi.requires_grad else gi.requires_grad_(), [], [], [])
    project = weights.get(f"weight_hr_{suffix}")
    sequence = []
    for step in one.gi.unbind(1):
        gh = functional.linear(state[0], weights[f"weight_hh_{suffix}"], weights.get(f"bias_hh_{suffix}"))
        one.before.append(state[0])
        one.gh.append(gh if gh.requires_grad else gh.requires_grad_())
        state = cell(step, gh, state)
        if project is not None:
            projected = functional.linear(state[0], project)
            one.made.append((state[0], projected))
            state = (projected, *state[1:])
        sequence.append(state[0])
    states = torch.stack(sequence, dim=1)
    return one, states.flip(1) if backwards else states, state
