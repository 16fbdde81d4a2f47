"""By how much the gradients were multiplied between `backward()` and the step: unscaling, clipping, averaging by hand.

Whatever a loop does to all gradients alike, a few elements of three parameters tell, before and after. Three, spread
over the model, because one may have no gradient (an unused head, a layer that was frozen since). All of it stays on
the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_clars.distributed import is_split, is_zeros, keeps_gradients_elsewhere, local_part
from hf_clars.grad_norms.hooks import BoundHook

ELEMENTS, SUMS = 128, 4  # of each witness, and of each of as many parts of it


def _stride(elements: int) -> int:
    return max(1, elements // ELEMENTS)


def some_of(tensor: Tensor) -> Tensor:
    """A few numbers that any factor multiplies: elements, evenly spread, and sums that all are in; float32 at least.

    Few rows of a large table may not be 0. In sums each element has a weight of its own, as if drawn: plain ones are
    often 0, before a LayerNorm or a softmax.
    """
    flat, wide = tensor.detach().reshape(-1), torch.promote_types(tensor.dtype, torch.float32)
    every = _stride(len(flat))
    if every == 1:
        return flat.to(wide, copy=True)
    whole = len(flat) // every * every
    drawn = torch.arange(1.0, SUMS * every + 1, device=flat.device).sin().mul(43758.5453).frac() / every**0.5
    sums = flat[:whole].view(-1, every) @ drawn.view(every, SUMS).to(flat.dtype)
    return torch.cat([flat[::every], sums.flatten(), flat[whole:]]).to(wide)


def _size(param: nn.Parameter) -> int:
    """How many numbers of a parameter processes tell each other."""
    if is_split(param):
        return 2
    every = _stride(param.numel())
    parts, rest = divmod(param.numel(), every)
    return parts if every == 1 else parts + bool(rest) + SUMS * parts + rest


def _witnesses(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """A small parameter near the loss, whose gradient is the last to vanish, one in the middle and one at the start."""
    middle = (len(params) - 2) // 2
    spread = (params[-2:], params[middle : middle + 2], params[:2])
    return list(dict.fromkeys(min(few, key=lambda p: p.numel()) for few in spread if few))


class GradientScale:
    """Watches a few gradients.

    Args:
        params: The parameters that train.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._handles: list[RemovableHandle] = []
        self._before: dict[nn.Parameter, Tensor] = {}
        self.watch(params)

    def watch(self, params: Sequence[nn.Parameter]) -> None:
        """Choose the witnesses.

        Args:
            params: The parameters that train; every process must choose from the same.
        """
        self.remove()
        self._before.clear()
        self._witnesses = _witnesses(params)
        for param in self._witnesses:
            self._handles.append(param.register_post_accumulate_grad_hook(BoundHook(self._on_gradient)))

    @property
    def stale(self) -> bool:
        """Whether a witness has been frozen since it was chosen."""
        return not all(param.requires_grad for param in self._witnesses)

    @property
    def seen(self) -> bool:
        """Whether a gradient has arrived since the last step."""
        return bool(self._before)

    @torch.no_grad()
    def _on_gradient(self, param: nn.Parameter) -> None:
        if param.grad is not None and not param.grad.is_sparse:
            self._before[param] = some_of(local_part(param.grad))

    @torch.no_grad()
    def local_sample(self) -> Tensor:
        """This process's share of what `scale_since` compares, [m]; m is the same in all processes.

        Of a whole parameter these are elements of its gradient as `backward()` left it here, before data parallelism:
        their mean over processes is what `p.grad` would be without anything else. Of a parameter that FSDP2 has split
        these are two sums of squares over this process's part, before and now. DeepSpeed keeps gradients elsewhere,
        and says itself what it does: zeros.
        """
        return torch.cat([self._share(param) for param in self._witnesses])

    def _share(self, param: nn.Parameter) -> Tensor:
        before = None if param.grad is None else self._before.get(param)
        if before is None or is_zeros(param):
            return torch.zeros(_size(param), device=param.device)
        if not is_split(param):
            return before
        return torch.stack([before.square().sum(), some_of(local_part(param.grad)).square().sum()])

    @torch.no_grad()
    def scale_since(self, sample: Tensor) -> Tensor:
        """What `p.grad` was multiplied by since.

        Args:
            sample: `local_sample()`, averaged over processes.

        Returns:
            0-dim; 1 where there is nothing to compare.
        """
        before, after = self._squares(sample)
        return torch.where(before > 0, (after / before).sqrt(), 1.0)

    @torch.no_grad()
    def is_own(self, sample: Tensor | None, *, others: bool) -> Tensor:
        """Whether `p.grad` points where this process's own samples did.

        Args:
            sample: `local_sample()`, averaged over processes; None where that is not known.
            others: And not where all processes' samples did.

        Returns:
            Bool, 0-dim.
        """
        own = self.local_sample()
        now = self._now(own)
        alone = _cosine(now, own) > 1 - 1e-5
        return alone if sample is None or not others else alone & (_cosine(now, sample) < 1 - 1e-3)

    def _now(self, sample: Tensor) -> Tensor:
        """Like the sample, of the gradients as they are; zeros for what is split."""
        parts = []
        for param, part in zip(self._witnesses, self._parts(sample), strict=True):
            told = param.grad is not None and not keeps_gradients_elsewhere(param)
            parts.append(some_of(param.grad).to(part) if told and param.grad is not None else torch.zeros_like(part))
        return torch.cat(parts)

    def _parts(self, sample: Tensor) -> Sequence[Tensor]:
        return sample.split([_size(param) for param in self._witnesses])

    def _squares(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares over the witnesses that have both: (before, now)."""
        before, after = sample.new_zeros(()), sample.new_zeros(())
        for param, part in zip(self._witnesses, self._parts(sample), strict=True):
            if is_split(param):
                before, after = before + part[0], after + part[1]
            elif param.grad is not None and not keeps_gradients_elsewhere(param):
                before = before + part.square().sum()
                after = after + some_of(param.grad).to(part).square().sum()
        return before, after

    def stepped(self) -> None:
        """Forget the gradients of the step that was taken."""
        self._before.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def all_zero(grads: Sequence[Tensor]) -> bool:
    """Whether there are gradients, and all are zero in this process; waits for the device."""
    return bool(grads) and not any(bool(local_part(grad).any()) for grad in grads)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    product = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return torch.where(product > 0, (a @ b) / product, 0.0)
