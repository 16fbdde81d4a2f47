"""`LayerRateLog`: what each layer did at each step of a run, on disk as safetensors."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_clars.records import pieces
from hf_clars.records.files import RecordError, from_json, to_json
from hf_clars.records.log_file import LogFile, LogHead
from hf_clars.records.log_reader import LogReader

logger = logging.getLogger(__name__)


class LayerRateLog(LogReader):
    """Write or read the per-step, per-layer quantities of a run.

    The quantities are those of `QUANTITIES`, float32: "rate" (gamma_k), "weight_norm" (||w_k||), "grad_norm"
    (||g_k||), "mean_sample_norm" (n_k of Eq. 5 of Huo, Gu and Huang, AAAI 2021) and "ratio" (R_k = ||g_k|| / n_k);
    NaN where a method has none. The log of a method that measures the share of signal has two more, those of
    `SIGNAL_QUANTITIES`: "signal" (s_k) and "damping" (f_k). A log grows as pieces in `folder/layer_rates/` and ends as
    `folder/layer_rates.safetensors`. One process writes; any process may read at any moment. Make one by `create`,
    `resume` or `open`, not by the constructor. Reading a log that is open for writing flushes it first.

    Example:
        >>> log = LayerRateLog.create("run", layers=["conv1", "fc"], settings={"method": "clars"})
        >>> log.append(1, torch.rand(5, 2))
        >>> log.close()
        >>> LayerRateLog.open("run")["rate"].shape
        (1, 2)
    """

    def __init__(
        self, path: Path, head: LogHead, parts: list[LogFile], *, folder: Path | None = None, flush_every: int = 50
    ) -> None:
        super().__init__(path, head, parts)
        self._folder = folder  # the pieces; None: this log is for reading
        self._flush_every = flush_every
        self._buffer: list[tuple[int, torch.Tensor]] = []
        self._tail: list[LogFile] = []  # the small pieces at the end, which are still to be joined
        for part in parts:
            self._tail = [] if len(part.steps) >= pieces.FINAL_ROWS else [*self._tail, part]

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        layers: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        signal: bool = False,
        flush_every: int = 50,
    ) -> "LayerRateLog":
        """Begin a log.

        Args:
            folder: The run's folder (made if absent); the log is `layer_rates/` in it until `close`.
            layers: The K layer names, all different, in the order of the columns.
            settings: What a reader should know of the run (method, eta, batch size ...); JSON-able. Default: {}.
            signal: Keep `SIGNAL_QUANTITIES` too. Default False.
            flush_every: Write a piece every so many steps (default 50); a killed run loses fewer steps than this.

        Raises:
            RecordError: `folder` already holds a log or cannot be written, or an argument is unfit.
        """
        folder = Path(folder)
        pieces_folder = folder / pieces.FOLDER
        for existing in (pieces_folder / pieces.HEAD, folder / pieces.MERGED):
            if existing.exists():
                raise RecordError(
                    f"{existing} is a layer-rate log already. Continue it with LayerRateLog.resume, "
                    "or choose another folder."
                )
        # Through JSON and back: the writer sees the settings exactly as any later reader will.
        text = to_json(dict(settings or {}), "The settings of a layer-rate log")
        head = LogHead(tuple(layers), from_json(text, "settings"), signal)
        _check_flush_every(flush_every)
        pieces.start(pieces_folder, head)
        return cls(folder, head, [], folder=pieces_folder, flush_every=flush_every)

    @classmethod
    def set_aside(cls, folder: str | Path) -> Path | None:
        """Make room for another run's log: the one that is there gets a number, `layer_rates-1.safetensors` and up.

        Args:
            folder: The run's folder.

        Returns:
            Where the log is now; None when there was none, or it was without a step and is gone.

        Raises:
            RecordError: It could not be moved.
        """
        folder = Path(folder)
        growing, merged = folder / pieces.FOLDER, folder / pieces.MERGED
        numbers = (folder / f"{merged.stem}-{n}{merged.suffix}" for n in itertools.count(1))
        kept = None
        try:
            if merged.exists():
                kept = merged.replace(next(path for path in numbers if not path.exists()))
            if (growing / pieces.HEAD).exists():
                if len(cls.open(folder)):
                    kept = next(path for path in numbers if not path.exists())
                    pieces.merge(growing, kept)
                pieces.remove(growing)
        except OSError as error:
            raise RecordError(f"The layer-rate log in {folder} could not be moved aside: {error}.") from error
        return kept

    @classmethod
    def discard(cls, folder: str | Path) -> None:
        """Delete the pieces of a run that did not end, and that nothing can resume; a merged log is left alone.

        Args:
            folder: The run's folder.

        Raises:
            RecordError: They could not be deleted.
        """
        growing = Path(folder) / pieces.FOLDER
        try:
            if growing.is_dir():
                pieces.remove(growing)
        except OSError as error:
            raise RecordError(f"The layer-rate log in {folder} could not be deleted: {error}.") from error

    @classmethod
    def resume(
        cls, folder: str | Path, from_step: int, *, layers: Sequence[str] | None = None, flush_every: int = 50
    ) -> "LayerRateLog":
        """Continue the log of a run that goes on from a checkpoint, without the rows above its step.

        For a log without a gap, `flush` the log before each checkpoint is completed. A log that was already
        merged is continued too.

        Args:
            folder: The run's folder, as given to `create`.
            from_step: The checkpoint's step.
            layers: If given, must equal the names in the log.
            flush_every: As in `create`.

        Raises:
            RecordError: There is no log in `folder`, it is damaged before its last piece, or it has other layers.
        """
        folder = Path(folder)
        _check_flush_every(flush_every)
        head, parts = pieces.find_log(folder)
        _check_layers(folder, head.layers, layers)
        pieces_folder = folder / pieces.FOLDER
        try:
            if (pieces_folder / pieces.HEAD).exists():
                parts = pieces.cut_after(pieces_folder, from_step)
            else:
                parts = pieces.split_merged(parts[0], pieces_folder, from_step)
        except OSError as error:
            raise RecordError(f"Cannot continue the layer-rate log in {folder}: {error}.") from error
        log = cls(folder, head, parts, folder=pieces_folder, flush_every=flush_every)
        if log.last_step != from_step and from_step > 0:
            logger.warning(
                "The layer-rate log in %s ends at step %s, but the run goes on from step %d: "
                "if steps between were logged, they are lost.",
                folder,
                log.last_step,
                from_step,
            )
        return log

    def append(self, step: int, values: torch.Tensor) -> None:
        """Add one step.

        Nothing is copied and no device is waited for until `flush`: do not change `values` afterwards.

        Args:
            step: Above all steps before, not negative.
            values: [5, K], or [7, K] with `SIGNAL_QUANTITIES`: rows in the order of `quantities`, on any device; stored
                as float32.

        Raises:
            RecordError: The log is not open for writing, or the step or the shape is wrong.
        """
        if self._folder is None:
            raise RecordError(f"The layer-rate log at {self._path} is open for reading only (or closed): use resume.")
        if step < 0 or (self._last_step is not None and step <= self._last_step):
            raise RecordError(f"Step {step} cannot follow step {self._last_step}: steps of a log increase from 0 up.")
        expected = (len(self.quantities), len(self._head.layers))
        if tuple(values.shape) != expected:
            raise RecordError(
                f"Values of step {step} have shape {tuple(values.shape)}; expected {expected} (quantities, layers)."
            )
        self._buffer.append((int(step), values.detach()))
        self._last_step = int(step)
        if len(self._buffer) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Write the steps in memory to a new piece; does nothing when there are none.

        Raises:
            RecordError: The piece could not be written; the steps stay in memory for the next flush.
        """
        if self._folder is None or not self._buffer:
            return
        steps = np.array([step for step, _ in self._buffer], np.int64)
        values = torch.stack([values for _, values in self._buffer]).to("cpu", torch.float32).numpy()
        part = pieces.add_part(self._folder, self._head, steps, values)
        self._buffer.clear()
        self._rows += len(steps)
        self._parts = None
        try:
            self._tail = pieces.join_small([*self._tail, part])
        except (RecordError, OSError) as error:
            # The steps are safe already, and a log in many small pieces is as good a log.
            logger.warning("Small pieces of the layer-rate log in %s were not joined: %s", self._folder, error)
            self._tail = []

    def merge(self, path: str | Path) -> None:
        """Write all steps so far to one file at `path`; memory stays bounded by one piece, and the log goes on.

        Raises:
            RecordError: This log is not open for writing, or the file could not be written.
        """
        if self._folder is None:
            raise RecordError(f"The layer-rate log at {self._path} is open for reading only: its file can be copied.")
        self.flush()
        pieces.merge(self._folder, Path(path))

    def close(self) -> None:
        """End the log: merge it to `layer_rates.safetensors`, then delete the pieces. It can still be read.

        Raises:
            RecordError: The merged file could not be written; the pieces are kept, and `close` may be tried again.
        """
        if self._folder is None:
            return
        self.merge(self._path / pieces.MERGED)
        try:
            pieces.remove(self._folder)
        except OSError as error:
            logger.warning("The merged pieces in %s could not all be deleted: %s", self._folder, error)
        self._folder, self._parts = None, None

    def __len__(self) -> int:
        """Return T, the number of logged steps, those in memory too."""
        return self._rows + len(self._buffer)

    def _current(self) -> list[LogFile]:
        self.flush()
        return super()._current()


def _check_flush_every(flush_every: int) -> None:
    if flush_every < 1:
        raise RecordError(f"flush_every must be at least 1, not {flush_every}.")


def _check_layers(folder: Path, found: Sequence[str], expected: Sequence[str] | None) -> None:
    if expected is None or list(expected) == list(found):
        return
    missing, extra = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    raise RecordError(
        f"The layer-rate log in {folder} has {len(found)} layers, the model has {len(expected)}; only in the log: "
        f"{missing[:5] or 'none'}, only in the model: {extra[:5] or 'none'} (the order counts too). "
        "Resume with the model and the `layers` option that began the run."
    )
