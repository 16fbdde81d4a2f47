"""Checks that the training loop around an optimizer keeps the promises that its rates rest on.

They compare version counters, which torch raises whenever a tensor is changed in place; the device is waited for only
where those say that something is wrong.
Private name: `Tensor._version`. torch has no public way to ask whether a tensor was changed in place, and a copy of
each weight would cost the memory of the model. A test fails loudly should the name change its meaning. It ends when
torch documents the counter.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from hf_clars.distributed import local_part
from hf_clars.distributed.zero_marks import trains_without
from hf_clars.errors import HfClarsError
from hf_clars.grad_norms.compiled.operations import Told
from hf_clars.grad_norms.hooks import BoundHook, kind_of_hook
from hf_clars.grad_norms.torch_internals import version
from hf_clars.optim.gradient_scale import GradientScale


class OptimizerNotSteppedError(HfClarsError, RuntimeError):
    """The weights change, but this optimizer's `step()` is never called."""


class AccumulationIgnoredError(HfClarsError, RuntimeError):
    """The model's loss ignores `num_items_in_batch`, so that accumulated gradients come out too large."""


def _entry(output: Any, name: str) -> Tensor | None:
    """A tensor of a model's output by name, or None."""
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


GuardBegins, GuardEnds = kind_of_hook("GuardBegins"), kind_of_hook("GuardEnds")


class _WithoutItems:
    """In compiled code a result is not looked at, unless Trainer says how many items the whole batch has."""

    def ready(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        """Whether there is nothing to look at."""
        return kwargs.get("num_items_in_batch") is None

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


MOVES = 3
"""So many backward passes in a row may find the weights at a new place before the first step."""

_GUARDS: WeakKeyDictionary[nn.Module, LoopGuard] = WeakKeyDictionary()


class LoopGuard:
    """Watches one model on behalf of one optimizer.

    Args:
        model: The module that is trained.
        params: Its parameters that train.
        groups: The optimizer's parameter groups; kept, so that they can be looked at when the optimizer is gone.
        before_forward: Called before every pass with gradients; a method of the optimizer, which is not kept alive.
        minds_scale: Whether steps depend on the gradients' scale; told by a method of the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        before_forward: Callable[[], None],
        minds_scale: Callable[[], bool],
    ) -> None:
        self._params = list(params)
        self.groups = groups
        self.paused = False  # see BoundHook
        self.scale = GradientScale(params)
        self._before_forward, self._minds_scale = WeakMethod(before_forward), WeakMethod(minds_scale)
        self._weights: list[int] | None = None
        self._places: list[Tensor] = []
        self._moves = 0
        self._other: str | None = None
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
            model.register_forward_pre_hook(GuardBegins(self._on_forward, traced=Told(self), keep_owner=True)),
            model.register_forward_hook(
                GuardEnds(self._on_result, traced=_WithoutItems(), keep_owner=True), with_kwargs=True
            ),
        ]
        if self._watch_weights:
            self._steps = register_optimizer_step_post_hook(BoundHook(self._on_any_step))
        self.scale.watch(self._params)
        # The guard outlives an optimizer that a launcher drops; one that another of ours follows has nothing to say.
        self._training = weakref.ref(model)
        previous = _GUARDS.get(model)
        if previous is not None and previous is not self:
            previous._watch_weights = False
        _GUARDS[model] = self

    def compiled_model_is_called(self) -> None:
        """Compiled code is about to call the model."""
        model = self._training()
        if model is not None and not self.paused:
            with torch.enable_grad():
                self._on_forward(model, ())

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        prepare = self._before_forward()
        if prepare is not None:
            prepare()
        if not self._watch_weights or not module.training:
            return
        now = [version(p) for p in self._params]
        if self._weights is None:
            self._places.append(self._place())
        changed = self._weights is not None and now != self._weights and self.scale.seen
        self._weights = now
        if (changed and self._wanders()) or self._other or trains_without(self._params, self.groups):
            raise OptimizerNotSteppedError(
                f"{self._other or 'Another optimizer'} is training this model, and the step() of the layer-wise "
                "optimizer attached to it is never called. Trainer under DeepSpeed replaces optimizers=(optimizer, "
                "None) by AdamW without a word: use ClarsTrainer, which creates its optimizer where DeepSpeed honours "
                "it. If you meant to replace the optimizer, call remove_hooks() on the old one."
            )

    @torch.no_grad()
    def _wanders(self) -> bool:
        """Whether the weights go on and on, and do not come back: a loop may move them and put them back.

        Sharpness-aware steps do, and weights that are swapped for their average. Only asked when weights have changed
        without a step, so that the device may be waited for.
        """
        here = self._place()
        self._moves += 1
        if any(torch.allclose(here, place, rtol=1e-6, atol=1e-7) for place in self._places):
            self._moves = 0
        else:
            self._places = [*self._places[:1], here]
        return self._moves > MOVES

    def _place(self) -> Tensor:
        """Some of the weights, enough to tell whether they are where they were."""
        few = [local_part(p.detach()) for p in self._params[:: max(1, len(self._params) // 8)]]
        return torch.cat([p.reshape(-1)[:64].to(few[0].device, torch.float32, copy=True) for p in few])

    def _on_any_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Any optimizer of torch's kind has stepped."""
        if not self._watch_weights or optimizer.param_groups is self.groups:
            return
        theirs = {p for group in optimizer.param_groups for p in group["params"]}
        if not theirs.isdisjoint(self._params):
            self._other = type(optimizer).__name__

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
            self._say_ignored(type(module).__name__, len(labels), float(items))

    def _say_ignored(self, model: str, samples: int, items: float) -> None:
        what = (
            f"{model} takes num_items_in_batch but ignores it: its loss is the mean over the {samples} samples of one "
            f"pass, while Trainer counts on a share of {items:g}, the samples of all accumulated passes in all "
            f"processes. "
        )
        way_out = (
            "Use ClarsTrainer, which is right for every head, or set model.accepts_loss_kwargs = False before "
            "creating the Trainer."
        )
        minds = self._minds_scale()
        if minds is None or minds():
            raise AccumulationIgnoredError(
                f"{what}Loss and gradient would be {items / samples:g} times too large. {way_out}"
            )
        warnings.warn(
            f"{what}The loss that is logged will be too large by up to that factor, {items / samples:g}. The steps are "
            f"right: they do not depend on the gradients' scale. {way_out}",
            stacklevel=2,
        )

    def follow(self, params: Sequence[nn.Parameter]) -> None:
        """Watch other parameters: FSDP2 has put its own in the place of others, or some were unfrozen.

        Args:
            params: The parameters that train now.
        """
        self._params = list(params)
        self._weights = None
        self.scale.watch(params)

    def stepped(self) -> None:
        """The optimizer has stepped: it is the one that trains."""
        if self._watch_weights:
            self._watch_weights = False
            self._places.clear()
            self._steps.remove()
        self.scale.stepped()

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._steps.remove()
        self.scale.remove()
