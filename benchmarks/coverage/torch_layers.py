"""Every module that PyTorch's own tests know, with their inputs, as the first, a middle or the last layer of a model.

`torch.testing._internal.common_modules` ships with torch; it needs `expecttest`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.subject import NotRunnable, Subject, tensors_of

PLACES = ("first", "middle", "last")
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
ATTENTION = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


@cache
def module_infos() -> dict[str, Any]:
    """What PyTorch tests: `nn.Conv2d` and so on -> its entry."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    return {info.name: info for info in module_db}


def names() -> list[str]:
    """The modules' names."""
    return list(module_infos())


def build(name: str) -> Subject:
    """A module in the middle of a model, with the first of its inputs that has a batch, in float32.

    Raises:
        NotRunnable: If no input has a batch.
    """
    for case in cases(name, training=True):
        for place in ("middle", "first"):
            try:
                return case.subject(place, torch.float32)
            except NotRunnable:
                continue
    raise NotRunnable("none of its test inputs has a batch")


def modes(name: str) -> tuple[bool, ...]:
    """The modes that a module behaves differently in: training, and where it differs evaluation."""
    return (True, False) if module_infos()[name].train_and_eval_differ else (True,)


@dataclass
class Case:
    """One of a module's test inputs.

    Attributes:
        module: The module, in float64.
        args: What it is called with, by position; in float64.
        kwargs: And by name.
        axes: Where each of `args` has the batch; None: nowhere.
        samples: The batch size.
        what: PyTorch's description.
    """

    module: nn.Module
    args: list[Any]
    kwargs: dict[str, Any]
    axes: list[int | None]
    samples: int
    what: str

    def subject(self, place: str, dtype: torch.dtype = torch.float64) -> Subject:
        """The model for one place.

        Raises:
            NotRunnable: If the module cannot stand there: one that takes whole numbers has nothing before it.
        """
        x = self.args[0]
        if place != "first" and not x.is_floating_point():
            raise NotRunnable("takes whole numbers, so that no layer can be before it")
        torch.manual_seed(0)
        model = Place(self, place)
        batch = {"": tuple(_batch_first(a, axis) for a, axis in zip(self.args, self.axes, strict=True))}
        with torch.no_grad():
            out = model(*batch[""])
        if place == "last" and isinstance(out, Tensor) and out.dim() == 0:
            return ScalarLoss(model.to(dtype), _cast(batch, dtype), note=self.what, samples=self.samples)
        if place != "last":
            model.add_head(out)
        return Subject(model.to(dtype), _cast(batch, dtype), note=self.what, samples=self.samples)


class Place(nn.Module):
    """A layer before the module, the module, a layer after it; batch first, whatever the module takes."""

    def __init__(self, case: Case, place: str) -> None:
        super().__init__()
        self.inner, self.axes, self.kwargs = case.module, case.axes, case.kwargs
        x = case.args[0]
        self.before = nn.Linear(x.shape[-1] if x.dim() > 1 else 1, 1).double() if place != "first" else None
        self.head: nn.Module | None = None
        self.batch_axis = 0 if case.axes[0] is None else case.axes[0]

    def add_head(self, out: Tensor) -> None:
        """End in a linear layer over what the module returns."""
        if out.dim() == 0 or out.numel() == 0:
            raise NotRunnable("returns no batch that a layer could follow")
        self.head = nn.Linear(out.shape[1], 2).double()

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """The outputs of all, flattened to [B, F]; or a loss module's number."""
        if self.before is not None:  # keeps the sign and makes nothing larger: some take probabilities
            gate = self.before(x if x.dim() > 1 else x[:, None]).sigmoid()
            x = x * (gate if x.dim() > 1 else gate[:, 0])
        args = [_batch_back(a, axis) for a, axis in zip((x, *rest), self.axes, strict=True)]
        found = [t for t in tensors_of(self.inner(*args, **self.kwargs)) if t.numel()]
        if not found:
            raise NotRunnable("returns no numbers")
        if found[0].dim() == 0:
            return found[0]
        of_first = self.batch_axis if found[0].dim() > self.batch_axis else 0  # CTC's losses: [B] of [T, B, C]
        axes = [of_first] + [1 if isinstance(self.inner, RECURRENT) else 0] * (len(found) - 1)
        rows = [t.movedim(a, 0).reshape(t.shape[a], -1) for t, a in zip(found, axes, strict=True)]
        flat = torch.cat(rows, 1)
        return flat if self.head is None else self.head(flat)


@dataclass
class ScalarLoss(Subject):
    """A model that ends in a loss module with a reduction: its loss is a number, and each sample's that of it alone."""

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What the loss module returns."""
        torch.manual_seed(1)
        out: Tensor = model(*batch[""])
        return out

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Each sample's loss alone, times what makes their mean the batch's loss.

        Raises:
            NotRunnable: If the batch's loss is neither their mean nor their sum.
        """
        try:
            alone = [
                self.loss(model, {"": tuple(a[i : i + 1] if isinstance(a, Tensor) else a for a in batch[""])})
                for i in range(self.samples)
            ]
        except (RuntimeError, ValueError, IndexError) as error:  # targets one after the other, without a batch axis
            raise NotRunnable(f"cannot be called on one sample: {error}") from error
        each, whole = torch.stack(alone), self.loss(model, batch).detach()
        # Weights of classes may make the mean another one by little.
        near = 1e-9 if whole.dtype == torch.float64 else 1e-5
        for factor in (1, self.samples):
            if torch.allclose(factor * each.detach().mean(), whole, rtol=near, atol=near):
                return factor * each
        raise NotRunnable("its mean weighs samples differently")


def cases(name: str, training: bool = True) -> Iterator[Case]:
    """A module's test inputs that have a batch.

    Args:
        name: The module's name, of `names()`.
        training: The mode.
    """
    info = module_infos()[name]
    torch.manual_seed(0)
    for number, given in enumerate(
        info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=training)
    ):
        call = given.forward_input
        if call is None or "scalar" in given.desc:
            continue
        module = (
            info.module_cls(*given.constructor_input.args, **given.constructor_input.kwargs).double().train(training)
        )
        args, kwargs = _by_position(module, [_leaf(a) for a in call.args], dict(call.kwargs))
        if not args or not isinstance(args[0], Tensor):
            continue
        axes = _axes(module, args)
        unbatched = args[0].dim() < _fewest_axes(module) or "no_batch_dim" in given.desc
        if axes[0] is not None and (unbatched or args[0].shape[axes[0]] == 1):
            args = [
                _as_batch(a, axis, torch.stack if unbatched else torch.cat) for a, axis in zip(args, axes, strict=True)
            ]
        try:
            module(*args, **kwargs)  # initialises those that are lazy; some settings are for one batch size
        except (RuntimeError, ValueError, AssertionError, IndexError):
            continue
        yield Case(
            module.double(), args, kwargs, axes, args[0].shape[axes[0]], f"{given.desc} (input {number})".strip()
        )


def _as_batch(value: Any, axis: int | None, join: Any) -> Any:
    """A batch of four out of one sample: itself, and three that are smaller."""
    if axis is None or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_as_batch(v, axis, join) for v in value)
    return join([value * f if value.is_floating_point() else value for f in (1.0, 0.8, 0.6, 0.4)], axis)


def _by_position(module: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    takes = list(inspect.signature(module.forward).parameters)
    while kwargs and len(args) < len(takes) and takes[len(args)] in kwargs:
        value = kwargs.pop(takes[len(args)])
        args.append(value)
    return args, kwargs


def _fewest_axes(module: nn.Module) -> int:
    """How many axes an input has at least, with a batch."""
    if isinstance(module, (*RECURRENT, *ATTENTION)):
        return 3
    if isinstance(module, CELLS) or type(module).__name__ in ("Linear", "Bilinear", "GLU", "MultiLabelMarginLoss"):
        return 2
    found = [n for n in (1, 2, 3) if type(module).__name__.endswith(f"{n}d")]
    spatial = "Norm" not in type(module).__name__ or "Instance" in type(module).__name__
    return (found[0] + 2 if spatial else 2) if found else 1


def _axes(module: nn.Module, args: list[Any]) -> list[int | None]:
    if isinstance(module, RECURRENT):
        return [0 if module.batch_first else 1, *[1] * (len(args) - 1)]
    if isinstance(module, ATTENTION):
        inner = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
        axis = 0 if inner is not None and inner.batch_first else 1
        named = list(inspect.signature(module.forward).parameters)
        return [
            (0 if "padding_mask" in n else None if "mask" in n else axis) if isinstance(a, Tensor) else None
            for n, a in zip(named, args, strict=False)
        ]
    if isinstance(module, nn.CTCLoss):
        return [1] + [0 if isinstance(a, Tensor) else None for a in args[1:]]
    return [0 if isinstance(a, (Tensor, tuple, list)) else None for a in args]


def _batch_first(value: Any, axis: int | None) -> Any:
    if axis is None or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_batch_first(v, axis) for v in value)
    return value.movedim(axis, 0).contiguous()


def _batch_back(value: Any, axis: int | None) -> Any:
    if axis is None or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_batch_back(v, axis) for v in value)
    return value.movedim(0, axis)


def _leaf(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_leaf(v) for v in value)
    return value.detach() if isinstance(value, Tensor) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
