"""The layer-rate log of a run, with R_k for methods that do not measure it themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.optim import LayerMeasures, LayerwiseOptimizer
from hf_clars.optim.clars import CLARS
from hf_clars.optim.rates import mean_sample_norm
from hf_clars.records import LayerRateLog
from research.study.loop import Training

OBSERVED_SAMPLES = 512
"""LARS and mNAG do without n_k: for the log it is measured from so many samples of each batch."""


class LayerLogger:
    """Logs a run's layers: an observer of `research.study.loop.train`.

    Args:
        folder: Where to; must hold no log yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: LayerRateLog | None = None

    def __call__(self, training: Training) -> Callable[[int], None] | None:
        """Begin; None for optimizers without layers."""
        optimizer = training.optimizer
        if not isinstance(optimizer, LayerwiseOptimizer):
            return None
        settings = dataclasses.asdict(training.settings)
        log = LayerRateLog.create(self.folder, layers=optimizer.layer_names, settings=settings, flush_every=1000)
        norms = _norms(training.model, optimizer)
        self.log = log

        def after_update(step: int) -> None:
            measures = optimizer.last_step
            assert measures is not None
            log.append(step, (measures if norms is None else _with_ratio(measures, norms)).stacked())

        return after_update

    def close(self) -> None:
        """End the log."""
        if self.log is not None:
            self.log.close()


def _norms(model: nn.Module, optimizer: LayerwiseOptimizer) -> PerSampleGradNorms | None:
    if isinstance(optimizer, CLARS):
        return None
    return PerSampleGradNorms(model, layers=optimizer.partition, samples=OBSERVED_SAMPLES, keep_per_sample=False)


def _with_ratio(measures: LayerMeasures, norms: PerSampleGradNorms) -> LayerMeasures:
    totals = norms.totals()
    norms.reset()
    assert totals is not None
    n = mean_sample_norm(
        totals.norms,
        totals.squares,
        measures.grad_norm,
        captured=totals.captured,
        total=totals.total,
        norm="mean",
    )
    return dataclasses.replace(measures, mean_sample_norm=n, ratio=measures.grad_norm / n)
