"""The cost model: which of the equal forms of a weight's per-sample norms is cheapest, from shapes alone.

A weight is shared by T positions of each sample. Position t sees p inputs x_t and gives d outputs with gradient g_t, in
each of G groups, so that a sample's gradient is the [d, p] matrix sum_t g_t x_t^T. The ways to its norm:

- **outer** (T = 1): ||x|| ||g||.
- **gram**: <X X^T, G G^T> of the [T, T] products of inputs and of output gradients. A convolution's patches overlap:
  on a CPU their products are sums of shifted products of single pixels, so only the c = p / taps values of a pixel
  enter the matrix product, and the sum over taps is taken axis by axis.
- **product**: the gradients themselves. Their sum is the batch gradient, so that they replace the product that autograd
  would do for it ("one product"); what they cost beyond it is that they are written and read, and shorter sums.
- **rows**: the product's kernel for a Linear layer, over the pixels of a 1x1 convolution.
- **grouped**: the product by the library's convolution, with the samples as groups.

On a CPU times are arithmetic / speed + traffic / bandwidth, and only the ratio of the two constants decides. On CUDA
each form has constants of its own, fitted by `scripts/fit_forms.py` to what `h100.json` lists; these, and the times
themselves, are in `SHIPPED`. `hf_clars.grad_norms.choice` asks this model last.
`scripts/benchmark_grad_norms.py --pages layers` prints predicted and measured times for each layer of a network.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hf_clars.grad_norms.norm_math import samples_at_once

Form = Literal["outer", "gram", "product", "rows", "grouped"]

Kind = Literal["cpu", "cpu beside", "torch", "torch beside", "linear", "convolution", "pointwise"]
"""Where a form is asked for. With kernels: of a Linear layer, a convolution, and a 1x1 convolution without strides.
Without: by operations of torch, in place of autograd's weight gradient or beside it; those of a CPU are others."""

SHIPPED: dict[str, Any] = json.loads(Path(__file__).with_name("h100.json").read_text(encoding="utf-8"))
"""`machine`: what it holds for. `times`: {kind: {use: {form: milliseconds}}}. `model`: {kind: {form: {what a form does:
milliseconds a unit}}}. `float32`: how much longer a product of float32 takes than one of bfloat16."""

#: Products with short sums run below full speed: at half of it for sums over this many positions. A batched matrix
#: product (Linear layers, 1x1 kernels) minds little, a convolution with the samples as groups minds more.
_HALF_SPEED_MATRIX, _HALF_SPEED_CONVOLUTION = 8, 32
#: Passes over memory: a gradient is written, and read for its square and for the sum.
_PRODUCT_PASSES = 3
#: A tap of a convolution's Gram form reads two [T, T] matrices and writes one.
_TAP_PASSES = 3
#: Positions that a kernel takes at once: 49 cost as much as 64.
_TILE = 64
_NAME = re.compile(r"B (\d+) T (\d+) (\d+)>(\d+)(?: kernel ([\dx]+) of (\d+))?(?: groups (\d+))? bytes (\d+)")


@dataclass(frozen=True)
class Machine:
    """Speeds of a device.

    Attributes:
        flops: Arithmetic operations a second of a large matrix product.
        bandwidths: Bytes a second of a pass over temporaries, by the bytes up to which that holds, in rising order.
    """

    flops: float
    bandwidths: tuple[tuple[float, float], ...]

    def passes(self, size: float, times: int = 1, *, at_once: float | None = None) -> float:
        """Seconds of some passes over temporaries of this size in bytes, of which so many exist at once; or all."""
        held = size if at_once is None else at_once
        return times * size / next(speed for most, speed in self.bandwidths if held <= most)


#: From here on the C library asks the system for a tensor's memory each time.
SYSTEM_BYTES = 1 << 25
#: Measured on two cores of a server (AVX-512, float32): what stays in cache, what does not, and what is asked for anew.
CPU = Machine(1.2e11, ((9e6, 4e10), (SYSTEM_BYTES, 1.2e10), (math.inf, 3e9)))


class WeightUse(NamedTuple):
    """The shapes of one use of a weight. As a string it is the name by which times are kept.

    Attributes:
        samples: B.
        positions: T.
        width_in: c, inputs of one pixel or token that a group sees.
        width_out: d, outputs of a group.
        groups: G.
        pixels: Input positions, between which products are taken; T unless a convolution strides or pads.
        kernel: Kernel size along each axis; p = width_in * their product.
        element_size: Bytes a number.
    """

    samples: int
    positions: int
    width_in: int
    width_out: int
    groups: int = 1
    pixels: int = 0
    kernel: tuple[int, ...] = ()
    element_size: int = 4

    def __str__(self) -> str:
        window = f" kernel {'x'.join(map(str, self.kernel))} of {self.pixels}" if self.kernel else ""
        groups = f" groups {self.groups}" if self.groups > 1 else ""
        widths = f"{self.width_in}>{self.width_out}"
        return f"B {self.samples} T {self.positions} {widths}{window}{groups} bytes {self.element_size}"

    @classmethod
    def named(cls, name: str) -> WeightUse:
        """The shapes that a string stands for.

        Raises:
            ValueError: It stands for none.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} names no shapes: 'B 64 T 197 768>768 bytes 2' does.")
        samples, positions, width_in, width_out, kernel, pixels, groups, size = found.groups()
        axes = tuple(int(k) for k in kernel.split("x")) if kernel else ()
        numbers = int(samples), int(positions), int(width_in), int(width_out), int(groups or 1), int(pixels or 0)
        return cls(*numbers, axes, int(size))

    def gram_seconds(self, machine: Machine) -> float:
        """Time of the Gram form; it comes on top of the ordinary weight gradient."""
        pixels, batch = self.pixels or self.positions, self.samples * self.groups
        inputs, outputs, between = pixels**2, self.positions**2, pixels * self.positions
        flops = 2 * batch * (inputs * self.width_in + outputs * self.width_out)
        taps = sum(k for k in self.kernel if k > 1)
        traffic = batch * self.element_size * (inputs + outputs + _TAP_PASSES * taps * between)
        return flops / machine.flops + machine.passes(traffic, at_once=min(traffic, SYSTEM_BYTES))

    def product_seconds(self, machine: Machine, *, replaces_weight_grad: bool = True) -> float:
        """Time of the per-sample gradients, beyond the ordinary weight gradient if they replace it."""
        each = self.groups * math.prod(self.kernel) * self.width_in * self.width_out
        elements, at_once = self.samples * each, min(self.samples, samples_at_once(each)) * each
        half_speed = _HALF_SPEED_CONVOLUTION if math.prod(self.kernel) > 1 else _HALF_SPEED_MATRIX
        sum_length = half_speed + (0 if replaces_weight_grad else self.positions)
        flops = 2 * elements * sum_length
        return flops / machine.flops + machine.passes(
            elements * self.element_size, _PRODUCT_PASSES, at_once=at_once * self.element_size
        )


def amounts(kind: Kind, form: Form, use: WeightUse) -> dict[str, float]:
    """What a form does on CUDA, in billions of operations and of bytes; the model is a sum over these.

    Args:
        kind: Not a CPU's.
        form: "gram", "product" or "rows". A Gram form includes the ordinary weight gradient, except beside autograd.
        use: Shapes.
    """
    batch, taps = use.samples * use.groups, math.prod(use.kernel)
    width, size, by_kernel = use.width_in * taps, use.element_size, not kind.startswith("torch")
    positions = -(-use.positions // _TILE) * _TILE if by_kernel else use.positions
    product = 2 * batch * use.positions * width * use.width_out
    gradients = batch * width * use.width_out
    pairs = batch * positions * (width + use.width_out)
    done: dict[str, float]
    if not by_kernel:
        done = {"patches": 2 * size * batch * use.positions * width if taps > 1 else 0}
        if form == "gram":
            done |= {"pairs": 2 * pairs * positions, "matrices": 4 * 4 * batch * positions**2}
            done |= {} if kind == "torch beside" else {"product": product}
        else:
            done |= {"product": product, "gradients": 4 * _PRODUCT_PASSES * gradients}
    elif form == "gram":  # the upper triangle, in tiles
        done = {"product": product, "pairs": pairs * (positions + _TILE)}
    else:
        read = batch * ((use.pixels or use.positions) * use.width_in + use.positions * use.width_out)
        done = {"product": product * positions / use.positions, "gradients": 4 * gradients, "operands": size * read}
    return {"calls": 1.0} | {name: amount / 1e9 for name, amount in done.items()}


def predicted(kind: Kind, use: WeightUse) -> dict[Form, float]:
    """Milliseconds of each form that the model knows.

    Args:
        kind: On a CPU, times are those beyond the ordinary weight gradient; elsewhere those of the weight gradient and
            the norms together, or beside autograd of the norms alone.
        use: Shapes.
    """
    if kind == "cpu" or kind == "cpu beside":
        product = use.product_seconds(CPU, replaces_weight_grad=kind == "cpu")
        return {"gram": 1e3 * use.gram_seconds(CPU), "product": 1e3 * product}
    # Kernels multiply float32 exactly, without tensor cores; torch's Gram form was fitted to float32 as it is.
    wide = use.element_size > 2
    found: dict[Form, float] = {}
    for form, constants in SHIPPED["model"][kind].items():
        total = 0.0
        for name, amount in amounts(kind, form, use).items():
            slow = wide and (name == "product" or (name == "pairs" and not kind.startswith("torch")))
            total += constants[name] * amount * (SHIPPED["float32"] if slow else 1.0)
        found[form] = total
    return found


def forms_of(kind: str) -> set[str]:
    """The forms that may be taken on CUDA; none for a kind that is not CUDA's. The model predicts all but "grouped"."""
    known = set(SHIPPED["model"].get(kind, ()))
    return known | {"grouped"} if kind.startswith("torch") else known


def fastest(times: dict[Form, float]) -> Form:
    """The form of the least time; of equal ones the last."""
    best, least = next(iter(times)), math.inf
    for form, time in times.items():
        if time <= least:
            best, least = form, time
    return best


def cheapest_form(use: WeightUse, device: str, *, replaces_weight_grad: bool = True) -> Form:
    """The form that the model alone would take on a device of this type ("cpu", "cuda", ...), without kernels.

    Args:
        use: Shapes.
        device: `tensor.device.type`; unknown ones count as "cuda".
        replaces_weight_grad: Whether the product may stand in for autograd's weight gradient.
    """
    if use.positions == 1:
        return "outer"
    if device == "cpu":
        product = use.product_seconds(CPU, replaces_weight_grad=replaces_weight_grad)
        return "gram" if use.gram_seconds(CPU) < product else "product"
    return fastest(predicted("torch" if replaces_weight_grad else "torch beside", use))


def milliseconds_beyond(use: WeightUse, device: str) -> dict[Form, float]:
    """Predicted milliseconds of each form of torch's operations beyond the ordinary weight gradient. As above."""
    if device == "cpu":
        return predicted("cpu", use)
    alone, together = predicted("torch beside", use)["gram"], predicted("torch", use)
    return {"gram": alone, "product": together["product"] - (together["gram"] - alone)}
