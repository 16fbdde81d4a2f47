"""Layer-wise optimizers on mNAG. Needs torch only."""

from hf_clars.distributed.zero import UnsupportedEngineError
from hf_clars.optim.base import LayerwiseOptimizer
from hf_clars.optim.clars import CLARS, NoNormsError
from hf_clars.optim.lars import LARS
from hf_clars.optim.loop_guard import AccumulationIgnoredError, OptimizerNotSteppedError
from hf_clars.optim.measures import LayerMeasures
from hf_clars.optim.nag import NAG

__all__ = [
    "CLARS",
    "LARS",
    "NAG",
    "AccumulationIgnoredError",
    "LayerMeasures",
    "LayerwiseOptimizer",
    "NoNormsError",
    "OptimizerNotSteppedError",
    "UnsupportedEngineError",
]
