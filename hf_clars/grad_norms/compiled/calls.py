"""What happens while a model is compiled: which calls of its modules get a function of ours, and with which rows.

Everything here that is called while a compiler looks on must be what it understands: tensors, plain attributes, loops
over fixed things.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import is_split
from hf_clars.grad_norms.compiled.functions import OneProduct, Watched, Way
from hf_clars.grad_norms.compiled.operations import begin_pass, check_sum, refuse
from hf_clars.grad_norms.compiled.tied import Linked, Tie, TiedLookup, has_one_user, is_tied_head
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.norm_math import at_least_float32, slices_of, squared_sum
from hf_clars.grad_norms.pytree import of_the_batch, tensor_given, tensors_in
from hf_clars.grad_norms.registry import LayerRule, is_shipped
from hf_clars.grad_norms.token_weights import label_counts

_LEARN = (
    "Run one forward and backward pass on a batch without torch.compile first (with the norms attached): the layout of "
    "the batch is learned there. A table of positions can be looked up at [1, T] in place of [T]: that is every "
    "sample's, and can be compiled."
)
_LEFT_OUT = "Passes without torch.compile have shown no way to tell: compile only parts of the model without it."


#: A model may be compiled in parts after some passes that were not: code that finds no rows must be left.
_PATIENCE = 3


class CompiledCalls:
    """A tracker's state in compiled code.

    Args:
        receiver: Its number, see `operations.enlist`.
        hooked: The modules.

    Attributes:
        calls: One for each module with a rule, by its path.
        within: Whether compiled code has begun the pass, or refused it.
        measures: Whether the model is being called, and its calls have rows.
        number: Of the last pass. Kept so that a compiler lets a pass begin in the forward pass: what only the backward
            pass needs, it would put there.
        whole: Whether every measured parameter can be measured in a compiled graph, so that the model may be compiled
            as a whole.
        expected: In how many more calls outside compiled code to prepare rows, though none inside has used them.
        checked: Whether sums are checked in this batch.
        paused: As the tracker's.
        by_tokens: Whether the loss is a mean over tokens.
        reason: Which parameters stand in the way of `whole`, in words.
    """

    def __init__(self, model: nn.Module, receiver: int, hooked: list[HookedModule]) -> None:
        self.model = model
        self.receiver = receiver
        self.measures = self.within = False
        self.number: Tensor | None = None
        self.given_axes: tuple[int, ...] = ()
        self.given: tuple[Tensor, ...] = ()
        self.checked = True
        self.expected = _PATIENCE
        self.paused = self.by_tokens = False
        self.modules = [h.module for h in hooked]
        self.calls: dict[str, CompiledCall] = {}
        owners: dict[nn.Parameter, list[HookedModule]] = {}
        for h in hooked:
            for p in h.params.values():
                owners.setdefault(p, []).append(h)
        self.ties = {p: Tie() for p, of in owners.items() if is_tied_head(of)}
        alone = {p for p, of in owners.items() if has_one_user(p, of)} | self.ties.keys()
        calls = [h for h in hooked if h.rule and _can_be_compiled(h.rule) and alone.issuperset(h.params.values())]
        self.params = list(dict.fromkeys(p for h in calls for p in h.params.values()))
        rows = {p: i for i, p in enumerate(self.params)}
        for h in calls:
            tie = next((self.ties[p] for p in h.params.values() if p in self.ties), None)
            self.calls[h.path] = CompiledCall(self, h, [rows[p] for p in h.params.values()], tie)
        missing = [
            of[0].full_name(n) for p, of in owners.items() if p not in rows for n, q in of[0].params.items() if q is p
        ]
        self.whole = bool(self.params) and not missing
        self.reason = ", ".join(missing)
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        # Of one number, and not without axes: the compiler takes those for numbers of Python, and begins anew.
        self.leaf = torch.zeros(1, dtype=wide, requires_grad=True)
        self.place = torch.zeros(1)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called: make rows. In compiled code and outside."""
        self.measures = False
        given = [t for t in tensors_in((args, kwargs)) if t.dim() > 0]
        batched = of_the_batch(given)
        if batched is None or self.paused or not torch.is_grad_enabled():
            return
        weights = label_counts(self.model, kwargs) if self.by_tokens else None
        rows, uses, number = begin_pass(self.leaf, batched, weights, self.receiver, len(self.params), self.checked)
        each, used = rows.unbind(0), uses.unbind(0)
        for call in self.calls.values():
            call.rows = tuple(each[i] for i in call.row_numbers)
            call.uses = tuple(used[i] for i in call.row_numbers)
        self.measures = True
        self.within = torch.compiler.is_compiling()
        self.number = number
        self.given_axes = tuple(batched.shape[1:])
        self.given = tuple(given) if self.within else ()

    def expects_code(self) -> bool:
        """Whether compiled code may be met in a call outside of it."""
        return self.expected > 0 or any(m._compiled_call_impl is not None for m in self.modules)

    def met_code(self, met: bool) -> None:
        """Whether a call outside compiled code has met some."""
        self.expected = _PATIENCE if met else max(0, self.expected - 1)

    def ready(self) -> bool:
        """Whether modules can do their work in compiled code, as far as it depends on the pass."""
        return self.measures or self.within or self.paused or not torch.is_grad_enabled()

    def end(self) -> None:
        """The model returns. In compiled code and outside."""
        self.measures = self.within = False
        self.given = ()
        for call in self.calls.values():
            call.rows = call.uses = ()
        for tie in self.ties.values():
            tie.forget()

    def ran(self) -> list[CompiledCall]:
        """The calls that compiled code has made since `forget`."""
        return [call for call in self.calls.values() if call.ran]

    def forget(self) -> None:
        """A pass begins outside compiled code."""
        for call in self.calls.values():
            call.ran = False


def _can_be_compiled(rule: LayerRule) -> bool:
    return not rule.several_results and type(rule).batch_axes is LayerRule.batch_axes


class CompiledCall:
    """One module in compiled code; a hook.

    Args:
        state: The tracker's.
        hooked: The module.
        row_numbers: The row of each of its parameters.
        tie: What it shares with another module that has the same table.

    Attributes:
        names: Of its parameters.
        rows: For each a row of zeros [B], while the model is called.
        uses: For each a zero, [1].
        ran: Whether compiled code has called it.
    """

    def __init__(self, state: CompiledCalls, hooked: HookedModule, row_numbers: list[int], tie: Tie | None) -> None:
        assert hooked.rule is not None
        self.state = state
        self.hooked = hooked
        self.module = hooked.module
        self.rule = hooked.rule
        self.name = str(hooked)
        self.tie = tie
        self.row_numbers = row_numbers
        self.places = torch.tensor(row_numbers)  # as numbers they would make different code of equal blocks
        self.names = tuple(hooked.params)
        self.rows: tuple[Tensor, ...] = ()
        self.uses: tuple[Tensor, ...] = ()
        self.ran = False

    def in_words(self) -> str:
        """How it is measured, for people."""
        return f"{type(self.rule).__name__} of {self.hooked}: in the compiled graph"

    def ready(self, *args: Any) -> bool:
        """Whether it can do its work in compiled code."""
        if not self.state.ready():
            self.state.expected = _PATIENCE
            return False
        return True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """After the module's forward, while a compiler looks on. What is returned takes the output's place."""
        x = tensor_given(args, kwargs)
        if not self.state.measures or not torch.is_grad_enabled() or x is None:
            return None
        if not any(getattr(module, n).requires_grad for n in self.names):
            return None
        if not self.rows:
            return refuse(output, self.state.receiver, used_twice(self.name), False)
        wanted = [i for i, n in enumerate(self.names) if getattr(module, n).requires_grad]
        names = tuple(self.names[i] for i in wanted)
        rows = [self.rows[i] for i in wanted] + [self.uses[i] for i in wanted]
        # Where the whole model is compiled, checkpointing allows no change of attributes here.
        if not self.state.within:
            self.rows = self.uses = ()
            self.ran = True
        batch = rows[0].shape[0]
        y = output
        spread = output.shape[0] == 1 and batch != 1
        if not self._layout_is_known(x, output, batch):
            return refuse(output, self.state.receiver, self._unknown_rows(x, batch), True)
        if spread:  # what is made of parameters, and added to every sample
            y = output.expand(batch, *output.shape[1:])
        elif way := self._way(names, x, output, batch):
            params = [getattr(self.module, n) for n in names]
            return OneProduct.apply(y.detach(), self, names, way, x, *rows, *params)
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        kwargs = {k: a.detach() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        saved = self.rule.save(self.module, args, kwargs, output.detach(), names)
        if spread:
            saved = tuple(t.expand(batch, *t.shape[1:]) if t.shape[0] == 1 else t for t in saved)
        if self.tie is None:
            return Watched.apply(y, self, names, *rows, *saved)
        return self._tied(y, x, names, rows, saved)

    def _tied(
        self, y: Tensor, x: Tensor, names: tuple[str, ...], rows: list[Tensor], saved: tuple[Tensor, ...]
    ) -> Tensor:
        tie = self.tie
        assert tie is not None
        if self.rule.lookup_tokens(saved) is not None:
            tie.tokens = x
            y, tie.link = TiedLookup.apply(y, self, names, *rows, *saved)
            return y
        if tie.link is not None and tie.tokens is not None:
            y = Linked.apply(y, tie.link, tie.tokens, x.detach())
        return Watched.apply(y, self, names, *rows, *saved)

    def _way(self, names: tuple[str, ...], x: Tensor, output: Tensor, batch: int) -> Way | None:
        """How the weight gradient comes from this engine; None: from autograd, as always with a rule of the user's."""
        if self.tie is not None or "weight" not in names or x.shape[0] != batch or is_split(self.module.weight):
            return None
        if not is_shipped(self.rule):
            return None  # the sum check would compare what it gives with itself, and its input_grad with nothing
        # Sums, as of normalisation layers, a compiler joins with what is around them; products it cannot.
        products = type(self.rule).fuses_weight_grad is not LayerRule.fuses_weight_grad
        if products and self.rule.gives_whole_backward and self.rule.supplies_backward(self.module, x, output):
            return "kernels"
        return "torch" if self.rule.gives_input_grad and self.rule.fuses_weight_grad(self.module, x, output) else None

    def _layout_is_known(self, x: Tensor, output: Tensor, batch: int) -> bool:
        """Whether the first axis is the batch, or folds it as an uncompiled pass has shown."""
        hooked = self.hooked
        if not self.rule.has_batch_axis(self.module, x) or output.shape[0] != x.shape[0]:
            return False
        if x.shape[0] == 1 != batch:
            if hooked.was_seen:
                return x.dim() in hooked.own_dims and x.dim() not in hooked.data_dims
            # What is looked up is every sample's; but the batch may be in another place.
            return not x.is_floating_point() and (batch not in x.shape[1:] or batch in self.state.given_axes)
        if x.shape[0] == batch:
            if "graph" in (hooked.calls.get((1, x.dim())), hooked.calls.get((0, x.dim()))):
                return False  # rows were given other places, or the batch was on another axis
            if hooked.was_seen:
                return x.dim() not in hooked.own_dims or x.dim() in hooked.data_dims
            return not self._may_be_table(x, batch)
        rows = x.shape[0] // batch
        known = hooked.calls.get((rows, *x.shape[1:])) if rows * batch == x.shape[0] else None
        return known in ("certain", "observed")

    def _may_be_table(self, x: Tensor, batch: int) -> bool:
        """Whether an input may be as long as the batch by chance: tokens of positions, T5's buckets [T, T], a table."""
        given = self.state.given
        if x.requires_grad or batch not in self.state.given_axes or any(x is t for t in given):
            return False
        return not x.is_floating_point() or (bool(given) and x.numel() < given[0].numel())

    def _unknown_rows(self, x: Tensor, batch: int) -> str:
        return (
            f"{self.name} is called on {tuple(x.shape)} in compiled code, and the batch has {batch} samples: which "
            f"rows are whose is not known. {_LEFT_OUT if self.hooked.was_seen else _LEARN}"
        )

    # ---- arithmetic of the backward pass ---------------------------------------------------------------------

    def squares(self, names: tuple[str, ...], saved: tuple[Tensor, ...], g: Tensor, batch: int) -> list[Tensor]:
        """Every sample's squared norms of each parameter named, [B] each."""
        rule, module = self.rule, self.module
        rows = g.shape[0] // batch
        dtype = g.dtype
        saved, g = tuple(at_least_float32(t) for t in saved), at_least_float32(g)
        if rows > 1 and rule.weight_sharing_axes:
            saved, g = tuple(t.unflatten(0, (batch, rows)) for t in saved), g.unflatten(0, (batch, rows))
            rows = 1
        if rows > 1 or not rule.squares_without_grads:
            grads = rule.per_sample_grads(module, saved, g, set(names))
            grads = {n: t.unflatten(0, (batch, rows)).sum(1) if rows > 1 else t for n, t in grads.items()}
            found = {n: squared_sum(t) for n, t in grads.items()}
        else:
            found = rule.squared_norms(module, saved, g, set(names))
        if self.state.checked:
            for n in names:
                total = rule.summed_grad(module, saved, g, n, elements=getattr(module, n).numel())
                found[n] = self._checked(n, found[n], total, dtype)
        return [found[n].to(self.state.leaf.dtype) for n in names]

    def whole_backward(
        self, names: tuple[str, ...], x: Tensor, weight: Tensor, g: Tensor, *, input_wanted: bool
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """By kernels: the input's gradient, each named parameter's, and every sample's squared norms [B] of these."""
        done = self.rule.whole_backward(self.module, (x,), weight, g, input_wanted=input_wanted)
        sums, squares = done.grads, done.squares
        if self.state.checked:
            squares = {n: self._checked(n, squares[n], sums[n], g.dtype) for n in names}
        return done.input_grad, [sums[n] for n in names], [squares[n].to(self.state.leaf.dtype) for n in names]

    def sums_and_squares(self, names: tuple[str, ...], x: Tensor, g: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient of each parameter named, and every sample's squared norms [B] of it."""
        size = sum(getattr(self.module, n).numel() for n in names)
        sums: dict[str, Tensor] = {}
        parts: dict[str, list[Tensor]] = {n: [] for n in names}
        for x_part, g_part in slices_of(x, g, elements_per_sample=size):
            grads = self.rule.per_sample_grads(self.module, (x_part,), g_part, set(names))
            for n in names:
                t = at_least_float32(grads[n])
                sums[n] = sums[n] + t.sum(0) if n in sums else t.sum(0)
                parts[n].append(squared_sum(t))
        squares = {n: part[0] if len(part) == 1 else torch.cat(part) for n, part in parts.items()}
        if self.state.checked:
            squares = {n: self._checked(n, t, sums[n], g.dtype) for n, t in squares.items()}
        return [sums[n] for n in names], [squares[n].to(self.state.leaf.dtype) for n in names]

    def _checked(self, name: str, squares: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
        size = squares.clamp(min=0).sqrt().sum()
        return check_sum(squares, total, size, self.places, self.names.index(name), self.state.receiver, dtype)


def used_twice(names: str) -> str:
    """What is wrong with modules that are called twice: uses add up before they are squared, which a row cannot do."""
    return (
        f"{names} is called more than once in one pass of compiled code, and its gradients must be added before their "
        "norms are taken: compile the model without it, or in parts that call it once."
    )
