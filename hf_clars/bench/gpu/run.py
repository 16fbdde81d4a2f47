"""Run the stages, each in a process of its own with a share of the time: `python scripts/benchmark_gpu.py --help`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_clars.bench.gpu.report import write_report
from hf_clars.bench.gpu.stages import STAGES, machine

RESULTS = "gpu.json"
DESCRIPTION = """\
What exact per-sample gradient norms cost on this machine's GPU. Stages run in order of importance, each in a process
of its own that ends when its share of the time is up; results are written as they come. Without a GPU, or with --tiny,
every stage runs in tiny sizes, which measures nothing and shows that the kit works.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kit, or one stage of it."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="time for all stages (default: 6)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark-gpu"), metavar="DIR", help="(default: benchmark-gpu)"
    )
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), help="only these (default: all)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: only shows that all stages run")
    parser.add_argument("--report-only", action="store_true", help="make the report from an earlier run's JSON")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        print(json.dumps(STAGES[args.stage][1](args.tiny)))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / RESULTS
    if not args.report_only:
        _run(path, args.stages or list(STAGES), 60 * args.minutes, tiny=args.tiny)
    write_report(json.loads(path.read_text(encoding="utf-8")), args.output)
    print((args.output / "gpu.md").read_text(encoding="utf-8"))
    return 0


def _run(path: Path, stages: Sequence[str], seconds: float, *, tiny: bool) -> None:
    about = machine()
    tiny = tiny or about["card"].startswith("none")
    results: dict[str, Any] = {"machine": about, "tiny": tiny, "stages": {}}
    end = time.monotonic() + seconds
    for index, name in enumerate(stages):
        left = end - time.monotonic()
        weights = [STAGES[later][0] for later in stages[index:]]
        share = left * min(1.0, 1.6 * weights[0] / sum(weights))
        results["stages"][name] = _one(name, max(share, 1.0), tiny=tiny) if left > 1 else {"skipped": "no time left"}
        _write(path, results)
        print(f"{seconds - (end - time.monotonic()):6.0f} s  {name}", file=sys.stderr, flush=True)


def _one(name: str, seconds: float, *, tiny: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "hf_clars.bench.gpu.run", "--stage", name, *(["--tiny"] if tiny else [])]
    start = time.monotonic()
    code, output, errors = _process(command, seconds)
    figures = _last_figures(output)
    if code is None:
        figures["error"] = f"not done within {seconds:.0f} s"
    elif code or not figures:
        figures["error"] = (errors.strip() or "no output")[-1500:]
    return figures | {"seconds": round(time.monotonic() - start, 1)}


def _process(command: Sequence[str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None: the time was up), output and errors of a process; what it has started ends with it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
        return process.returncode, output, errors
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()


def _last_figures(output: str) -> dict[str, Any]:
    """The last line of a stage that is whole: a stage says again and again what it has found by then."""
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _write(path: Path, results: dict[str, Any]) -> None:
    """Complete or not at all: the machine may be taken away at any moment."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
