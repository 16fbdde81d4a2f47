"""The cost model against the clock, layer by layer: what each form of a weight's norms should take, and takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hf_clars.bench.networks import Network
from hf_clars.bench.timing import alternate
from hf_clars.grad_norms.norm_math import squared_sum
from hf_clars.grad_norms.rules.convolution import ConvolutionRule, convolution_squared_norm, convolution_use
from hf_clars.grad_norms.rules.costs import Form, WeightUse, cheapest_form, milliseconds_beyond
from hf_clars.grad_norms.rules.linear import LinearRule, linear_squared_norm, linear_use
from hf_clars.grad_norms.torch_kernels import convolution_weight_grad

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGEST_GRAM = 1 << 28
"""Numbers in the Gram matrices of a layer above which the form is hopeless, and not timed."""


@dataclass(frozen=True)
class LayerRow:
    """All layers of a network that have one shape.

    Attributes:
        network: Its name.
        layer: Name of the first of them.
        count: How many there are.
        use: The shapes.
        form: What the cost model takes.
        predicted: {"gram", "product": seconds beyond the ordinary weight gradient}.
        measured: The same by the clock; what was not timed is missing.
        weight_grad: Seconds of the ordinary weight gradient.
    """

    network: str
    layer: str
    count: int
    use: WeightUse
    form: Form
    predicted: dict[str, float]
    measured: dict[str, float]
    weight_grad: float


def weight_calls(model: nn.Module, x: Tensor) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """(name, module, input, output) of each Linear or convolution layer that `model(x)` calls."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, n=name: calls.append((n, m, args[0], out)))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS))
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return iter(calls)


def use_of(module: nn.Module, x: Tensor, output: Tensor) -> WeightUse:
    """The shapes of a call of a Linear or convolution layer."""
    if isinstance(module, CONVOLUTIONS):
        return convolution_use(module, x, output)
    return linear_use(_positions(x), _positions(output))


def chosen_forms(network: Network) -> dict[Form, int]:
    """How many layers of a network take each form."""
    found: dict[Form, int] = {"outer": 0, "gram": 0, "product": 0}
    x, _ = network.data()
    for _, module, taken, output in weight_calls(network.build(), x):
        found[cheapest_form(use_of(module, taken, output), taken.device.type)] += 1
    return found


def measure_layers(network: Network, rounds: int) -> list[LayerRow]:
    """Predict and time the forms of each layer with more than one position; layers of one shape are one row."""
    x, _ = network.data()
    groups: dict[WeightUse, list[tuple[str, nn.Module, Tensor, Tensor]]] = {}
    for call in weight_calls(network.build(), x):
        use = use_of(*call[1:])
        if use.positions > 1:
            groups.setdefault(use, []).append(call)
    return [_measure(network.name, use, calls, rounds) for use, calls in groups.items()]


def _measure(network: str, use: WeightUse, calls: list[tuple[str, nn.Module, Tensor, Tensor]], rounds: int) -> LayerRow:
    name, module, x, output = calls[0]
    x, g = torch.randn_like(x), torch.randn_like(output)
    steps: dict[str, Callable[[], object]] = {
        "weight gradient": partial(_weight_grad, module, x, g),
        "product": partial(_one_product, module, x, g),
    }
    if use.samples * use.groups * max(use.pixels, use.positions) ** 2 <= LARGEST_GRAM:
        steps["gram"] = partial(_by_gram, module, x, g)
    times = {step: sorted(each)[len(each) // 2] for step, each in alternate(steps, rounds, label=name).items()}
    plain = times.pop("weight gradient")
    measured = {form: seconds - (plain if form == "product" else 0) for form, seconds in times.items()}
    predicted = {str(form): ms / 1e3 for form, ms in milliseconds_beyond(use, x.device.type).items()}
    return LayerRow(network, name, len(calls), use, cheapest_form(use, x.device.type), predicted, measured, plain)


def _positions(t: Tensor) -> Tensor:
    return t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)


def _weight_grad(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """What autograd does for the weight."""
    if isinstance(module, CONVOLUTIONS):
        settings = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        return convolution_weight_grad(g, x, tuple(module.weight.shape), **settings)
    return g.flatten(0, -2).mT @ x.flatten(0, -2)


@torch.no_grad()
def _one_product(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample gradients, their sum and their norms."""
    rule = ConvolutionRule() if isinstance(module, CONVOLUTIONS) else LinearRule()
    grads = rule.per_sample_grads(module, (x,), g, {"weight"})["weight"]
    return grads.sum(0), squared_sum(grads)


@torch.no_grad()
def _by_gram(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    if isinstance(module, CONVOLUTIONS):
        return convolution_squared_norm(module, x, g, "gram")
    return linear_squared_norm(_positions(x), _positions(g), "gram")
