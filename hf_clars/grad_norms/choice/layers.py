"""For people: which form each layer of a model takes, why, and how long it should take and took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.choice.forms import Choice
from hf_clars.grad_norms.registry import find_rule


@dataclass(frozen=True)
class LayerForm:
    """One call of a Linear or convolution layer.

    Attributes:
        layer: Its name in the model.
        use: Its shapes.
        choice: The form of its weight's norms.
    """

    layer: str
    use: str
    choice: Choice


@dataclass(frozen=True)
class LayerForms:
    """A table, one line a call; `print` shows it. Times are milliseconds."""

    rows: Sequence[LayerForm]

    def __str__(self) -> str:
        cells = [("layer", "shapes", "form", "why", "predicted", "measured")]
        for row in self.rows:
            choice = row.choice
            ms = [" ".join(f"{f} {t:.3f}" for f, t in t.items()) or "-" for t in (choice.predicted, choice.measured)]
            cells.append((row.layer, row.use, choice.form, choice.why, ms[0], ms[1]))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def layer_forms(model: nn.Module, *args: Any, **kwargs: Any) -> LayerForms:
    """Call the model once in evaluation mode, without gradients, and say for each layer which form its norms take.

    What is not decided yet is looked up, and not measured. Call it as training does: on the device, under autocast.

    Args:
        model: The model; it is left as it was.
        args: What to call it with.
        kwargs: The same.
    """
    rows: list[LayerForm] = []

    def note(name: str, rule: Any, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            use, choice = rule.choice(module, given[0].to(output.dtype), output)
            rows.append(LayerForm(name, str(use), choice))

    handles, modes = [], {module: module.training for module in model.modules()}
    for name, module in model.named_modules():
        rule = find_rule(module)
        if hasattr(rule, "choice"):
            handles.append(
                module.register_forward_hook(lambda m, given, out, n=name, r=rule: note(n, r, m, given, out))
            )
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return LayerForms(rows)
