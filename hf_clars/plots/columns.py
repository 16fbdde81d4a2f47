"""Steps gathered into columns, the range of a log scale, and names as labels: what pictures and page share."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.floating[Any]]

MAX_DECADES = 8  # a dying layer's 1e-30 must not squeeze all the others into one colour


@dataclass(frozen=True)
class Columns:
    """The steps [T] of a log (T > 0), gathered into at most `limit` columns of equally many steps."""

    steps: NDArray[np.int64]
    limit: int

    @property
    def width(self) -> int:
        """How many steps one column holds."""
        return math.ceil(len(self.steps) / self.limit)

    @property
    def count(self) -> int:
        """The number of columns."""
        return math.ceil(len(self.steps) / self.width)

    @property
    def edges(self) -> NDArray[np.float64]:
        """Where columns begin and end on the axis of steps, [columns + 1]: half-way between neighbours."""
        steps = self.steps.astype(np.float64)
        between = (steps[1:] + steps[:-1]) / 2
        margin = (between[0] - steps[0], steps[-1] - between[-1]) if len(between) else (0.5, 0.5)
        inner = between[self.width - 1 :: self.width]
        return np.concatenate([[steps[0] - margin[0]], inner, [steps[-1] + margin[1]]])

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each column, [columns]."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    def reduce(self, values: Values, how: Callable[..., Any]) -> Values:
        """Return values [T, ...] as [columns, ...], each column reduced by `how`, which skips NaN."""
        missing = self.count * self.width - len(values)
        padded = np.concatenate([values, np.full((missing, *values.shape[1:]), np.nan, values.dtype)])
        return quietly(how, padded.reshape(self.count, self.width, *values.shape[1:]))


def quietly(how: Callable[..., Any], values: Values) -> Values:
    """Return `how(values, axis=1)`; a row without any number gives NaN, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(how(values, axis=1))


def on_log_scale(values: Values) -> NDArray[np.bool_]:
    """Return where `values` can stand on a log scale: finite and above zero."""
    return np.isfinite(values) & (values > 0)


def log_range(values: Values, upper: float | None = None) -> tuple[float, float]:
    """Return the ends (low, high) of a log scale for values [T, K] with at least one that can stand on it.

    It reaches from the smallest to the largest layer, but leaves 1% of the steps below and 0.5% above, and
    spans at most `MAX_DECADES` decades: the last steps of a decaying schedule, or one spike, shall not
    squeeze all the rest. A narrow range is widened to a factor of 4, so that at least one tick has a number.

    Args:
        values: [T, K].
        upper: The end of the scale; default: from the values.
    """
    usable = np.where(on_log_scale(values), values, np.nan).astype(np.float64)
    high = float(np.nanquantile(quietly(np.nanmax, usable), 0.995)) if upper is None else upper
    low = float(np.nanquantile(quietly(np.nanmin, usable), 0.01))
    low = min(max(low, high / 10**MAX_DECADES), high)
    if high / low < 4:
        middle = math.sqrt(low * high)
        low, high = (middle / 2, middle * 2) if upper is None else (high / 4, high)
    return low, high


def common_prefix(names: Sequence[str]) -> str:
    """Return the words that layer names have in common at their beginning, with the last dot; "" if there are none.

    A few names may lack them (a classifier beside a backbone): these keep all their words. What is left of each name
    still tells it from all the others, and does not begin with a number.
    """
    prefix = ""
    while True:
        inside = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        words = Counter(name.split(".")[0] for name in inside if "." in name)
        if len(names) < 2 or not words:
            return prefix
        word, count = words.most_common(1)[0]
        longer = f"{prefix}{word}."
        left = [name.removeprefix(longer) for name in names]
        numbered = any(short[:1].isdigit() for short, name in zip(left, names, strict=True) if short != name)
        if count < 0.8 * len(names) or numbered or len(set(left)) < len(left):
            return prefix
        prefix = longer


def shortened(name: str, limit: int = 40) -> str:
    """Return a name as a label: one line of at most `limit` characters.

    Module paths differ in their numbers and their end, so the words are abbreviated to three letters from the
    left, as many as needed; what is still too long is cut in the middle.
    """
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    words = name.split(".")
    for index, word in enumerate(words[:-1]):
        if len(".".join(words)) <= limit:
            break
        words[index] = word[:3]
    name = ".".join(words)
    head = limit // 3
    return name if len(name) <= limit else f"{name[:head]}…{name[-(limit - head - 1) :]}"
