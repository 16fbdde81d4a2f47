"""What stands beside a bare use in compiled code, see `bare_uses.py`: modules, as a traced graph calls these."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_clars.grad_norms.axes.functions import SPREADS
from hf_clars.grad_norms.axes.place import Place
from hf_clars.grad_norms.compiled.functions import Beside, Copies
from hf_clars.grad_norms.compiled.places import name_of
from hf_clars.grad_norms.torch_traces import OF_ANY_BATCH, attention, value_of

IN_PLACE = {getattr(operator, f"i{n}"): getattr(operator, n) for n in ("add", "sub", "mul", "truediv", "matmul")}


class NotOfSamplesError(ValueError):
    """A use whose samples cannot be told apart; its words say why."""


class SampleUse(nn.Module):
    """A use and what led to it, with a copy of its parameters for each sample.

    Args:
        run: The operations. It takes the parameters first.
        count: How many.
        places: Of each other operand where the samples are; None if it is all samples'.
        result: The same of the result.
        batch: B.
        kept: Whether an operand is written into afterwards.
        wide: Whether copies are in their own precision, and not in the parameter's.
    """

    def __init__(
        self,
        run: fx.GraphModule,
        count: int,
        places: Sequence[Place | None],
        result: Place,
        batch: int,
        *,
        kept: bool,
        wide: bool,
    ) -> None:
        super().__init__()
        self.run, self.places, self.result = run, tuple(places), result
        self.count, self.batch, self.kept, self.wide = count, batch, kept, wide

    def forward(self, *operands: Any) -> Tensor:
        """Of copies, parameters and others to the use's result. No gradient goes to what is not a copy."""
        n = self.count
        copies, params, others = operands[:n], operands[n : 2 * n], operands[2 * n :]
        own = [p.detach() + (c if self.wide else c.to(p.dtype)) for c, p in zip(copies, params, strict=True)]
        batch = copies[0].shape[0]  # a symbol that was traced means nothing when the code runs as it is
        rest = [self._by_sample(t, place, batch) for t, place in zip(others, self.places, strict=True)]
        axes = (0,) * n + tuple(None if place is None else 0 for place in self.places)
        result = self.result
        z = torch.vmap(self.run.forward, in_dims=axes)(*own, *rest)
        outer, inner = _sizes(result)
        z = z.unflatten(result.axis + 1, (outer, inner)).movedim(0, result.axis + 1)
        return z.flatten(result.axis, result.axis + 2)

    def _by_sample(self, t: Any, place: Place | None, batch: Any) -> Any:
        """From [..., outer * B * inner, ...] to [B, ..., outer * inner, ...]."""
        if isinstance(t, Tensor):
            t = t.detach().clone() if self.kept else t.detach()
        if place is None:
            return t
        outer, inner = _sizes(place)
        t = t.unflatten(place.axis, (outer, batch, inner)).movedim(place.axis + 1, 0)
        return t.flatten(place.axis + 1, place.axis + 2)


def _sizes(place: Place) -> tuple[Any, Any]:
    """What is folded into the samples' axis, outside and inside; -1: what is left, where that is no number."""
    if isinstance(place.outer, int):
        return place.outer, place.inner if isinstance(place.inner, int) else -1
    return -1, place.inner


class Joined(nn.Module):
    """The place of `Beside` in what was traced."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """See `Beside`."""
        return Beside.apply(y, z)


class CopiesOf(nn.Module):
    """The place of `Copies` in what was traced: see there."""

    def __init__(self, row: int, shape: tuple[int, ...], receiver: int, *, checked: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.row, self.settings = row, (row, shape, receiver, checked, dtype)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Of all rows [K, B] and counts [K, 1] to one parameter's copies [B, *shape]."""
        return Copies.apply(rows[self.row], counts[self.row], *self.settings)


def function_of(
    operands: Sequence[fx.Node], chain: Sequence[fx.Node], target: Any, spread: tuple[Any, Place] | None
) -> fx.GraphModule:
    """Operations of a traced graph as a function.

    Args:
        operands: What it takes.
        chain: The operations, in order.
        target: What the last one is to be.
        spread: B, and where the samples are in the result: parameters are not spread over the samples then.
    """
    graph = fx.Graph()
    env = {n: graph.placeholder(f"operand_{i}") for i, n in enumerate(operands)}
    for n in chain:
        env[n] = graph.node_copy(n, env.__getitem__)
        if spread is not None and name_of(n) in SPREADS:
            env[n].args = _for_one_sample(n.args, env[n].args, *spread)
    env[chain[-1]].target = target
    graph.output(env[chain[-1]])
    return fx.GraphModule(nn.Module(), graph)


def _for_one_sample(old: tuple[Any, ...], args: tuple[Any, ...], batch: Any, result: Place) -> tuple[Any, ...]:
    """An operation's arguments, `args`; sizes after its operand become those of one sample.

    Args:
        old: The arguments in what was traced, where their values are known.
        args: The same in the function.
        batch: B.
        result: Where the samples are in what is made of this in the end.
    """
    listed = len(old) > 1 and isinstance(old[1], tuple | list)
    known, sizes = (list(of[1] if listed else of[1:]) for of in (old, args))
    given = known[result.axis] if len(known) > result.axis else None
    value = value_of(given) if isinstance(given, fx.Node) else given
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        return args
    if value != batch and value != result.length(batch):
        return args
    sizes[result.axis] = 1 if value == batch else result.outer * result.inner
    return (args[0], sizes, *args[2:]) if listed else (args[0], *sizes)


def functional(node: fx.Node, batch: Any) -> Any:
    """A use's operation, or the one like it that does not write into its operand."""
    written = written_by(node)
    if name_of(node) == "scaled_dot_product_attention":
        if node.kwargs.get("dropout_p") or any(isinstance(a, float) and a for a in node.args[4:5]):
            raise NotOfSamplesError("it draws numbers at random")
        return attention
    if name_of(node) in OF_ANY_BATCH and isinstance(batch, torch.SymInt):
        return OF_ANY_BATCH[name_of(node)]
    if written is None:
        return node.target
    if node.target is operator.setitem or any(n is not node and n > node for n in written.users):
        raise NotOfSamplesError("the operation writes into what is used later")
    return str(node.target)[:-1] if node.op == "call_method" else IN_PLACE[node.target]


def written_by(node: fx.Node) -> fx.Node | None:
    """What an operation writes into."""
    method = node.op == "call_method" and str(node.target).endswith("_")
    return node.all_input_nodes[0] if method or node.target in (*IN_PLACE, operator.setitem) else None


def bare_use_refused(names: str, operation: str, why: str) -> str:
    """What is wrong with a use that compiled code cannot measure."""
    return (
        f"{names} (in {operation}): cannot be measured in compiled code, because {why}. Compile only the parts of the "
        "model without it (as model.layers[0].compile()), register a rule (README of grad_norms), freeze it, or run "
        "the model without torch.compile."
    )
