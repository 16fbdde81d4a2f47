"""What NAG, LARS and CLARS share: one parameter group a layer, layer norms, and the update."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_clars.distributed import LocalNorms, ZeroPieces, local_norms, on_device, sum_over_ranks, zero_pieces
from hf_clars.distributed.zero import UnsupportedEngineError, is_flat_piece, is_partitioned
from hf_clars.layers import LayerMode, ParamLayer
from hf_clars.optim.gradient_scale import local
from hf_clars.optim.groups import ADAPTIVE, FROZEN, HELD, model_groups, tensor_layers, validate_settings
from hf_clars.optim.layer_book import LayerBook
from hf_clars.optim.loop_guard import LoopGuard
from hf_clars.optim.measures import LayerMeasures, StepTensors
from hf_clars.optim.nonfinite import hold_unless_finite
from hf_clars.optim.process_checks import check_gradients_are_shared
from hf_clars.optim.state_names import arranged
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
        params: Iterable[Any] | None,
        scale_norm_and_bias: bool,
        momentum_form: MomentumForm,
        foreach: bool | None,
    ) -> None:
        validate_settings(defaults)
        self.momentum_form = momentum_form
        self.foreach = foreach
        self.last_step: LayerMeasures | None = None
        self._zero: ZeroPieces | None = None
        self._step: LayerMeasures | None = None
        self._calls_left = 0
        self._makes_state = False
        self._scale_norm_and_bias = scale_norm_and_bias
        self._guard: LoopGuard | None = None
        self._model = model if isinstance(model, nn.Module) else None
        self._partitioned: LayerMode = layers
        groups: Iterable[Any]
        if isinstance(model, nn.Module):
            self._book, groups = model_groups(
                model, layers=layers, params=params, scale_norm_and_bias=scale_norm_and_bias
            )
        else:
            self._book, groups = LayerBook(), model
        super().__init__(groups, {ADAPTIVE: True, FROZEN: False, **defaults})
        # ZeRO shows `step()` one group at a time; the rates need the settings of all.
        self._all_groups = self.param_groups
        if isinstance(model, nn.Module):
            self._guard = LoopGuard(
                model,
                self._training(),
                self.param_groups,
                before_forward=self._before_forward,
                minds_scale=self._minds_scale,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do.

        Args:
            param_group: `params`, and settings that differ from the defaults. With a model: parameters of it that are
                in no group yet, after `params=` has named others.

        Raises:
            ValueError: For parameters that are not the model's, or in a group already, or settings out of range.
        """
        validate_settings(param_group)
        if self._model is None:
            super().add_param_group(param_group)
            first = sum(map(len, self._book.rows))
            layers, adaptive = tensor_layers(self.param_groups[-1], first, self._scale_norm_and_bias)
            self._book.add(layers, adaptive, self.param_groups[-1]["params"])
            return
        if self._guard is None:  # while the optimizer is created: the layers are known
            super().add_param_group(param_group)
            return
        group, layers = self._new_layers(param_group)
        super().add_param_group(group)
        adaptive = [self._scale_norm_and_bias or not layer.norm_or_bias for layer in layers]
        self._book.add(layers, adaptive, self.param_groups[-1]["params"])
        self._new_partition()

    def _new_layers(self, param_group: dict[str, Any]) -> tuple[dict[str, Any], list[ParamLayer]]:
        """A group of parameters of the model that were in none, by name, and its layers."""
        assert self._model is not None
        try:
            book, (group,) = model_groups(
                self._model,
                layers=self._partitioned,
                params=[param_group],
                scale_norm_and_bias=self._scale_norm_and_bias,
            )
        except ValueError as error:
            raise ValueError(
                f"{error} Only parameters of the model that a layer-wise optimizer was created with can be added to "
                "it. Create a new one."
            ) from error
        taken, number = {layer.name for layer in self._book.layers}, len(self.param_groups)
        layers = [
            replace(layer, name=f"{layer.name} (group {number})") if layer.name in taken else layer
            for layer in book.layers
        ]
        return group, layers

    @property
    def partition(self) -> list[ParamLayer]:
        """The layers that train, in the order of every measured vector."""
        return self._book.shown_layers

    @property
    def layer_names(self) -> list[str]:
        """Name of each layer that trains, in the order of every measured vector.

        Frozen layers are in `param_groups`, and not here. One that is unfrozen comes to the end, from the first step
        on that it takes part in.
        """
        return [self._book.layers[row].name for row in self._book.shown]

    def layer_group(self, name: str) -> dict[str, Any]:
        """The parameter group of a layer.

        Args:
            name: Its name.

        Raises:
            KeyError: If there is no such layer.
        """
        for group, layer in zip(self._layer_settings(), self._book.layers, strict=True):
            if layer.name == name:
                return group
        raise KeyError(name)

    def layers_of(self, group: dict[str, Any]) -> list[str]:
        """Names of the layers of one of the parameter groups, frozen ones too."""
        number = next(g for g, known in enumerate(self._all_groups) if known is group)
        return [self._book.layers[row].name for row in self._book.rows_in(number)]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerwiseOptimizer:
        self._refuse_copies()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_copies()
        own = {name: value for name, value in self.__dict__.items() if not name.startswith("_optimizer_")}
        return own  # but for the hooks that others have placed, as torch's optimizers do

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._all_groups = self.param_groups

    def _refuse_copies(self) -> None:
        if self._model is not None:
            raise TypeError(
                f"This {type(self).__name__} has hooks on its model, which cannot be copied or pickled with it. Copy "
                f"or save optimizer.state_dict(), create a {type(self).__name__} for the other model and load it there."
            )

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
        if self._zero is None and self._book.asleep and self._book.wake():
            self._new_partition()
        untouched = self._is_untouched()
        tensors = self._gather()
        if untouched and _all_zero(tensors.grads):
            self._make_state(tensors)
            return loss
        if self._calls_left == 0:
            self._calls_left = self._calls()
            if tensors.params or self._zero is not None:
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
        return loss

    def _check_processes(self) -> None:
        """At the first step, where nothing else has been asked: are the gradients shared?"""
        if self._guard is not None and self._zero is None:
            check_gradients_are_shared(self._guard.scale, None)

    def _is_untouched(self) -> bool:
        """Whether this may be the step by which `torch.distributed.checkpoint` makes an optimizer create its state.

        It is taken with gradients of zero at a rate of zero, before any other. So may be the first of a warmup, but
        not with such gradients.
        """
        return not self.state and self._zero is None and all(float(g["lr"]) == 0.0 for g in self.param_groups)

    def _make_state(self, tensors: StepTensors) -> None:
        """The state is there; nothing moves. Processes with parts of the weights must reduce together all the same."""
        self._makes_state = True
        try:
            if any(hasattr(p, "device_mesh") for p in tensors.params):
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
        several = [g for g in range(len(self._book.rows)) if len({*self._book.rows_in(g)} & {*self._book.shown}) > 1]
        if several and self._model is not None and is_partitioned(engine):
            raise UnsupportedEngineError(
                f"Group {several[0]} holds more than one layer, and DeepSpeed makes one flat piece of it, of which "
                "layers cannot be told apart: leave params= out, or give a group for each layer."
            )
        self._zero = zero_pieces(engine, self, self._book.leading_rows())

    def _calls(self) -> int:
        """How often `step()` is called for the update that begins now."""
        if self._zero is not None:
            return self._zero.calls
        emptied = any(
            rows and not group["params"] for rows, group in zip(self._book.rows, self._all_groups, strict=True)
        )
        if emptied or len(self.param_groups) < len(self._all_groups):
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
        self._follow()

    def _before_forward(self) -> None:
        """A pass begins: know the parameters that take part in it."""
        if self._zero is None and self.last_step is None:
            self._follow()
        if self._book.asleep and self._book.wake():
            self._new_partition()
        elif self._guard is not None and self._guard.scale.stale:
            self._guard.follow(self._training())

    def _follow(self) -> None:
        """FSDP2 may have put its own parameters in the place of those that were recorded.

        The recorded ones are let go: they would keep a whole copy of the weights alive.
        """
        swapped = self._book.swapped(self._all_groups)
        if swapped:
            self._on_swap(swapped)

    def _on_swap(self, swapped: dict[nn.Parameter, nn.Parameter]) -> None:
        """Parameters were swapped: {old: new}."""
        if self._guard is not None:
            self._guard.follow(self._training())

    def _new_partition(self) -> None:
        """Other parameters train than did before."""
        if self._guard is not None:
            self._guard.follow(self._training())

    def _training(self) -> list[nn.Parameter]:
        return [p for layer in self._book.shown_layers for p in layer.params if p.requires_grad]

    def _minds_scale(self) -> bool:
        """Whether gradients that are all too large by one factor make another step."""
        settings = zip(self._adaptive(), self._layer_settings(), strict=True)
        return any(not adaptive or group["weight_decay"] for adaptive, group in settings)

    def arranged_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state in the order of this optimizer's groups, by the names that are stored in it.

        Args:
            state_dict: As for `load_state_dict`.

        Raises:
            ValueError: As there.
        """
        return arranged(state_dict, self.param_groups, self._book)

    def remove_hooks(self) -> None:
        """Take all hooks off the model."""
        if self._guard is not None:
            self._guard.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Momentum goes to the parameter, or layer, of the name that is stored with it.

        Args:
            state_dict: From `state_dict()` of an optimizer for the same layers, whatever its groups. Without names
                (parameters that were given without a model), the order tells, as in torch's optimizers.

        Raises:
            ValueError: If the state is of layers that this optimizer does not have, or lacks some that train.
        """
        super().load_state_dict(self.arranged_state(state_dict))
        self._all_groups = self.param_groups
        if self._guard is not None:
            self._guard.groups = self.param_groups

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

    def _layer_settings(self) -> list[dict[str, Any]]:
        """The group of each layer."""
        return [self._all_groups[g] for g in self._book.group_of]

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

    def _adaptive(self) -> list[bool]:
        """Whether each layer is scaled by its norms."""
        settings = self._layer_settings()
        return [own and bool(group[ADAPTIVE]) for own, group in zip(self._book.adaptive, settings, strict=True)]

    def _frozen(self) -> list[bool]:
        """Whether each layer's rate is held at zero."""
        names = [layer.name for layer in self._book.layers]
        settings = self._layer_settings()
        return [bool(g[FROZEN]) or name in g.get(HELD, ()) for name, g in zip(names, settings, strict=True)]

    def _per_layer(self, values: Sequence[float], like: Tensor) -> Tensor | float:
        """A K-vector of host numbers; one number when they are all equal, which costs no copy to the device."""
        return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=like.dtype).to(like.device)

    def _where_adaptive(self, factor: Tensor) -> Tensor:
        """A factor [K] of the rates; 1 for layers that train at `lr` itself."""
        adaptive = self._adaptive()
        if all(adaptive):
            return factor
        wanted = self._per_layer([float(on) for on in adaptive], factor)
        return torch.where(torch.as_tensor(wanted, device=factor.device) > 0, factor, 1.0)

    def _rates(self, ratio: Tensor) -> Tensor:
        """gamma_k = lr * eta * ratio_k; lr alone for layers that are not scaled, 0 for frozen ones."""
        settings = zip(self._layer_settings(), self._adaptive(), self._frozen(), strict=True)
        scales = [0.0 if held else float(g["lr"]) * (g.get("eta", 1.0) if on else 1.0) for g, on, held in settings]
        return self._where_adaptive(ratio) * self._per_layer(scales, ratio)

    def _clips(self, like: Tensor) -> Tensor | float | None:
        """The layers' bounds on the trust ratio; None when none has one."""
        clips = [group["trust_clip"] for group in self._layer_settings()]
        if all(clip is None for clip in clips):
            return None
        return self._per_layer([float("inf") if clip is None else clip for clip in clips], like)

    def _weight_decays(self, like: Tensor) -> Tensor | float:
        return self._per_layer([group["weight_decay"] for group in self._layer_settings()], like)


def _all_zero(grads: Sequence[Tensor]) -> bool:
    """Whether gradients are zero in this process; waits for the device."""
    return bool(grads) and not any(bool(local(grad).any()) for grad in grads)
