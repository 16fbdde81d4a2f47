"""The methods that are compared, by name: how each makes its optimizer. All minimise the same mean loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_clars.errors import ConfigError
from hf_clars.optim import CLARS, LARS, NAG
from hf_clars.records.files import nearest
from research.study.settings import RunSettings
from research.study.variants import make_variant

REFERENCE_MICRO_BATCH, REFERENCE_SAMPLES = 8, 512
"""The authors' code measures the norms of 64 micro-batches of 8."""


@dataclass(frozen=True)
class Method:
    """How a method is made.

    Attributes:
        make: (model, settings) -> optimizer with `lr` in its groups.
        fine_samples: So many samples of each batch pass in micro-batches of `fine_micro_batch`, the rest as usual.
        fine_micro_batch: See there.
    """

    make: Callable[[nn.Module, RunSettings], Optimizer]
    fine_samples: int = 0
    fine_micro_batch: int = 0


def _common(settings: RunSettings) -> dict[str, Any]:
    return {"momentum": settings.momentum, "weight_decay": settings.weight_decay, **settings.method_kwargs}


def _with_eta(settings: RunSettings) -> dict[str, Any]:
    return _common(settings) | ({} if settings.eta is None else {"eta": settings.eta})


def _nag(model: nn.Module, settings: RunSettings) -> Optimizer:
    return NAG(model, settings.rate, measure=True, **_common(settings))


def _lars(model: nn.Module, settings: RunSettings) -> Optimizer:
    return LARS(model, settings.rate, **_with_eta(settings))


def _samples(settings: RunSettings) -> int | None:
    return settings.norm_samples if 0 < settings.norm_samples < settings.batch_size else None


def _clars(model: nn.Module, settings: RunSettings) -> Optimizer:
    return CLARS(model, settings.rate, samples=_samples(settings), **_with_eta(settings))


def _reference_code(model: nn.Module, settings: RunSettings) -> Optimizer:
    """The authors' own weight decay (2e-4) unless the settings name one."""
    given = {"weight_decay": settings.weight_decay} if settings.weight_decay else {}
    eta = {} if settings.eta is None else {"eta": settings.eta}
    return CLARS.reference_code(
        model, settings.rate, momentum=settings.momentum, samples=REFERENCE_SAMPLES, **given, **eta
    )


def _variant(model: nn.Module, settings: RunSettings) -> Optimizer:
    return make_variant(
        model, settings.rate, batch_size=settings.batch_size, samples=_samples(settings), **_with_eta(settings)
    )


def _lamb(model: nn.Module, settings: RunSettings) -> Optimizer:
    """LAMB (You et al., 2020, Algorithm 2) by timm, every tensor scaled, no clipping of the global norm."""
    try:
        from timm.optim.lamb import Lamb
    except ImportError as error:
        raise ConfigError("method lamb is timm's, which is not installed: pip install 'hf_clars[timm]'.") from error
    return Lamb(
        model.parameters(),
        lr=settings.rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=None,
        always_adapt=True,
        **settings.method_kwargs,
    )


METHODS: dict[str, Method] = {
    "nag": Method(_nag),
    "lars": Method(_lars),
    "clars": Method(_clars),
    "reference_code": Method(_reference_code, REFERENCE_SAMPLES, REFERENCE_MICRO_BATCH),
    # TVLARS (arXiv 2309.14053) is LARS under a schedule of its own: schedule tvlars.
    "tvlars": Method(_lars),
    "lamb": Method(_lamb),
    "lars_times_ratio": Method(_variant),
}


def method_of(settings: RunSettings) -> Method:
    """The method that the settings name.

    Args:
        settings: Of a run.

    Returns:
        The method.

    Raises:
        ConfigError: If there is none of that name, it is TVLARS without its schedule, or passes do not split evenly.
    """
    if settings.method not in METHODS:
        raise ConfigError(f"method={settings.method!r} is unknown.{nearest(settings.method, METHODS)}")
    if (settings.method == "tvlars") != (settings.schedule == "tvlars"):
        raise ConfigError("TVLARS is LARS with its own schedule: set method and schedule to tvlars, both or neither.")
    method = METHODS[settings.method]
    if method.fine_micro_batch and settings.pass_size % method.fine_micro_batch:
        raise ConfigError(
            f"{settings.method} splits passes into micro-batches of {method.fine_micro_batch}, but micro_batch is "
            f"{settings.pass_size}: make it a multiple."
        )
    return method
