"""What NAG, LARS and CLARS share: the step, the layers' norms in it, and the update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import Groups, GroupTensors, TensorHolder, is_split, on_device, whole_norms, zero_pieces
from hf_clars.distributed.zero import check_all_at_once, check_one_layer_a_group
from hf_clars.layers import LayerMode
from hf_clars.optim.gradient_scale import all_zero
from hf_clars.optim.grouped import GroupedOptimizer
from hf_clars.optim.loop_guard import LoopGuard
from hf_clars.optim.measures import LayerMeasures, StepTensors
from hf_clars.optim.nonfinite import hold_unless_finite
from hf_clars.optim.process_checks import check_gradients_are_shared
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
        self._holder: TensorHolder = Groups()
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, see `GroupedOptimizer.load_state_dict`.

        Args:
            state_dict: As there.

        Raises:
            ValueError: As there.
        """
        super().load_state_dict(state_dict)
        if self._guard is not None:
            self._guard.groups = self.param_groups

    # ---- the step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. Parameters without a gradient are left alone, as in torch's optimizers.

        A step with a NaN or an infinity in the measured norms is not taken, see `last_step.applied`.

        Under DeepSpeed's ZeRO this is called several times for one update, with a part of the weights each time: all
        norms are taken, and all rates computed, at the first of these calls.

        Args:
            closure: Re-evaluates the model and returns the loss. Optional.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: For sparse gradients.
            UnsupportedEngineError: Under engine settings that would make layer norms wrong.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @torch.compiler.disable(
        reason="hf_clars: a step reads numbers, and cannot be one graph. Compile it without fullgraph=True, or the "
        "model alone"
    )
    def _take_step(self) -> None:
        if not self._holder.in_pieces and self._book.asleep and self._book.wake():
            self._new_partition()
        untouched = self._is_untouched()
        tensors = self._gather()
        if untouched and all_zero(tensors.grads):
            self._make_state(tensors)
            return
        if self._calls_left == 0:
            self._calls_left = self._calls()
            if tensors.params or self._holder.in_pieces:
                if self.last_step is None:
                    self._check_processes()
                measures = self._measure(tensors)
                self._step = hold_unless_finite(measures)
                self._keep(self._step)
                self.last_step = self._shown(self._step)
        if tensors.params and self._step is not None:
            self._update(tensors, self._step.rate, self._step.applied)
        self._calls_left = max(0, self._calls_left - 1)
        if self._calls_left == 0:
            self._after_step()

    def _check_processes(self) -> None:
        """At the first step, where nothing else has been asked: are the gradients shared?"""
        if self._guard is not None and not self._holder.in_pieces:
            check_gradients_are_shared(self._guard.scale, None)

    def _is_untouched(self) -> bool:
        """Whether this may be the step by which `torch.distributed.checkpoint` makes an optimizer create its state.

        It is taken with gradients of zero at a rate of zero, before any other. So may be the first of a warmup, but
        not with such gradients.
        """
        first = not self.state and not self._holder.in_pieces
        return first and all(float(g["lr"]) == 0.0 for g in self.param_groups)

    def _make_state(self, tensors: StepTensors) -> None:
        """The state is there; nothing moves. Processes with parts of the weights must reduce together all the same."""
        self._makes_state = True
        try:
            if any(is_split(p) for p in tensors.params):
                self._measure(tensors)
        finally:
            self._makes_state = False

    @torch.no_grad()
    def layer_measures(self) -> LayerMeasures:
        """What a step would measure now, without taking it: the layers' norms and rates."""
        self._before_forward()
        return self._shown(self._measure(self._gather()))

    def _shown(self, measures: LayerMeasures) -> LayerMeasures:
        """The same of the layers that train."""
        return measures.of(self._rows(measures.rate.device)) if self._book.shows_other_rows else measures

    def _rows(self, device: torch.device) -> Tensor:
        return on_device(tuple(self._book.shown), device)

    def attach_engine(self, engine: Any) -> None:
        """Tell the optimizer which DeepSpeed engine it is inside; `ClarsTrainer` does this by itself.

        ZeRO hands an optimizer one flat piece after the other, and a layer's norm needs them all.

        Args:
            engine: The first of what `deepspeed.initialize` returned, or the model that `accelerator.prepare` returned.

        Raises:
            UnsupportedEngineError: If it is no engine or this optimizer is not inside it, or under optimizer offload.
        """
        if self._model is not None:
            check_one_layer_a_group(
                engine, [{*self._book.rows_in(g)} & {*self._book.shown} for g in range(len(self._book.rows))]
            )
        self._holder = zero_pieces(engine, self, self._book.leading_rows()) or Groups()

    def _calls(self) -> int:
        """How often `step()` is called for the update that begins now."""
        if not self._holder.in_pieces:
            check_all_at_once(self.param_groups, self._all_groups, [len(rows) for rows in self._book.rows])
        return self._holder.calls

    def _keep(self, measures: LayerMeasures) -> None:
        """Subclasses with a memory of their own keep what a step measured."""

    def _after_step(self) -> None:
        """Subclasses also clear what they accumulated for this step."""
        if self._guard is not None:
            self._guard.stepped()
        self._follow()

    def _before_forward(self) -> None:
        """A pass begins: know the parameters that take part in it."""
        if not self._holder.in_pieces and self.last_step is None:
            self._follow()
        if self._book.asleep and self._book.wake():
            self._new_partition()
        elif self._guard is not None and self._guard.scale.stale:
            self._watch_again()

    def _follow(self) -> None:
        """FSDP2 may have put its own parameters in the place of those that were recorded.

        The recorded ones are let go: they would keep a whole copy of the weights alive.
        """
        swapped = self._book.swapped(self._all_groups)
        if swapped:
            self._on_swap(swapped)

    def _on_swap(self, swapped: dict[nn.Parameter, nn.Parameter]) -> None:
        """Parameters were swapped: {old: new}."""
        self._watch_again()

    def _new_partition(self) -> None:
        """Other parameters train than did before."""
        self._watch_again()

    def _watch_again(self) -> None:
        if self._guard is not None:
            self._guard.follow(self._training())

    def _minds_scale(self) -> bool:
        """Whether gradients that are all too large by one factor make another step."""
        settings = zip(self._adaptive(), self._layer_settings(), strict=True)
        return any(not adaptive or group["weight_decay"] for adaptive, group in settings)

    def remove_hooks(self) -> None:
        """Take all hooks off the model; `attach_hooks` places them again."""
        if self._guard is not None:
            self._guard.remove()

    def attach_hooks(self, model: nn.Module) -> None:
        """Place the hooks again, after `remove_hooks`; does nothing while they are in place.

        Args:
            model: The module that this optimizer was created with; wrapped or sharded in place since, if so.
        """
        if self._guard is not None and not self._guard.attached:
            self._guard.attach(model)

    def pause_hooks(self, paused: bool = True) -> None:
        """Let the hooks do nothing, or work again, while they stay in place.

        In between, the model can be evaluated and differentiated as if it had none.

        Args:
            paused: Default True.
        """
        if self._guard is not None:
            self._guard.paused = paused

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
    def measures_signal(self) -> bool:
        """Whether steps measure the share of signal, and so log it."""
        return False

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
        weights, own = self._weights(), self._book.layers[0].params
        found = GroupTensors(list(weights), list(weights.values()), tensors.grads, tensors.layer, own)
        local = self._holder.local_norms(found, len(self._book.layers), foreach=self.foreach is not False)
        return whole_norms(local, beside)

    def _weights(self) -> dict[Tensor, int]:
        """The tensors that train now, each once, with their layer."""
        found: dict[Tensor, int] = {}
        for rows, group in zip(self._book.rows, self._all_groups, strict=True):
            found.update({p: row for p, row in zip(group["params"], rows, strict=False) if p.requires_grad})
        return found
