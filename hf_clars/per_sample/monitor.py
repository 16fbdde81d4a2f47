"""`NormMonitor`: which steps are measured, and what becomes of what was measured. The loop may be anyone's."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_clars.errors import ConfigError
from hf_clars.grad_norms.resumed import Proven
from hf_clars.layers import LayerMode, ParamLayer
from hf_clars.per_sample.attached import AttachedNorms, LocalSamples, NothingMeasuredError
from hf_clars.per_sample.gradient import BeforeZeroSteps, GradientNotHereError, before_zero_steps, gradient_squares
from hf_clars.per_sample.indexing import INDEX_COLUMN, IndexTaker, checked_index
from hf_clars.per_sample.log import PerSampleLog
from hf_clars.per_sample.measures import StepMeasures, step_measures
from hf_clars.per_sample.noise_scale import NoiseScaleAverage
from hf_clars.per_sample.norm_layers import Coupling, norm_layers
from hf_clars.per_sample.setup import WATCHED, any_process, check_settings, log_in, make_room, partition_of, watcher_of
from hf_clars.per_sample.spikes import NAMED, Spike, SpikeRule
from hf_clars.per_sample.window import Hard, Window

logger = logging.getLogger(__name__)


class NormMonitor:
    """Exact per-sample gradient norms of every N-th training step, for any loop and any optimizer.

    In a plain loop::

        monitor = NormMonitor(model, every=50, top_k=20)
        for batch in loader:
            with monitor.batch(index=batch.pop("sample_index")):
                model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()

    With accelerate, and its accumulation::

            with accelerator.accumulate(model):
                with monitor.batch(last=accelerator.sync_gradients):
                    accelerator.backward(model(**batch)["loss"])
                ...  # clip, step

    The batch gradient is read where the block of the last micro-batch ends, so clip and step after it (or inside, if
    you call `monitor.measure()` first). Give it the module itself, not a launcher's wrapper.

    Args:
        model: The module that is trained, on its device.
        every: Steps between two measured ones; the first is measured too. Default 50.
        top_k: How many of the samples with the largest whole-network norms to name. Default 20; 0: none.
        noise_scale: Read the batch gradient too: noise scale, share of signal and R_k. Default True.
        decay: How much of the noise scale's averages a measured step keeps. Default 0.9.
        layers: `"module"` (default), `"tensor"`, or a partition.
        norm_layers_only: The cheap mode: measure the normalisation layers only. Default False.
        folder: Where to keep the log, `per_sample_norms/`; None (default): nowhere.
        flush_every: Measured steps between two writes of the log. Default 20.
        index_column: Column of the batch that holds the data set's indices; it is taken out before the model sees it.
        strict: An error of the measuring ends the training. Default False: it is reported once, and measuring ends.
        on_spike: Called with each `Spike`, on every process.
        first_step: Steps that were taken before, in a run that is resumed. Default 0.
        window_began: In a run that is resumed, after which step the window began that it was in. Default: `first_step`.
        proven: In a run that is resumed, the `proven_calls()` before: it then rounds gradients as it would have.
        optimizer: For the noise scale under DeepSpeed's ZeRO: the optimizer that `accelerator.prepare` returned, or
            DeepSpeed's engine, which must step inside the block. Elsewhere it is not looked at.
        run: Any object that tells this run from others: a monitor of another run of the model is closed, not refused.

    Attributes:
        last: The last measured step, or None.
        ended: Why measuring has ended before the training, or None.
        knows_indices: Whether any batch came with its samples' indices.
        early: What reads the batch gradient before DeepSpeed's ZeRO steps, in a measured step; None elsewhere.

    Raises:
        ConfigError: For settings out of range, a model without trainable parameters, or one that another monitor
            watches already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        top_k: int = 20,
        noise_scale: bool = True,
        decay: float = 0.9,
        layers: LayerMode | Sequence[ParamLayer] = "module",
        norm_layers_only: bool = False,
        folder: str | Path | None = None,
        flush_every: int = 20,
        index_column: str = INDEX_COLUMN,
        strict: bool = False,
        on_spike: Callable[[Spike], None] | None = None,
        first_step: int = 0,
        window_began: int | None = None,
        proven: Proven | None = None,
        optimizer: Any = None,
        run: Any = None,
    ) -> None:
        taken: dict[str, Any] = {"layers": layers, "index_column": index_column, "flush_every": flush_every}
        check_settings(every=every, top_k=top_k, decay=decay, **taken)
        model = make_room(model, run)
        self.every, self.model, self.run, self.norm_layers_only = every, model, run, norm_layers_only
        self.strict, self.with_gradient, self.top_k = strict, noise_scale, top_k
        partition = partition_of(model, layers)
        self.layers = norm_layers(model, partition) if norm_layers_only else partition
        if not self.layers:
            raise ConfigError(f"{type(model).__name__} has no trainable parameter whose gradients could be measured.")
        names = [layer.name for layer in self.layers]
        settings = {"every": every, "decay": decay, "norm_layers_only": norm_layers_only}
        self._log = log_in(folder, names, settings, first_step)
        self.noise = NoiseScaleAverage(len(self.layers), decay=decay)
        self._flush_every, self._on_spike, self._engine, self._proven = flush_every, on_spike, optimizer, proven
        self._rule, self._window = SpikeRule(names), Window(top_k)
        self._attached: AttachedNorms | None = None
        self.early: BeforeZeroSteps | None = None
        self._measuring = self._stopped = self.knows_indices = False  # the first two on all processes alike
        self._coupling = Coupling(model, tell=noise_scale)
        self.step = first_step
        self.last: StepMeasures | None = None
        self.ended: str | None = None
        self._taker: IndexTaker | None = IndexTaker(model, index_column, self.note_index)
        if self._log is not None and first_step and PerSampleLog.is_in(self._log.folder.parent):
            for row in self._log.rows():  # averages and window of a run that is resumed are those that it had
                self._learn(row, in_window=row.step > (first_step if window_began is None else window_began))
                self.last = row
        WATCHED[model] = weakref.ref(self)

    # ---- one step --------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the step that comes is to be measured."""
        number = self.step + 1
        return not self._stopped and (number == 1 or number % self.every == 0)

    @property
    def measures_now(self) -> bool:
        """Whether the step that is under way is measured."""
        return self._measuring

    @contextmanager
    def batch(self, index: Tensor | None = None, *, last: bool = True, loss_scale: float = 1.0) -> Iterator[None]:
        """Around the forward and backward pass of a (micro-)batch.

        Args:
            index: The data set's index of each sample, [B]; None: the batch's index column, if the model is called
                with it.
            last: Whether the optimizer steps after it. Default True; False for all but the last of accumulated ones.
            loss_scale: What the loss was multiplied with (fp16): `scaler.get_scale()`.
        """
        self.begin()
        self.note_index(index)
        yield
        self.end_pass()
        if last:
            self.measure(loss_scale=loss_scale)
            self.end_step()

    def begin(self) -> None:
        """Before the forward pass of a step's first micro-batch; further calls do nothing."""
        if self._attached is None and self.ended is None and not self._stopped:
            with self._guarded():
                # Also before a step that is not measured: a model that is compiled must know the hooks from the start.
                given: dict[str, Any] = {"on_error": None if self.strict else self.end, "proven": self._proven}
                self._attached = AttachedNorms(self.model, self.layers, paused=True, **given)
        if self._measuring or not self.due:
            return
        self._measuring = True
        if self.with_gradient:
            with self._guarded():
                self.early = before_zero_steps(self.layers, self._engine)
        with self._guarded():
            if self._attached is not None:
                self._attached.resume()

    def note_index(self, index: Any) -> None:
        """The data set's indices of the pass that comes, or of the one that has just begun; None: nothing is known."""
        attached = self._attached
        if attached is None:
            return
        with self._guarded():
            if self._taker is not None and self._taker.meets_compiler:
                attached.keep_hooks()
            if index is not None and self._measuring:
                attached.note_index(checked_index(index))
                self.knows_indices = True

    def end_pass(self, loss: Tensor | None = None) -> None:
        """After the backward pass of each micro-batch."""
        if self._attached is not None and self._measuring:
            with self._guarded():
                self._attached.end_pass(loss)

    def measure(self, *, factor: Callable[[], Tensor] | None = None, loss_scale: float = 1.0) -> StepMeasures | None:
        """After the last micro-batch's backward pass, while `p.grad` is there: read, and pause.

        Args:
            factor: Gives what gradients have been multiplied with since `backward()`; default: nothing.
            loss_scale: What the loss was multiplied with.

        Returns:
            The step's measures, or None for a step that is not measured.
        """
        if not self._measuring:
            return None
        self._measuring = False
        early, self.early = self.early, None
        if early is not None:
            early.remove()
        local = None
        if self._attached is not None:
            if self.ended is None:
                with self._guarded():
                    local = self._attached.read()
            self._attached.pause(stay=self.every == 1)
        if self._any_process_failed(local is None or self.ended is not None) or local is None:
            self._detach()
            return None
        with self._guarded():
            squares = early.squares() if early else gradient_squares(self.layers) if self.with_gradient else None
            self._take(local, squares, factor, loss_scale)
            return self.last
        return None

    def _any_process_failed(self, here: bool) -> bool:
        """Whether a process cannot measure: then none goes on, since all must take part in the sums."""
        failed = any_process(here, self.layers[0].params[0].device)
        if failed and self.ended is None:
            self.end(NothingMeasuredError("Another process could not measure, and says why."))
        self._stopped = failed
        return failed

    def _take(
        self, local: LocalSamples, squares: Tensor | None, factor: Callable[[], Tensor] | None, loss_scale: float
    ) -> None:
        times = factor() if factor is not None and squares is not None else None
        if squares is not None and times is not None:
            squares = squares / times.to(squares).square()
        top_k = max(self.top_k, NAMED)  # a spike names its samples also where windows do not
        found = step_measures(
            self.step + 1, local, squares, top_k=top_k, independent=self._coupling.none(), loss_scale=loss_scale
        ).on_host()
        if not found.samples:
            raise NothingMeasuredError(
                f"Step {found.step} gave no samples: no gradient came back through a call of "
                f"{type(self.model).__name__} with the batch first. Call the module that the monitor was given, and "
                "compute the loss from its output."
            )
        if times is not None and found.finite and bool(found.sample_square.sum() > 0) and not bool(times == times):
            raise GradientNotHereError(
                f"Step {found.step}: after backward() the gradients were changed by something else than a factor "
                "(clipping by value, noise), so they are not the batch's: set noise_scale=False."
            )
        self.last = found
        for spike in self._learn(found):
            logger.warning("%s", spike.sentence())
            if self._on_spike is not None:
                self._on_spike(spike)
        if self._log is not None:
            self._log.append(found)
            if found.step == 1 or (found.step // self.every) % self._flush_every == 0:
                self._log.flush()

    def _learn(self, found: StepMeasures, *, in_window: bool = True) -> list[Spike]:
        if found.independent:
            self.noise.update(found.batch_square, found.sample_square, found.samples)
        if in_window:
            self._window.add(found)
        return self._rule.look(found)

    def end_step(self) -> None:
        """After the optimizer's step, measured or not."""
        self.step += 1

    # ---- what was found --------------------------------------------------------------------------------------

    def hardest(self) -> list[Hard]:
        """The samples with the largest norms since the window began, the largest first, at most `top_k`."""
        return self._window.hardest()

    def new_window(self) -> None:
        """Begin a new window."""
        self._window.clear()

    def proven_calls(self) -> Proven:
        """What a checkpoint keeps, as JSON takes it, so that a run that resumes rounds its gradients as this one."""
        return (self._proven or {}) if self._attached is None else self._attached.proven

    # ---- errors and the end ----------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Let errors of the measuring end the measuring, and not the training."""
        try:
            yield
        except Exception as error:
            if self.strict:
                self._detach()
                raise
            self.end(error)

    def end(self, error: Exception) -> None:
        """Say once that an error ends the measuring, which the next measured step does on all processes alike.

        Args:
            error: What happened.
        """
        if self.ended is None:
            self.ended = f"{type(error).__name__}: {error}"
            logger.warning(
                "Per-sample norms are no longer measured, and training goes on. %s (strict=True would have stopped.)",
                self.ended,
            )

    def _detach(self) -> None:
        if self.early is not None:
            self.early.remove()
            self.early = None
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    def flush(self) -> None:
        """Write the log."""
        if self._log is not None:
            with self._guarded():
                self._log.flush()

    def close(self) -> None:
        """Take every hook off the model, and write the log."""
        self._detach()
        if self._taker is not None:
            self._taker.remove()
            self._taker = None
        if watcher_of(self.model) is self:
            del WATCHED[self.model]
        self.flush()

    def __enter__(self) -> NormMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
