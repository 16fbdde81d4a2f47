"""Three passes with `PerSampleGradNorms` against the oracle, in one precision; in the process that may die of it."""

from __future__ import annotations

import copy
import statistics
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook

from benchmarks.coverage.oracle import Norms, one_backward_a_sample, one_copy_a_sample, trainable
from benchmarks.coverage.subject import NotRunnable, Subject, other_sample, to_float64
from benchmarks.coverage.ways import ways_of
from hf_clars.errors import HfClarsError
from hf_clars.grad_norms import PerSampleGradNorms

PASSES = 3
# How far a norm may be from the truth, in parts of itself, beside twice the error of plain autograd in that precision.
RTOL = {"float32": 2e-3, "bf16": 5e-2, "float64": 1e-9}
# And in parts of the sample's largest norm: a bias before a softmax has a gradient of rounding error alone.
FLOOR = {"float32": 1e-5, "bf16": 3e-3, "float64": 1e-12}
SLOW = 4.0
TIMED = 8  # more passes after the first ones, of which the mean counts, as of as many plain ones in between
ENOUGH = 0.2  # seconds of plain passes: a system may count processor time in ticks of 4 ms, which a sum evens out
MOST = 300  # passes
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # they may couple samples a little


def autocast(precision: str) -> AbstractContextManager[Any]:
    """The region that the forward pass runs in."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def is_coupled(subject: Subject) -> bool:
    """Whether samples depend on each other: by batch statistics, in their losses, or as gradients reach others' rows.

    Raises:
        NotRunnable: If the plain model does not run on numbers.
    """
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        values = subject.losses(model, subject.batch)
        try:
            others = subject.losses(model, other_sample(subject.batch, subject.samples))
        except RuntimeError as error:  # as targets one after the other, of other lengths
            raise NotRunnable(f"one sample cannot take the place of another: {error}") from error
    if not values.isfinite().all():
        raise NotRunnable("its loss is not finite on a batch of random numbers")
    changed = bool((others[0] - values[0]).abs() > 1e-4 * values[0].abs() + 1e-6)
    if changed or any(isinstance(m, _BATCH_NORMS) and m.training for m in model.modules()):
        return True
    if not reaches_others(subject):
        return False
    try:
        truth(subject, "float32", coupled=True)
    except Exception:  # the rows were another thing's: experts may take as many tokens as there are samples
        return False
    return True


def reaches_others(subject: Subject) -> bool:
    """Whether the first sample's gradient reaches rows of the others in what some module returns.

    Attention across the batch by mistake, on inputs that are all alike (csatv2), cannot be told from values.
    """
    model = copy.deepcopy(subject.model)
    edges: list[GradientEdge] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and output.shape[:1] == (subject.samples,):
            edges.append(get_gradient_edge(output))

    handle = register_module_forward_hook(note)
    try:
        first = subject.losses(model, subject.batch)[0]
        grads = torch.autograd.grad(first, edges, allow_unused=True) if edges else ()
    except RuntimeError:  # it runs backward once, and by backward() alone
        return False
    finally:
        handle.remove()
    sizes = [g.reshape(len(g), -1).abs().amax(1) for g in grads if g is not None and g.numel()]
    return any(bool(size[1:].max() > 1e-3 * size[0]) for size in sizes)


def truth(subject: Subject, precision: str, coupled: bool, prove: bool = True) -> Norms:
    """The oracle's norms in a precision; `prove`: where it can, it proves itself."""
    model, batch = copy.deepcopy(subject.model), subject.batch
    if precision == "float64":
        model, batch = model.double(), to_float64(batch)

    def losses() -> Tensor:  # as parts of a mean: bf16 rounds a third of a gradient in another way than the whole
        with autocast(precision):
            return subject.losses(model, batch) / subject.samples

    if coupled:
        found = one_copy_a_sample(model, losses, batch, RTOL[precision] if prove else None)
    else:
        found = one_backward_a_sample(model, losses)
    return {n: subject.samples * norms for n, norms in found.items()}


def expected(subject: Subject, precisions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is right in each precision and pass, how far off may be, and what the oracle has to say about itself.

    Raises:
        NotRunnable: If the plain model does not run.
        OracleFails: If nothing can judge it.
    """
    coupled = is_coupled(subject)
    found: dict[str, dict[str, Any]] = {p: {"coupled": coupled, "note": "", "passes": []} for p in precisions}
    for number in range(1, PASSES + 1):
        _expect(subject.in_pass(number), coupled, found)
    return found


def _expect(subject: Subject, coupled: bool, found: dict[str, dict[str, Any]]) -> None:
    """Add what is right in one pass."""
    best: Norms = {}
    note = ""
    try:
        exact = truth(subject, "float64", coupled)
        _check_finite(exact)
        best = exact
    except Exception as error:
        note = f"float64 fails ({_short(error)[:100]}), so it is judged in its own precision"
    for precision, right in found.items():
        try:
            own = truth(subject, precision, coupled, prove=not best) if precision != "float64" or not best else best
            _check_finite(own)
        except Exception as error:  # some cannot run in one precision; that is no reason to leave out the other
            if len(found) == 1:
                raise
            right["unjudged"] = f"{type(error).__name__}: {_short(error)}"
            continue
        want = {n: w.double() for n, w in (best or own).items()}
        largest = torch.stack(list(want.values())).amax(0)
        allowed = {
            n: RTOL[precision] * w + 2 * (own[n].double() - w).abs().amax() + FLOOR[precision] * largest + 1e-12
            for n, w in want.items()
        }
        right["passes"].append({"want": want, "allowed": allowed})
        right["note"] = right["note"] or note


def _check_finite(norms: Norms) -> None:
    bad = [n for n, v in norms.items() if not v.isfinite().all()]
    if bad or not norms:
        raise NotRunnable(f"the plain gradient of {bad[0]} is not finite" if bad else "nothing is trainable")


def judge(subject: Subject, precision: str, right: dict[str, Any], enough: float = ENOUGH) -> dict[str, Any]:
    """One row of the table.

    Args:
        subject: The model and its batch.
        precision: "float32", "bf16" (under autocast) or "float64".
        right: What `expected` gave for it.
        enough: How many seconds of plain passes `cost` is measured on. With 0 it says little, and the rest is the same.

    Returns:
        `verdict`: "exact", "refused", "wrong", "crashed" or "unjudged", and beside it `why`, `pass`, `ways`, `cost`.
    """
    if "unjudged" in right:
        return {"verdict": "unjudged", "why": right["unjudged"]}
    plain = _Plain(subject, precision)
    model = copy.deepcopy(subject.model)
    if precision == "float64":
        model = model.double()
    before = trainable(model)
    row: dict[str, Any] = {"coupled": right["coupled"], "note": right["note"]}
    seconds: list[float] = []

    def measured(norms: PerSampleGradNorms, batch: Any) -> Norms:
        start = time.process_time()
        model.zero_grad()
        with autocast(precision):
            loss = subject.loss(model, batch)
        loss.backward()
        got = norms.per_sample
        seconds.append(time.process_time() - start)
        return got

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        norms: PerSampleGradNorms | None = None
        for number in range(1, PASSES + TIMED + 1):
            row["pass"] = number
            turn = (number - 1) % PASSES
            batch = subject.in_pass(turn + 1).batch
            batch = to_float64(batch) if precision == "float64" else batch
            plain.step(batch)
            try:
                if norms is None:
                    norms = PerSampleGradNorms(model, layers="tensor")
                got = measured(norms, batch)
            except HfClarsError as error:
                return row | {"verdict": "refused", "why": f"{type(error).__name__}: {error}"}
            except Exception as error:
                return row | {
                    "verdict": "crashed",
                    "why": f"{type(error).__name__}: {_short(error)}",
                    "at": _place(error),
                }
            fault = _fault(got, right["passes"][turn]) or _changed(model, before, plain.grads, precision)
            if fault:
                return row | {"verdict": "wrong", "why": fault}
        assert norms is not None
        row |= {"verdict": "exact", "ways": ways_of(norms, [str(w.message) for w in seen])}
        while sum(plain.seconds[PASSES:]) < enough and len(seconds) < MOST:
            plain.step(batch)
            measured(norms, batch)
        norms.remove()
    del row["pass"]
    plain_seconds = max(statistics.fmean(plain.seconds[PASSES:]), 1e-6)
    row["cost"] = round(statistics.fmean(seconds[PASSES:]) / plain_seconds, 2)
    row["first"] = round(seconds[0] / plain_seconds, 1)
    return row


class _Plain:
    """The model without norms; its passes take turns with those that have them."""

    def __init__(self, subject: Subject, precision: str) -> None:
        self.model = copy.deepcopy(subject.model)
        if precision == "float64":
            self.model = self.model.double()
        self.subject, self.precision = subject, precision
        self.seconds: list[float] = []

    def step(self, batch: Any) -> None:
        """One pass."""
        start = time.process_time()
        self.model.zero_grad()
        with autocast(self.precision):
            loss = self.subject.loss(self.model, batch)
        loss.backward()
        self.seconds.append(time.process_time() - start)

    @property
    def grads(self) -> dict[str, Tensor | None]:
        """The gradients."""
        return {n: p.grad for n, p in trainable(self.model).items()}


def _fault(got: Norms, right: dict[str, Any]) -> str:
    """The worst norm that is not right, in words; empty if all are."""
    worst, words = 1.0, ""
    wrong = 0
    for name, want in right["want"].items():
        if name not in got:
            return f"{name}: no norm"
        found, allowed = got[name].double(), right["allowed"][name]
        if found.shape != want.shape:
            return f"{name}: {tuple(found.shape)} norms for {len(want)} samples"
        off = ((found - want).abs() / allowed).nan_to_num(nan=torch.inf)
        wrong += bool(off.max() > 1)
        if off.max() > worst:
            worst, i = float(off.max()), int(off.argmax())
            words = f"{name}, sample {i}: {float(found[i]):.6g} for {float(want[i]):.6g}"
    return f"{wrong} of {len(right['want'])} tensors, worst {words}" if words else ""


def _changed(model: nn.Module, before: dict[str, nn.Parameter], plain: dict[str, Tensor | None], precision: str) -> str:
    """What became of the model itself, in words: its parameters and gradients are those of the plain one."""
    largest = max((float(g.abs().max()) for g in plain.values() if g is not None and g.numel()), default=0.0)
    for name, p in before.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if getattr(owner, name.rpartition(".")[2]) is not p:
            return f"{name}: the parameter was replaced"
        want = plain[name]
        if (want is None) != (p.grad is None):
            return f"{name}: p.grad is {'there' if want is None else 'missing'}, unlike without norms"
        if want is None or p.grad is None or not want.numel():
            continue
        atol = FLOOR[precision] * (largest + 20 * float(want.abs().max())) + 1e-7
        if not torch.allclose(p.grad, want, rtol=RTOL[precision], atol=atol):
            return f"{name}: p.grad differs from the plain one by {float((p.grad - want).abs().max()):.3g}"
    return ""


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _place(error: BaseException) -> str:
    """Where in our own code it was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "hf_clars" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside hf_clars"
