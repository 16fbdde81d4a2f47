"""Per-sample gradients of any module's own parameters, for modules that no rule knows. Three exact ways.

**Replay**: the forward runs again under `torch.func.vmap`, one sample at a time in one batched call. As cheap as one
more forward and backward of the module, but it needs a module that treats samples apart and draws no random numbers.

**Unrolling**: for torch's recurrent nets, in place of the replay; see `recurrent.py`.

**Masks**: the module's own graph is differentiated once for every sample, with the output gradient of all other
samples set to zero: what reaches the parameters then is that sample's own use of them. This is the definition itself,
so it is right for coupled samples and random layers too, and costs a backward pass of the module for every sample.

The replay, or the unrolled net, is compared with the real output at the first call in each mode; where it fails or
differs, masks are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, UncoveredParameterError
from hf_clars.grad_norms.module_call import ModuleCall
from hf_clars.grad_norms.norm_math import MAX_ELEMENTS
from hf_clars.grad_norms.trees import map_tensors, tensors_in
from hf_clars.grad_norms.without_rule.agreement import agree
from hf_clars.grad_norms.without_rule.batched_grads import batched_grads
from hf_clars.grad_norms.without_rule.recurrent import by_unrolling, can_unroll


class Fallback:
    """Chooses the way for each module and remembers the choice.

    Attributes:
        replaying: True while a module's forward runs again.
    """

    def __init__(self) -> None:
        self.replaying = False
        self._replays: dict[tuple[nn.Module, bool], bool] = {}
        self._warned: set[nn.Module] = set()

    def _warn_of_cost(self, call: ModuleCall) -> None:
        if call.count > 1 and call.module not in self._warned:
            self._warned.add(call.module)
            warnings.warn(
                f"{call.path}: the gradient norms of {', '.join(sorted(call.params))} need a backward pass of this "
                "module for every sample (no rule or no batch axis inside, and samples that cannot be run apart). "
                "This is exact but slow: register a layer rule, freeze these parameters, or measure fewer samples.",
                stacklevel=2,
            )

    def per_sample_grads(self, call: ModuleCall, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Differentiate a call sample by sample.

        Args:
            call: The call.
            grads: Gradient of the loss for each of its outputs, None where there is none.

        Returns:
            {local parameter name: Tensor [count, *parameter shape]}.

        Raises:
            UncoveredParameterError: If neither way works.
        """
        key = (call.module, call.training)
        replay = call.replayable and self._replays.get(key, True) and call.module.training == call.training
        if replay:
            self.replaying = True
            try:
                with _same_autocast(call):
                    result, outputs = (by_unrolling if can_unroll(call) else _by_replay)(call, grads)
            except torch.OutOfMemoryError:
                raise  # says nothing of the module
            except (RuntimeError, ValueError, TypeError, IndexError):
                self._replays[key] = False  # not fit for vmap: coupled, random or data-dependent
            else:
                right = self._replays.get(key)
                if right is None:
                    right = _same(outputs, _samples_first(call, call.outputs.values()), call.precision)
                if right is not None:
                    self._replays[key] = right
                if right:
                    return result
            finally:
                self.replaying = False
        self._warn_of_cost(call)
        try:
            return _by_masks(call, grads)
        except RuntimeError as error:
            raise UncoveredParameterError(
                f"{call.path} owns {', '.join(sorted(call.params))}, has no layer rule, and cannot be differentiated "
                f"sample by sample: {str(error).splitlines()[0]} Register a rule with "
                "hf_clars.grad_norms.register_rule for its class, set requires_grad=False on the parameters, or "
                f"{WITHOUT_SAMPLES}."
            ) from error


def _same(first: Sequence[Tensor], second: Sequence[Tensor], precision: torch.dtype) -> bool | None:
    """Whether a replay gave the real outputs; looked at once for each module and mode. None: not finite, ask again."""
    verdicts = [agree(a, b, precision) for a, b in zip(first, second, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _same_autocast(call: ModuleCall) -> AbstractContextManager[Any]:
    """The autocast region that the module ran in: a backward pass is outside of it."""
    device = next(iter(call.outputs.values())).device.type
    return nullcontext() if call.autocast is None else torch.autocast(device, call.autocast)


def _samples_first(call: ModuleCall, outputs: Iterable[Tensor]) -> list[Tensor]:
    """What has the outputs' shapes, with the batch axis first and cut to the samples that are wanted."""
    return [t.movedim(axis, 0)[: call.count] for t, axis in zip(outputs, call.axes, strict=True)]


def _by_replay(call: ModuleCall, grads: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], list[Tensor]]:
    own = {name: p.detach() for name, p in call.params.items()}
    everything: list[tuple[str, Tensor]] = [*call.module.named_parameters(), *call.module.named_buffers()]
    fixed = {name: t.detach() for name, t in everything if name not in own}
    leaves = list(tensors_in((call.args, call.kwargs)))
    batched = [t.dim() > 0 and t.shape[0] == call.batch_size for t in leaves]
    all_grads = (torch.zeros_like(o) if g is None else g for g, o in zip(grads, call.outputs.values(), strict=True))
    wanted = tuple(_samples_first(call, all_grads))

    def one_sample(
        sample_leaves: list[Tensor], sample_grads: tuple[Tensor, ...]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        rebuilt = iter(t.unsqueeze(0) if b else t for t, b in zip(sample_leaves, batched, strict=True))
        args, kwargs = map_tensors(lambda _: next(rebuilt), (call.args, call.kwargs))

        def outputs_of(params: dict[str, Tensor]) -> tuple[Tensor, ...]:
            result = torch.func.functional_call(call.module, {**fixed, **params}, args, kwargs)
            returned = list(tensors_in(result))
            return tuple(returned[i] for i in call.outputs)

        outputs, vjp, *_ = torch.func.vjp(outputs_of, own)
        own_grads = vjp(tuple(g.unsqueeze(axis) for g, axis in zip(sample_grads, call.axes, strict=True)))[0]
        return own_grads, tuple(o.squeeze(axis) for o, axis in zip(outputs, call.axes, strict=True))

    in_dims = ([0 if b else None for b in batched], tuple(0 for _ in wanted))
    sliced = [t[: call.count] if b else t for t, b in zip(leaves, batched, strict=True)]
    result, outputs = torch.func.vmap(one_sample, in_dims=in_dims, randomness="error")(sliced, wanted)
    return result, list(outputs)


def _by_masks(call: ModuleCall, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    names = list(call.params)
    present = [i for i, g in enumerate(grads) if g is not None]
    edges = [call.edges[i] for i in present]
    elements = sum(g.numel() for g in grads if g is not None)
    step = max(1, MAX_ELEMENTS // max(1, elements))
    parts: list[list[Tensor]] = []
    for start in range(0, call.count, step):
        rows = torch.arange(start, min(start + step, call.count))
        masked = [_one_row_each(g, rows, axis) for g, axis in zip(grads, call.axes, strict=True) if g is not None]
        found = batched_grads(edges, [call.params[n] for n in names], masked)
        zeros = [p.new_zeros(len(rows), *p.shape) for p in call.params.values()]
        parts.append([z if f is None else f for f, z in zip(found, zeros, strict=True)])
    if not parts:
        return {n: p.new_zeros(0, *p.shape) for n, p in call.params.items()}
    return {n: torch.cat([part[i] for part in parts]) for i, n in enumerate(names)}


def _one_row_each(g: Tensor, rows: Tensor, axis: int) -> Tensor:
    """[rows, *shape of g]: copies of g in which all but one sample is zero."""
    g = g.movedim(axis, 0)
    masked = g.new_zeros(len(rows), *g.shape)
    index = torch.arange(len(rows), device=g.device)
    rows = rows.to(g.device)
    masked[index, rows] = g[rows]
    return masked.movedim(1, 1 + axis)
