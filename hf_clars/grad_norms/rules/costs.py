"""The cost model: which of the equal forms of a weight's per-sample norms is cheapest, from shapes alone.

A weight is shared by T positions of each sample. Position t sees p inputs x_t and gives d outputs with gradient g_t, in
each of G groups, so that a sample's gradient is the [d, p] matrix sum_t g_t x_t^T. Three ways to its norm:

- **outer** (T = 1): ||x|| ||g||.
- **gram**: <X X^T, G G^T> of the [T, T] products of inputs and of output gradients. A convolution's patches overlap:
  their products are sums of shifted products of single pixels, so only the c = p / taps values of a pixel enter the
  matrix product, and the sum over taps is taken axis by axis.
- **product**: the gradients themselves. Their sum is the batch gradient, so that they replace the product that autograd
  would do for it ("one product"); what they cost beyond it is that they are written and read, and shorter sums.

Times are counted as arithmetic / speed + traffic / bandwidth, and only the ratio of the two constants decides.
`scripts/benchmark_grad_norms.py --pages layers` prints predicted and measured times for each layer of a network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Form = Literal["outer", "gram", "product"]

#: Products with short sums run below full speed: at half of it for sums over this many positions. A batched matrix
#: product (Linear layers, 1x1 kernels) minds little, a convolution with the samples as groups minds more.
_HALF_SPEED_MATRIX, _HALF_SPEED_CONVOLUTION = 8, 64
#: Passes over memory: a gradient is written, and read for its square and for the sum.
_PRODUCT_PASSES = 3
#: A tap of a convolution's Gram form reads two [T, T] matrices and writes one.
_TAP_PASSES = 3


@dataclass(frozen=True)
class Machine:
    """Speeds of a device.

    Attributes:
        flops: Arithmetic operations a second of a large matrix product.
        bandwidth: Bytes a second of a pass over memory.
    """

    flops: float
    bandwidth: float


#: "cpu" was measured on two cores of a server (AVX-512, float32, temporaries in cache); "cuda" is an order of magnitude
#: from data sheets and was not measured.
MACHINES = {"cpu": Machine(1.2e11, 4e10), "cuda": Machine(1e14, 2.5e12)}


@dataclass(frozen=True)
class WeightUse:
    """The shapes of one use of a weight.

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

    def gram_seconds(self, machine: Machine) -> float:
        """Time of the Gram form; it comes on top of the ordinary weight gradient."""
        pixels, batch = self.pixels or self.positions, self.samples * self.groups
        inputs, outputs, between = pixels**2, self.positions**2, pixels * self.positions
        flops = 2 * batch * (inputs * self.width_in + outputs * self.width_out)
        taps = sum(k for k in self.kernel if k > 1)
        traffic = batch * self.element_size * (inputs + outputs + _TAP_PASSES * taps * between)
        return flops / machine.flops + traffic / machine.bandwidth

    def product_seconds(self, machine: Machine, *, replaces_weight_grad: bool = True) -> float:
        """Time of the per-sample gradients, beyond the ordinary weight gradient if they replace it."""
        elements = self.samples * self.groups * math.prod(self.kernel) * self.width_in * self.width_out
        half_speed = _HALF_SPEED_CONVOLUTION if math.prod(self.kernel) > 1 else _HALF_SPEED_MATRIX
        sum_length = half_speed + (0 if replaces_weight_grad else self.positions)
        flops = 2 * elements * sum_length
        return flops / machine.flops + _PRODUCT_PASSES * elements * self.element_size / machine.bandwidth


def cheapest_form(use: WeightUse, device: str, *, replaces_weight_grad: bool = True) -> Form:
    """The form to take on a device of this type ("cpu", "cuda", ...).

    Args:
        use: Shapes.
        device: `tensor.device.type`; unknown ones count as "cuda".
        replaces_weight_grad: Whether the product may stand in for autograd's weight gradient.
    """
    if use.positions == 1:
        return "outer"
    machine = MACHINES.get(device, MACHINES["cuda"])
    product = use.product_seconds(machine, replaces_weight_grad=replaces_weight_grad)
    return "gram" if use.gram_seconds(machine) < product else "product"
