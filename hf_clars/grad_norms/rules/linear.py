"""Rule for `nn.Linear`: inputs [B, in] or [B, ..., in]."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, nn

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.choice import Choice, cheapest_form, form_choices
from hf_clars.grad_norms.norm_math import on_cuda
from hf_clars.grad_norms.registry import LayerRule, WholeBackward, register_rule
from hf_clars.grad_norms.rules.costs import Form, Kind, WeightUse
from hf_clars.grad_norms.rules.kernel_forms import kernels_fit, linear_backward
from hf_clars.grad_norms.torch_internals import weight_of


def positions(t: Tensor) -> Tensor:
    """[B, ..., width] -> [B, T, width]."""
    return t if t.dim() == 3 else t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)


def linear_use(x: Tensor, output: Tensor) -> WeightUse:
    """The shapes of a call: x [B, T, in], output [B, T, out]."""
    return WeightUse(x.shape[0], x.shape[1], x.shape[2], output.shape[2], element_size=output.element_size())


@register_rule(nn.Linear, "timm.layers.linear.Linear", "transformers.models.falcon.modeling_falcon.FalconLinear")
class LinearRule(LayerRule):
    """y = x W^T + b; the weight is shared by all axes between batch and width."""

    parameters = frozenset({"weight", "bias"})

    weight_sharing_axes = True
    is_dense_weight = True

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.dim() > 1

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        x, g = positions(saved[0]), positions(g)
        grads = {}
        if "weight" in wanted:
            grads["weight"] = norm_math.linear_weight_grads(x, g)
        if "bias" in wanted:
            grads["bias"] = g.sum(1)
        return grads

    def squared_norms(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        if g.dim() == 2:
            return _outer_squared_norms(saved[0], g, wanted)
        x, g = positions(saved[0]), positions(g)
        squares = {}
        if "weight" in wanted:
            form = cheapest_form(linear_use(x, g), x.device.type, replaces_weight_grad=False)
            squares["weight"] = linear_squared_norm(x, g, form)
        if "bias" in wanted:
            # positions add up before they are squared: the bias is shared by all of them
            squares["bias"] = norm_math.squared_sum(g.sum(1))
        return squares

    def fuses_weight_grad(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """Where the per-sample product is the cheapest form."""
        return cheapest_form(linear_use(positions(x), positions(output)), x.device.type) == "product"

    def supplies_backward(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """On a GPU, for more than one position."""
        return kernels_fit(output) and x.dim() > 2 and positions(x).shape[1] > 1

    def whole_backward(
        self,
        module: nn.Module,
        saved: tuple[Tensor, ...],
        weight: Tensor,
        g: Tensor,
        *,
        input_wanted: bool,
        measured: int | None = None,
    ) -> WholeBackward:
        """See `LayerRule`."""
        done = linear_backward(
            positions(saved[0]),
            weight,
            positions(g),
            bias=module.bias is not None,
            input_wanted=input_wanted,
            measured=measured,
        )
        return done if done.input_grad is None else replace(done, input_grad=done.input_grad.view(saved[0].shape))

    def weight_as_used(self, module: nn.Module, weight: Tensor, output: Tensor) -> Tensor:
        """See `LayerRule`."""
        return weight_of(output, weight, transposed=True)

    def choice(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[WeightUse, Choice]:
        """The shapes of a call, and the form of its weight's norms."""
        use = linear_use(positions(x), positions(output))
        kind: Kind = "torch" if on_cuda(x) else "cpu"
        return use, form_choices.look_up("linear" if self.supplies_backward(module, x, output) else kind, use)

    def input_grad(self, module: nn.Module, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        """See `LayerRule`."""
        return g @ weight


def _outer_squared_norms(x: Tensor, g: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """T = 1: ||g x^T||^2 = ||x||^2 ||g||^2, and the second factor is the bias's. x [B, in], g [B, out]."""
    of_bias = norm_math.squared_sum(g)
    squares = {"bias": of_bias} if "bias" in wanted else {}
    if "weight" in wanted:
        squares["weight"] = norm_math.squared_sum(x) * of_bias
    return squares


def linear_squared_norm(x: Tensor, g: Tensor, form: Form) -> Tensor:
    """Squared norm of each sample's weight gradient in a given form: x [B, T, in], g [B, T, out] -> [B]."""
    if form == "outer":
        return norm_math.outer_squared_norm(x[:, 0], g[:, 0])
    if form == "gram":
        return norm_math.gram_squared_norm(x, g)
    return norm_math.in_slices(
        lambda *part: norm_math.squared_sum(norm_math.linear_weight_grads(*part)),
        x,
        g,
        elements_per_sample=x.shape[2] * g.shape[2],
    )
