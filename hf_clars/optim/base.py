"""What NAG, LARS and CLARS share: one parameter group a layer, layer norms, and the update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_clars.distributed import LocalNorms, ZeroPieces, local_norms, sum_over_ranks, zero_pieces
from hf_clars.distributed.zero import UnsupportedEngineError, is_flat_piece
from hf_clars.layers import LayerMode
from hf_clars.optim.groups import ADAPTIVE, FROZEN, LAYER, layer_groups, validate_settings
from hf_clars.optim.loop_guard import LoopGuard
from hf_clars.optim.measures import LayerMeasures, StepTensors
from hf_clars.optim.nonfinite import hold_unless_finite
from hf_clars.optim.update import MomentumForm, multi_tensor_update, single_tensor_update

BUFFER = "momentum_buffer"


class LayerwiseOptimizer(Optimizer):
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
        params: Iterable[dict[str, Any]] | None,
        scale_norm_and_bias: bool,
        momentum_form: MomentumForm,
        foreach: bool | None,
    ) -> None:
        validate_settings(defaults)
        self.partition, groups = layer_groups(
            model, layers=layers, params=params, scale_norm_and_bias=scale_norm_and_bias
        )
        self.momentum_form = momentum_form
        self.foreach = foreach
        self.last_step: LayerMeasures | None = None
        self._zero: ZeroPieces | None = None
        self._calls_left = 0
        super().__init__(groups, {ADAPTIVE: True, FROZEN: False, **defaults})
        for group in self.param_groups:
            validate_settings(group)
        # ZeRO shows `step()` one group at a time; the rates need the settings of all.
        self._all_groups = self.param_groups
        trained = [p for layer in self.partition for p in layer.params]
        self._guard = LoopGuard(model, trained, self.param_groups) if isinstance(model, nn.Module) else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Layers are fixed when the optimizer is created, with the hooks that measure them.

        Args:
            param_group: As torch passes it while the optimizer is created.

        Raises:
            ValueError: Afterwards.
        """
        if getattr(self, "_guard", None) is not None:
            raise ValueError(
                "Parameters cannot be added to a layer-wise optimizer: its layers were fixed when it was created. "
                "Create a new one; load_state_dict of the old one's state works only for the same layers."
            )
        super().add_param_group(param_group)

    @property
    def layer_names(self) -> list[str]:
        """Name of each layer, in the order of `param_groups` and of every measured vector."""
        return [layer.name for layer in self.partition]

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
        tensors = self._gather()
        if self._calls_left == 0:
            self._calls_left = self._calls()
            if tensors.params or self._zero is not None:
                measures = self._measure(tensors)
                self.last_step = hold_unless_finite(measures) if self.measures_norms else measures
                self._keep(self.last_step)
        if tensors.params and self.last_step is not None:
            self._update(tensors, self.last_step.rate, self.last_step.applied)
        self._calls_left = max(0, self._calls_left - 1)
        if self._calls_left == 0:
            self._after_step()
        return loss

    @torch.no_grad()
    def layer_measures(self) -> LayerMeasures:
        """What a step would measure now, without taking it: the layers' norms and rates."""
        return self._measure(self._gather())

    def attach_engine(self, engine: Any) -> None:
        """Tell the optimizer which DeepSpeed engine it is inside; `ClarsTrainer` does this by itself.

        ZeRO hands an optimizer one flat piece after the other, and a layer's norm needs them all.

        Args:
            engine: The first of what `deepspeed.initialize` returned, or the model that `accelerator.prepare` returned.

        Raises:
            UnsupportedEngineError: If it is no engine or this optimizer is not inside it, or under optimizer offload.
        """
        self._zero = zero_pieces(engine, self)

    def _calls(self) -> int:
        """How often `step()` is called for the update that begins now."""
        if self._zero is not None:
            return self._zero.calls
        if len(self.param_groups) < len(self._all_groups) or any(not group["params"] for group in self._all_groups):
            raise UnsupportedEngineError(
                "step() was called with a part of the layers, as DeepSpeed's ZeRO does, but this optimizer does not "
                "know its engine: call optimizer.attach_engine(engine) after deepspeed.initialize or "
                "accelerator.prepare, or use ClarsTrainer."
            )
        return 1

    def _keep(self, measures: LayerMeasures) -> None:
        """Subclasses with a memory of their own keep what a step measured."""

    def _after_step(self) -> None:
        """Subclasses also clear what they accumulated for this step."""
        if self._guard is not None:
            self._guard.stepped()
        swapped = {
            old: new
            for layer, group in zip(self.partition, self._all_groups, strict=True)
            for old, new in zip(layer.params, group["params"], strict=False)
            if hasattr(new, "device_mesh") and old is not new
        }
        if swapped:
            self._follow(swapped)

    def _follow(self, swapped: dict[nn.Parameter, nn.Parameter]) -> None:
        """FSDP2 has put its own parameters in the place of those that were recorded.

        The recorded ones are let go: they would keep a whole copy of the weights alive.
        """
        self.partition = [layer.with_params(swapped) for layer in self.partition]
        if self._guard is not None:
            self._guard.follow([p for layer in self.partition for p in layer.params])

    def remove_hooks(self) -> None:
        """Take all hooks off the model."""
        if self._guard is not None:
            self._guard.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as torch's optimizers do.

        Args:
            state_dict: From `state_dict()` of an optimizer for the same layers.
        """
        super().load_state_dict(state_dict)
        self._all_groups = self.param_groups
        if self._guard is not None:
            self._guard.groups = self.param_groups

    def _gather(self) -> StepTensors:
        tensors = StepTensors([], [], [], [])
        for k, group in self._groups_shown():
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"Layer {group[LAYER]} has a sparse gradient, whose norm {type(self).__name__} cannot use: "
                        "create the module with sparse=False."
                    )
                state = self.state[p]
                if BUFFER not in state:
                    state[BUFFER] = torch.zeros_like(p, memory_format=torch.preserve_format)
                tensors.params.append(p)
                tensors.grads.append(p.grad)
                tensors.buffers.append(state[BUFFER])
                tensors.layer.append(k)
        return tensors

    def _groups_shown(self) -> Iterable[tuple[int, dict[str, Any]]]:
        """The groups that this call of `step()` is for, with their layer index."""
        if len(self.param_groups) == len(self._all_groups):
            return enumerate(self.param_groups)
        shown = {id(group) for group in self.param_groups}
        return ((k, group) for k, group in enumerate(self._all_groups) if id(group) in shown)

    def _update(self, tensors: StepTensors, rates: Tensor, applied: Tensor | None) -> None:
        """Apply the update, once for each pair of (momentum, weight decay) among the groups."""
        # On the CPU each weight is updated at one go, while it is in cache; a rate is read there without waiting.
        on_host = self.foreach is None and rates.device.type == "cpu"
        per_layer: Sequence[Any] = rates.tolist() if on_host else rates.unbind()
        if on_host and applied is not None:
            if not applied:
                return
            applied = None
        buckets: dict[tuple[float, float], list[int]] = {}
        for i, k in enumerate(tensors.layer):
            group = self._all_groups[k]
            buckets.setdefault((group["momentum"], group["weight_decay"]), []).append(i)
        update: Callable[..., None] = single_tensor_update if on_host or self.foreach is False else multi_tensor_update
        for (momentum, weight_decay), members in buckets.items():
            update(
                [tensors.params[i] for i in members],
                [tensors.grads[i] for i in members],
                [tensors.buffers[i] for i in members],
                [per_layer[tensors.layer[i]] for i in members],
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

    @property
    def measures_norms(self) -> bool:
        """Whether steps measure the layers' norms, and so are held when one is not finite."""
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
        layers = len(self.partition)
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
        layers, foreach = len(self.partition), self.foreach is not False
        if self._zero is not None:
            return self._zero.local_norms(layers, foreach=foreach)
        weights = [(p, k) for k, group in enumerate(self._all_groups) for p in group["params"]]
        flat = is_flat_piece(weights[0][0], self.partition[0].params) and weights[0][0].dim() == 1
        return local_norms(
            [p for p, _ in weights],
            [k for _, k in weights],
            tensors.grads,
            tensors.layer,
            layers,
            flat=flat,
            foreach=foreach,
        )

    def _per_group(self, values: Sequence[float], like: Tensor) -> Tensor | float:
        """A K-vector of host numbers; one number when they are all equal, which costs no copy to the device."""
        return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=like.dtype).to(like.device)

    def _rates(self, ratio: Tensor) -> Tensor:
        """gamma_k = lr * eta * ratio_k; lr alone for layers that are not scaled, 0 for frozen ones."""
        groups = self._all_groups
        if not all(group[ADAPTIVE] for group in groups):
            adaptive = self._per_group([float(group[ADAPTIVE]) for group in groups], ratio)
            ratio = torch.where(torch.as_tensor(adaptive, device=ratio.device) > 0, ratio, 1.0)
        scales = [0.0 if g[FROZEN] else float(g["lr"]) * (g.get("eta", 1.0) if g[ADAPTIVE] else 1.0) for g in groups]
        return ratio * self._per_group(scales, ratio)

    def _clips(self, like: Tensor) -> Tensor | float | None:
        """The groups' bounds on the trust ratio; None when no layer has one."""
        clips = [group["trust_clip"] for group in self._all_groups]
        if all(clip is None for clip in clips):
            return None
        return self._per_group([float("inf") if clip is None else clip for clip in clips], like)

    def _weight_decays(self, like: Tensor) -> Tensor | float:
        return self._per_group([group["weight_decay"] for group in self._all_groups], like)
