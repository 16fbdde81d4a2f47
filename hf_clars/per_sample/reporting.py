"""Where a Trainer's run reports to: numbers for its log and its trackers, and lines of JSON beside the log."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_clars.per_sample.log import FOLDER
from hf_clars.per_sample.measures import QUANTILES
from hf_clars.per_sample.monitor import NormMonitor
from hf_clars.per_sample.spikes import Spike
from hf_clars.per_sample.window import Hard

logger = logging.getLogger(__name__)

WINDOWS, SPIKES = "windows.jsonl", "spikes.jsonl"


def model_values(monitor: NormMonitor) -> dict[str, float]:
    """The whole model's values, by name; what is not finite (a noise scale that is not known yet) is left out."""
    assert monitor.last is not None
    values = {
        f"per_sample/norm_p{round(100 * level):02d}": float(value)
        for level, value in zip(QUANTILES, monitor.last.quantiles, strict=True)
    }
    if monitor.noise.steps:
        read = monitor.noise.layer(monitor.noise.read(), -1)
        values |= {
            "per_sample/noise_scale": read["value"],
            "per_sample/noise_scale_low": read["low"],
            "per_sample/noise_scale_high": read["high"],
            "per_sample/signal_share": read["share"],
        }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def layer_values(monitor: NormMonitor) -> dict[str, float]:
    """Noise scale, share of signal and R_k of each layer, by name."""
    assert monitor.last is not None
    read = monitor.noise.read()
    columns = {"R": monitor.last.ratio, "noise_scale": read.value, "signal_share": read.share}
    return {
        f"per_sample/{quantity}/{layer.name}": float(values[k])
        for quantity, values in columns.items()
        for k, layer in enumerate(monitor.layers)
        if math.isfinite(float(values[k]))
    }


class Reporter:
    """Sends values to the trackers of `report_to`, and keeps windows and spikes as lines of JSON.

    Trainer gives callbacks no way to add to what its own trackers are sent, so this speaks to them directly: to the run
    of trackio or wandb that Trainer has opened, and, as tensorboard has no such thing, with a writer of its own.

    Args:
        args: Trainer's arguments.
        state: Trainer's state.
        folder: The output folder; None: no files.
    """

    def __init__(self, args: Any, state: Any, folder: Path | None) -> None:
        wanted = args.report_to if isinstance(args.report_to, list) else [args.report_to]
        self._main = bool(state.is_world_process_zero)
        self._trackers = [name for name in ("trackio", "wandb") if name in wanted]
        self._tensorboard = "tensorboard" in wanted
        self._writer: Any = None
        self._output = Path(str(args.output_dir))
        self._folder = None if folder is None else folder / FOLDER
        if self._main and self._folder is not None:
            for name in (WINDOWS, SPIKES):
                _cut(self._folder / name, int(state.global_step))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send values, in the main process."""
        named = {f"train/{name}": value for name, value in values.items()}
        for name in self._trackers:
            tracker = sys.modules.get(name)  # Trainer has imported it if it reports to it
            if tracker is not None:
                self._try(name, lambda t=tracker: t.log({**named, "train/global_step": step}))
        if self._tensorboard:
            self._try("tensorboard", lambda: self._to_tensorboard(named, step))

    def _to_tensorboard(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            place = os.environ.get("TENSORBOARD_LOGGING_DIR") or self._output / "runs" / FOLDER
            self._writer = SummaryWriter(log_dir=str(place))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def keep_window(self, step: int, hardest: Sequence[Hard]) -> None:
        """Keep a window's hardest examples, in the main process."""
        self._line(WINDOWS, {"step": step, "hardest": [hard.record() for hard in hardest]})

    def keep_spike(self, spike: Spike) -> None:
        """Keep a spike, and raise trackio's alert where trackio is used; the main process does."""
        if not self._main:
            return
        self._line(SPIKES, spike.record())
        trackio = sys.modules.get("trackio") if "trackio" in self._trackers else None
        if trackio is not None:
            title = f"Spike of the {spike.what} at step {spike.step}"
            self._try("trackio", lambda: trackio.alert(title=title, text=spike.sentence()))

    def _line(self, name: str, record: dict[str, Any]) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_without_nan(record)) + "\n")
        except OSError as error:
            logger.warning("%s could not be written, and training goes on: %s.", self._folder / name, error)

    def _try(self, name: str, send: Any) -> None:
        """A tracker that fails is reported once, and gets nothing more."""
        try:
            send()
        except Exception as error:
            logger.warning("%s took no per-sample norms, and gets none from now on: %s", name, error)
            self._trackers = [other for other in self._trackers if other != name]
            self._tensorboard = self._tensorboard and name != "tensorboard"

    def close(self) -> None:
        """Close what was opened here."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _without_nan(value: Any) -> Any:
    """JSON has no word for NaN and infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, step: int) -> None:
    """Drop the lines of later steps: the run is resumed, or begins anew."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off
    path.write_text("".join(kept), encoding="utf-8")
