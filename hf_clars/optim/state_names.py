"""Optimizer states find their way by name: momentum goes to the parameter that it was stored for.

torch's own loading goes by order and number. Here a state may come from an optimizer with other groups (one a layer, as
states were written when that was the only form), with layers in another order, or without the parameters that were
frozen then.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from hf_clars.optim.layer_book import LayerBook

LAYER = "layer"
NAMES = "param_names"
MOMENTS = "signal_moments"  # [2], or [2, layers of the group]: SignalLARS's running moments
OWN = ("params", NAMES, LAYER)  # what a group has of its own, and takes from no state

SHOWN = 5

Place = tuple[int, int]


def arranged(state: Mapping[str, Any], groups: list[dict[str, Any]], book: LayerBook) -> dict[str, Any]:
    """A state in the order of an optimizer's groups.

    Args:
        state: From `state_dict()`.
        groups: The optimizer's groups.
        book: Its layers.

    Returns:
        A state dict that torch's loading takes; `state` itself where nothing has a name and the groups are alike.

    Raises:
        ValueError: If the state has layers that the optimizer has not, or the other way round.
    """
    saved = state["param_groups"]
    if any(len(group["params"]) != len(rows) for group, rows in zip(groups, book.rows, strict=True)):
        return dict(state)  # an engine's flat pieces: its own loading knows
    places = _places_by_name(saved, groups, book)
    if places is None:
        places = _places_by_order(saved, groups)
    if places is None:
        return dict(state)
    return _rebuilt(state, groups, book, places)


def _places_by_name(
    saved: list[dict[str, Any]], groups: list[dict[str, Any]], book: LayerBook
) -> dict[Place, Place] | None:
    """{place here: place in the state}; None where one of them has no names."""
    if not all(NAMES in group for group in groups) or not all(NAMES in g or LAYER in g for g in saved):
        return None
    here = {name: (g, i) for g, group in enumerate(groups) for i, name in enumerate(group[NAMES])}
    of_layer = {layer.name: layer.param_names for layer in book.layers}
    trains = {n: p.requires_grad for group in groups for n, p in zip(group[NAMES], group["params"], strict=True)}
    found: dict[Place, Place] = {}
    unknown: list[str] = []
    for g, group in enumerate(saved):
        names = group.get(NAMES)
        if names is None:
            names = of_layer.get(group[LAYER], ())
            if len(names) != len(group["params"]):
                names = [name for name in names if trains[name]]
        if len(names) != len(group["params"]):
            unknown.append(f"layer {group[LAYER]} of {len(group['params'])} tensors")
            continue
        for i, name in enumerate(names):
            if name in here:
                found[here[name]] = (g, i)
            else:
                unknown.append(name)
    missing = [name for name, place in here.items() if place not in found and trains[name]]
    _refuse(unknown, missing)
    return found


def _refuse(unknown: list[str], missing: list[str]) -> None:
    if unknown:
        raise ValueError(
            f"The optimizer state holds {_listed(unknown)}, which this optimizer does not have: it is of another model "
            "or of another partition into layers."
        )
    if missing:
        raise ValueError(
            f"The optimizer state holds nothing of {_listed(missing)}, which this optimizer trains: it is of another "
            "model, or they were not in its groups."
        )


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _places_by_order(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> dict[Place, Place] | None:
    """{place here: place in the state} for a state with one group a tensor; None: torch's own loading will do."""
    alike = [len(group["params"]) for group in saved] == [len(group["params"]) for group in groups]
    if alike or not all(len(group["params"]) == 1 and LAYER in group for group in saved):
        return None
    for wanted in (lambda p: True, lambda p: p.requires_grad):  # the frozen ones were left out of such states
        here = [(g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"]) if wanted(p)]
        if len(here) == len(saved):
            return {place: (g, 0) for g, place in enumerate(here)}
    return None


def _rebuilt(
    state: Mapping[str, Any], groups: list[dict[str, Any]], book: LayerBook, places: Mapping[Place, Place]
) -> dict[str, Any]:
    row_at = {source: book.rows[g][i] for (g, i), source in places.items()}
    saved, tensors = state["param_groups"], state["state"]
    values: dict[Hashable, Any] = {}
    rebuilt = []
    number = 0
    for g, group in enumerate(groups):
        ids = list(range(number, number + len(group["params"])))
        number += len(ids)
        sources = [places.get((g, i)) for i in range(len(ids))]
        for key, source in zip(ids, sources, strict=True):
            held = None if source is None else tensors.get(saved[source[0]]["params"][source[1]])
            if held is not None:
                values[key] = held
        first: dict[str, Any] = next((saved[source[0]] for source in sources if source is not None), {})
        settings = {key: value for key, value in group.items() if key != MOMENTS}
        settings |= {key: value for key, value in first.items() if key not in (*OWN, MOMENTS)}
        moments = _moments(saved, sources, book.rows[g], row_at)
        rebuilt.append({**settings, **({} if moments is None else {MOMENTS: moments}), "params": ids})
    return {**state, "state": values, "param_groups": rebuilt}


def _moments(
    saved: list[dict[str, Any]], sources: list[Place | None], rows: list[int], row_at: Mapping[Place, int]
) -> torch.Tensor | None:
    """The moments of one group's layers, [2] for one layer, else [2, layers]; zeros where there are none."""
    columns: dict[int, torch.Tensor] = {}
    for row, source in zip(rows, sources, strict=True):
        if row in columns or source is None or MOMENTS not in saved[source[0]]:
            continue
        group = saved[source[0]]
        held = group[MOMENTS].reshape(2, -1)
        order = list(dict.fromkeys(row_at.get((source[0], i)) for i in range(len(group["params"]))))
        if len(order) == held.shape[1]:
            columns[row] = held[:, order.index(row)]
    if not columns:
        return None
    zeros = torch.zeros_like(next(iter(columns.values())))
    found = torch.stack([columns.get(row, zeros) for row in dict.fromkeys(rows)], dim=1)
    return found[:, 0] if found.shape[1] == 1 else found
