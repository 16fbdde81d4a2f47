"""Other libraries' ways to per-sample gradient norms, each as its documentation shows it.

Each is imported where it is used, so that this module works without them. Some are handed a model that was eased for
them (see `out_of_place`, `VmapGrad`): they are measured at their best, not refused for a detail.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from hf_clars.bench.networks import logits, mean_loss
from hf_clars.bench.ways import HfClars, Plain, SquaredNorms, Way


def out_of_place(model: nn.Module) -> None:
    """Keep the results of modules from being overwritten, which autograd forbids for modules with backward hooks.

    Args:
        model: Changed: activations lose `inplace=True`, and transformers' ResNet, which adds its shortcut in place,
            adds it to a copy instead.
    """
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, (ResNetBasicLayer, ResNetBottleNeckLayer)):
            module.layer.register_forward_hook(lambda _module, _args, output: output.clone())


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Other libraries' hooks warn in each step, some for each module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _squared_norms(grads: Tensor) -> Tensor:
    """[B, ...] -> [B], without a temporary of the size of the gradients."""
    return torch.linalg.vector_norm(grads.flatten(1), dim=1).square()


class OpacusHooks(Way):
    """Opacus' `GradSampleModule`: backward hooks that store every sample's gradient; their norms are taken afterwards.

    `p.grad` comes from the same backward pass.
    """

    name = "opacus hooks"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        out_of_place(model)
        self.wrapped = self._wrap(model)

    def _wrap(self, model: nn.Module) -> Any:
        from opacus.grad_sample import GradSampleModule

        return GradSampleModule(model, loss_reduction="mean")

    def _take(self, param: nn.Parameter) -> Tensor:
        grads = param.grad_sample  # type: ignore[attr-defined]
        param.grad_sample = None  # type: ignore[attr-defined]
        return _squared_norms(grads)

    def step(self) -> SquaredNorms:
        """As `Way.step`."""
        with _without_warnings():
            self.backward(self.wrapped)
        return {name: self._take(param) for name, param in self.model.named_parameters()}

    def close(self) -> None:
        """As `Way.close`."""
        self.wrapped.remove_hooks()


class OpacusGhost(OpacusHooks):
    """Opacus' ghost clipping, up to its norms: its second backward pass, for clipping, is not run.

    Linear and embedding layers get their norms without per-sample gradients; for all others it stores these for one
    layer at a time. `p.grad` comes from the same backward pass.
    """

    name = "opacus ghost"

    def _wrap(self, model: nn.Module) -> Any:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

        return GradSampleModuleFastGradientClipping(model, loss_reduction="mean", use_ghost_clipping=True)

    def _take(self, param: nn.Parameter) -> Tensor:
        # Private name: _norm_sample, where Opacus keeps each tensor's norms; its public function adds them up over all
        # tensors. It ends when Opacus hands them out.
        return param._norm_sample.square()  # type: ignore[attr-defined]


class BackPack(Way):
    """BackPACK's `BatchL2Grad`, with model and loss extended: squared norms of linear and convolution layers.

    Parameters of other modules (GroupNorm, LayerNorm, ViT's embeddings) get no norms; the table tells how many do.
    `p.grad` comes from the same backward pass. Its converter to a graph of known modules (`use_converter=True`) is left
    out: first-order quantities do not need it, and it would rename the parameters.
    """

    name = "backpack"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad

        out_of_place(model)
        self._extended, self._loss = extend(model), extend(nn.CrossEntropyLoss())
        self._context, self._extension = backpack, BatchL2Grad()

    def step(self) -> SquaredNorms:
        """As `Way.step`, for the parameters that it knows."""
        self.model.zero_grad(set_to_none=True)
        with _without_warnings(), self._context(self._extension):
            self._loss(logits(self._extended(self.x)).flatten(0, -2), self.y.flatten()).backward()
        squares = {}
        for name, param in self.model.named_parameters():
            if hasattr(param, "batch_l2"):
                squares[name] = param.batch_l2 * len(self.x) ** 2  # it measures gradients of loss / B
                del param.batch_l2
        return squares


class VmapGrad(Way):
    """`torch.func`: `vmap(grad(...))` over the batch gives every sample's gradient, then norms and mean (`p.grad`).

    All samples at once, without `chunk_size`.
    """

    name = "vmap(grad)"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        if isinstance(model, PreTrainedModel):
            model.set_attn_implementation("eager")  # the fused one has no batching rule: it would run in a loop
        buffers = dict(model.named_buffers())

        def loss(params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            output = torch.func.functional_call(model, (params, buffers), (image[None],))
            return mean_loss(output, label[None])

        self._per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")

    def step(self) -> SquaredNorms:
        """As `Way.step`."""
        self.model.zero_grad(set_to_none=True)
        params = dict(self.model.named_parameters())
        grads = self._per_sample({name: param.detach() for name, param in params.items()}, self.x, self.y)
        for name, param in params.items():
            param.grad = grads[name].mean(0)
        return {name: _squared_norms(grad) for name, grad in grads.items()}


WAYS: dict[str, type[Way]] = {way.name: way for way in (Plain, HfClars, OpacusHooks, OpacusGhost, BackPack, VmapGrad)}
"""By name, in the order of the tables."""
