"""Layer-wise optimizers on mNAG. Needs torch only."""

from hf_clars.distributed.zero import UnsupportedEngineError
from hf_clars.optim.base import LayerwiseOptimizer
from hf_clars.optim.clars import CLARS, NoNormsError
from hf_clars.optim.factory import ClarsFactory
from hf_clars.optim.lars import LARS
from hf_clars.optim.loop_guard import AccumulationIgnoredError, OptimizerNotSteppedError
from hf_clars.optim.measures import LayerMeasures
from hf_clars.optim.methods import METHODS, Method, method_of
from hf_clars.optim.nag import NAG
from hf_clars.optim.process_checks import TrainsAloneError
from hf_clars.optim.signal_lars import SignalLARS

__all__ = [
    "CLARS",
    "LARS",
    "METHODS",
    "NAG",
    "AccumulationIgnoredError",
    "ClarsFactory",
    "LayerMeasures",
    "LayerwiseOptimizer",
    "Method",
    "NoNormsError",
    "OptimizerNotSteppedError",
    "SignalLARS",
    "TrainsAloneError",
    "UnsupportedEngineError",
    "method_of",
]
