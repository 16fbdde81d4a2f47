"""The modules whose parameters are measured, and what their tensors must look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, BatchAxisError
from hf_clars.grad_norms.registry import LayerRule, find_rule

_WAY_OUT = f"freeze its parameters, or {WITHOUT_SAMPLES}."


class HookedModule:
    """A module with measured parameters of its own or inside, and the rule for it.

    Args:
        path: Its name in the model.
        module: The module.
        layers: Its own measured parameters' layers by local name; none for a mere container.

    Attributes:
        params: The same parameters by local name.
        rule: The rule that serves it, if any does.
        inner: Measured parameters of the modules inside, by their name relative to this one; only without a rule.
        tied: Names of its own parameters that a module around it or inside owns too.
        strays: Those of them that are used without a call of their modules; found in the first pass.
        foreign_inputs: What its inputs are like that were seen not to be tensors of the model itself.
        known_rows: Layouts (rows a sample, shape of a row) whose rows were proven to lie sample by sample.
        proven_dims: Numbers of axes with which its calls were proven to have the batch first.
        decisions: How the rule takes the weight gradient over, if it does, by shapes.
        ever_captured: Whether a call has been captured since the hooks were placed.
    """

    def __init__(self, path: str, module: nn.Module, layers: dict[str, int]) -> None:
        self.path = path
        self.module = module
        self.layers = layers
        self.params = {n: p for n, p in module.named_parameters(recurse=False) if n in layers}
        self.rule: LayerRule | None = find_rule(module) if layers else None
        self.inner: dict[str, nn.Parameter] = {}
        self.tied: set[str] = set()
        self.strays: dict[str, nn.Parameter] = {}
        self.foreign_inputs: set[tuple[bool, tuple[int, ...]]] = set()
        self.known_rows: set[tuple[int, ...]] = set()
        self.proven_dims: set[int] = set()
        self.decisions: dict[tuple[Any, ...], Any] = {}
        self.ever_captured = False

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__name__})"

    def full_name(self, name: str) -> str:
        """A parameter's name in the model."""
        return f"{self.path}.{name}" if self.path else name

    def in_use(self, name: str) -> nn.Parameter:
        """The tensor that the module computes with now; FSDP puts another one in the recorded one's place.

        Args:
            name: A parameter's name, relative to this module.
        """
        path, _, local = name.rpartition(".")
        return getattr(self.module.get_submodule(path) if path else self.module, local)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Its own measured parameters that are not frozen now, by local name."""
        return {n: p for n, p in self.params.items() if self.in_use(n).requires_grad}

    def leaves(self, params: Mapping[str, nn.Parameter]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Parameters of this module or inside, by name, each with the tensor that is computed with in its place."""
        return {n: (p, self.in_use(n)) for n, p in params.items()}

    def batch_axes(self, outputs: Mapping[int, Tensor]) -> dict[int, int]:
        """The batch axis of each output, by its place among all that the module returned: the first as a rule.

        The states of torch's recurrent nets have the layers there, [layers, B, hidden], whatever `batch_first` says.
        """
        recurrent = isinstance(self.module, nn.RNNBase) and type(self.module).__module__.startswith("torch.nn.")
        return {i: int(recurrent and i > 0 and t.dim() == 3) for i, t in outputs.items()}

    def follow(self, swapped: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know parameters by those that an engine has put in their place: {old: new}."""
        self.params = {n: swapped.get(p, p) for n, p in self.params.items()}
        self.inner = {n: swapped.get(p, p) for n, p in self.inner.items()}
        self.strays = {n: swapped.get(p, p) for n, p in self.strays.items()}

    def contains(self, other: HookedModule) -> bool:
        """Whether the other module is inside this one."""
        return other is not self and (not self.path or other.path.startswith(f"{self.path}."))

    def rows_of(self, x: Tensor, output: Tensor, batch_size: int, *, alone: bool = False) -> int | None:
        """Rows of the first axis that make up a sample, if that is certain: 1 where the batch is the first axis.

        Models fold other axes into the first (windows, frames). Whether a sample's rows then lie together is proven
        once (see `adoption.py`); until then the answer is None.

        Args:
            x: Input.
            output: Output.
            batch_size: Samples in the pass.
            alone: Nothing has to be proven: no module is around this one, or this is what the model was given.
        """
        if self.rule is not None and not self.rule.has_batch_axis(self.module, x):
            return None
        if x.shape[0] == batch_size == output.shape[0]:
            certain = self.rule is None or self.rule.batch_axis_is_certain or alone or batch_size == 1
            return 1 if certain or _layout(1, x) in self.known_rows else None
        rows = folded_rows(x, output, batch_size)
        return rows if rows and (batch_size == 1 or _layout(rows, x) in self.known_rows) else None

    def learn_rows(self, rows: int, x: Tensor) -> None:
        """Remember that in calls like this one each sample's `rows` rows lie together."""
        self.known_rows.add(_layout(rows, x))

    def no_batch_axis(
        self, taken: str, outputs: Sequence[Tensor], batch_size: int, *, recomputed: bool
    ) -> BatchAxisError:
        """The error for a call whose tensors cannot be told apart by sample.

        Args:
            taken: Its input, as text.
            outputs: Its tensor outputs.
            batch_size: Samples in the pass.
            recomputed: Whether reentrant activation checkpointing made the call, in the backward pass.
        """
        given = ", ".join(str(tuple(t.shape)) for t in outputs)
        what = f"returns {given}" if outputs else "returns no tensor that could be found"
        if recomputed:
            return BatchAxisError(
                f"{self} takes {taken} and {what}, but the batch has {batch_size} samples. It was called by reentrant "
                "activation checkpointing, under which no module around it can be differentiated for it: checkpoint "
                "with use_reentrant=False (Trainer: gradient_checkpointing_kwargs={'use_reentrant': False}), "
                f"{_WAY_OUT}"
            )
        return BatchAxisError(
            f"{self} takes {taken} and {what}, but the batch has {batch_size} samples, and no module around it has "
            f"the batch as first axis of its input and output: per-sample norms need one. Put the batch first in this "
            f"module's call or return it so from a module around it, {_WAY_OUT}"
        )

    def refuse_gradient_through(self, tensor: Tensor, batch_size: int) -> None:
        """Raise in the backward pass if a gradient comes through an output without the batch as first axis."""
        error = BatchAxisError(
            f"{self} has no layer rule and returns a tensor of shape {tuple(tensor.shape)}, but the batch has "
            f"{batch_size} samples: the general fallback needs the batch as its first axis. Register a rule for its "
            f"class, {_WAY_OUT}"
        )
        tensor.register_hook(lambda _: _raise(error))


def folded_rows(x: Tensor, output: Tensor, batch_size: int) -> int | None:
    """How many rows of the first axis there are for each sample, if they can be evenly shared."""
    first = x.shape[0] if x.dim() else 0
    if batch_size and first >= batch_size and first % batch_size == 0 and output.dim() and output.shape[0] == first:
        return first // batch_size
    return None


def _layout(rows: int, x: Tensor) -> tuple[int, ...]:
    """What calls must have in common to be laid out alike: tokens of any length, but windows of one size."""
    return (rows, x.dim()) if rows == 1 else (rows, *x.shape[1:])


def _raise(error: Exception) -> None:
    raise error


def find_hooked_modules(model: nn.Module, layer_of: Mapping[nn.Parameter, int]) -> list[HookedModule]:
    """Every module that owns a measured parameter, directly or inside; a tied one is owned by several.

    Args:
        model: Where to look.
        layer_of: The measured parameters and the layer of each.

    Returns:
        In the order of `model.named_modules()`.
    """
    found = []
    for path, module in model.named_modules():
        own = {name: layer_of[p] for name, p in module.named_parameters(recurse=False) if p in layer_of}
        hooked = HookedModule(path, module, own)
        if hooked.rule is None:
            hooked.inner = {n: p for n, p in module.named_parameters() if p in layer_of and n not in own}
        if own or hooked.inner:
            found.append(hooked)
    _find_tied(found)
    return found


def _find_tied(found: Sequence[HookedModule]) -> None:
    """Note parameters that a module shares with one around it, as a head's bias with the Linear layer inside."""
    owners: dict[nn.Parameter, list[tuple[HookedModule, str]]] = {}
    for hooked in found:
        for name, param in hooked.params.items():
            owners.setdefault(param, []).append((hooked, name))
    for shared in owners.values():
        for outer, outer_name in shared:
            for inner, inner_name in shared:
                if outer.contains(inner):
                    outer.tied.add(outer_name)
                    inner.tied.add(inner_name)
