"""Whether a way computes what it should, on a few small images, before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_clars.bench.networks import Network, has_batch_norm
from hf_clars.bench.timing import time_of
from hf_clars.bench.ways import HfClars, OneByOne, Plain, SquaredNorms, Way

TOLERANCE = 1e-3
"""Relative; far above float32's rounding in these networks, far below a wrong formula."""

NEGLIGIBLE = 1e-5
"""Norms below this part of the model's largest are rounding noise, such as those of biases of attention keys."""


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        good: Whether the way may be timed.
        note: What a table says about it; empty where there is nothing to say.
    """

    good: bool
    note: str = ""


def try_way(make: Callable[[], Way]) -> tuple[Way | None, str]:
    """Set a way up and run one step.

    Args:
        make: Sets it up.

    Returns:
        The way and an empty note; or None and why not, in one line. Whatever it raises is caught: other libraries
        refuse with errors of every kind, and the benchmark goes on without them.
    """
    try:
        way = make()
        way.first_seconds = time_of(way.step)
    except Exception as error:
        return None, refusal(error)
    return way, ""


def refusal(error: Exception) -> str:
    """An error as one line for a table."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    first = error.args[0] if error.args else None
    if isinstance(first, list) and first and isinstance(first[0], Exception):
        return refusal(first[0])  # Opacus raises one error with a list of all
    lines = str(error).strip().splitlines() or [""]
    return f"refused: {type(error).__name__}: {lines[0]}"[:200]


def check_way(way_class: type[Way], network: Network) -> Verdict:
    """Run a way on a few small images and compare gradient and norms with the reference.

    Args:
        way_class: The way.
        network: Its image size and batch are used as they are: give a small one.

    Returns:
        The verdict. Its note tells refusals, wrong results, and how many tensors have norms if not all.
    """
    # A GPU would else multiply TF32 numbers of ten bits in convolutions: a wrong formula could hide behind rounding.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        model = network.build()
        x, y = network.data()
        way, note = try_way(lambda: way_class(copy.deepcopy(model), x, y))
        if way is None:
            return Verdict(False, note)
        # With BatchNorm a sample alone has another gradient: only our definition of its part is left to compare with.
        reference_class = HfClars if has_batch_norm(model) else OneByOne
        try:
            return agrees(reference_class(copy.deepcopy(model), x, y), way)
        finally:
            way.close()


def agrees(reference: Way, way: Way) -> Verdict:
    """Whether a way leaves the gradient of a plain backward pass, and norms that equal the reference's.

    Args:
        reference: Another way, for the same model and batch.
        way: The one to judge.

    Returns:
        The verdict.
    """
    expected, found = reference.step(), way.step()
    plain = Plain(copy.deepcopy(reference.model), reference.x, reference.y)
    plain.step()
    if wrong := _wrong_gradient(plain.model, way.model):
        return Verdict(False, f"wrong p.grad: {wrong}")
    if isinstance(way, Plain):
        return Verdict(True)
    if wrong := _wrong_norms(_by_tensors(reference, expected), _by_tensors(way, found)):
        return Verdict(False, f"wrong norms: {wrong}")
    names = [name for name, param in way.model.named_parameters() if param.requires_grad]
    covered = {tensor for name in found for tensor in way.tensors_of(name)}
    missing = len(set(names) - covered)
    return Verdict(True, f"norms of {len(names) - missing} of {len(names)} tensors" if missing else "")


def _by_tensors(way: Way, squares: SquaredNorms) -> dict[frozenset[str], Tensor]:
    return {frozenset(way.tensors_of(name)): value for name, value in squares.items()}


def _wrong_gradient(plain: nn.Module, model: nn.Module) -> str:
    grads = {name: param.grad for name, param in model.named_parameters()}
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for name, param in plain.named_parameters():
        grad = grads[name]
        if param.grad is None:
            continue
        if grad is None:
            return f"none for {name}"
        error = float((grad - param.grad).norm())
        if not error <= TOLERANCE * float(param.grad.norm()) + NEGLIGIBLE * largest:
            return f"{name} differs by {error / float(param.grad.norm()):.1%}"
    return ""


def _wrong_norms(expected: dict[frozenset[str], Tensor], found: dict[frozenset[str], Tensor]) -> str:
    largest = max(float(value.max()) for value in expected.values()) ** 0.5
    wrong = []
    for tensors, squares in found.items():
        # Norms of modules against norms of tensors: squares add up.
        parts = [value for members, value in expected.items() if members <= tensors]
        true = torch.stack(parts).sum(0).sqrt()
        error = (squares.sqrt() - true).abs()
        if squares.shape != true.shape or not bool((error <= TOLERANCE * true + NEGLIGIBLE * largest).all()):
            wrong.append(min(tensors))
    return f"{len(wrong)} of {len(found)}, such as {wrong[0]}" if wrong else ""
