"""What a run that resumes must know of the layers' calls, so that its gradients are rounded as they were.

In a tracker's first pass it may be open whose rows a call has. Its weight gradient is then autograd's. Once that is
known, it may be the sum of the samples', which adds up in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_clars.grad_norms.hooked_norms import HookedNorms

Proven = Mapping[str, Sequence[Sequence[int]]]


def proven_calls(norms: object) -> dict[str, list[list[int]]]:
    """{module: layouts of its calls that are known to be right}, as JSON takes it.

    Args:
        norms: The tracker; another estimator has none. What it expects itself, and has not met yet, is handed on.
    """
    modules = norms.hooked if isinstance(norms, HookedNorms) else ()
    known = {each.path: dict.fromkeys(sorted(each.expected), "expected") | each.calls for each in modules}
    found = {path: [list(key) for key, how in calls.items() if how != "graph"] for path, calls in known.items()}
    return {path: keys for path, keys in found.items() if keys}


def expect_calls(norms: object, proven: Proven) -> None:
    """Take weight gradients from the first pass on as in the run that has proven this. It is proven again all the same.

    Args:
        norms: The tracker; another estimator does nothing.
        proven: From `proven_calls`.
    """
    for each in norms.hooked if isinstance(norms, HookedNorms) else ():
        each.expected.update(tuple(key) for key in proven.get(each.path, ()))
