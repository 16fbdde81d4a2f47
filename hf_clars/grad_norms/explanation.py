"""What a tracker has learned of a model: how each parameter is measured, and why so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterWay:
    """How one parameter is measured.

    Attributes:
        layer: Its layer.
        parameter: Its name in the model.
        ways: One for each kind of use that was seen; none if no use was seen.
    """

    layer: str
    parameter: str
    ways: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """A table, one line a parameter; `print` shows it.

    Attributes:
        parameters: In the order of the layers.
    """

    parameters: Sequence[ParameterWay]

    def __str__(self) -> str:
        width = max((len(p.parameter) for p in self.parameters), default=0)
        lines = [f"{p.parameter:<{width}}  {'; '.join(p.ways) or 'no use seen so far'}" for p in self.parameters]
        return "\n".join(lines)
