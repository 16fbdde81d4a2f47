"""Rules for normalisation layers with an affine transform: y = x_hat * w + b, x_hat the normalised input.

BatchNorm in train mode couples the samples of a batch. The per-sample gradient is then the gradient with respect to
sample i's own copy of (w, b): sum over i's positions of g * x_hat and of g. These add up to the batch gradient exactly;
the path of sample i through the batch statistics is the business of the layers before, and reaches them in their g.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import world_size
from hf_clars.grad_norms.errors import SharedStatisticsError
from hf_clars.grad_norms.kernels import runs_kernels
from hf_clars.grad_norms.kernels.operations import channel_sums, row_sums
from hf_clars.grad_norms.pytree import first_tensor
from hf_clars.grad_norms.registry import LayerRule, WholeBackward, register_rule
from hf_clars.grad_norms.rules.kernel_forms import (
    channel_norm_backward,
    is_dense,
    kernels_fit,
    layer_norm_backward,
)
from hf_clars.grad_norms.torch_internals import batch_statistics, group_statistics, layer_statistics
from hf_clars.grad_norms.torch_kernels import affine_sums
from hf_clars.grad_norms.torch_traces import is_compiling
from hf_clars.layers import BATCH_NORM_MODULES

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
# The same for isinstance: the compiler of torch 2.8 knows no unions there.
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)


class _ChannelRule(LayerRule):
    """Affine per channel, channels on axis 1. Saved: the input and its statistics, [C], [B, C] or [B, groups]."""

    parameters = frozenset({"weight", "bias"})

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """The input and its statistics; nothing for the bias alone."""
        if "weight" not in wanted:
            return ()
        x = first_tensor(args, kwargs)
        mean, rstd = self.statistics(module, x, output)
        return x, mean, rstd

    def take(self, saved: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
        """The first `count` samples; statistics of the whole batch stay what they are."""
        return tuple(t if t.dim() == 1 else t[:count] for t in saved)

    @abstractmethod
    def statistics(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, 1 / standard deviation) that the module has just normalised with, [C], [B, C] or [B, groups] each."""

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`: [B, C] each."""
        if "weight" not in wanted:
            return {"bias": g.flatten(2).sum(2) if g.dim() > 2 else g}
        weight, bias = self._sums(saved[0], g, *saved[1:])
        return {"weight": weight, "bias": bias} if "bias" in wanted else {"weight": weight}

    def _sums(self, x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over positions of g * x_hat and of g: [B, C] each. A compiler makes its own kernel of torch's way."""
        if is_compiling() or x.dim() == 2 or not (runs_kernels(x) and is_dense(x)):
            return affine_sums(x, g, mean, rstd)
        bias, weight = channel_sums(x, g, mean, rstd).unbind()
        return weight, bias

    def _kernels_fit(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """Whether `whole_backward` can run, where the statistics depend on the input."""
        return kernels_fit(output) and x.dim() > 2 and is_dense(x) and module.bias is not None

    def operands(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """The input and its statistics."""
        return x, *self.statistics(module, x, output)

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
        x, mean, rstd = saved
        return channel_norm_backward(x, weight, mean, rstd, g, measured=measured)


def _running_statistics(module: _BatchNorm | _InstanceNorm) -> tuple[Tensor, Tensor] | None:
    """Copies of the running statistics if the module uses them: they may change before the backward pass."""
    mean, var = module.running_mean, module.running_var
    if module.training or mean is None or var is None:
        return None
    return mean.clone(), (var + module.eps).rsqrt()


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormRule(_ChannelRule):
    """Batch statistics in train mode (or without running ones), running statistics in eval mode."""

    def statistics(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """[C] each."""
        assert isinstance(module, BATCH_NORM_MODULES)
        return _running_statistics(module) or batch_statistics(x, output, module.eps)

    def supplies_backward(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """On a GPU, for positions that the batch's own statistics are taken over."""
        assert isinstance(module, BATCH_NORM_MODULES)
        own = module.training or module.running_mean is None
        return own and self._kernels_fit(module, x, output)


@register_rule(nn.SyncBatchNorm)
class SyncBatchNormRule(BatchNormRule):
    """As BatchNorm, in one process or with frozen statistics; statistics of several processes are refused."""

    def statistics(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """[C] each."""
        if module.training and world_size() > 1:
            raise SharedStatisticsError(
                "SyncBatchNorm takes its statistics over all processes, and the norms of a sample's gradient would "
                "need them: leave BatchNorm as it is (each process then normalises its own samples), freeze its "
                "statistics (module.eval()), or use GroupNorm."
            )
        return super().statistics(module, x, output)


@register_rule(nn.GroupNorm, "timm.layers.norm.GroupNorm1")
class GroupNormRule(_ChannelRule):
    """Statistics per sample and group."""

    def statistics(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """[B, groups] each."""
        assert isinstance(module, nn.GroupNorm)
        return group_statistics(x, output, module.num_groups, module.eps)

    def supplies_backward(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """On a GPU, for more than one position."""
        return x.dtype == output.dtype and self._kernels_fit(module, x, output)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(_ChannelRule):
    """Statistics per sample and channel; running ones only in eval mode with `track_running_stats`."""

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        dims = next(
            d
            for d, kind in ((3, nn.InstanceNorm1d), (4, nn.InstanceNorm2d), (5, nn.InstanceNorm3d))
            if isinstance(module, kind)
        )
        return x.dim() == dims

    def statistics(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C] or [C] each."""
        assert isinstance(module, _INSTANCE_NORMS)
        return _running_statistics(module) or group_statistics(x, output, x.shape[1], module.eps)


def weighted_rows(x: Tensor, g: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor:
    """Sums over a sample's rows of g * x_hat, x_hat = (x - mean) * scale; [B, C] from [B, T, C] and [B, T, 1].

    A compiler makes its own kernel of torch's way.
    """
    if runs_kernels(x) and not is_compiling():
        return row_sums(x, g, None if mean is None else mean.squeeze(2), scale.squeeze(2))[1]
    # The mean goes first, for g * x - mean * g would cancel; the scales come with the sum over positions.
    weighted = x * g if mean is None else (x - mean).mul_(g)
    return (scale.mT @ weighted).squeeze(1)


def _positions(t: Tensor, dims: int) -> Tensor:
    """[B, ..., *shape of `dims` axes] -> [B, T, size of that shape]."""
    if t.dim() == 3 and dims == 1:
        return t  # as it mostly is; flattening costs something also where there is nothing to do
    return t.flatten(t.dim() - dims).flatten(1, -2) if t.dim() > dims + 1 else t.flatten(1).unsqueeze(1)


@register_rule(nn.LayerNorm, "timm.layers.norm.LayerNorm", nn.RMSNorm)
class LayerNormRule(LayerRule):
    """Statistics over the last axes, affine per element of them, shared by all axes between."""

    parameters = frozenset({"weight", "bias"})

    weight_sharing_axes = True

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        assert isinstance(module, _LAYER_NORMS)
        return x.dim() > len(module.normalized_shape)

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """The input, its mean unless that stays, and 1 / its scale; nothing for the bias alone."""
        assert isinstance(module, _LAYER_NORMS)
        if "weight" not in wanted:
            return ()
        x = first_tensor(args, kwargs)
        dims = len(module.normalized_shape)
        if isinstance(module, nn.LayerNorm):
            return x, *layer_statistics(x, output, dims, module.eps)
        return x, _inverse_scale(module, x, dims)

    def supplies_backward(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """On a GPU, over the last axis and with all parameters."""
        assert isinstance(module, _LAYER_NORMS)
        plain = type(self) is LayerNormRule and len(module.normalized_shape) == 1
        plain = plain and (isinstance(module, nn.RMSNorm) or module.bias is not None)
        same = x.dtype == output.dtype and x.is_contiguous()
        return plain and same and x.dim() > 2 and kernels_fit(output)

    def operands(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """The input and its statistics."""
        return self.save(module, (x,), {}, output, ("weight",))

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
        x = _positions(saved[0], 1)
        *mean, rstd = (t.reshape(x.shape[:2]) for t in saved[1:])
        done = layer_norm_backward(
            x,
            weight,
            mean[0] if mean else None,
            rstd,
            _positions(g, 1),
            bias=isinstance(module, nn.LayerNorm),
            input_wanted=input_wanted,
            measured=measured,
        )
        return done if done.input_grad is None else replace(done, input_grad=done.input_grad.view(saved[0].shape))

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        assert isinstance(module, _LAYER_NORMS)
        shape = tuple(module.normalized_shape)
        g = _positions(g, len(shape))
        grads = {}
        if "weight" in wanted:
            x, *mean, scale = (_positions(t, len(shape)) for t in saved)
            grads["weight"] = weighted_rows(x, g, mean[0] if mean else None, scale).view(-1, *shape)
        if "bias" in wanted:
            grads["bias"] = g.sum(1).view(-1, *shape)
        return grads


@register_rule(
    "timm.layers.norm.LayerNorm2d",
    "torchvision.models.convnext.LayerNorm2d",
    "transformers.models.convnext.modeling_convnext.ConvNextLayerNorm",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2LayerNorm",
    "transformers.models.dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayerNorm",
)
class ChannelLayerNormRule(LayerNormRule):
    """LayerNorm over the channels of images [B, C, H, W], as in ConvNeXt; transformers' have `data_format` for both."""

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.dim() == 4 if _channels_first(module) else super().has_batch_axis(module, x)

    def save(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, wanted: Collection[str]
    ) -> tuple[Tensor, ...]:
        """As for LayerNorm, of the input with its channels last."""
        x = first_tensor(args, kwargs)
        return super().save(module, (x.movedim(-3, -1) if _channels_first(module) else x,), {}, output, wanted)

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        return super().per_sample_grads(module, saved, g.movedim(-3, -1) if _channels_first(module) else g, wanted)


def _channels_first(module: nn.Module) -> bool:
    return getattr(module, "data_format", "channels_first") == "channels_first"


def _inverse_scale(module: nn.RMSNorm, x: Tensor, dims: int) -> Tensor:
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (exact.square().mean(tuple(range(-dims, 0)), keepdim=True) + eps).rsqrt()
