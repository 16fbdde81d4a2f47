"""Per-sample gradient norms by layer, out of an ordinary backward pass. Needs torch only."""

from hf_clars.grad_norms import rules  # noqa: F401  registers them
from hf_clars.grad_norms.errors import (
    BatchAxisError,
    MixedDevicesError,
    SecondBackwardError,
    SumCheckError,
    UncoveredParameterError,
)
from hf_clars.grad_norms.explanation import Explanation
from hf_clars.grad_norms.forward_pass import NormTotals
from hf_clars.grad_norms.microbatch import MicroBatchGradNorms
from hf_clars.grad_norms.registry import LayerRule, find_rule, register_rule, registered_rules, unregister_rule
from hf_clars.grad_norms.tracker import PerSampleGradNorms

__all__ = [
    "BatchAxisError",
    "Explanation",
    "LayerRule",
    "MicroBatchGradNorms",
    "MixedDevicesError",
    "NormTotals",
    "PerSampleGradNorms",
    "SecondBackwardError",
    "SumCheckError",
    "UncoveredParameterError",
    "find_rule",
    "register_rule",
    "registered_rules",
    "unregister_rule",
]
