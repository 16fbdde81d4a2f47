"""A letter for each axis of what a product multiplies, and of its result."""

from __future__ import annotations

import string


def letters_of_einsum(equation: str, dims: list[int]) -> tuple[list[str], str]:
    """An einsum's letters; an ellipsis is spelled out, from the right."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    more = max(d - len(t.replace("...", "")) if "..." in t else 0 for t, d in zip(terms, dims, strict=True))
    dots = "".join(free[:more])
    if not arrow:
        letters = sorted({c for c in given if c.isalpha()})
        result = ("..." if "..." in given else "") + "".join(c for c in letters if given.count(c) == 1)
    spelled = []
    for term, dim in zip(terms, dims, strict=True):
        missing = dim - len(term.replace("...", ""))
        spelled.append(term.replace("...", dots[more - missing :] if missing else ""))
    return spelled, result.replace("...", dots)


def letters_of_matmul(a: int, b: int, *, turned: bool = False) -> tuple[list[str], str]:
    """The same of a matrix product of tensors with so many axes; `turned`: the second is transposed, as a weight."""
    batch = "abcdefgh"[: max(a, b, 2) - 2]
    first = "k" if a == 1 else batch[len(batch) - a + 2 :] + "ik"
    second = "k" if b == 1 else batch[len(batch) - b + 2 :] + ("jk" if turned else "kj")
    return [first, second], batch + ("i" if a > 1 else "") + ("j" if b > 1 else "")
