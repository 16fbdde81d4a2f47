"""A table that is looked up and is a layer's weight as well, as the tied embeddings of language models.

A sample's gradient is A + E: A = sum_t g_t x_t^T of the linear layer, and E, which has a row e_s at each token that the
sample looked up. ||A + E||^2 = ||A||^2 + ||E||^2 + 2 sum_s <A[token_s], e_s>, so that no more than the rows of A that
were looked up have to meet E. The gradients [B, vocabulary, width] that would otherwise be added up before they are
squared never exist together. A table that is looked up several times and is no layer's weight is the case A = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.rules.linear import positions
from hf_clars.grad_norms.uses import RuleUse, Uses


class TiedTable:
    """What one backward pass has delivered of a table's gradients.

    Args:
        lookups: The calls that look rows up.
        count: Samples that are measured.
    """

    def __init__(self, lookups: Sequence[RuleUse], count: int) -> None:
        self.tokens = [call.tokens[:count] for call in lookups if call.tokens is not None]
        self._lookups = list(lookups)
        self._found: dict[int, Tensor] = {}
        self._dense: list[Tensor] = []
        self._rows: list[list[Tensor]] = []

    def measure(self, call: RuleUse, name: str, saved: tuple[Tensor, ...], g: Tensor) -> None:
        """Take the gradient of one call's output.

        Args:
            call: The call.
            name: The table's name in its module.
            saved: What the rule saved, of the measured samples.
            g: Gradient of the module's output, of the measured samples.
        """
        if call in self._lookups:
            self._found[self._lookups.index(call)] = call.rule.row_grads(call.module, saved, g)
            return
        x, g = positions(saved[0]), positions(g)
        squares = call.rule.squared_norms(call.module, (x,), g, {name})[name]
        rows = [norm_math.linear_weight_rows(x, g, tokens) for tokens in self.tokens]
        self._dense.append(squares)
        self._rows.append(rows)

    def add_grads(self, grads: Tensor) -> None:
        """Take the linear layer's gradients of the samples that follow those taken so far.

        Args:
            grads: [b, vocabulary, width].
        """
        start = sum(map(len, self._dense))
        own = (tokens[start : start + len(grads)].unsqueeze(-1) for tokens in self.tokens)
        self._rows.append([grads.gather(1, tokens.expand(-1, -1, grads.shape[2])) for tokens in own])
        self._dense.append(norm_math.squared_sum(grads))

    def squares(self) -> Tensor | None:
        """||A + E||^2, [count]; None if no gradient has come."""
        dense = torch.cat(self._dense) if self._dense else None
        if not self._found:
            return dense
        order = sorted(self._found)
        e = torch.cat([self._found[i] for i in order], dim=1)
        total = norm_math.embedding_weight_squared_norm(torch.cat([self.tokens[i] for i in order], dim=1), e)
        if dense is None:
            return total
        rows = torch.cat([torch.cat([part[i] for part in self._rows]) for i in order], dim=1)
        return total + dense + 2 * (rows * e).flatten(1).sum(1)


def tied_table(param: nn.Parameter, uses: Uses, count: int) -> TiedTable | None:
    """Where a parameter's uses in a pass are lookups and at most one linear layer, what they come to; else None.

    Args:
        param: A parameter with several uses.
        uses: Those of the pass.
        count: Samples that are measured.
    """
    calls = [(c, n) for c in uses.rule_calls if not c.cancelled for n, p in c.wanted.items() if p is param]
    lookups = [c for c, _ in calls if c.tokens is not None and c.rows_per_sample == 1]
    dense = [c for c, n in calls if c.rule.is_dense_weight and n == "weight" and c.rows_per_sample == 1]
    known = lookups and len(dense) <= 1 and len(lookups) + len(dense) == uses.times[param]
    return TiedTable(lookups, count) if known else None
