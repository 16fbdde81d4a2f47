"""The samples with the largest gradient norms of a window of steps."""

from __future__ import annotations

import heapq
from dataclasses import asdict, dataclass
from typing import Any

from hf_clars.per_sample.measures import StepMeasures
from hf_clars.per_sample.spikes import Carrier, carriers


@dataclass(frozen=True)
class Hard:
    """One of them, and the step that it was seen in."""

    step: int
    sample: Carrier

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"step": self.step, **asdict(self.sample)}


class Window:
    """Keeps the `top_k` hardest; a sample that comes twice counts twice, once a step."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._heap: list[tuple[float, int, int, Hard]] = []

    def add(self, step: StepMeasures) -> None:
        """Add a measured step; norms that are not finite are left to the spikes."""
        for place, sample in enumerate(carriers(step)):
            if self.top_k and sample.norm < float("inf"):
                heapq.heappush(self._heap, (sample.norm, -step.step, -place, Hard(step.step, sample)))
                if len(self._heap) > self.top_k:
                    heapq.heappop(self._heap)

    def hardest(self) -> list[Hard]:
        """Since the window began, the largest first."""
        return [entry[3] for entry in sorted(self._heap, reverse=True)]

    def clear(self) -> None:
        """Begin a new window."""
        self._heap.clear()
