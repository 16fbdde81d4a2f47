"""Rules for convolutions: any stride, padding, padding mode, dilation and groups; transposed ones too."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_clars.grad_norms import convolution_math, norm_math
from hf_clars.grad_norms.choice import Choice, cheapest_form, form_choices
from hf_clars.grad_norms.norm_math import on_cuda
from hf_clars.grad_norms.registry import LayerRule, WholeBackward, register_rule
from hf_clars.grad_norms.rules.costs import Form, WeightUse
from hf_clars.grad_norms.rules.kernel_forms import (
    FEW_CHANNELS,
    convolution_backward,
    convolution_shapes,
    in_channels_last,
    kernels_fit,
)
from hf_clars.grad_norms.rules.linear import linear_squared_norm
from hf_clars.grad_norms.torch_internals import weight_of
from hf_clars.grad_norms.torch_kernels import convolution_input_grad, convolution_weight_grad

# Up to so many inputs an output (an RGB image's first 3x3 convolution has 27) patches are cheap to write out.
_THIN = 32

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
# The same for isinstance: the compiler of torch 2.8 knows no unions there.
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _same_padding(module: _Conv) -> list[int]:
    """Zeros of `padding="same"` as `F.pad` takes them: last dimension first, the odd one on the right."""
    pads: list[int] = []
    for kernel, dilation in zip(reversed(module.kernel_size), reversed(module.dilation), strict=True):
        total = dilation * (kernel - 1)
        pads += [total // 2, total - total // 2]
    return pads


def _zeros_only(module: _Conv) -> bool:
    """Whether the padding is plain zeros, the same on both sides, which the library's kernels add themselves."""
    return not isinstance(module.padding, str) and module.padding_mode == "zeros"


def _padded_input(module: _Conv, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with every padding applied that the weight-gradient kernel cannot, and the zeros left to it."""
    none = (0,) * len(module.kernel_size)
    if module.padding == "valid":
        return x, none
    if isinstance(module.padding, str):
        pads = _same_padding(module)
    elif module.padding_mode == "zeros":
        return x, tuple(module.padding)
    else:
        pads = [p for pad in reversed(module.padding) for p in (pad, pad)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, pads, mode=mode), none


def convolution_use(module: _Conv, x: Tensor, output: Tensor) -> WeightUse:
    """The shapes of a call."""
    return WeightUse(
        samples=x.shape[0],
        positions=math.prod(output.shape[2:]),
        width_in=module.in_channels // module.groups,
        width_out=module.out_channels // module.groups,
        groups=module.groups,
        pixels=math.prod(x.shape[2:]) if math.prod(module.kernel_size) > 1 else 0,  # a 1x1 kernel visits T of them
        kernel=tuple(module.kernel_size),
        element_size=output.element_size(),
    )


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvolutionRule(LayerRule):
    """y = conv(x, W) + b; the weight is shared by all positions, each group sees its own channels."""

    parameters = frozenset({"weight", "bias"})

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        assert isinstance(module, _CONVS)
        return x.dim() == 2 + len(module.kernel_size)

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        assert isinstance(module, _CONVS)
        grads = {}
        if "weight" in wanted:
            grads["weight"] = _weight_grads(module, *_padded_input(module, saved[0]), g)
        if "bias" in wanted:
            grads["bias"] = g.flatten(2).sum(2)
        return grads

    def squared_norms(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        assert isinstance(module, _CONVS)
        squares = {}
        if "weight" in wanted:
            form = cheapest_form(convolution_use(module, saved[0], g), g.device.type, replaces_weight_grad=False)
            squares["weight"] = convolution_squared_norm(module, saved[0], g, form)
        if "bias" in wanted:
            squares["bias"] = norm_math.squared_sum(g.flatten(2).sum(2))
        return squares

    def summed_grad(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, name: str, *, elements: int
    ) -> Tensor:
        """See `LayerRule`; by the library's own kernel, which sums over the batch."""
        assert isinstance(module, _CONVS)
        if name == "bias":
            return g.flatten(2).sum((0, 2))
        x, padding = _padded_input(module, saved[0])
        return convolution_weight_grad(g, x, _weight_shape(module), **_settings(module, padding))

    def fuses_weight_grad(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """Where the per-sample product is the cheapest form, and the padding is plain."""
        assert isinstance(module, _CONVS)
        use = convolution_use(module, x, output)
        return _zeros_only(module) and cheapest_form(use, x.device.type) != "gram"

    def supplies_backward(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """On a GPU, for images with plain padding; 1x1 kernels only in channels_last.

        In another format both tensors are copied for the kernels. On an H100 that is estimated at half of what torch's
        own way takes for 3x3 kernels (0.07 of 0.5 ms for 64 channels of 56 x 56 pixels, B = 128, beside 0.1 ms of the
        kernel), and at more than all of it for 1x1 kernels.
        """
        assert isinstance(module, _CONVS)
        if not isinstance(module, nn.Conv2d) or output.shape[2] * output.shape[3] <= 1:
            return False
        last = in_channels_last(x) and in_channels_last(output)
        return kernels_fit(output) and _zeros_only(module) and (last or math.prod(module.kernel_size) > 1)

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
        assert isinstance(module, _CONVS)
        return convolution_backward(
            saved[0],
            weight,
            g,
            _settings(module, module.padding),
            bias=module.bias is not None,
            input_wanted=input_wanted,
            measured=measured,
        )

    def weight_as_used(self, module: nn.Module, weight: Tensor, output: Tensor) -> Tensor:
        """See `LayerRule`."""
        return weight_of(output, weight)

    def choice(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[WeightUse, Choice]:
        """The shapes of a call, and the form of its weight's norms."""
        assert isinstance(module, _CONVS)
        if self.supplies_backward(module, x, output):
            kind, use = convolution_shapes(x, module.weight, output, _settings(module, module.padding))
            few = use.width_in < FEW_CHANNELS  # as `convolution_backward` does: of a group
            return use, Choice("product", "model") if few else form_choices.look_up(kind, use)
        use = convolution_use(module, x, output)
        return use, form_choices.look_up("torch" if on_cuda(x) else "cpu", use)

    def input_grad(self, module: nn.Module, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        """See `LayerRule`."""
        assert isinstance(module, _CONVS)
        return convolution_input_grad(g, x, weight, **_settings(module, module.padding))


def _settings(module: _Conv | _Transposed, padding: Any) -> dict[str, Any]:
    return {
        "stride": tuple(module.stride),
        "padding": tuple(padding),
        "dilation": tuple(module.dilation),
        "groups": module.groups,
    }


def _weight_shape(module: _Conv) -> tuple[int, ...]:
    """Also where an engine has put the weight aside."""
    return module.out_channels, module.in_channels // module.groups, *module.kernel_size


def _is_pointwise(module: _Conv, padding: tuple[int, ...]) -> bool:
    """A 1x1 kernel is a Linear layer over the positions that it visits."""
    return module.groups == 1 and math.prod(module.kernel_size) == 1 and not any(padding)


def _visited(module: _Conv, x: Tensor) -> Tensor:
    """[B, T, in]: the pixels that a 1x1 kernel visits."""
    if all(s == 1 for s in module.stride):
        return x.flatten(2).mT
    steps: Any = tuple(slice(None, None, int(s)) for s in module.stride)
    return x[(..., *steps)].flatten(2).mT


def convolution_squared_norm(module: _Conv, x: Tensor, g: Tensor, form: Form) -> Tensor:
    """Squared norm of each sample's weight gradient in a given form, [B].

    Args:
        module: The convolution.
        x: Its input [B, in, *space].
        g: Gradient of its output [B, out, *space'].
        form: Of the forms for `convolution_use(module, x, g)`.
    """
    x, padding = _padded_input(module, x)
    if _is_pointwise(module, padding):
        return linear_squared_norm(_visited(module, x), g.flatten(2).mT, form)
    if form == "gram":
        gram = (
            convolution_math.patch_gram_squared_norm if on_cuda(x) else convolution_math.convolution_gram_squared_norm
        )
        return gram(x, g, kernel=tuple(module.kernel_size), **_settings(module, padding))
    return norm_math.in_slices(
        lambda x_part, g_part: norm_math.squared_sum(_weight_grads(module, x_part, padding, g_part)),
        x,
        g,
        elements_per_sample=math.prod(module.weight.shape),
    )


def _weight_grads(module: _Conv, x: Tensor, padding: tuple[int, ...], g: Tensor) -> Tensor:
    shape = _weight_shape(module)
    if _is_pointwise(module, padding):
        return norm_math.product(g.flatten(2), _visited(module, x)).view(-1, *shape)
    settings = _settings(module, padding)
    if on_cuda(x) and form_choices.take("torch", convolution_use(module, x, g)) != "grouped":
        return convolution_math.patch_weight_grads(x, g, kernel_shape=shape, **settings)
    if len(shape) == 4 and settings.pop("groups") == 1 and math.prod(shape[1:]) <= _THIN:
        return convolution_math.thin_convolution_weight_grads(x, g, kernel_shape=shape, **settings)
    return convolution_math.convolution_weight_grads(x, g, kernel_shape=shape, **_settings(module, padding))


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolutionRule(LayerRule):
    """The convolution that maps the output to the input: the same weight gradient with x and g exchanged."""

    parameters = frozenset({"weight", "bias"})

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        assert isinstance(module, _TRANSPOSED)
        return x.dim() == 2 + len(module.kernel_size)

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        assert isinstance(module, _TRANSPOSED)
        grads = {}
        if "weight" in wanted:
            shape = (module.in_channels, module.out_channels // module.groups, *module.kernel_size)
            settings = _settings(module, module.padding)
            weight_grads = (
                convolution_math.patch_weight_grads if on_cuda(g) else convolution_math.convolution_weight_grads
            )
            grads["weight"] = weight_grads(g, saved[0], kernel_shape=shape, **settings)
        if "bias" in wanted:
            grads["bias"] = g.flatten(2).sum(2)
        return grads
