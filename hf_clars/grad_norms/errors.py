"""What can be wrong with a model or a loop, as seen by the norm hooks."""

from __future__ import annotations

from hf_clars.errors import HfClarsError

WITHOUT_SAMPLES = "use CLARS(model, estimator='microbatch'), which takes norms of whole passes"
IN_A_FORWARD = (
    "Call the model itself: where a method of it is called in its place (encode, log_prob, forward), put that call "
    "into the forward of a module around the model, and make the norms, or the optimizer, of that module"
)
TIME_FIRST = (
    "The model seems to be called with time first, and the batch second. Rows of the first axis are taken for samples: "
    "norms are those of steps then. Put the model into a module whose forward takes and returns the batch first, and "
    "make the norms, or the optimizer, of that module"
)


class UncoveredParameterError(HfClarsError, RuntimeError):
    """A trainable parameter gets a gradient by a way that no layer rule sees."""


class BatchAxisError(HfClarsError, ValueError):
    """A module's input or output does not have the batch on its first axis."""


class SecondBackwardError(HfClarsError, RuntimeError):
    """`backward()` ran twice through one forward pass."""


class SharedStatisticsError(HfClarsError, RuntimeError):
    """A normalisation takes its statistics over several processes, which couples samples that no rule sees together."""


class MixedDevicesError(HfClarsError, ValueError):
    """The model's layers are on different devices."""


class LayerRuleError(HfClarsError, TypeError):
    """A layer rule gives something else than it is asked for."""


class SumCheckError(HfClarsError, RuntimeError):
    """The samples' gradients of a parameter do not add up to its batch gradient."""
