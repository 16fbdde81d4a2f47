"""The paper's theory: step-size conditions, convergence bounds, and estimates of the constants they need."""

from hf_clars.theory.advice import BatchAdvice, FactorEstimate, LayerAdvice, advise, variance_factor
from hf_clars.theory.advice_table import advice_table
from hf_clars.theory.bounds import (
    corollary1_bound,
    corollary1_gamma,
    corollary2_bound,
    corollary2_gamma,
    corollary3_bound,
    theorem1_bound,
    theorem2_bound,
)
from hf_clars.theory.conditions import (
    StepConditions,
    corollary3_largest_rate,
    every_layer_conditions,
    linear_scaling_limit,
    theorem1_conditions,
    theorem2_conditions,
)
from hf_clars.theory.constants import ProblemConstants
from hf_clars.theory.lipschitz import LipschitzEstimate, SpectralNorm, estimate_lipschitz
from hf_clars.theory.variance import (
    GradientMoments,
    measure_gradient_moments,
    variance_constants,
    variance_floor,
)

__all__ = [
    "BatchAdvice",
    "FactorEstimate",
    "GradientMoments",
    "LayerAdvice",
    "LipschitzEstimate",
    "ProblemConstants",
    "SpectralNorm",
    "StepConditions",
    "advice_table",
    "advise",
    "corollary1_bound",
    "corollary1_gamma",
    "corollary2_bound",
    "corollary2_gamma",
    "corollary3_bound",
    "corollary3_largest_rate",
    "estimate_lipschitz",
    "every_layer_conditions",
    "linear_scaling_limit",
    "measure_gradient_moments",
    "theorem1_bound",
    "theorem1_conditions",
    "theorem2_bound",
    "theorem2_conditions",
    "variance_constants",
    "variance_factor",
    "variance_floor",
]
