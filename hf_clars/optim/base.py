"""What NAG, LARS and CLARS share: the step, the layers' norms in it, and the update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import LocalNorms, ZeroPieces, local_norms, sum_over_ranks
from hf_clars.distributed.zero import is_flat_piece
from hf_clars.layers import LayerMode
from hf_clars.optim.gradient_scale import local
from hf_clars.optim.grouped import GroupedOptimizer
from hf_clars.optim.loop_guard import LoopGuard
from hf_clars.optim.measures import LayerMeasures, StepTensors
from hf_clars.optim.update import MomentumForm, multi_tensor_update, single_tensor_update

BUFFER = "momentum_buffer"


class LayerwiseOptimizer(GroupedOptimizer):
    """Base class; see `NAG`, `LARS` and `CLARS`.

    Works on whole tensors, on the DTensors of FSDP2 and on the flat pieces of DeepSpeed's ZeRO: the update is
    elementwise, and only the layers' norms, taken once a step, know about processes.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        *,
        layers: LayerMode,
        params: Iterable[Any] | None,
        scale_norm_and_bias: bool,
        momentum_form: MomentumForm,
        foreach: bool | None,
    ) -> None:
        self.momentum_form = momentum_form
        self.foreach = foreach
        self.last_step: LayerMeasures | None = None
        self._step: LayerMeasures | None = None
        self._zero: ZeroPieces | None = None
        self._calls_left = 0
        self._makes_state = False
        self._guard: LoopGuard | None = None
        super().__init__(model, defaults, layers=layers, params=params, scale_norm_and_bias=scale_norm_and_bias)
        if self._model is not None:
            self._guard = LoopGuard(
                self._model,
                self._training(),
                self.param_groups,
                before_forward=self._before_forward,
                minds_scale=self._minds_scale,
            )

    def _gather(self) -> StepTensors:
        tensors = StepTensors([], [], [], [])
        seen: set[Tensor] = set()
        for g, group in self._groups_shown():
            rows = self._book.rows[g]
            for place, p in enumerate(group["params"]):
                if p.grad is None or p in seen:
                    continue
                seen.add(p)
                row = rows[place]
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"Layer {self._book.layers[row].name} has a sparse gradient, whose norm {type(self).__name__} "
                        "cannot use: create the module with sparse=False."
                    )
                state = self.state[p]
                if BUFFER not in state:
                    state[BUFFER] = torch.zeros_like(p, memory_format=torch.preserve_format)
                tensors.params.append(p)
                tensors.grads.append(p.grad)
                tensors.buffers.append(state[BUFFER])
                tensors.layer.append(row)
        return tensors

    def _groups_shown(self) -> Iterable[tuple[int, dict[str, Any]]]:
        """The groups that this call of `step()` is for, with their number."""
        if len(self.param_groups) == len(self._all_groups):
            return enumerate(self.param_groups)
        shown = {id(group) for group in self.param_groups}
        return ((g, group) for g, group in enumerate(self._all_groups) if id(group) in shown)

    def _update(self, tensors: StepTensors, rates: Tensor, applied: Tensor | None) -> None:
        """Apply the update, once for each pair of (momentum, weight decay) among the groups."""
        # On the CPU each weight is updated at one go, while it is in cache; a rate is read there without waiting.
        on_host = self.foreach is None and rates.device.type == "cpu"
        per_row: Sequence[Any] = rates.tolist() if on_host else rates.unbind()
        if on_host and applied is not None:
            if not applied:
                return
            applied = None
        buckets: dict[tuple[float, float], list[int]] = {}
        settings = self._layer_settings()
        for i, k in enumerate(tensors.layer):
            group = settings[k]
            buckets.setdefault((group["momentum"], group["weight_decay"]), []).append(i)
        update: Callable[..., None] = single_tensor_update if on_host or self.foreach is False else multi_tensor_update
        for (momentum, weight_decay), members in buckets.items():
            update(
                [tensors.params[i] for i in members],
                [tensors.grads[i] for i in members],
                [tensors.buffers[i] for i in members],
                [per_row[tensors.layer[i]] for i in members],
                momentum=momentum,
                weight_decay=weight_decay,
                form=self.momentum_form,
                applied=applied,
            )

    # ---- norms and rates -----------------------------------------------------------------------------------

    @property
    def measures_norms(self) -> bool:
        """Whether steps measure norms of the gradient, and so are held when one is not finite: all methods do."""
        return True

    @abstractmethod
    def _measure(self, tensors: StepTensors) -> LayerMeasures:
        """The step's norms and rates."""

    def _layer_norms(self, tensors: StepTensors, beside: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Norms of all layers, and the sum over ranks of what a method needs beside them: one all-reduce at most.

        Args:
            tensors: What the step works on.
            beside: [n], to be summed over ranks in the same all-reduce; None: nothing.

        Returns:
            (||w_k||, ||g_k||), each [K], a layer without gradients having ||g_k|| = 0; and the sum [n].
        """
        local = self._local_norms(tensors)
        layers = len(self._book.layers)
        parts = [local.weights.square(), local.grads.square()] if local.partial else []
        if beside is not None:
            parts.append(beside.to(local.weights))
        if not parts:
            return local.weights, local.grads, None
        summed = sum_over_ranks(torch.cat(parts))
        if not local.partial:
            return local.weights, local.grads, summed
        weights, grads = summed[: 2 * layers].sqrt().split(layers)
        return weights, grads, None if beside is None else summed[2 * layers :]

    def _local_norms(self, tensors: StepTensors) -> LocalNorms:
        layers, foreach = len(self._book.layers), self.foreach is not False
        if self._zero is not None:
            return self._zero.local_norms(layers, foreach=foreach)
        weights = self._weights()
        own = self._book.layers[0].params
        flat = bool(weights) and is_flat_piece(weights[0][0], own) and weights[0][0].dim() == 1
        return local_norms(
            [p for p, _ in weights],
            [k for _, k in weights],
            tensors.grads,
            tensors.layer,
            layers,
            flat=flat,
            foreach=foreach,
        )

    def _weights(self) -> list[tuple[Tensor, int]]:
        """The tensors that train now, each once, with their layer."""
        found: dict[Tensor, int] = {}
        for rows, group in zip(self._book.rows, self._all_groups, strict=True):
            found.update({p: row for p, row in zip(group["params"], rows, strict=False) if p.requires_grad})
        return list(found.items())


def _all_zero(grads: Sequence[Tensor]) -> bool:
    """Whether gradients are zero in this process; waits for the device."""
    return bool(grads) and not any(bool(local(grad).any()) for grad in grads)
