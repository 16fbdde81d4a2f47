"""Checks that the training loop around an optimizer keeps the promises that its rates rest on.

None of them touches the device: they compare version counters, which torch raises whenever a tensor is changed in
place.
`Tensor._version` is not a documented name; this file alone uses it, and a test fails loudly should it change its
meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_clars.distributed.zero import keeps_gradients_elsewhere, trains_without
from hf_clars.errors import HfClarsError
from hf_clars.grad_norms.hooks import BoundHook


class OptimizerNotSteppedError(HfClarsError, RuntimeError):
    """The weights change, but this optimizer's `step()` is never called."""


class AccumulationIgnoredError(HfClarsError, RuntimeError):
    """The model's loss ignores `num_items_in_batch`, so that accumulated gradients come out too large."""


def version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place."""
    return tensor._version


def _entry(output: Any, name: str) -> Tensor | None:
    """A tensor of a model's output by name, or None."""
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _sentinel(params: Sequence[nn.Parameter]) -> nn.Parameter:
    """A small parameter near the loss, whose gradient is the last to vanish: the smallest of the last two."""
    return min(params[-2:], key=lambda p: p.numel())


def _sampled(tensor: Tensor) -> int:
    """How many elements `_sample` takes."""
    return len(range(0, tensor.numel(), _stride(tensor)))


def _stride(tensor: Tensor) -> int:
    return max(1, tensor.numel() // 256)


def _sample(tensor: Tensor) -> Tensor:
    """A copy of some 256 elements, evenly spread, in float32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().reshape(-1)[:: _stride(tensor)].to(wide, copy=True)


_GUARDS: WeakKeyDictionary[nn.Module, LoopGuard] = WeakKeyDictionary()


class LoopGuard:
    """Watches one model on behalf of one optimizer.

    Args:
        model: The module that is trained.
        params: Its trainable parameters.
        groups: The optimizer's parameter groups; kept, so that they can be looked at when the optimizer is gone.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], groups: list[dict[str, Any]]) -> None:
        self._params = list(params)
        self.groups = groups
        self.paused = False  # see BoundHook
        self._weights: list[int] | None = None
        self._sentinel = _sentinel(params)
        self._measured: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._watch_weights = True
        self._watch_loss = True
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Place the hooks; also again, after `remove`.

        Args:
            model: The module that is trained.
        """
        self._handles += [
            model.register_forward_pre_hook(BoundHook(self._on_forward, keep_owner=True)),
            model.register_forward_hook(BoundHook(self._on_result, keep_owner=True), with_kwargs=True),
            self._sentinel.register_post_accumulate_grad_hook(self._on_gradient),
        ]
        # The guard outlives an optimizer that a launcher drops; one that another of ours follows has nothing to say.
        previous = _GUARDS.get(model)
        if previous is not None and previous is not self:
            previous._watch_weights = False
        _GUARDS[model] = self

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._watch_weights or not torch.is_grad_enabled() or not module.training:
            return
        now = [version(p) for p in self._params]
        changed = self._weights is not None and now != self._weights and self._measured is not None
        if changed or trains_without(self._params, self.groups):
            raise OptimizerNotSteppedError(
                "Another optimizer is training this model, and the step() of the layer-wise optimizer attached to it "
                "is never called. Trainer under DeepSpeed replaces optimizers=(optimizer, None) by AdamW without a "
                "word: use ClarsTrainer, which creates its optimizer where DeepSpeed honours it. If you meant to "
                "replace the optimizer, call remove_hooks() on the old one."
            )
        self._weights = now

    def _on_result(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Once, when Trainer first passes `num_items_in_batch`: is the loss a share of the batch's, or a mean?"""
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if items is None or type(items) not in (Tensor, int, float):
            return  # none, or one that ClarsTrainer counts, which itself sees what becomes of it
        if not self._watch_loss or not torch.is_grad_enabled() or not isinstance(labels, Tensor):
            return
        loss, logits = _entry(output, "loss"), _entry(output, "logits")
        if loss is None or logits is None or logits.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
            return
        if float(items) <= len(labels):
            return  # one pass is the whole batch: nothing to see, and nothing wrong
        self._watch_loss = False
        mean = torch.nn.functional.cross_entropy(logits.detach().float(), labels)
        if torch.isclose(loss.detach().float(), mean, rtol=1e-2):
            raise AccumulationIgnoredError(
                f"{type(module).__name__} takes num_items_in_batch but ignores it: its loss is the mean over the "
                f"{len(labels)} samples of one pass, while Trainer counts on a share of {float(items):g}. Loss and "
                "gradient would be too large by the number of accumulated passes. Use ClarsTrainer, which is right for "
                "every head, or set model.accepts_loss_kwargs = False before creating the Trainer."
            )

    def _on_gradient(self, param: nn.Parameter) -> None:
        if param.grad is not None:
            self._measured = _sample(param.grad)

    @torch.no_grad()
    def local_sample(self) -> Tensor:
        """Some elements of a small parameter's gradient as `backward()` left it here, before data parallelism.

        Unscaling (fp16), clipping and whatever else a loop does multiply all gradients alike, so a few elements tell by
        how much: the mean of this over ranks is what `p.grad` would be without. Sharded engines keep gradients
        elsewhere and say themselves what they do.

        Returns:
            [m]; zeros where there is nothing to compare.
        """
        grad = self._sentinel.grad
        if self._measured is None or grad is None or keeps_gradients_elsewhere(self._sentinel):
            return torch.zeros(_sampled(self._sentinel), device=self._sentinel.device)
        return self._measured

    @torch.no_grad()
    def scale_since(self, sample: Tensor) -> Tensor:
        """What `p.grad` was multiplied by since.

        Args:
            sample: `local_sample()`, averaged over ranks.

        Returns:
            0-dim; 1 where there is nothing to compare.
        """
        grad = self._sentinel.grad
        before = torch.linalg.vector_norm(sample)
        if grad is None or keeps_gradients_elsewhere(self._sentinel):
            return torch.ones_like(before)
        return torch.where(before > 0, torch.linalg.vector_norm(_sample(grad)).to(before) / before, 1.0)

    def follow(self, params: Sequence[nn.Parameter]) -> None:
        """Watch the parameters that FSDP2 has put in the place of others; it keeps their gradients itself.

        Args:
            params: The trainable parameters now.
        """
        self._handles.pop().remove()  # the sentinel's
        self._params, self._sentinel = list(params), _sentinel(params)

    def stepped(self) -> None:
        """The optimizer has stepped: it is the one that trains."""
        self._watch_weights = False
        self._measured = None

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
