"""The decision, once for each shape and process: memory, disk, the shipped file, a measurement, the cost model.

The file shipped for another card of the same compute capability is asked between the last two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from hf_clars.distributed import world_size
from hf_clars.errors import ConfigError
from hf_clars.grad_norms.choice import tables
from hf_clars.grad_norms.choice.tables import Times
from hf_clars.grad_norms.choice.timing import milliseconds
from hf_clars.grad_norms.rules import costs
from hf_clars.grad_norms.rules.costs import SHIPPED, Form, Kind, WeightUse, fastest, forms_of, predicted
from hf_clars.grad_norms.torch_traces import is_compiling

Why = Literal["memory", "disk", "shipped", "measured", "shipped, like card", "model"]
LIKE_CARD: Why = "shipped, like card"


@dataclass(frozen=True)
class Choice:
    """The form for one shape.

    Attributes:
        form: What is taken.
        why: Who said so: "memory" is an earlier run's checkpoint, or rank 0; "shipped, like card" is the file that was
            shipped for another card of the same compute capability.
        predicted: Milliseconds of each form by the cost model.
        measured: Milliseconds of each form that was ever measured on such a machine, or on that other card.
    """

    form: Form
    why: Why
    predicted: Mapping[Form, float] = field(default_factory=dict)
    measured: Mapping[Form, float] = field(default_factory=dict)


class FormChoices:
    """The forms that this process takes.

    Attributes:
        seconds: How long forms may still be measured, in all; 0: never. None (default): what the environment variable
            `HF_CLARS_MEASURE_FORMS` says, by default 0. Only rank 0 measures. What it finds is kept on disk.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._taken: dict[tuple[Kind, WeightUse], Choice] = {}
        self._before: dict[str, dict[str, Form]] = {}
        self._known: dict[Why, Times] | None = None

    def __iter__(self) -> Iterator[tuple[Kind, WeightUse, Choice]]:
        return ((*key, choice) for key, choice in self._taken.items())

    def take(self, kind: Kind, use: WeightUse, runs: Mapping[Form, Callable[[], object]] | None = None) -> Form:
        """The form for a shape: always the same in a process, unless `restore` or `share` come in between.

        Args:
            kind: Where it is asked for; not a CPU's.
            use: The shapes.
            runs: What each form would run, for a measurement; None: it cannot be measured now.

        Raises:
            ConfigError: `HF_CLARS_MEASURE_FORMS` is no number of seconds.
        """
        if is_compiling():  # a compiler wants no side effects
            return fastest(predicted(kind, use))
        choice = self._taken.get((kind, use))
        if choice is None:
            choice = self._taken[kind, use] = self._decide(kind, use, runs)
        return choice.form

    def look_up(self, kind: Kind, use: WeightUse) -> Choice:
        """What `take` has taken, or would take without measuring. Arguments as there; nothing is kept."""
        if use.positions == 1:
            return Choice("outer", "model")
        if kind == "cpu":
            return Choice(costs.cheapest_form(use, "cpu"), "model", predicted(kind, use))
        return self._taken.get((kind, use)) or self._decide(kind, use, None)

    def _decide(self, kind: Kind, use: WeightUse, runs: Mapping[Form, Callable[[], object]] | None) -> Choice:
        name, guess = str(use), predicted(kind, use)
        known = self._tables()
        found = {why: times[kind][name] for why, times in known.items() if name in times.get(kind, {})}
        measured = next(iter(found.values()), {})
        if form := self._before.get(kind, {}).get(name):
            return Choice(form, "memory", guess, measured)
        whole = {why: times for why, times in found.items() if guess.keys() <= times.keys()}  # one form says nothing
        of_like_card = whole.pop(LIKE_CARD, {})
        for why, times in whole.items():
            return Choice(fastest(times), why, guess, times)
        times = self._measure(kind, name, runs) if runs else {}
        if times:
            return Choice(fastest(times), "measured", guess, times)
        if of_like_card:
            return Choice(fastest(of_like_card), LIKE_CARD, guess, of_like_card)
        return Choice(fastest(guess), "model", guess, measured)

    def _tables(self) -> dict[Why, Times]:
        if self._known is None:
            self._known = {"disk": tables.read()}
            if tables.machine()["card"] == SHIPPED["machine"]["card"]:
                self._known["shipped"] = SHIPPED["times"]
            elif tables.capability() == SHIPPED["capability"]:
                self._known[LIKE_CARD] = SHIPPED["times"]
        return self._known

    def _measure(self, kind: Kind, name: str, runs: Mapping[Form, Callable[[], object]]) -> dict[Form, float]:
        if self.seconds is None:
            self.seconds = tables.seconds_allowed()
        first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self.seconds <= 0 or not first or capturing:
            return {}
        times, took = milliseconds(runs)
        self.seconds -= took
        if times.keys() == runs.keys():  # what found no memory today may find it tomorrow
            self._tables()["disk"].setdefault(kind, {})[name] = times
            tables.write(self._tables()["disk"])
        return times

    def measure_anew(self, seconds: float) -> None:
        """Forget all that is known, and measure.

        Args:
            seconds: How long, in all.
        """
        self.seconds, self._known = seconds, {"disk": {}}
        self.restore({})

    # ---- from run to run, from process to process ------------------------------------------------------------

    def export(self) -> dict[str, dict[str, str]]:
        """The forms taken so far, {kind: {shapes: form}}: plain values for a checkpoint. Empty on a CPU."""
        forms: dict[str, dict[str, str]] = {kind: dict(by_use) for kind, by_use in self._before.items()}
        for (kind, use), choice in self._taken.items():
            forms.setdefault(kind, {})[str(use)] = choice.form
        return forms

    def restore(self, forms: Mapping[str, Mapping[str, str]]) -> None:
        """Take the forms of an earlier run, and forget what was decided before.

        Args:
            forms: What `export` gave.

        Raises:
            ConfigError: It names forms or kinds that there are not.
        """
        for kind, by_use in forms.items():
            odd = [f"{use}: {form!r}" for use, form in by_use.items() if form not in forms_of(kind)]
            if odd or not forms_of(kind):
                raise ConfigError(
                    f"The stored forms of layers' norms are not of this hf_clars ({kind!r}: {'; '.join(odd[:2])}). "
                    "Resume with the hf_clars that wrote them, or take 'forms' out of the checkpoint's settings."
                )
        self._before = {kind: cast(dict[str, Form], dict(by_use)) for kind, by_use in forms.items()}
        self._taken.clear()

    def share(self) -> None:
        """All processes take rank 0's forms, and its times. Every process must call it; alone, it does nothing."""
        if world_size() == 1:
            return
        mine = (self.export(), self._tables())
        box: list[Any] = [mine if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, src=0)
        if dist.get_rank() > 0:
            forms, self._known = box[0]
            self.restore(forms)


form_choices = FormChoices()
"""This process's."""


def cheapest_form(use: WeightUse, device: str, *, replaces_weight_grad: bool = True) -> Form:
    """The form to take where no kernel fits. On a CPU the model alone decides.

    Args:
        use: Shapes.
        device: `tensor.device.type`.
        replaces_weight_grad: Whether the product may stand in for autograd's weight gradient.
    """
    if device == "cuda" and use.positions > 1:
        return form_choices.take("torch" if replaces_weight_grad else "torch beside", use)
    by_model = costs.cheapest_form if is_compiling() else _by_model
    return by_model(use, device, replaces_weight_grad=replaces_weight_grad)


_by_model = lru_cache(1 << 12)(costs.cheapest_form)
