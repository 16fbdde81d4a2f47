"""Where the samples are in the tensors of a traced graph; what functions do with axes is in `axes/place.py`."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from hf_clars.grad_norms.axes.place import LOST, Call, Place, place_in_view, the_one
from hf_clars.grad_norms.pytree import tensors_in
from hf_clars.grad_norms.torch_traces import UnknownLength, fake_values, is_whole_function, value_of

_BEHIND_MODULES = ("autograd_function_apply", "behind", "linked")
"""What stands behind a module: a function as it is traced, and the operations of `behind.py`."""


def name_of(node: fx.Node) -> str:
    """The name of an operation in a traced graph, without what tells its variants apart."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    return name.rstrip("_") if node.op == "call_method" else name


def place_of_input(t: Tensor, batch: Any) -> Any:
    """Where the samples are in a tensor that the model is called with: a place, None (in no axis), or `LOST`."""
    if t.dim() == 0 or t.shape[0] == batch:
        return Place() if t.dim() else None
    return LOST if any(n == batch for n in t.shape) or t.shape[0] % batch == 0 else None


def place_of(node: fx.Node, places: Mapping[fx.Node, Any], batch: Any) -> Any:
    """Where the samples are in the result of an operation that was traced.

    Args:
        node: The operation.
        places: Of the operations before it.
        batch: B.

    Returns:
        A place; None if it is all samples', as a mean over them; or `LOST`. Of several results a tuple.
    """
    y = value_of(node)
    given = [n for n in node.all_input_nodes if places.get(n) is not None]
    if not given:
        return None
    try:
        return _place_of(node, y, given, places, batch)
    except UnknownLength:
        return (LOST,) * len(y) if isinstance(y, tuple | list) else LOST


def _place_of(node: fx.Node, y: Any, given: Sequence[fx.Node], places: Mapping[fx.Node, Any], batch: Any) -> Any:
    name = name_of(node)
    if name == "getitem" and isinstance(places[given[0]], tuple):
        return places[given[0]][node.args[1]]
    several = isinstance(y, tuple | list)
    if name in _BEHIND_MODULES:  # its output, or its input and its output
        alike = the_one([places[n] for n in given if value_of(n).shape == (y[0] if several else y).shape])
        x: Any = node.args[1] if name == "behind" else None
        called_on = places.get(x)
        if alike is LOST and isinstance(called_on, Place):  # of a module that was not traced itself
            alike = called_on
        return (alike, *(LOST for _ in y[1:])) if several else alike
    if any(not isinstance(places[n], Place) for n in given):
        return (LOST,) * len(y) if several else LOST
    if getattr(node.target, "namespace", "") == "hf_clars" or name.startswith("hf_clars_"):  # it goes through
        return places[given[0]]
    args: Any = fx.map_arg(node.args, value_of)
    kwargs: Any = fx.map_arg(node.kwargs, value_of)
    of_tensors = {id(value_of(n)): places[n] for n in given}
    counts = {id(value_of(n)) for n in node.all_input_nodes if name_of(n) == "arange" and _counts_samples(n, batch)}
    whole = is_whole_function(node)
    return Call(name, node.target, args, kwargs, of_tensors, batch, whole, counts).places_in(y)


def _counts_samples(node: fx.Node, batch: Any) -> bool:
    return len(node.args) == 1 and bool(value_of(node).shape[0] == batch)


def place_after(node: fx.Node, written: fx.Node, places: Mapping[fx.Node, Any], batch: Any) -> Any:
    """Where the samples are in what an operation has written into: where they were, or come into a blank; or `LOST`."""
    at, y = places.get(written), value_of(written)
    given = [n for n in node.all_input_nodes if n is not written and places.get(n) is not None]
    if not given:
        return at  # what is all samples', as a mean over them in a buffer
    if at is None and y.dim() and y.shape[0] == batch:
        at = Place()
    if not isinstance(at, Place):
        return LOST
    if node.target is not operator.setitem:
        return place_of(node, places, batch)
    key, new = (a for a in node.args[1:])  # type: Any, Any
    if new not in given:  # a number, where a mask says so
        return the_one([places[n] for n in given])
    key = fx.map_arg(key, value_of)
    if len(given) > 1 or next(tensors_in(key), None) is not None:
        return LOST
    with fake_values(y):
        dims = y[key].dim()
    into, of = place_in_view(operator.getitem, (y, key), {}, at, batch), places[new]
    same = isinstance(of, Place) and into == replace(of, axis=of.axis - value_of(new).dim() + dims)
    return at if same else LOST
