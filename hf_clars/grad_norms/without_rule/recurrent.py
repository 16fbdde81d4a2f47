"""torch's recurrent nets (RNN, LSTM, GRU), unrolled: their own kernels show no gradient but the weights'.

The net runs once more, step by step and all samples together, so that the gradients of the gates' inputs can be had.
With them each of its weights is a linear layer's over T positions. That costs another forward and backward pass, where
the general ways would run the net's kernel once for every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_clars.grad_norms.module_call import ModuleCall
from hf_clars.grad_norms.norm_math import linear_weight_grads

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


def _cell(module: nn.RNNBase) -> Cell | None:
    if type(module) is nn.RNN:
        return _rnn(torch.relu if module.nonlinearity == "relu" else torch.tanh)
    return {nn.LSTM: _lstm, nn.GRU: _gru}.get(type(module))


@dataclass(eq=False)
class _Pass:
    """One layer in one direction.

    Attributes:
        suffix: Of its parameters' names.
        x: Its input [b, T, in].
        gi: What the gates get from the input [b, T, gates].
        gh: What they get from the state before, for each step [b, gates].
        before: The state before, for each step [b, H].
    """

    suffix: str
    x: Tensor
    gi: Tensor
    gh: list[Tensor]
    before: list[Tensor]


def can_unroll(call: ModuleCall) -> bool:
    """Whether a call can be run step by step: batch first, no dropout, no projection, no packed sequence.

    Args:
        call: Of any module.
    """
    module = call.module
    return (
        isinstance(module, nn.RNNBase)
        and _cell(module) is not None
        and module.batch_first
        and not getattr(module, "proj_size", 0)
        and not (module.training and module.dropout and module.num_layers > 1)
        and isinstance(call.args[0] if call.args else None, Tensor)
        and call.args[0].dim() == 3
        and not call.kwargs
    )


def by_unrolling(call: ModuleCall, grads: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Per-sample gradients of a recurrent net.

    Args:
        call: A call that `can_unroll`.
        grads: Gradient of the loss for each of its outputs, None where there is none.

    Returns:
        {parameter name: [count, *shape]}, and the outputs, with the samples first.
    """
    with torch.enable_grad():
        outputs, passes = _unroll(call)
    leaves = [t for one in passes for t in (one.gi, *one.gh)]
    present = [(outputs[i], g) for i, g in zip(call.outputs, grads, strict=True) if g is not None]
    axes = [axis for axis, g in zip(call.axes, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [t for t, _ in present],
        leaves,
        [g.narrow(axis, 0, call.count) for (_, g), axis in zip(present, axes, strict=True)],
        allow_unused=True,
        materialize_grads=True,
    )
    result: dict[str, Tensor] = {}
    rest = list(found)
    for one in passes:
        gi, gh = rest.pop(0), torch.stack([rest.pop(0) for _ in one.gh], dim=1)
        result[f"weight_ih_{one.suffix}"] = linear_weight_grads(one.x.detach(), gi)
        result[f"weight_hh_{one.suffix}"] = linear_weight_grads(torch.stack(one.before, dim=1).detach(), gh)
        result[f"bias_ih_{one.suffix}"], result[f"bias_hh_{one.suffix}"] = gi.sum(1), gh.sum(1)
    own = {name: result[name] for name in call.params}
    return own, [outputs[i].detach().movedim(axis, 0) for i, axis in zip(call.outputs, call.axes, strict=True)]


def _unroll(call: ModuleCall) -> tuple[list[Tensor], list[_Pass]]:
    """All that the net returns for the first samples, and its passes; `gi` and `gh` are in the graph."""
    module = call.module
    assert isinstance(module, nn.RNNBase)
    cell = _cell(module)
    assert cell is not None
    x = call.args[0][: call.count]
    directions = 2 if module.bidirectional else 1
    size = 2 if isinstance(module, nn.LSTM) else 1
    given = call.args[1] if len(call.args) > 1 and call.args[1] is not None else None
    starts = (given if isinstance(given, tuple) else (given,)) if given is not None else ()
    zeros = x.new_zeros(module.num_layers * directions, call.count, module.hidden_size)
    starts = tuple(t[:, : call.count] for t in starts) or (zeros,) * size
    passes, ends = [], []
    for layer in range(module.num_layers):
        states = []
        for direction in range(directions):
            one, sequence, last = _run(
                module,
                cell,
                x,
                tuple(t[layer * directions + direction] for t in starts),
                f"l{layer}{'_reverse' if direction else ''}",
                backwards=bool(direction),
            )
            passes.append(one)
            states.append(sequence)
            ends.append(last)
        x = torch.cat(states, dim=2)
    return [x, *(torch.stack(each) for each in zip(*ends, strict=True))], passes


def _run(
    module: nn.RNNBase, cell: Cell, x: Tensor, state: State, suffix: str, *, backwards: bool
) -> tuple[_Pass, Tensor, State]:
    """One layer in one direction: the pass, its states [b, T, H] and its last state."""
    weights = {n: p.detach() for n, p in module.named_parameters()}
    x = x.flip(1) if backwards else x
    gi = functional.linear(x, weights[f"weight_ih_{suffix}"], weights.get(f"bias_ih_{suffix}"))
    one = _Pass(suffix, x, gi if gi.requires_grad else gi.requires_grad_(), [], [])
    sequence = []
    for step in gi.unbind(1):
        gh = functional.linear(state[0], weights[f"weight_hh_{suffix}"], weights.get(f"bias_hh_{suffix}"))
        one.before.append(state[0])
        one.gh.append(gh if gh.requires_grad else gh.requires_grad_())
        state = cell(step, gh, state)
        sequence.append(state[0])
    states = torch.stack(sequence, dim=1)
    return one, states.flip(1) if backwards else states, state
