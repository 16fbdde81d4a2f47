"""What NAG, LARS and CLARS share: one parameter group a layer, layer norms, and the update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_clars.errors import HfClarsError
from hf_clars.layers import LayerMode
from hf_clars.optim.groups import ADAPTIVE, FROZEN, LAYER, layer_groups
from hf_clars.optim.loop_guard import LoopGuard
from hf_clars.optim.nonfinite import hold_unless_finite
from hf_clars.optim.update import (
    MomentumForm,
    multi_tensor_update,
    single_tensor_update,
    tensor_norms,
)

BUFFER = "momentum_buffer"


class ShardedWeightsError(HfClarsError, RuntimeError):
    """Weights that are split over processes, whose layer norms would come out too small."""


@dataclass(frozen=True)
class LayerMeasures:
    """What one step measured, each [K], on the weights' device; layers in the order of `layer_names`.

    Attributes:
        rate: gamma_k.
        weight_norm: ||w_k|| before the update.
        grad_norm: ||g_k||.
        mean_sample_norm: n_k in the units of `p.grad`; None for methods that do not measure it.
        ratio: R_k = ||g_k|| / n_k, in [0, 1]; None likewise.
        finite: Bool: the layer's gradient norms are neither NaN nor infinite; None for methods that measure none.
        applied: Bool, 0-dim: the step was taken, because all of them are; None likewise.
    """

    rate: Tensor
    weight_norm: Tensor
    grad_norm: Tensor
    mean_sample_norm: Tensor | None = None
    ratio: Tensor | None = None
    finite: Tensor | None = None
    applied: Tensor | None = None

    def stacked(self) -> Tensor:
        """[5, K] in the order of the attributes, NaN where a quantity was not measured."""
        missing = torch.full_like(self.rate, float("nan"))
        rows = (self.rate, self.weight_norm, self.grad_norm, self.mean_sample_norm, self.ratio)
        return torch.stack([missing if row is None else row for row in rows])


@dataclass
class _StepTensors:
    """The tensors that a step works on, and the layer (group) of each."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    layer: list[int]


class LayerwiseOptimizer(Optimizer):
    """Base class; see `NAG`, `LARS` and `CLARS`."""

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
        _validate(defaults)
        self.partition, groups = layer_groups(
            model, layers=layers, params=params, scale_norm_and_bias=scale_norm_and_bias
        )
        self.momentum_form = momentum_form
        self.foreach = foreach
        self.last_step: LayerMeasures | None = None
        self._layer_index: dict[tuple[int, ...], Tensor] = {}
        super().__init__(groups, {ADAPTIVE: True, FROZEN: False, **defaults})
        for group in self.param_groups:
            _validate(group)
        trained = [p for layer in self.partition for p in layer.params]
        self._guard = LoopGuard(model, trained) if isinstance(model, nn.Module) else None

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
                "Create a "
                "new one; load_state_dict of the old one's state works only for the same layers."
            )
        super().add_param_group(param_group)

    @property
    def layer_names(self) -> list[str]:
        """Name of each layer, in the order of `param_groups` and of every measured vector."""
        return [group[LAYER] for group in self.param_groups]

    # ---- the step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. Parameters without a gradient are left alone, as in torch's optimizers.

        A step with a NaN or an infinity in the measured norms is not taken, see `last_step.applied`.

        Args:
            closure: Re-evaluates the model and returns the loss. Optional.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: For sparse gradients.
            ShardedWeightsError: For weights that FSDP has split.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = self._gather()
        if tensors.params:
            measures = self._measure(tensors)
            if self.measures_norms:
                measures = hold_unless_finite(measures)
            self._update(tensors, measures.rate, measures.applied)
            self.last_step = measures
        self._after_step()
        return loss

    def _after_step(self) -> None:
        """Subclasses also clear what they accumulated for this step."""
        if self._guard is not None:
            self._guard.stepped()

    def remove_hooks(self) -> None:
        """Take all hooks off the model."""
        if self._guard is not None:
            self._guard.remove()

    def _gather(self) -> _StepTensors:
        tensors = _StepTensors([], [], [], [])
        for k, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"Layer {group[LAYER]} has a sparse gradient, whose norm {type(self).__name__} cannot use: "
                        "create the module with sparse=False."
                    )
                if hasattr(p, "device_mesh"):
                    raise ShardedWeightsError(
                        f"Layer {group[LAYER]} is sharded over processes (FSDP), and its norms are not yet summed "
                        f"over the "
                        "shards: train with plain data parallelism (accelerate launch --multi_gpu, torchrun)."
                    )
                state = self.state[p]
                if BUFFER not in state:
                    state[BUFFER] = torch.zeros_like(p, memory_format=torch.preserve_format)
                tensors.params.append(p)
                tensors.grads.append(p.grad)
                tensors.buffers.append(state[BUFFER])
                tensors.layer.append(k)
        return tensors

    def _update(self, tensors: _StepTensors, rates: Tensor, applied: Tensor | None) -> None:
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
            group = self.param_groups[k]
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
    def measures_norms(self) -> bool:
        """Whether steps measure the layers' norms, and so are held when one is not finite."""
        return True

    @abstractmethod
    def _measure(self, tensors: _StepTensors) -> LayerMeasures:
        """The step's norms and rates."""

    def _layer_norms(self, tensors: _StepTensors) -> tuple[Tensor, Tensor]:
        """(||w_k||, ||g_k||), each [K]; a layer without gradients has ||g_k|| = 0."""
        weights = [(p, k) for k, group in enumerate(self.param_groups) for p in group["params"]]
        weight_norm = self._per_layer([p for p, _ in weights], [k for _, k in weights])
        return weight_norm, self._per_layer(tensors.grads, tensors.layer)

    def _per_layer(self, tensors: list[Tensor], layer: Sequence[int]) -> Tensor:
        norms = tensor_norms(tensors, foreach=self.foreach is not False)
        layers = len(self.param_groups)
        if list(layer) == list(range(layers)):
            return norms
        key = tuple(layer)
        index = self._layer_index.get(key)
        if index is None or index.device != norms.device:
            index = self._layer_index[key] = torch.tensor(key, device=norms.device)
        return norms.new_zeros(layers).index_add_(0, index, norms.square()).sqrt()

    def _per_group(self, values: Sequence[float], like: Tensor) -> Tensor | float:
        """A K-vector of host numbers; one number when they are all equal, which costs no copy to the device."""
        return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=like.dtype).to(like.device)

    def _rates(self, ratio: Tensor) -> Tensor:
        """gamma_k = lr * eta * ratio_k; lr alone for layers that are not scaled, 0 for frozen ones."""
        groups = self.param_groups
        if not all(group[ADAPTIVE] for group in groups):
            adaptive = self._per_group([float(group[ADAPTIVE]) for group in groups], ratio)
            ratio = torch.where(torch.as_tensor(adaptive, device=ratio.device) > 0, ratio, 1.0)
        scales = [0.0 if g[FROZEN] else float(g["lr"]) * (g.get("eta", 1.0) if g[ADAPTIVE] else 1.0) for g in groups]
        return ratio * self._per_group(scales, ratio)

    def _clips(self, like: Tensor) -> Tensor | float | None:
        """The groups' bounds on the trust ratio; None when no layer has one."""
        clips = [group["trust_clip"] for group in self.param_groups]
        if all(clip is None for clip in clips):
            return None
        return self._per_group([float("inf") if clip is None else clip for clip in clips], like)

    def _weight_decays(self, like: Tensor) -> Tensor | float:
        return self._per_group([group["weight_decay"] for group in self.param_groups], like)


def _validate(group: dict[str, Any]) -> None:
    """Refuse settings that cannot work."""
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (lambda v: v >= 0, "at least 0"),
        "eta": (lambda v: v > 0, "above 0"),
        "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "weight_decay": (lambda v: v >= 0, "at least 0"),
        "trust_clip": (lambda v: v is None or v > 0, "above 0, or None for no bound"),
    }
    for name, (valid, allowed) in rules.items():
        if name in group and not valid(group[name]):
            raise ValueError(f"{name}={group[name]!r} cannot work: it must be {allowed}.")
