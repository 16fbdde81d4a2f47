"""CLARS (Eq. 5 and Algorithm 1): each layer's rate in proportion to ||w_k|| / mean_i ||grad_k f_i||."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_clars.distributed import world_size
from hf_clars.errors import HfClarsError
from hf_clars.grad_norms import MicroBatchGradNorms, NormTotals, PerSampleGradNorms
from hf_clars.grad_norms.resumed import Proven, expect_calls, proven_calls
from hf_clars.layers import LayerMode
from hf_clars.optim.lars import LARS, TRUST_CLIP
from hf_clars.optim.measures import LayerMeasures, StepTensors
from hf_clars.optim.process_checks import check_gradients_are_shared
from hf_clars.optim.rates import mean_sample_norm, trust_ratio
from hf_clars.optim.update import MomentumForm

PROVEN = "proven_calls"  # in a state, beside torch's entries


class NoNormsError(HfClarsError, RuntimeError):
    """A step without a measured backward pass."""


NormKind = Literal["mean", "rms"]
Estimator = Literal["samples", "microbatch"]


class CLARS(LARS):
    """Complete layer-wise adaptive rate scaling on mNAG: gamma_k = lr * eta * ||w_k|| / n_k.

    n_k = (1/B) sum_i ||grad_k f_i|| is the mean norm of the samples' gradients in layer k. It is measured while
    `backward()` runs, by hooks that this optimizer attaches to the model, over everything accumulated since the last
    step: no second pass, no wrapped model, `p.grad` untouched. Equal to LARS times R_k = ||g_k|| / n_k <= 1.

    The norms are in the units of `p.grad`, whatever scaled the loss (means, accumulation, a loss scale) or, afterwards,
    the gradients (unscaling, clipping by the global norm): both cancel in the rate. So clipping has no effect without
    weight decay. That is added to the gradient that the step finds, as everywhere in torch: beside a gradient that was
    clipped it counts for more.

    Args:
        model: The module to train, as it will be called.
        lr: gamma_scale, the global rate that schedules move; by linear scaling gamma_base * B / B_base. Default 0.1.
        eta: One of 1e-3, 1e-2, 1e-1 in the paper. Default 1e-2.
        momentum: beta in [0, 1); the rate is inside the buffer. Default 0.9.
        weight_decay: Coupled: g_k + weight_decay * w_k is applied. n_k stays that of the loss alone, and
            weight_decay * ||w_k|| is added to the denominator. Default 0 (the paper names none).
        samples: Measure the first `samples` of each accumulated batch (the paper's |J_t| = 512, shared evenly by the
            processes); None (default): every sample, Eq. 5 exactly.
        norm: `"mean"` (default, Eq. 5) or `"rms"` (root of the mean square, Algorithm 1 line 4).
        estimator: `"samples"` (default) or `"microbatch"`: norms of micro-batch gradients, as in the authors' code.
        layers: `"module"` (default) or `"tensor"`.
        trust_clip: Upper bound on ||w_k|| / n_k. Default 1e8, which healthy training does not reach. None: no bound.
        scale_norm_and_bias: False trains biases and normalisation weights at `lr` itself. Default True.
        params: Groups of the model's parameters with their own `lr`, `eta`, `momentum`, `weight_decay`, `trust_clip`.
        decay_in_norm: With `estimator="microbatch"`, measure the norm of g + weight_decay * w. Default False.
        momentum_form: `"nesterov"` (default) or `"heavy_ball"`.
        foreach: Use the multi-tensor path. Default: on the CPU no, elsewhere yes, whichever is faster.

    A layer whose weights have norm zero, or that no sample has a gradient for, takes the ratio 1.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: For settings out of range.
        UncoveredParameterError: In the first forward pass, if hooks cannot see a trainable parameter.
        NoNormsError: At a step, if gradients did not come from a backward pass through the model.
        OptimizerNotSteppedError: In training, if another optimizer changes the weights.
        AccumulationIgnoredError: If Trainer passes `num_items_in_batch` to a head that ignores it.
    """

    _proven_before: Proven = MappingProxyType({})

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        eta: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        samples: int | None = None,
        norm: NormKind = "mean",
        estimator: Estimator = "samples",
        layers: LayerMode = "module",
        trust_clip: float | None = TRUST_CLIP,
        scale_norm_and_bias: bool = True,
        params: Iterable[dict[str, Any]] | None = None,
        decay_in_norm: bool = False,
        momentum_form: MomentumForm = "nesterov",
        foreach: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"CLARS needs the model itself, not {type(model).__name__}: it hooks the modules to measure each "
                'sample\'s gradient norm. With Trainer use optimizer_cls_and_kwargs=(CLARS, {"model": model, ...}), or '
                "optimizers=(CLARS(model, ...), None), or ClarsTrainer."
            )
        _check_choice("norm", norm, ("mean", "rms"))
        _check_choice("estimator", estimator, ("samples", "microbatch"))
        if samples is not None and samples < 1:
            raise ValueError(f"samples={samples}: give a positive number of samples, or None for every sample.")
        if decay_in_norm and estimator != "microbatch":
            raise ValueError("decay_in_norm=True needs estimator='microbatch': a sample has no share of the decay.")
        super().__init__(
            model,
            lr,
            eta=eta,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_clip=trust_clip,
            layers=layers,
            scale_norm_and_bias=scale_norm_and_bias,
            params=params,
            momentum_form=momentum_form,
            foreach=foreach,
        )
        self.norm = norm
        self.decay_in_norm = decay_in_norm
        self._local_samples = None if samples is None else max(1, samples // world_size())
        self._micro_batches = estimator == "microbatch"
        self.norms = self._new_norms(model)

    def _new_norms(self, model: nn.Module) -> PerSampleGradNorms | MicroBatchGradNorms:
        norms = self._estimator(model)
        expect_calls(norms, self._proven_before)
        return norms

    def _estimator(self, model: nn.Module) -> PerSampleGradNorms | MicroBatchGradNorms:
        samples = self._local_samples
        if not self._micro_batches:
            norms = PerSampleGradNorms(model, layers=self.partition, samples=samples, keep_per_sample=False)
            # One that nobody keeps, as after its cell was run again in a notebook, has nothing to say of the model.
            weakref.finalize(self, norms.pause, lift=True).atexit = False
            return norms
        decay = self.defaults["weight_decay"] if self.decay_in_norm else 0.0
        return MicroBatchGradNorms(model, self.partition, samples=samples, weight_decay=decay)

    @classmethod
    def reference_code(cls, model: nn.Module, lr: float, **overrides: Any) -> CLARS:
        """The semantics of the authors' published code, which differ from the paper's.

        Mean norm of micro-batch gradients (theirs: 64 batches of 8), weight decay 2e-4 inside that norm, eta times the
        trust ratio at most 0.1, biases and normalisation weights at `lr` itself, each tensor a layer, and momentum
        without Nesterov's step and with the rate outside. Their schedule is polynomial of power 2 down to 1e-4.

        Args:
            model: The module to train; give it 8 samples a forward pass for the authors' micro-batches.
            lr: gamma_scale.
            overrides: Any argument of `CLARS` instead.

        Returns:
            The optimizer.
        """
        eta = overrides.get("eta", 1e-2)
        settings: dict[str, Any] = {
            "eta": eta,
            "weight_decay": 2e-4,
            "samples": 512,
            "estimator": "microbatch",
            "layers": "tensor",
            "trust_clip": 0.1 / eta,
            "scale_norm_and_bias": False,
            "decay_in_norm": True,
            "momentum_form": "heavy_ball",
        }
        return cls(model, lr, **{**settings, **overrides})

    # ---- runs that resume ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and which calls of layers are proven, so that a run that resumes rounds its gradients alike."""
        return {**super().state_dict(), PROVEN: proven_calls(self.norms)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `LayerwiseOptimizer.load_state_dict`.

        Args:
            state_dict: As there.

        Raises:
            ValueError: As there.
        """
        super().load_state_dict(state_dict)
        self._proven_before = state_dict.get(PROVEN, {})
        expect_calls(self.norms, self._proven_before)

    # ---- the step ------------------------------------------------------------------------------------------

    def _measure(self, tensors: StepTensors) -> LayerMeasures:
        weight_norm, grad_norm, n, _ = self._measured_norms(tensors)
        ratio = torch.where(n > 0, grad_norm / n, 1.0)
        trust = trust_ratio(
            weight_norm,
            n,
            weight_decay=0.0 if self.decay_in_norm else self._weight_decays(weight_norm),
            clip=self._clips(weight_norm),
        )
        return LayerMeasures(self._rates(trust), weight_norm, grad_norm, n, ratio)

    def _measured_norms(self, tensors: StepTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(||w_k||, ||g_k||, n_k), each [K], the latter two in the units of `p.grad`; and the batch size B, 0-dim."""
        asked = not self._makes_state
        if asked and isinstance(self.norms, PerSampleGradNorms):
            self.norms.check_all_captured()
        totals = self.norms.totals()
        if asked and totals is None and world_size() == 1:
            raise NoNormsError(
                "There are gradients to step with, but no backward pass through the model was seen since the last "
                f"step. {type(self).__name__} measures norms while backward() runs through the module it was created "
                "with: call that module, and do not set p.grad by hand."
            )
        weight_norm, grad_norm, sums = self._layer_norms(tensors, self._sample_sums(totals))
        assert sums is not None
        return weight_norm, grad_norm, self._mean_sample_norm(sums, grad_norm), sums[len(self._book.layers) + 1]

    def _check_processes(self) -> None:
        """Asked with the mean over processes, which a step has to take anyway."""

    def _sample_sums(self, totals: NormTotals | None) -> Tensor:
        """This rank's share of n_k, [K + 2 + m]: K sums, samples measured, samples in all, and the guard's sample."""
        assert self._guard is not None
        sample = self._guard.scale.local_sample()
        if totals is None:  # a rank without samples
            nothing = sample.new_zeros(len(self._book.shown))
            totals = NormTotals(nothing, nothing, 0, 0)
        ranks = world_size()  # data parallelism averages gradients over them
        own = totals.norms / ranks if self.norm == "mean" else totals.squares / ranks**2
        if self._book.shows_other_rows:
            own = own.new_zeros(len(self._book.layers)).index_copy(0, self._rows(own.device), own)
        counts = torch.stack([own.new_full((), float(count)) for count in (totals.captured, totals.total)])
        return torch.cat([own, counts, sample.to(own) / ranks])

    @property
    def reduction_size(self) -> int:
        """How many numbers a step's all-reduce carries with whole weights; with split ones, 2 K more."""
        return len(self._sample_sums(None))

    def _mean_sample_norm(self, sums: Tensor, grad_norm: Tensor) -> Tensor:
        """n_k over all ranks, in the units of the final `p.grad`."""
        assert self._guard is not None
        layers = len(self._book.layers)
        own, captured, total, sample = sums[:layers], sums[layers], sums[layers + 1], sums[layers + 2 :]
        if self.last_step is None and not self._makes_state:
            check_gradients_are_shared(self._guard.scale, sample)
        scale = self._guard.scale.scale_since(sample)
        if self._holder.in_pieces:
            scale = scale * self._holder.gradient_scale
        own = own * (scale if self.norm == "mean" else scale.square())
        return mean_sample_norm(own, own, grad_norm, captured=captured.clamp(min=1), total=total, norm=self.norm)

    def _on_swap(self, swapped: dict[nn.Parameter, nn.Parameter]) -> None:
        super()._on_swap(swapped)
        if isinstance(self.norms, PerSampleGradNorms):
            self.norms.rebind(swapped)

    def _new_partition(self) -> None:
        super()._new_partition()
        late = self.norms.totals() is not None
        self.norms.cover(self.partition)
        if late:
            raise NoNormsError(
                "Parameters were unfrozen, or added, after a backward pass of the batch that is being measured, or in "
                "a model that is not called as a whole: do it after step() or zero_grad(), and call the model itself."
            )

    def attach_engine(self, engine: Any) -> None:
        """As `LayerwiseOptimizer.attach_engine`; the norms of a batch whose step the engine skips are dropped too.

        Args:
            engine: DeepSpeed's engine.

        Raises:
            UnsupportedEngineError: As there.
        """
        super().attach_engine(engine)
        self.norms.engine_dropped_a_batch = self._holder.dropped_a_batch

    def _after_step(self) -> None:
        super()._after_step()
        self.norms.reset()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the norms accumulated for them."""
        super().zero_grad(set_to_none)
        self.norms.reset()

    def remove_hooks(self) -> None:
        """Take all hooks off the model; until `attach_hooks` the optimizer cannot step with new gradients."""
        super().remove_hooks()
        self.norms.remove()

    def attach_hooks(self, model: nn.Module) -> None:
        """Place the hooks again, after `remove_hooks`; does nothing while they are in place.

        Args:
            model: As in `LayerwiseOptimizer.attach_hooks`.
        """
        super().attach_hooks(model)
        if not self.norms.attached:
            self.norms = self._new_norms(model)
            self.norms.engine_dropped_a_batch = self._holder.dropped_a_batch

    def pause_hooks(self, paused: bool = True) -> None:
        """As `LayerwiseOptimizer.pause_hooks`.

        Args:
            paused: Default True.
        """
        super().pause_hooks(paused)
        self.norms.paused = paused


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
