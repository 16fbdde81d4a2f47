"""What is known of a model's graph, and how it is learned: the uses to measure, whose rows are whose, which gate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from hf_clars.grad_norms.forward_pass import ForwardPass
from hf_clars.grad_norms.functions import OWN_NODES
from hf_clars.grad_norms.graph.known_layouts import FOLLOWED, LayoutsOfUses
from hf_clars.grad_norms.graph.layout import Arrival, Layout, is_open, many_of, two_of
from hf_clars.grad_norms.graph.measured_uses import Gate, MeasuredUse
from hf_clars.grad_norms.graph.places import ContainerCall, announce, are_coupled, inner_roots, no_proof, place_of
from hf_clars.grad_norms.graph.proofs import Proofs
from hf_clars.grad_norms.graph.row_check import Kinds, check_rows
from hf_clars.grad_norms.graph.rows import GivenRows
from hf_clars.grad_norms.graph.taint import MOVED, DataTaint, WorstPlaces
from hf_clars.grad_norms.graph.walk import SPREADS, GraphWalk, Region, Signature, Use, refuse
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.torch_internals import is_jagged, saves_packed, shape_at
from hf_clars.grad_norms.uses import RuleUse

_BY_INDEX = ("IndexBackward0", "IndexSelectBackward0", "GatherBackward0", "EmbeddingBackward0", "EmbeddingBagBackward0")
"""Operations that take numbers of rows, which no graph shows."""


@dataclass(eq=False)
class GraphFinder:
    """Finds the uses of parameters that no rule measures.

    Args:
        param_of: See `GraphWalk`.
        name_of: A parameter's name.
        is_split: Whether an engine (ZeRO-3, FSDP2) gathers weights for the backward pass. One of our own would confuse
            it, so that nothing can be proven.

    Attributes:
        unknown: Whether something was met that is not known, so that the next pass must follow the data.
        moves_rows: Whether the model gives rows other places.
        given: What is known of the tensors that it is called with.
        gated: Modules whose results are kept as gates from now on.
        gates_may_be_needed: Whether those of all modules are: a use was heard in part, and may not be heard again.
        bare: What the model returned last that is made of parameters alone, and of which.
        checks_rows: Whether the second pass looks again at all that was sure, see `check_rows`.
    """

    param_of: Callable[[Tensor], nn.Parameter | None]
    name_of: Callable[[nn.Parameter], str]
    is_split: Callable[[], bool]
    unknown: bool = False
    gated: set[HookedModule] = field(default_factory=set)
    gates_may_be_needed: bool = False
    bare: Sequence[tuple[Tensor, list[nn.Parameter]]] = ()
    checks_rows: bool = True

    def __post_init__(self) -> None:
        self._proofs = Proofs(self.is_split)
        self._takes_data: dict[Signature, bool] = {}
        self._mixed: set[Signature] = set()
        self._whole: set[Signature] = set()
        self._tables: set[Signature] = set()
        self._layouts = LayoutsOfUses()
        self.moves_rows, self._moved, self.given = False, WorstPlaces(), GivenRows()
        self._followed, self._follows, self._kinds, self._sees_hooks = 0, False, Kinds(), False
        self._believed: dict[tuple[object, ...], list[Layout | None]] = {}
        self._gate_of: dict[tuple[object, ...], HookedModule] = {}
        self._unheard: dict[tuple[object, ...], HookedModule | None] = {}  # uses that no gradient reached: their gates
        self._gates: dict[HookedModule, bool] = {}

    @property
    def asks_for_data(self) -> bool:
        """Whether the next pass must follow the data.

        Always where one operation is used on the data and on constants alike; a few times more where rows are given
        other places, as their ways are others in each pass.
        """
        return self.unknown or bool(self._mixed) or self._sees_hooks or (self.moves_rows and self._followed < FOLLOWED)

    def forget(self) -> None:
        """An engine has put other parameters in the places of those that were known."""
        self.__post_init__()
        self.unknown = True

    # ---- one pass --------------------------------------------------------------------------------------------

    def find(
        self,
        forward_pass: ForwardPass,
        outputs: Sequence[Tensor],
        taint: DataTaint | None,
        containers: Sequence[ContainerCall],
    ) -> tuple[list[MeasuredUse], list[Gate]]:
        """The uses of a pass to be measured at their nodes, and those behind gates. Wrong rules' calls are cancelled.

        Args:
            forward_pass: The pass; its forward has just ended.
            outputs: What the model returned.
            taint: What depends on the data, if that was followed.
            containers: Calls that may be gates, inner ones first.

        Raises:
            BatchAxisError: If rows cannot be told apart by sample.
        """
        self._follows, self._sees_hooks = taint is not None, self._sees_hooks if taint is None else taint.sees_hooks
        if taint is not None and taint.batch > 1:
            self.moves_rows, self._followed = self.moves_rows or taint.moves, self._followed + 1
        for _ in range(6):
            walk = self._walk(forward_pass, outputs, taint)
            if walk.lost or (walk.bare and self.unknown):
                # What is not known to take the data must have taken it before: these belong to samples.
                inner = inner_roots(outputs, forward_pass.batch_size) if self.unknown else []
                walk = self._walk(forward_pass, outputs, taint, walk.lost | {root.edge.node for root in inner})
            forward_pass.packed |= any(saves_packed(use.node) for use in walk.uses)
            self._layouts.look(walk.uses, forward_pass.batch_size)
            unproven = [c for c in forward_pass.uses.rule_calls if not c.proven and not c.cancelled]
            unknown = [use for use in walk.uses if self._known(use, forward_pass.batch_size) is None]
            if not (unproven or unknown) or not self._learn(forward_pass, outputs, walk, unproven, unknown):
                break
        self._layouts.trust()
        self.moves_rows |= any(use.moved == MOVED for use in walk.uses)
        self.moves_rows |= any(c.plan.moved == MOVED and not c.cancelled for c in forward_pass.uses.rule_calls)
        if self._kinds.is_new(forward_pass, walk) and self.checks_rows:
            self._layouts.part(check_rows(self._proofs, forward_pass, outputs, walk, self._known, self.name_of))
        found = [(use, self._at_node(use, forward_pass)) for use in walk.uses]
        gated = [use for use, at_node in found if at_node is None]
        if gated:
            self._look_at_gates(forward_pass, outputs, walk, containers)
        gates: dict[ContainerCall, Gate] = {}
        for use in gated:
            container = self._container_of(use, forward_pass, () if is_jagged(use.node) else containers)
            edges = container.batch_first(forward_pass.batch_size)
            gates.setdefault(container, Gate(edges, str(container.hooked), forward_pass.packed)).uses.append(use)
        self.gated = {*self._gate_of.values(), *filter(None, self._unheard.values())}
        self.gates_may_be_needed = self._layouts.end()
        self.bare = () if taint is None else walk.bare
        if taint is not None and self._followed == 1:
            self._proofs.look_at_the_second_axis(forward_pass, outputs, walk, taint)
        return [at_node for _, at_node in found if at_node is not None], list(gates.values())

    def _walk(
        self,
        forward_pass: ForwardPass,
        outputs: Sequence[Tensor],
        taint: DataTaint | None,
        on_data: Collection[Node] = (),
    ) -> GraphWalk:
        regions = {
            edge.node: Region(set(c.wanted.values()), c.input_node)
            for c in forward_pass.uses.rule_calls
            if not c.cancelled
            for edge in c.edges
        }
        walk = GraphWalk(
            self.param_of,
            regions,
            lambda node, signature: node in on_data or self._is_data(node, signature, taint, forward_pass.batch_size),
            self._whole.__contains__,
            forward_pass.batch_size,
            OWN_NODES,
            lambda node, key: self._moved_at(node, key, taint),
            forward_pass.uses.compiled,
            forward_pass.earlier,
        )
        walk.run(outputs)
        return walk

    def _is_data(self, node: Node, signature: Signature, taint: DataTaint | None, batch: int) -> bool:
        if any((signature[0], i, part) in self._tables for i, part in enumerate(signature[1:])):
            return False
        known = self._takes_data.get(signature)
        if taint is not None:
            found = node in taint.nodes
            if known not in (None, found):
                self._mixed.add(signature)
            self._takes_data[signature] = found
            return found
        if known is None:
            # The next pass will tell. What is taken for made of parameters until then is right wherever it meets data.
            self.unknown = True
            return signature[0] in _BY_INDEX and (shape_at(node) or ())[:1] == (batch,)
        return known

    def _moved_at(self, node: Node, key: Signature, taint: DataTaint | None) -> int:
        """Where the rows of a use's operation are; without following the data, where they were at worst."""
        return self._moved.at(key, taint, lambda t: t.moved_nodes.get(node, 0), moves_rows=self.moves_rows)

    # ---- layouts ---------------------------------------------------------------------------------------------

    def _known(self, use: Use, batch: int) -> list[Layout | None] | None:
        """The layouts of a use's results, if they are known or certain."""
        shapes = use.result_shapes
        if batch == 1:
            return [Layout() for _ in shapes]
        known = self._layouts.of(use)
        if known is not None:
            fits = all(la is None or la.sizes(s, batch) is not None for la, s in zip(known, shapes, strict=True))
            return known if fits else None
        if use.look in self._gate_of:
            return [None for _ in shapes]
        by_numbers = use.node.name() in _BY_INDEX and len(shapes[0]) == 2  # [B], or of as many positions
        unknown = not self._follows and is_open(shapes[0], batch)  # what moved before it
        doubtful = use.moved or unknown or by_numbers or use.node.name().startswith(SPREADS)
        if len(shapes) == 1 and shapes[0] and shapes[0][0] == batch and not doubtful:
            self._layouts.keep(use, [Layout()])
            return [Layout()]
        return None

    def _learn(
        self,
        forward_pass: ForwardPass,
        outputs: Sequence[Tensor],
        walk: GraphWalk,
        unproven: Sequence[RuleUse],
        unknown: Sequence[Use],
    ) -> bool:
        """Follow one sample's gradient. Returns whether anything was cancelled, so that the graph looks different."""
        places = [place_of(call.edges[0]) for call in unproven]
        believed: list[Layout | None] = [call.plan.layout for call in unproven]
        for use in unknown:
            shapes = use.result_shapes
            places += [(GradientEdge(use.node, i), shape) for i, shape in enumerate(shapes)]
            believed += self._believed.get(use.look, [None for _ in shapes])
        moved = [m == MOVED for m in (*(c.plan.moved for c in unproven), *(use.moved for use in unknown))]
        batch = forward_pass.batch_size
        samples = range(batch) if any(moved) else two_of(batch)
        proven = self._proofs.layouts(forward_pass, outputs, walk, places, samples, believed if all(moved) else ())
        if not any(moved) and any(f is not None and f.is_open for f in proven or ()):
            proven = self._proofs.layouts(forward_pass, outputs, walk, places, many_of(batch), ())
        if proven is None:
            self._take_as_they_look(unproven, forward_pass)
            return False
        again = False
        for call, found in zip(unproven, proven, strict=False):
            call.proven = True
            if found is None:
                continue
            plan, alone = call.plan, call.rows_per_sample == 1 and call.plan.x_depends_on_data
            shape = place_of(call.edges[0])[1]
            looks = alone and call.rule.weight_sharing_axes and found.is_hidden(shape, batch)
            hidden = looks and walk.saw(call.edges[0].node)  # else it is what nothing is made of, and left to the graph
            folded = plan.moved != MOVED and not found.layouts and call.rows_per_sample > 1  # rows of which samples?
            if hidden or (folded and found.is_shared(shape, batch)) or (plan.moved and found.elsewhere):
                raise no_proof(call, batch)
            right = plan.layout in found.layouts
            if alone and not found.layouts:
                right = not looks and (not found.samples or are_coupled(found, plan.moved, batch, plan.layout.axis))
            if not right:
                call.cancelled, again = True, True
                for param in call.wanted.values():
                    forward_pass.uses.forget(param)
            if not (right and (plan.moved == MOVED or found.is_open)):
                call.hooked.settle(plan.key, "observed" if right else "graph")
        rest = iter(proven[len(unproven) :])
        for use in unknown:
            shapes = use.result_shapes
            found_of = [next(rest) for _ in shapes]
            again |= self._learn_use(use, shapes, found_of, batch)
        return again

    def _learn_use(
        self, use: Use, shapes: Sequence[tuple[int, ...]], found: Sequence[Arrival | None], batch: int
    ) -> bool:
        if all(f is None for f in found):  # nothing is learned, as below a head that begins with zeros
            self._unheard.setdefault(use.look)
            return False
        self._unheard.pop(use.look, None)
        if use.node.name().startswith(SPREADS) and found[0] and found[0].samples and not found[0].layouts:
            # It spreads over something that is as long as the batch by chance.
            self._whole.add((use.node.name(), use.key[2]))
            return True
        told = [(f, shape) for f, shape in zip(found, shapes, strict=True) if f is not None]
        if any(f.is_hidden(shape, batch) or (use.moved and f.elsewhere) for f, shape in told):
            raise refuse(use, ", ".join(self.name_of(p) for p in use.leaves.values()), batch)
        looked_up = use.node.name() in _BY_INDEX and use.key not in self._tables
        if looked_up and all(f is not None and not f.layouts and f.everywhere() for f in found):
            # Rows by numbers that all samples share, as those of positions: the use is where they meet the samples.
            self._tables.add(use.key)
            return True

        def layout_of(shape: tuple[int, ...], f: Arrival | None) -> Layout | None:
            if f is not None and f.layouts:
                return f.layouts[0]
            looks = f is None or are_coupled(f, None if looked_up else use.moved, batch)  # coupled, or no gradient
            return Layout() if looks and shape[:1] == (batch,) else None

        layouts = [layout_of(shape, f) for shape, f in zip(shapes, found, strict=True)]
        if any(f is not None and la is None for f, la in zip(found, layouts, strict=True)):
            layouts = [None for _ in shapes]  # a part of its gradient would be missed
        if use.moved == MOVED:
            self._believed[use.look] = layouts
        lasts = use.moved != MOVED and not any(f.is_open for f, _ in told)
        mixed = all(layouts) and all(f is None or f.coupled for f in found)
        return (bool(use.moved) or any(layouts)) and self._layouts.keep(use, layouts, lasts=lasts, mixed=mixed)

    def _take_as_they_look(self, unproven: Sequence[RuleUse], forward_pass: ForwardPass) -> None:
        meta = forward_pass.device is not None and forward_pass.device.type == "meta"  # tensors without values
        for call in unproven:
            if (call.rows_per_sample != 1 or call.plan.moved == MOVED) and not meta:
                raise no_proof(call, forward_pass.batch_size)
            call.proven = True

    # ---- gates -----------------------------------------------------------------------------------------------

    def _at_node(self, use: Use, forward_pass: ForwardPass) -> MeasuredUse | None:
        shapes, name = use.result_shapes, self.name_of(next(iter(use.leaves.values())))
        if (layouts := self._known(use, forward_pass.batch_size)) is not None:
            known = any(la is not None for la in layouts)
            return MeasuredUse(use, layouts, name, careful=forward_pass.packed) if known else None
        if shapes[0] and shapes[0][0] == forward_pass.batch_size and use.moved != MOVED:
            # Nothing could be learned: taken for what it looks like.
            return MeasuredUse(use, [Layout(), *[None for _ in shapes[1:]]], name, careful=forward_pass.packed)
        return None

    def _look_at_gates(
        self,
        forward_pass: ForwardPass,
        outputs: Sequence[Tensor],
        walk: GraphWalk,
        containers: Sequence[ContainerCall],
    ) -> None:
        """Learn which modules return as many rows as the batch has samples, but not the samples: time comes first."""
        batch = forward_pass.batch_size
        new = [(c.hooked, place_of(e)) for c in containers for e in c.batch_first(batch) if c.hooked not in self._gates]
        self._gates.update({hooked: True for hooked, _ in new})
        asked = [(hooked, place) for hooked, place in new if is_open(place[1], batch)]
        places = [place for _, place in asked]
        found = self._proofs.layouts(forward_pass, outputs, walk, places, two_of(batch), ()) if asked else None
        told = [(hooked, f) for (hooked, _), f in zip(asked, found or (), strict=False)]
        for hooked, f in told:
            self._gates[hooked] &= f is None or Layout() in f.layouts
        for hooked in {h for h, _ in told} - {h for h, f in told if f is not None}:
            del self._gates[hooked]  # no gradient reached it: it is asked again

    def _container_of(self, use: Use, forward_pass: ForwardPass, containers: Sequence[ContainerCall]) -> ContainerCall:
        """The innermost module around a use whose results have the batch first."""
        key = use.look
        wanted, gate_of = self._gate_of.get(key), self._unheard if key in self._unheard else self._gate_of
        for container in containers:
            if wanted not in (None, container.hooked) or not self._gates.get(container.hooked, True):
                continue
            if container.surrounds(use.node, forward_pass.batch_size):
                if key not in gate_of and forward_pass.measured > 1:
                    announce(container, [self.name_of(p) for p in use.leaves.values()])
                gate_of[key] = container.hooked
                return container
        self.unknown = True
        raise refuse(use, ", ".join(self.name_of(p) for p in use.leaves.values()), forward_pass.batch_size)
