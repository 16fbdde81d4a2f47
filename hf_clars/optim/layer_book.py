"""Which layer each tensor of the parameter groups belongs to: the partition, held beside the groups.

A layer is known by its row, its place in every K-vector inside an optimizer, and a tensor by its place (group, number
within the group), so that launchers may put other tensors into the places. Layers in which nothing trains have a row
as well, but are shown to no one until something in them does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_clars.distributed import is_split
from hf_clars.layers import ParamLayer


@dataclass
class LayerBook:
    """The layers of an optimizer.

    Attributes:
        layers: All of them, K.
        rows: For every group, the row of each of its tensors.
        tensors: Likewise, the tensors that were there when it was last looked at.
        adaptive: For every layer, False if it trains at `lr` itself whatever its group says.
        asleep: Tensors that have never been seen to train.
        group_of: For every layer, its group.
        shown: Rows of the layers with a tensor that is not asleep, in the order in which they came to be.
    """

    layers: list[ParamLayer] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    tensors: list[list[nn.Parameter]] = field(default_factory=list)
    adaptive: list[bool] = field(default_factory=list)
    asleep: list[nn.Parameter] = field(default_factory=list)
    group_of: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, layers: Sequence[ParamLayer], groups: Sequence[Sequence[nn.Parameter]]) -> LayerBook:
        """The book of layers that are known beforehand.

        Args:
            layers: Their parameters are those of the groups, each layer's in one group.
            groups: The groups' parameters.
        """
        book = cls(list(layers), adaptive=[True] * len(layers))
        row_of = {p: row for row, layer in enumerate(layers) for p in layer.params}
        for members in groups:
            book._add_members(row_of, members)
        book.wake()
        return book

    def add(self, layers: Sequence[ParamLayer], adaptive: Sequence[bool], members: Sequence[nn.Parameter]) -> None:
        """Add a group.

        Args:
            layers: Its layers.
            adaptive: One entry a layer.
            members: Its tensors.
        """
        row_of = {p: len(self.layers) + i for i, layer in enumerate(layers) for p in layer.params}
        self.layers += layers
        self.adaptive += adaptive
        self._add_members(row_of, members)
        self.wake()

    def _add_members(self, row_of: Mapping[nn.Parameter, int], members: Sequence[nn.Parameter]) -> None:
        self.rows.append([row_of[p] for p in members])
        self.tensors.append(list(members))
        self.asleep += dict.fromkeys(members)
        found = {row: g for g, rows in enumerate(self.rows) for row in rows}
        self.group_of = [found.get(row, 0) for row in range(len(self.layers))]

    @property
    def shown_layers(self) -> list[ParamLayer]:
        """The layers that train, each with those of its parameters that do."""
        asleep = set(self.asleep)
        if not asleep:
            return [self.layers[row] for row in self.shown]
        return [self.layers[row].without(asleep) for row in self.shown]

    @property
    def shows_other_rows(self) -> bool:
        """Whether some layers are not shown, or come in another order."""
        return self.shown != list(range(len(self.layers)))

    def rows_in(self, group: int) -> list[int]:
        """The layers of a group, each once, in the order of its tensors."""
        return list(dict.fromkeys(self.rows[group]))

    def leading_rows(self) -> list[int]:
        """The layer that each group stands for where an engine has made its tensors one flat piece."""
        return [rows[0] if rows else 0 for rows in self.rows]

    def wake(self) -> bool:
        """Look whether tensors that were asleep train by now.

        Returns:
            Whether there are any.

        Raises:
            TypeError: For complex parameters.
        """
        woken = {p for p in self.asleep if p.requires_grad}
        if not woken:
            return False
        self.asleep = [p for p in self.asleep if p not in woken]
        shown = set(self.shown)
        for row, layer in enumerate(self.layers):
            if not woken.isdisjoint(layer.params):
                _check_real(layer)
                self.shown += [] if row in shown else [row]
        return True

    def swapped(self, groups: Iterable[dict[str, Any]]) -> dict[nn.Parameter, nn.Parameter]:
        """The tensors that FSDP2 has put in the place of others since this was last asked: {old: new}."""
        found: dict[nn.Parameter, nn.Parameter] = {
            old: new
            for known, group in zip(self.tensors, groups, strict=True)
            for old, new in zip(known, group["params"], strict=False)
            if old is not new and is_split(new)
        }
        if found:
            self.tensors = [[found.get(p, p) for p in known] for known in self.tensors]
            self.asleep = [found.get(p, p) for p in self.asleep]
            self.layers = [layer.with_params(found) for layer in self.layers]
        return found


def _check_real(layer: ParamLayer) -> None:
    for name, param in zip(layer.param_names, layer.params, strict=True):
        if param.requires_grad and param.is_complex():
            raise TypeError(
                f"The parameter {name} is complex ({param.dtype}), and layer rates are for real ones: keep its real "
                "and imaginary part as a real parameter [..., 2], and use torch.view_as_complex(...) of it."
            )
