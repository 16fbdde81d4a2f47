"""What a tracker has learned of a model: how each parameter is measured, why so, and what that costs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hf_clars.grad_norms.torch_internals import NOTHING

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterWay:
    """How one parameter is measured.

    Attributes:
        layer: Its layer.
        parameter: Its name in the model.
        ways: One for each kind of use that was seen; none if no use was seen.
        share: Part of the time that the norms of all parameters took, 0 to 1; None if no pass was timed. A module's
            parameters share its time equally. Where the weight gradient comes from the same product, its time is in it.
    """

    layer: str
    parameter: str
    ways: tuple[str, ...]
    share: float | None = None


@dataclass(frozen=True)
class Explanation:
    """A table, one line a parameter; `print` shows it.

    Attributes:
        parameters: In the order of the layers.
    """

    parameters: Sequence[ParameterWay]

    def __str__(self) -> str:
        width = max((len(p.parameter) for p in self.parameters), default=0)
        return "\n".join(
            f"{p.parameter:<{width}}  {'' if p.share is None else f'{p.share:6.1%}  '}"
            f"{'; '.join(p.ways) or 'no use seen so far'}"
            for p in self.parameters
        )


class LearnedWays:
    """The ways in which parameters were measured.

    Args:
        name_of: A parameter's name.

    Attributes:
        new: Whether a way is new since this was last set to False.
    """

    def __init__(self, name_of: Callable[[nn.Parameter], str]) -> None:
        self._name_of = name_of
        self._seen: set[object] = set()
        self._words: dict[nn.Parameter, dict[str, None]] = {}
        self.new = False

    def are_new(self, keys: set[object]) -> bool:
        """Whether one of these ways of measuring was not seen before; they are known from now on."""
        if keys <= self._seen:
            return False
        self._seen |= keys
        self.new = True
        return True

    def note(self, words: str, params: Iterable[nn.Parameter]) -> None:
        """Some parameters are measured in this way; said in the debug log where it is new."""
        for param in params:
            known = self._words.setdefault(param, {})
            if words not in known:
                known[words] = None
                logger.debug("%s: %s", self._name_of(param), words)

    def of(self, param: nn.Parameter) -> tuple[str, ...]:
        """All ways of one parameter."""
        return tuple(self._words.get(param, ()))

    def forget(self) -> None:
        """Other layers are measured now."""
        self._seen.clear()
        self._words.clear()


class CallTimes:
    """How long the norms of each call took, on its device."""

    def __init__(self) -> None:
        self._taken: list[tuple[list[nn.Parameter], Callable[[], float]]] = []

    @contextmanager
    def taking(self, params: Iterable[nn.Parameter], device: torch.device) -> Iterator[None]:
        """Time what happens inside; on a CUDA device by events, without waiting for it.

        Args:
            params: Whose norms are taken.
            device: Where.
        """
        if device.type != "cuda":
            begun = time.perf_counter()
            yield
            seconds = time.perf_counter() - begun
            self._taken.append((list(params), lambda: seconds))
            return
        with torch.cuda.device(device):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
        self._taken.append((list(params), lambda: _between(first, last)))

    def shares(self) -> dict[nn.Parameter, float]:
        """Each parameter's part of the whole time; empty if nothing was timed. Waits for the device."""
        each: dict[nn.Parameter, float] = {}
        for params, seconds in self._taken:
            for param in params:
                each[param] = each.get(param, 0.0) + seconds() / len(params)
        whole = sum(each.values())
        return {param: t / whole for param, t in each.items()} if whole else {}


def _between(first: torch.cuda.Event, last: torch.cuda.Event) -> float:
    last.synchronize()
    return first.elapsed_time(last)


def timed(
    times: CallTimes | None, params: Iterable[nn.Parameter], device: torch.device
) -> AbstractContextManager[None]:
    """`times.taking(...)`, if there are times to be taken."""
    return NOTHING if times is None else times.taking(params, device)
