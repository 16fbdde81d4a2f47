"""Runs every subject in a process of its own, under limits, and writes what became of it; resumable."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SUITES = {
    "transformers": "benchmarks.coverage.transformers_models",
    "timm": "benchmarks.coverage.timm_models",
    "torchvision": "benchmarks.coverage.torchvision_models",
    "torch": "benchmarks.coverage.torch_layers",
}
PRECISIONS = ("float32", "bf16")


def subjects(suites: Iterable[str]) -> list[str]:
    """What there is to sweep: `suite/name`."""
    return [f"{suite}/{name}" for suite in suites for name in import_module(SUITES[suite]).names()]


def sweep(names: list[str], path: Path, seconds: float, gigabytes: float, say: Callable[[str], None] = print) -> None:
    """Sweep what the file does not hold yet.

    Args:
        names: Subjects, `suite/name`.
        path: The JSON file with the results; written after each subject.
        seconds: Limit of processor time for each subject; ten times as long by the clock.
        gigabytes: Memory limit for each subject, beyond what the libraries take.
        say: Where a line a subject goes.
    """
    results = load(path)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["benchmarks.coverage.sweep", "benchmarks.coverage.judge", "transformers", "timm", "torchvision"]
    )
    for name in names:
        if name in results["rows"]:
            continue
        row = _one(server, name, seconds, gigabytes)
        results["rows"][name] = row
        save(results, path)
        say(f"{name}: {' / '.join(sorted(verdicts(row)))}")


def verdicts(row: dict[str, Any]) -> set[str]:
    """What was found of a subject: one verdict for each precision, or one for all."""
    return {row["verdict"]} if "verdict" in row else {row[p]["verdict"] for p in PRECISIONS if p in row}


def load(path: Path) -> dict[str, Any]:
    """The results so far, with the versions that they belong to."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    packages = ("torch", "transformers", "timm", "torchvision")
    return {"versions": {p: metadata.version(p) for p in packages}, "rows": {}}


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results so that no crash leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    half.replace(path)


def _one(server: Any, name: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    """A subject's row; what its process said before it died is kept."""
    receive, send = server.Pipe(duplex=False)
    suite, _, own = name.partition("/")
    process = server.Process(target=_in_child, args=(SUITES[suite], own, send, seconds, gigabytes), daemon=True)
    process.start()
    send.close()
    row: dict[str, Any] = {}
    end = time.monotonic() + 10 * seconds
    stage = "building it"
    try:
        while receive.poll(max(0.0, end - time.monotonic())):
            key, value = receive.recv()
            if key == "stage":
                stage = value
            else:
                row[key] = value
    except EOFError:
        process.join(60)
    if process.is_alive():
        process.kill()
        process.join()
        _ended(row, stage, f"not done after {10 * seconds:.0f} s")
    elif process.exitcode == -signal.SIGXCPU:
        _ended(row, stage, f"took longer than {seconds:.0f} s", "unjudged")
    elif process.exitcode:
        code = process.exitcode
        _ended(row, stage, f"the process died of {signal.Signals(-code).name}" if code < 0 else f"exit status {code}")
    return row


def _ended(row: dict[str, Any], stage: str, why: str, verdict: str = "crashed") -> None:
    """Note an end in the precision that it happened in."""
    if stage in PRECISIONS:
        row[stage] = {"verdict": verdict, "why": why}
    else:
        row.update(verdict="unjudged", why=f"{why} ({stage})")


def _in_child(module: str, name: str, send: Connection, seconds: float, gigabytes: float) -> None:
    """Build one subject and judge it in each precision."""
    import torch

    from benchmarks.coverage.judge import expected, judge

    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115  libraries talk a lot
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + int(gigabytes * 2**30),) * 2)
    torch.set_num_threads(1)
    try:
        subject = import_module(module).build(name)
    except Exception as error:
        send.send(("verdict", "unjudged"))
        send.send(("why", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        return
    send.send(("made", subject.note))
    send.send(("parameters", sum(p.numel() for p in subject.model.parameters())))
    send.send(("stage", "the oracle"))
    try:
        right = expected(subject, PRECISIONS)
    except Exception as error:
        send.send(("verdict", "unjudged"))
        send.send(("why", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        return
    for precision in PRECISIONS:
        send.send(("stage", precision))
        send.send((precision, judge(subject, precision, right[precision])))
    used = resource.getrusage(resource.RUSAGE_SELF)
    send.send(("seconds", round(used.ru_utime + used.ru_stime, 1)))
