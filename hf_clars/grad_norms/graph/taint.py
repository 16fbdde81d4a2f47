"""Which tensors of a forward pass depend on what the model was called with.

A table of positions, `1 + w`, or a small network on fixed coordinates is made of parameters and constants alone. That
cannot be told from shapes: such a table may be as long as the batch by chance. So the first pass follows the data; the
first few do where rows are given other places.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from functools import wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from hf_clars.grad_norms.axes.functions import TURNS_INSIDE, is_view
from hf_clars.grad_norms.axes.place import LOST, Call, Place
from hf_clars.grad_norms.errors import UncoveredParameterError
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.rows import Taken, has_batch_axis, is_write, moves_rows, operands_first, taken_rows
from hf_clars.grad_norms.pytree import tensors_in
from hf_clars.grad_norms.torch_internals import COMPILED, StorageReference, storage_of, unseen_by_modes, unwrapped
from hf_clars.grad_norms.undisturbed import left_out_of_looks

_FILLED = ("empty", "zeros", "ones", "full")

_GIVES_NO_TENSOR = frozenset(
    {"dim", "size", "numel", "stride", "is_floating_point", "is_contiguous", "untyped_storage"}
)

BROUGHT_BACK, MOVED, LOOSE = 1, 2, 3
"""Rows that were given other places: and were written back since, so that one look tells; or that may be anywhere.

Those of a tensor that was given without an axis of the batch, as the nodes of all graphs, may be anywhere until they
meet what has one. They are told apart here, and taken for `MOVED` by others."""

_BLANK = (*(f"new_{kind}" for kind in _FILLED), *(f"{kind}_like" for kind in _FILLED))
"""Functions that take of a tensor no more than its type, and perhaps its shape."""


class DataTaint(TorchFunctionMode):
    """Marks everything that torch's functions make of marked tensors, and its places in the graph.

    Args:
        batch: B.

    Attributes:
        nodes: Operations of the graph that took marked tensors.
        moved_nodes: Those whose rows were given other places: `BROUGHT_BACK` or `MOVED`.
        moves: Whether there were any.
        sees_hooks: Whether the model puts hooks on tensors.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.nodes: set[Node] = set()
        self.moved_nodes: dict[Node, int] = {}
        self.moves = self.sees_hooks = False
        self._moved: dict[int, int] = {}
        self._blank: set[int] = set()
        self._places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Place] = {}
        self._taken: list[tuple[Taken, int]] = []
        self._visited: set[Node] = set()
        # The references keep the keys from being given to other memory; they do not keep the memory.
        self._marked: dict[int, StorageReference] = {}

    def mark(self, tensors: Iterable[Tensor], moved: int = 0, inside: int = 0) -> None:
        """Say that these depend on the data, and where their rows are: 0, `BROUGHT_BACK` or `MOVED`.

        `inside` is where rows are at best in what a function made on its way to them.
        """
        for t in tensors:
            storage = storage_of(t)
            if storage is not None:
                self._marked[storage.key] = storage
                self._blank.discard(storage.key)
                if moved:
                    self._moved[storage.key] = moved
            node = node_of(t)
            if node is not None:
                self._mark_nodes(node, self.moved(t), inside)

    def moved(self, t: Tensor) -> int:
        """Where a tensor's rows are: 0 (surely where they were), `BROUGHT_BACK` (one look tells) or `MOVED`."""
        place = min(self._place(t), MOVED)
        return place or BROUGHT_BACK * (self.batch > 1 and self.layout_of(t) != Layout())

    def _place(self, t: Tensor) -> int:
        storage = storage_of(t) if self._moved else None
        return 0 if storage is None else self._moved.get(storage.key, 0)

    def layout_of(self, t: Tensor) -> Layout | None:
        """Which rows of a tensor are surely whose, also where several batches lie one after the other."""
        place = self._known_place(t)
        if place is None:
            return None
        return Layout(place.axis, -1 if place.inner == 1 != place.outer else place.outer)

    def _known_place(self, t: Tensor) -> Place | None:
        storage = storage_of(t) if self._places else None
        return None if storage is None or self._place(t) else self._places.get((storage.key, t.shape, t.stride()))

    def note_place(self, t: Tensor, place: Any) -> None:
        """Say where the samples are in a tensor; see `Place`."""
        storage = storage_of(t)
        if storage is None:
            return
        if isinstance(place, Place):
            self._places[storage.key, t.shape, t.stride()] = place
        else:
            self._places.pop((storage.key, t.shape, t.stride()), None)

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor depends on the data; what compiled code made is taken to."""
        node = node_of(t)
        if node is not None and node.name().startswith(COMPILED):
            return True
        storage = storage_of(t)
        return storage is not None and storage.key in self._marked

    def _is_blank(self, t: Tensor) -> bool:
        storage = storage_of(t) if self._blank else None
        return storage is not None and storage.key in self._blank

    def _mark_nodes(self, node: Node, moved: int, inside: int) -> None:
        """The node of a result, and those inside the same function that took something without a gradient."""
        self.nodes.add(node)
        self._visited.discard(node)
        stack = [node]
        while stack:
            inner = stack.pop()
            if inner in self._visited:
                continue
            self._visited.add(inner)
            if worst := moved if inner is node else max(moved, inside):
                self.moved_nodes[inner] = worst
            children = [child for child, _ in inner.next_functions]
            if None in children and len(children) > 1:
                self.nodes.add(inner)
            stack += [child for child in children if child is not None]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and mark its results if one of its arguments is marked."""
        name = getattr(func, "__name__", "")
        if torch.compiler.is_compiling() or name in _GIVES_NO_TENSOR:
            return func(*args, **(kwargs or {}))
        if name == "register_hook":
            self.sees_hooks = True
            return func(args[0], left_out_of_looks(args[1]))
        if name == "__get__":  # an attribute, as `shape` or `mT`
            found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):
                return found
            name = func.__self__.__name__
        taken = list(tensors_in((args, kwargs)))
        # Where the function begins in the graph; looked at before, as an in-place function moves its argument there.
        for t in taken:
            node = node_of(t)
            if node is not None and node not in self._visited:
                self._visited.add(node)
                if self.holds(t):  # made by somebody's own function, which no mode sees
                    self.nodes.add(node)
        held = [t for t in taken if self.holds(t)]
        named, operands = kwargs or {}, operands_first(args, kwargs or {})
        place = self._rows_after(name, operands, named, held) if held else 0
        places, blank = [self._known_place(t) for t in held], all(map(self._is_blank, held))
        result = func(*args, **named)
        if held:
            results = list(tensors_in((result, [args[0]] if name == "__setitem__" else [])))
            after = self._places_after(name, func, operands, named, held, places, result)
            for i, t in enumerate(results):
                self.note_place(t, after[i] if i < len(after) else LOST)
            inside = BROUGHT_BACK * (name in TURNS_INSIDE and self.batch > 1)
            self.mark(results, self._met(held, results) if place == LOOSE else place, inside)
            if blank or name in _BLANK:
                self._blank.update(storage.key for t in results if (storage := storage_of(t)) is not None)
        return result

    def _places_after(
        self, name: str, func: Any, args: Any, kwargs: Any, held: list[Tensor], places: list[Any], result: Any
    ) -> Sequence[Any]:
        """Where the samples surely are in a function's results; nothing where they are not known to be anywhere."""
        plain = name.strip("_")
        turned = bool(args) and result is args[0] and is_view(plain)  # in place: its shape before is gone
        data = {id(t): place for t, place in zip(held, places, strict=True) if not self._is_blank(t)}
        known = bool(data) and None not in data.values() and not turned
        if not known or self.batch < 2 or not isinstance(result, Tensor | tuple | list):
            return ()
        try:
            found = Call(plain, func, args, kwargs, data, self.batch).places_in(result)
        except (IndexError, TypeError, ValueError):  # called in a way that is not known, as with all given by name
            return ()
        return found if isinstance(found, tuple) else (found,)

    def _rows_after(self, name: str, args: Any, kwargs: Any, held: list[Tensor]) -> int:
        """Where the rows of a function's results are; looked at before, as it may change its argument.

        `held` is what depends on the data of what it is called with.
        """
        if self.batch < 2:
            return 0
        places = [self._place(t) for t in held]
        if is_write(name):
            if all(map(self._is_blank, held)):
                return 0  # numbers that are no data's, as those of a mask
            return self._rows_written(name, args, kwargs, max(places))
        if moves_rows(name, args, kwargs, self.batch, self.holds):
            self.moves = True
            self._taken += [(rows, self._place(args[0])) for rows in taken_rows(name, args, kwargs)]
            return MOVED
        return max(places)

    def _rows_written(self, name: str, args: Any, kwargs: Any, place: int) -> int:
        """Rows stay where they are written to. What was blank has only those that come back as they were taken."""
        into = args[0]
        blank = not self.holds(into) or self._is_blank(into)
        if not blank:
            return max(self.moved(into), min(place, BROUGHT_BACK))
        written = taken_rows(name, args, kwargs)
        if not written:
            return place
        before = [place for rows, place in self._taken if written[0].same_as(rows)]
        self.moves |= not before
        return max(BROUGHT_BACK, *before) if before else MOVED

    def _met(self, held: list[Tensor], results: list[Tensor]) -> int:
        """Where rows are after some without an axis of the batch were taken: a table of positions keeps the others'."""
        loose = [t for t in held if self._place(t) == LOOSE]
        rest = [t for t in held if self._place(t) != LOOSE]
        moved = max(map(self._place, rest), default=LOOSE)
        rows = {len(t) for t in results if t.dim()}
        if any(has_batch_axis(t, self.batch) for t in rest) or rows.isdisjoint(len(t) for t in loose if t.dim()):
            return moved
        return LOOSE


def node_of(t: Tensor) -> Node | None:
    """A tensor's place in the graph; None for a view of which torch cannot say it any more."""
    try:
        return unwrapped(t).grad_fn
    except RuntimeError:  # a view made without gradients, of something that was then changed with them
        return None


class WorstPlaces:
    """Where rows of the batch were at worst while the data were followed, for passes in which they are not.

    What was never seen may be anywhere.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, int] = {}

    def at(self, key: Hashable, taint: DataTaint | None, found: Callable[[DataTaint], int], *, moves_rows: bool) -> int:
        """0, `BROUGHT_BACK` or `MOVED`.

        Args:
            key: What looks alike in all passes.
            taint: Tells it, in passes that follow the data.
            found: What it tells.
            moves_rows: Whether the model gives rows other places.
        """
        if taint is None:
            return self._seen.get(key, MOVED if moves_rows else 0)
        place = found(taint)
        if taint.batch > 1:
            self._seen[key] = max(place, self._seen.get(key, 0))
        return place


class Following:
    """The mode of a forward pass, if it has one.

    It outlives the tracker, which may be collected in a forward pass: a mode left behind would follow all that comes.

    Attributes:
        taint: The mode.
        also: What else must be done when a forward pass ends.
        thread: In which one a forward pass is under way; None: in none.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.taint: DataTaint | None = None
        self.also: Callable[[], None] = lambda: None

    def begin(self, given: Iterable[Tensor], batch: int, loose: Container[int]) -> None:
        """Follow what depends on these tensors of B samples from now on; on some of them samples have no axis."""
        self.end()
        self.taint = DataTaint(batch)
        for i, t in enumerate(given):
            self.taint.note_place(t, Place() if i not in loose and t.dim() and len(t) == batch else LOST)
            self.taint.mark([t], LOOSE if i in loose else 0)
        self.taint.__enter__()

    def end(self) -> DataTaint | None:
        """Follow no longer. Returns what was followed."""
        taint, self.taint = self.taint, None
        if taint is not None:
            try:
                taint.__exit__(None, None, None)
            except RuntimeError:  # compiled code puts all modes aside while it runs: the model's end ends this one
                self.taint = taint
        return taint

    @staticmethod
    def unfollowed(hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook method of an object with `_following`: its own operations are none of the model's."""

        @wraps(hook)
        def run(owner: Any, *args: Any) -> Any:
            if owner._following.taint is None:
                return hook(owner, *args)
            with unseen_by_modes():
                return hook(owner, *args)

        return run

    def enter(self, *, whole: bool) -> None:
        """A pass begins.

        Args:
            whole: Whether the model itself is called, so that its end will be seen.

        Raises:
            UncoveredParameterError: If another one is under way in another thread.
        """
        if self.elsewhere:
            raise UncoveredParameterError(
                "The model was called in two threads at once, both with gradients, and norms are those of one thread's "
                "pass: give each thread a model of its own, or let them take turns."
            )
        self.thread = get_ident() if whole else self.thread

    @property
    def elsewhere(self) -> bool:
        """Whether a forward pass is under way in another thread: what this one calls is none of its business."""
        return self.thread is not None and self.thread != get_ident()

    def on_model_end(self, *_: Any) -> None:
        """A hook for when the model returns, or fails."""
        if not self.elsewhere:
            self.thread = None
            self.end()
            self.also()
