"""Rules for normalisation layers with an affine transform: y = x_hat * w + b, x_hat the normalised input.

BatchNorm in train mode couples the samples of a batch. The per-sample gradient is then the gradient with respect to
sample i's own copy of (w, b): sum over i's positions of g * x_hat and of g. These add up to the batch gradient exactly;
the path of sample i through the batch statistics is the business of the layers before, and reaches them in their g.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn

from hf_clars.grad_norms.registry import LayerRule, register_rule
from hf_clars.grad_norms.torch_internals import affine_sums, batch_statistics, group_statistics

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


class _ChannelRule(LayerRule):
    """Affine per channel, channels on axis 1. Saved: the input, its mean and 1 / standard deviation, [B, C] or [C]."""

    parameters = frozenset({"weight", "bias"})

    def save(self, module: nn.Module, x: Tensor, output: Tensor, wanted: Collection[str]) -> tuple[Tensor, ...]:
        """The input and its statistics; nothing for the bias alone."""
        if "weight" not in wanted:
            return ()
        mean, rstd = self.statistics(module, x, output)
        return x, mean, rstd

    def take(self, saved: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
        """The first `count` samples; statistics of the whole batch stay what they are."""
        return tuple(t if t.dim() == 1 else t[:count] for t in saved)

    @abstractmethod
    def statistics(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, 1 / standard deviation) that the module has just normalised with, [B, C] or [C] each."""

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`: [B, C] each."""
        if "weight" not in wanted:
            return {"bias": g.flatten(2).sum(2) if g.dim() > 2 else g}
        weight, bias = affine_sums(saved[0], g, *saved[1:])
        return {"weight": weight, "bias": bias} if "bias" in wanted else {"weight": weight}


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
        assert isinstance(module, _BatchNorm)
        return _running_statistics(module) or batch_statistics(x, output, module.eps)


@register_rule(nn.GroupNorm)
class GroupNormRule(_ChannelRule):
    """Statistics per sample and group."""

    def statistics(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C] each."""
        assert isinstance(module, nn.GroupNorm)
        mean, rstd = group_statistics(x, output, module.num_groups, module.eps)
        width = module.num_channels // module.num_groups
        return mean.repeat_interleave(width, 1), rstd.repeat_interleave(width, 1)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(_ChannelRule):
    """Statistics per sample and channel; running ones only in eval mode with `track_running_stats`."""

    def statistics(self, module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C] or [C] each."""
        assert isinstance(module, _InstanceNorm)
        return _running_statistics(module) or group_statistics(x, output, x.shape[1], module.eps)


def _trailing(t: Tensor, dims: int) -> Tensor:
    """Sum over the axes between the batch and the last `dims`: [B, ..., *shape] -> [B, *shape]."""
    between = tuple(range(1, t.dim() - dims))
    return t.sum(between) if between else t


@register_rule(nn.LayerNorm, nn.RMSNorm)
class LayerNormRule(LayerRule):
    """Statistics over the last axes, affine per element of them, shared by all axes between."""

    parameters = frozenset({"weight", "bias"})

    positions_in_the_middle = True

    def per_sample_grads(
        self, module: nn.Module, saved: tuple[Tensor, ...], g: Tensor, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """See `LayerRule`."""
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        shape = tuple(module.normalized_shape)
        grads = {}
        if "weight" in wanted:
            if isinstance(module, nn.LayerNorm):
                x_hat = F.layer_norm(saved[0], shape, eps=module.eps)
            else:
                x_hat = F.rms_norm(saved[0], shape, eps=module.eps)
            grads["weight"] = _trailing(x_hat.mul_(g), len(shape))
        if "bias" in wanted:
            grads["bias"] = _trailing(g, len(shape))
        return grads
