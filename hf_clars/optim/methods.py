"""The methods, one row each: what arguments, cards, pictures and studies have to know of them."""

from __future__ import annotations

from dataclasses import dataclass

from hf_clars.optim.base import LayerwiseOptimizer
from hf_clars.optim.clars import CLARS
from hf_clars.optim.lars import LARS
from hf_clars.optim.nag import NAG
from hf_clars.optim.signal_lars import SignalLARS


@dataclass(frozen=True)
class Method:
    """One way to set the layers' rates.

    Attributes:
        name: What people write: the argument `method`, the name in logs.
        title: What pictures and tables show.
        optimizer: The class.
        eta: Default trust coefficient; None for a method that has none.
        measures_samples: Whether it measures the gradient norms of samples, and takes `samples`.
        formula: The rate as TeX.
        words: One sentence for a model card, after "The optimizer is".
    """

    name: str
    title: str
    optimizer: type[LayerwiseOptimizer]
    eta: float | None
    measures_samples: bool
    formula: str
    words: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "clars",
            "CLARS",
            CLARS,
            1e-2,
            True,
            r"$\gamma_k = \gamma\,\eta\,\Vert w_k\Vert\,/\,n_k$",
            "CLARS: each layer k steps with the rate `gamma_scale * eta * ||w_k|| / n_k`, `n_k` being the mean norm "
            "of the layer's per-sample gradients; it is made for large batches without warmup.",
        ),
        Method(
            "signal_lars",
            "SignalLARS",
            SignalLARS,
            1e-2,
            True,
            r"$\gamma_k = \gamma\,\eta\,f_k\,\Vert w_k\Vert\,/\,\Vert g_k\Vert$",
            "SignalLARS: each layer k steps with the rate `gamma_scale * eta * f_k * ||w_k|| / ||g_k||`; the factor "
            "`f_k` shortens the step where the samples' gradients agree, in place of a warmup.",
        ),
        Method(
            "lars",
            "LARS",
            LARS,
            1e-3,
            False,
            r"$\gamma_k = \gamma\,\eta\,\Vert w_k\Vert\,/\,\Vert g_k\Vert$",
            "LARS: each layer k steps with the rate `gamma_scale * eta * ||w_k|| / ||g_k||`.",
        ),
        Method(
            "nag",
            "mNAG",
            NAG,
            None,
            False,
            r"$\gamma_k = \gamma$ for all layers",
            "Nesterov's accelerated gradient: one rate for all layers.",
        ),
    )
}


def method_of(optimizer: LayerwiseOptimizer) -> str:
    """The name of an optimizer's method; the class's own name for one that is not in the table."""
    for method in METHODS.values():
        if type(optimizer) is method.optimizer:
            return method.name
    return type(optimizer).__name__.lower()
