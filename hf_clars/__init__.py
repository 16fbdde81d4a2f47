"""Large-batch training without warmup: CLARS, LARS and exact per-sample gradient norms.

Importing this package registers its small networks with transformers' Auto classes. What needs the Trainer, and
`theory`, is imported at first use. The optimizers and the norms work where nothing but torch is installed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.layers import ParamLayer, param_layers
from hf_clars.optim import CLARS, LARS, NAG, ClarsFactory, SignalLARS
from hf_clars.version import __version__

if find_spec("transformers") is not None:
    from hf_clars import models

if TYPE_CHECKING:
    from hf_clars import theory
    from hf_clars.per_sample import NormMonitor, PerSampleNormsCallback, keep_index, rank_samples, with_index
    from hf_clars.records import LayerRateLog
    from hf_clars.trainer import ClarsTrainer, ClarsTrainingArguments

_LATER = {
    "ClarsTrainer": "hf_clars.trainer",
    "ClarsTrainingArguments": "hf_clars.trainer",
    "LayerRateLog": "hf_clars.records",
    "NormMonitor": "hf_clars.per_sample",
    "PerSampleNormsCallback": "hf_clars.per_sample",
    "keep_index": "hf_clars.per_sample",
    "rank_samples": "hf_clars.per_sample",
    "with_index": "hf_clars.per_sample",
}

__all__ = [
    "CLARS",
    "LARS",
    "NAG",
    "ClarsFactory",
    "ClarsTrainer",
    "ClarsTrainingArguments",
    "LayerRateLog",
    "NormMonitor",
    "ParamLayer",
    "PerSampleGradNorms",
    "PerSampleNormsCallback",
    "SignalLARS",
    "__version__",
    "keep_index",
    "models",
    "param_layers",
    "rank_samples",
    "theory",
    "with_index",
]


def __getattr__(name: str) -> Any:
    if name == "theory":
        return import_module("hf_clars.theory")
    if name in _LATER:
        globals()[name] = getattr(import_module(_LATER[name]), name)  # found without this function from now on
        return globals()[name]
    raise AttributeError(f"module 'hf_clars' has no attribute {name!r}")
