"""Whether gradients were cleared since `backward()` brought them, also where they were set to zero in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hf_clars.distributed import is_zeros, local_part
from hf_clars.grad_norms.hooks import BoundHook, PlacedHooks
from hf_clars.grad_norms.torch_internals import version


class GradientWatch:
    """Looks at the gradients of a few parameters: the first, the middle and the last, and more where these get none.

    Args:
        params: The parameters that train.

    Attributes:
        paused: While True, gradients are not noted.
        hooks: On these parameters.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.paused = False
        self._noted: dict[nn.Parameter, tuple[Tensor, tuple[int, int]]] = {}
        self.hooks = PlacedHooks()
        self._watched: set[nn.Parameter] = set()
        trained = [p for p in params if p.requires_grad]
        places = {0, len(trained) // 2, len(trained) - 1} if trained else set()
        for place in sorted(places):
            self._watch(trained[place])

    def _watch(self, param: nn.Parameter) -> None:
        self.hooks.add(param.register_post_accumulate_grad_hook, BoundHook(self._on_gradient))
        self._watched.add(param)

    @torch.no_grad()
    def _on_gradient(self, param: nn.Parameter) -> None:
        if param.grad is not None and not is_zeros(param):
            self._noted[param] = (param.grad, _versions(param.grad))

    @torch.no_grad()
    def cleared(self, used: Iterable[nn.Parameter]) -> bool:
        """Whether the gradients that were noted are gone, or zero.

        Waits for the device only where a gradient was changed in place between two backward passes, which is no part of
        an ordinary loop, and as often as it must find a parameter that is to be watched too.

        Args:
            used: The parameters of the passes that a gradient has reached.
        """
        if not self._noted:
            others = [p for p in used if p not in self._watched and p.grad is not None and not is_zeros(p)]
            if others:  # a head of many, or what is left when the rest is frozen
                self._watch(others[0])
            return bool(others) and not any(bool(local_part(p.grad).any()) for p in others)
        now = {p: p.grad for p in self._noted if p.grad is not None}
        if all(self._noted[p][0] is grad and self._noted[p][1] == _versions(grad) for p, grad in now.items()):
            return not now
        return not any(bool(local_part(grad).any()) for grad in now.values())

    def forget(self) -> None:
        """A new batch begins."""
        self._noted.clear()


def _versions(grad: Tensor) -> tuple[int, int]:
    """How often a gradient has been changed; of one that FSDP2 has split, operations count at either end."""
    return version(grad), version(local_part(grad))
