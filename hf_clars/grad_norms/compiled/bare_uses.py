"""Parameters that compiled code uses without a module that has a rule: class tokens, `gamma`, tables, packed weights.

What was traced is a graph of operations. A parameter's *use* is an operation with an operand that is made of parameters
alone, and with another one that depends on the data. Beside the use, what led to it runs once more, for each sample
with a copy of the parameter of its own:

    y = use(x, made(p))                                                 as it was, with p's own gradient
    z = vmap(use(., made(.)))(x.detach(), p.detach() + copies)
    y = Beside(y, z)                                                    is y, and z gets the same gradient

`copies` are zeros [B, *shape], whose "gradient" is every sample's own. Nobody needs the numbers of z, so a compiler
leaves out what only they need.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_clars.grad_norms.axes.functions import SPREADS, is_view
from hf_clars.grad_norms.axes.place import LOST, Place
from hf_clars.grad_norms.compiled.places import name_of, place_after, place_of, place_of_input
from hf_clars.grad_norms.compiled.sample_use import (
    LOST_IN_PART,
    CopiesOf,
    Joined,
    NotOfSamplesError,
    SampleUse,
    bare_use_refused,
    function_of,
    functional,
    memory_of,
    written_by,
)
from hf_clars.grad_norms.compiled.state import PassState
from hf_clars.grad_norms.compiled.uses import HANDED
from hf_clars.grad_norms.pytree import is_differentiable, tensors_in
from hf_clars.grad_norms.torch_traces import (
    compile_anew,
    fake_values,
    held_by,
    is_from_model,
    opened,
    resumes,
    trains,
    value_of,
)

MADE, CONSTANT, DATA = range(3)


class BareUses:
    """Finds the bare uses in what was traced, and puts what measures them beside each.

    Args:
        state: The tracker's.
        traced: The graph module; it is changed.
    """

    def __init__(self, state: PassState, traced: fx.GraphModule) -> None:
        self.state = state
        self.module = traced
        self.graph: fx.Graph = traced.graph
        self.params: dict[fx.Node, int] = {}
        self.copies: dict[int, fx.Node] = {}
        self.kinds: dict[fx.Node, int] = {}
        self.places: dict[fx.Node, Any] = {}
        self.done: set[fx.Node] = set()
        self.refused: list[str] = []
        self.writes: dict[fx.Node, list[fx.Node]] = {}

    def measure(self) -> Any:
        """Do it; where that is not possible, the code will refuse. What is to be put around the code, if anything."""
        if not self._find_rows():
            return None
        held = {n: held_by(n) for n in self.graph.nodes if n.op == "placeholder"}
        rows = {id(p): row for row, p in enumerate(self.state.params)}
        later = self.rows in held
        part = later and not self.state.within
        if not part:
            outside = self.state.uses.used_outside(self.graph, dict(self.module.named_modules()))
            self._measure_anew({rows[id(p)] for p in outside})
        bare = {id(self.state.params[row]): row for row in self.state.bare_rows()}
        self.params = {n: bare[id(t)] for n, t in held.items() if id(t) in bare and is_differentiable(t)}
        of_model = [n for n, t in held.items() if id(t) in rows]
        taken = self._look_at_inputs(held, of_model, later and (not part or resumes()))
        for node in list(self.graph.nodes):
            if node.op == "output":
                returned = [self.places.get(n) for n in node.args[0]]
            elif node.op != "placeholder" and node not in self.done:
                self._follow(node)
        by_module = {n: rows[id(t)] for n, t in held.items() if id(t) in rows and n not in self.params}
        seen = self.state.seen_rows()
        folded = {row for n, row in by_module.items() if any(self._is_folded(u, row in seen) for u in n.users)}
        if part:
            self.refused += [f"{self.state.name_of_row(row)}: {LOST_IN_PART}" for row in sorted(folded)[:1]]
        else:
            self._measure_anew(folded)
        self._end(self.graph.output_node())
        self.graph.lint()
        self.module.recompile()
        if later and not of_model:
            return None  # as uncompiled code
        names = ", ".join(self.state.name_of_row(rows[id(held[n])]) for n in of_model)
        at = list(held).index(self.rows) if taken else 0
        return lambda compiled: self.state.crossings.around(compiled, names, at, taken, returned)

    def _look_at_inputs(self, held: Mapping[fx.Node, Any], of_model: Sequence[fx.Node], later: bool) -> dict[int, Any]:
        """What the code takes. Where the samples are in what comes from a piece of code before this one, by number."""
        state, taken = self.state, {}
        known = {id(t) for t in (*state.model.parameters(), *state.model.buffers(), *tensors_in(HANDED))}
        known_rows = {id(t) for t in state.given}
        for number, (node, t) in enumerate(held.items()):
            constant = not isinstance(t, Tensor) or id(t) in known or is_from_model(node, of_model)
            place = None if constant else place_of_input(value_of(node), self.batch)
            if place is not None and later and id(t) not in known_rows:
                place = taken[number] = state.crossings.place_of(t, held[self.rows].shape[1])
            self.places[node] = place
            self.kinds[node] = MADE if node in self.params else CONSTANT if place is None else DATA
        return taken

    def _measure_anew(self, rows: set[int]) -> None:
        """Trace the model anew, if there are parameters that no module can measure rightly."""
        rows -= set(self.state.bare_rows())
        if rows:
            self.state.uses.measure_bare(rows)
            compile_anew("hf_clars: a parameter is measured where it is used")

    def _is_folded(self, node: fx.Node, seen: bool) -> bool:
        """Whether an operation's samples are on another axis than a module's rule takes them for.

        Args:
            node: The operation.
            seen: Whether an uncompiled pass has shown where they are, if that cannot be told.
        """
        place = self.places.get(node)
        if not isinstance(place, Place):
            return place is LOST and not seen
        return place.axis != 0 or place.outer != 1

    def _find_rows(self) -> bool:
        kept = [n for n in self.graph.nodes if n.target is torch.ops.hf_clars.keep_rows.default]
        kept = [n for n in kept if n.args[2] == self.state.receiver]
        if kept:
            self.rows, self.counts, _, axes = kept[0].args
            self.axes = [value_of(a) if isinstance(a, fx.Node) else a for a in axes]
            self.batch = value_of(self.rows).shape[1]
        for node in kept:
            self.graph.erase_node(node)
        return bool(kept)

    def _follow(self, node: fx.Node) -> None:
        """One operation: what it is made of, where its samples are, and what measures it."""
        made = self._differentiable(node)
        with_data = any(self.kinds[n] == DATA for n in node.all_input_nodes)
        if (written := written_by(node)) is not None and self._follow_a_write(node, written, made, with_data):
            return None
        differentiable = trains(node)
        size = not list(tensors_in(value_of(node))) and node.op != "get_attr"
        if size or name_of(node).startswith("new_") or node.target is torch.ops.hf_clars.begin_pass.default:
            with_data = False  # no numbers of the data's
        self.kinds[node] = DATA if with_data else MADE if made and differentiable else CONSTANT
        self.places[node] = place_of(node, self.places, self.batch) if with_data and self.batch != 1 else None
        if made and name_of(node) == "multi_head_attention_forward":
            return self._open(node)
        if made and differentiable and (with_data or self._is_spread(node, made[0])):
            self.kinds[node] = DATA
            try:
                self._put_beside(node, made)
            except NotOfSamplesError as error:
                self._refuse(node, str(error))
        return None

    def _follow_a_write(self, node: fx.Node, written: fx.Node, made: Sequence[fx.Node], with_data: bool) -> bool:
        """An operation writes into `written`. Whether no more is to be done about it."""
        kind = self.kinds[written]
        if kind == MADE:
            self.writes.setdefault(memory_of(written), []).append(node)
        elif made and (kind == CONSTANT or node.target is operator.setitem):
            self.kinds[node] = kind
            self._refuse(node, "what is made of it is written into something else")
            return True
        elif with_data:
            before, after = self.places.get(written), place_after(node, written, self.places, self.batch)
            for n in {written, memory_of(written)}:
                blank = before is None and n is written
                self.kinds[n] = DATA
                self.places[n] = after if blank else self.places.get(n) if after == before else LOST
        return False

    def _differentiable(self, node: fx.Node) -> list[fx.Node]:
        """What a node takes that is made of parameters, and may be differentiated."""
        made = (n for n in node.all_input_nodes if self.kinds[n] == MADE)
        return [n for n in made if trains(n)]

    def _is_spread(self, node: fx.Node, made: fx.Node) -> bool:
        """Whether one row of parameters becomes one for each sample, as a class token does."""
        y, m = value_of(node), value_of(made)
        one = isinstance(y, Tensor) and y.dim() > 0 and y.shape[0] == self.batch and self.batch not in self.axes
        return one and name_of(node) in SPREADS and (m.dim() < y.dim() or m.shape[0] == 1 != self.batch)

    def _open(self, node: fx.Node) -> None:
        """Put the operations that a function of torch's is made of in its place, and follow these."""
        inside, inputs = opened(node)
        env = dict(zip((n for n in inside.nodes if n.op == "placeholder"), inputs, strict=True))
        with self.graph.inserting_before(node):
            own = [n for n in inside.nodes if n.op not in ("placeholder", "output")]
            for n in own:
                env[n] = self.graph.node_copy(n, env.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(env[inside.output_node().args[0][user.args[1]]])
            self.graph.erase_node(user)
            self.done.add(user)
        self.graph.erase_node(node)
        for n in own:
            self._follow(env[n])

    # ---- one use ---------------------------------------------------------------------------------------------

    def _put_beside(self, node: fx.Node, made: Sequence[fx.Node]) -> None:
        y, batch = value_of(node), self.batch
        if not isinstance(y, Tensor) or y.dim() == 0:
            raise NotOfSamplesError("the operation is a whole function, or has several results")
        result = self.places[node] = self._place_of_result(node, y)
        if name_of(node) == "batch_norm" and batch != 1 and (True in node.args[5:6] or node.kwargs.get("training")):
            raise NotOfSamplesError("its samples depend on each other there; a module with a rule may do it")
        target = functional(node, batch)
        for wide, alone, ambiguous in itertools.product((True, False), (False, True), (False, True)):
            params, others, chain = self._operands(node, alone)
            places = [self._place_in(n, y, result, ambiguous) for n in others]
            run = function_of([*params, *others], chain, target, (batch, result) if alone else None)
            use = SampleUse(run, len(params), places, result, batch, kept=written_by(node) is not None, wide=wide)
            if self._fits(use, params, others, y):
                break
        else:
            raise NotOfSamplesError("the operation cannot be done for one sample alone")
        copies = [self._copies(self.params[p]) for p in params]
        self._insert(node, use, [*copies, *params, *others])

    def _place_of_result(self, node: fx.Node, y: Tensor) -> Place:
        if self.batch == 1:
            return Place(inner=y.shape[0])
        place = self.places[node]
        if place is None and not any(self.kinds[n] == DATA for n in node.all_input_nodes):
            place = Place()  # it is spread over the samples
        if not isinstance(place, Place) or y.shape[place.axis] != place.length(self.batch):
            raise NotOfSamplesError(
                f"in its result {tuple(y.shape)} nobody knows which rows belong to which of the {self.batch} samples"
            )
        return place

    def _operands(self, node: fx.Node, alone: bool) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
        """The parameters that led to a use; what else it and they were made with; and the operations, in order.

        Args:
            node: The use.
            alone: Whether constants are taken as they were before they were spread over the samples.
        """
        params: dict[fx.Node, None] = {}
        others: dict[fx.Node, None] = {}
        chain, todo = {node}, [node]
        while todo:
            for n in todo.pop().all_input_nodes:
                spread = alone and self.kinds[n] == CONSTANT and n.op != "placeholder" and is_view(name_of(n))
                if n in self.params or not (spread or self.kinds[n] == MADE):
                    (params if n in self.params else others)[n] = None
                    continue
                written = [w for w in self.writes.get(memory_of(n), ()) if w < node]
                todo += {n, *written} - chain
                chain.update([n, *written])
        return list(params), list(others), sorted(chain)

    def _place_in(self, node: fx.Node, y: Tensor, result: Place, ambiguous: bool) -> Place | None:
        """Where the samples are in an operand; `ambiguous`: also in what may only be as long as the batch."""
        t, place = value_of(node), self.places.get(node)
        if not isinstance(t, Tensor) or t.dim() == 0 or self.batch == 1:
            return None
        if self.kinds[node] == DATA:
            return place
        return result if ambiguous and t.shape[0] == y.shape[0] and not result.axis else None

    def _fits(self, use: SampleUse, params: Sequence[fx.Node], others: Sequence[fx.Node], y: Tensor) -> bool:
        with fake_values(y):
            copies = [
                value_of(p).new_zeros((use.batch, *value_of(p).shape), dtype=self.state.leaf.dtype) for p in params
            ]
            try:
                z = use(*copies, *(value_of(n) for n in (*params, *others)))
            except Exception:  # whatever torch says where shapes do not fit
                return False
        return isinstance(z, Tensor) and z.shape == y.shape

    def _copies(self, row: int) -> fx.Node:
        if row not in self.copies:
            state, param = self.state, self.state.params[row]
            state.beside.add(row)
            module = CopiesOf(row, tuple(param.shape), state.receiver, checked=state.checked, dtype=param.dtype)
            after = max(self.rows, self.counts)
            while after.next.op == "placeholder":
                after = after.next
            with self.graph.inserting_after(after):
                self.copies[row] = self._call(module, f"copies_{row}", (self.rows, self.counts))
        return self.copies[row]

    def _insert(self, node: fx.Node, use: SampleUse, operands: Sequence[fx.Node]) -> None:
        users = list(node.users)
        with self.graph.inserting_before(node):
            beside = self._call(use, f"use_{len(self.kinds)}", operands)
        with self.graph.inserting_after(node):
            joined = self._call(Joined(), f"joined_{len(self.kinds)}", (node, beside))
        joined.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, joined)
        self.kinds[joined], self.places[joined] = DATA, self.places.get(node)

    def _call(self, module: nn.Module, name: str, args: Sequence[fx.Node]) -> fx.Node:
        name = f"hf_clars_{self.state.receiver}_{name}"  # another tracker has its own
        self.module.add_submodule(name, module)
        return self.graph.call_module(name, tuple(args))

    def _refuse(self, node: fx.Node, why: str) -> None:
        """Note a use that cannot be measured."""
        names = ", ".join(self.state.name_of_row(row) for row in sorted(self._rows_in(node)))
        self.refused.append(bare_use_refused(names, name_of(node), why))

    def _end(self, output: fx.Node) -> None:
        """Let the code say what cannot be measured, by what it returns: a compiler leaves out what is not used."""
        for made in self._differentiable(output):
            self._refuse(made, "it leaves the compiled code without having met a sample")
        returned = [n for n in output.all_input_nodes if isinstance(value_of(n), Tensor)]
        if self.refused and returned:
            args = (returned[0], self.state.receiver, self.refused[0], False)
            with self.graph.inserting_before(output):
                said = self.graph.call_function(torch.ops.hf_clars.refuse.default, args)
            output.replace_input_with(returned[0], said)

    def _rows_in(self, node: fx.Node) -> set[int]:
        found, todo = set(), [node]
        while todo:
            n = todo.pop()
            if n in self.params:
                found.add(self.params[n])
            todo += [m for m in n.all_input_nodes if self.kinds[m] == MADE]
        return found
