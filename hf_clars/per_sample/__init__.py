"""Per-sample gradient norms for any training loop: noise scale, hardest examples, spikes. The loop needs torch only.

What needs transformers (`PerSampleNormsCallback`) or datasets (`rank_samples`) is imported at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_clars.per_sample.indexing import INDEX_COLUMN, IndexedDataset, keep_index, with_index
from hf_clars.per_sample.log import PerSampleLog
from hf_clars.per_sample.measures import QUANTILES, StepMeasures
from hf_clars.per_sample.monitor import NormMonitor
from hf_clars.per_sample.noise_scale import NoiseScale, NoiseScaleAverage, unbiased_moments
from hf_clars.per_sample.spikes import Spike, SpikeRule

if TYPE_CHECKING:
    from hf_clars.per_sample.callback import PerSampleNormsCallback
    from hf_clars.per_sample.ranking import rank_samples

_LATER = {
    "PerSampleNormsCallback": "hf_clars.per_sample.callback",
    "rank_samples": "hf_clars.per_sample.ranking",
}

__all__ = [
    "INDEX_COLUMN",
    "QUANTILES",
    "IndexedDataset",
    "NoiseScale",
    "NoiseScaleAverage",
    "NormMonitor",
    "PerSampleLog",
    "PerSampleNormsCallback",
    "Spike",
    "SpikeRule",
    "StepMeasures",
    "keep_index",
    "rank_samples",
    "unbiased_moments",
    "with_index",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        globals()[name] = getattr(import_module(_LATER[name]), name)
        return globals()[name]
    raise AttributeError(f"module 'hf_clars.per_sample' has no attribute {name!r}")
