"""The sum check: by definition the samples' gradients add up to the batch gradient.

What is forgotten, counted twice, or measured with the wrong rows cannot pass it. It is made in a model's first passes,
and now and then later: it costs one more product for layers whose norms are taken without making the gradients.
Sums are kept as sketches (Johnson and Lindenstrauss), so that no gradient is held a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_clars.grad_norms.errors import IN_A_FORWARD, WITHOUT_SAMPLES, SumCheckError
from hf_clars.grad_norms.norm_math import squared_sum
from hf_clars.grad_norms.torch_internals import no_autocast
from hf_clars.grad_norms.undisturbed import differentiating

#: How far two sums of the same numbers may differ, relative to the sum of the samples' norms, and to the largest such
#: sum of all parameters: some gradients, as of a bias before a softmax, are rounding errors and nothing else.
_TOLERANCE = {torch.float64: (1e-6, 1e-9), torch.float32: (2e-3, 1e-5), torch.float16: (5e-2, 5e-3)}
_COARSE = (2e-1, 3e-2)
_FINE = (torch.float32, torch.float64)
_IN_HALF_PRECISION = (
    "It was computed in half precision. If float32 raises no such error, the batch gradient is off, and not the norms: "
    "on a CPU torch sums the gradient of LayerNorm's bias in bfloat16, which goes wrong over thousands of rows. Train "
    "this layer in float32 then. If it raises it too:"
)


#: A sketch has `_ROWS` rows of this many numbers, and gradients of fewer numbers are kept as they are.
_WIDTH, _ROWS = 1024, 16


def sketch(t: Tensor) -> Tensor:
    """A few sums of a tensor's numbers, each with a random sign: they add up as tensors do, and have about its norm.

    The signs are the same in each call. The norm is exact for one row of `_WIDTH` numbers; for many rows that are all
    alike it is off by a third, as a rule, and for others by much less.

    Args:
        t: Of any shape.

    Returns:
        At most `(_ROWS + 1) * _WIDTH` numbers, in float32 at least; all of them where there are no more.
    """
    flat = t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32))
    rows = flat.numel() // _WIDTH
    if rows <= _ROWS:
        return flat
    drawn = torch.randint(2, (_ROWS, rows), generator=torch.Generator().manual_seed(rows), device="cpu")
    signs = (2 * drawn - 1).to(flat) / math.sqrt(_ROWS)
    head, rest = flat[: rows * _WIDTH], flat[rows * _WIDTH :]
    with no_autocast(flat.device.type):  # a user's backward() may run inside a region
        return torch.cat([(signs @ head.view(rows, _WIDTH)).flatten(), rest])


def close(t: Tensor, right: Tensor) -> bool:
    """Whether a gradient is another up to rounding, and to the latter's shape; this reads a value from the device."""
    relative, _ = _TOLERANCE.get(t.dtype, _COARSE)
    return t.shape == right.shape and not bool((t - right).norm() > relative * right.norm())


class SumCheck:
    """Compares both sums over a batch of one or more passes.

    Args:
        names: Of all measured parameters.
        in_use: The tensor that is computed with in the place of each parameter that is looked at.
        keeps_errors: Whether an error of its hooks is kept until sums are compared, in place of ending the backward
            pass.

    Attributes:
        delivered: Parameters for which autograd has delivered a gradient.
    """

    def __init__(
        self, names: Mapping[nn.Parameter, str], in_use: Mapping[nn.Parameter, Tensor], *, keeps_errors: bool = False
    ) -> None:
        self._keeps_errors = keeps_errors
        self._error: Exception | None = None
        self.delivered: dict[nn.Parameter, Tensor] = {}
        self._names = names
        self._wanted = set(in_use)
        self._balance: dict[nn.Parameter, Tensor] = {}
        self._sizes: dict[nn.Parameter, Tensor] = {}
        self._coarsest: dict[nn.Parameter, torch.dtype] = {}
        # Gradients that a hook of the user's has changed cannot be compared.
        self._handles: list[RemovableHandle] = [
            leaf.register_hook(_Take(self, p)) for p, leaf in in_use.items() if not leaf._backward_hooks
        ]

    def wants(self, param: nn.Parameter) -> bool:
        """Whether a parameter is looked at."""
        return param in self._wanted

    def leave_out(self, params: Iterable[nn.Parameter]) -> None:
        """Do not look at these."""
        for param in params:
            self._wanted.discard(param)
            self._balance.pop(param, None)
            self.delivered.pop(param, None)

    def add(self, param: nn.Parameter, total: Tensor, size: Tensor, dtype: torch.dtype) -> None:
        """Note one use of a parameter that is looked at.

        Args:
            param: The parameter.
            total: Sum of the samples' gradients, in its shape.
            size: Sum of their norms, a scalar.
            dtype: The precision that this use was computed in.
        """
        held, mine = self._balance.get(param), sketch(total)
        self._balance[param] = mine if held is None else held + mine
        self._sizes[param] = self._sizes[param] + size if param in self._sizes else size
        self._note_precision(param, dtype)

    def add_grads(self, param: nn.Parameter, grads: Tensor, dtype: torch.dtype) -> None:
        """As `add`, of one use's per-sample gradients [b, *shape]."""
        if self.wants(param):
            self.add(param, grads.sum(0), squared_sum(grads).sqrt().sum(), dtype)

    def _note_precision(self, param: nn.Parameter, dtype: torch.dtype) -> None:
        known = self._coarsest.get(param, torch.float64)
        self._coarsest[param] = dtype if torch.finfo(dtype).eps > torch.finfo(known).eps else known

    def take(self, param: nn.Parameter, g: Tensor | None) -> None:
        """Take a gradient that autograd delivers for a parameter; None, where an operation says that there is none."""
        if g is None or differentiating() or g.is_sparse or param not in self._wanted or self._error is not None:
            return
        try:
            self._take(param, g)
        except Exception as error:
            if not self._keeps_errors:
                raise
            self._error = error
            self.delivered[param] = g.new_zeros(())  # so that the comparison comes, and raises it

    def _take(self, param: nn.Parameter, g: Tensor) -> None:
        with torch.no_grad():
            held, mine = self._balance.get(param), sketch(g.detach())
            self._balance[param] = -mine if held is None else held - mine
            norm = g.detach().to(torch.promote_types(g.dtype, torch.float32)).norm()
            self.delivered[param] = self.delivered[param] + norm if param in self.delivered else norm
            self._note_precision(param, g.dtype)

    def stop(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def raise_if_wrong(self) -> None:
        """Compare; this reads values from the device.

        Raises:
            SumCheckError: Naming the parameter, and both numbers.
        """
        if self._error is not None:
            raise self._error
        if not self.delivered:
            return
        table = self._table()
        if not bool(table.isfinite().all()):
            return
        largest = float(table[:, 1:].max()) if len(table) else 0.0
        for param, (difference, size, norm) in zip(self.delivered, table.tolist(), strict=False):
            relative, noise = _TOLERANCE.get(self._coarsest[param], _COARSE)
            if difference > relative * max(size, norm) + noise * largest:
                why = "" if self._coarsest[param] in _FINE else f"{_IN_HALF_PRECISION} "
                raise SumCheckError(
                    f"{self._names.get(param, 'a parameter')}: the samples' gradients do not add up to the batch "
                    f"gradient. They differ from it by {difference:.3g}, and its norm is {norm:.3g}. {why}A use of the "
                    "parameter was missed, or counted twice, or a layer rule of yours is wrong. Uses outside of the "
                    f"model's forward are not seen. {IN_A_FORWARD}. Or the loss has a part that is no sample's, as a "
                    "penalty on weights: use weight_decay for it, or set check_every = 0 on the norms (CLARS: "
                    "optimizer.norms). If it is none of these, please report this model, and until then freeze the "
                    f"parameter, or {WITHOUT_SAMPLES}."
                )

    def _table(self) -> Tensor:
        """[parameters, 3]: how far both sums differ, the sum of the samples' norms, and the gradient's norm.

        It is put together on the device of the first, and comes to the host at one go.
        """
        rows = [
            torch.stack(
                [t.to(norm.device).double() for t in (self._balance[p].norm(), self._sizes.get(p, norm * 0), norm)]
            )
            for p, norm in self.delivered.items()
            if not norm.is_meta
        ]
        return torch.stack([row.to(rows[0].device) for row in rows]).cpu() if rows else torch.zeros(0, 3)


class _Take:
    """A hook that does not keep the check alive in a copy of the model."""

    def __init__(self, check: SumCheck, param: nn.Parameter) -> None:
        self._check, self._param = check, param

    def __call__(self, g: Tensor | None) -> None:
        self._check.take(self._param, g)

    def __deepcopy__(self, memo: object) -> _Ignore:
        return _Ignore()

    def __reduce__(self) -> tuple[type[_Ignore], tuple[()]]:
        return _Ignore, ()


class _Ignore:
    def __call__(self, g: Tensor) -> None:
        """Do nothing."""
