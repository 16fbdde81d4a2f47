"""Doing a study's runs: in one process, or several that take whatever run is free."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_clars.errors import HfClarsError
from research.study.images import locate, open_images
from research.study.layer_log import LayerLogger
from research.study.loop import Outcome, train
from research.study.plan import Run, Study
from research.study.results import ResultsFolder, finite_or_none

LOOK_AGAIN = 2.0
"""Seconds between two looks at what other processes have finished."""
LOG_EVERY = 60.0
"""Seconds between two lines of progress where they do not overwrite each other: in a log file."""


class StudyIncompleteError(HfClarsError, RuntimeError):
    """Worker processes ended before all runs were done."""


def run_study(study: Study, results: Path, *, data: Path | None = None, jobs: int = 1) -> None:
    """Do all runs that have no result yet, with a progress display.

    Args:
        study: What to do.
        results: The results folder; other processes may work on it at the same time.
        data: Where data sets are, see `research.study.images.locate`.
        jobs: Processes; they share the machine's cores.

    Raises:
        DataError: If `data` is given, but a set is not there.
        StudyIncompleteError: If a process ended with an error; what is finished stays.
    """
    for dataset in {arm.base.dataset for arm in study.arms}:
        locate(dataset, data)  # before any process is started
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(study, results, data, threads)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        _show_progress(study, ResultsFolder(results), workers)
    finally:
        for worker in workers:
            if worker.exitcode is None:
                worker.terminate()
            worker.join()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise StudyIncompleteError(
            f"{len(failed)} of {jobs} processes ended with an error (see above); finished runs are kept in {results}. "
            "Start the same command again to go on."
        )


def work(study: Study, results: Path, data: Path | None, threads: int) -> None:
    """Do runs until none is left, taking only those that no other process holds.

    Args:
        study: What to do.
        results: The results folder.
        data: Where data sets are.
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    folder = ResultsFolder(results)
    while True:
        open_runs = [run for run in study.known_runs(folder.get) if folder.get(run.settings.key) is None]
        if not open_runs:
            return
        if not any(_try(run, folder, data) for run in open_runs):
            time.sleep(LOOK_AGAIN)  # others are at the last ones, which decide what comes next


def _work(study: Study, results: Path, data: Path | None, threads: int) -> None:
    """`work` as a process: an error that the user can mend is one paragraph."""
    try:
        work(study, results, data, threads)
    except HfClarsError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)


def _try(run: Run, folder: ResultsFolder, data: Path | None) -> bool:
    """Do a run if it is free; True if it was done."""
    with folder.claim(run.settings.key) as mine:
        if mine:
            folder.put(run.settings.key, do(run, folder, data))
        return mine


def do(run: Run, folder: ResultsFolder, data: Path | None) -> dict[str, Any]:
    """Do one run. Final runs keep their layer-rate log.

    Args:
        run: What to do.
        folder: For the log.
        data: Where data sets are.

    Returns:
        Its result.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = open_images(run.settings, data, device)
    logger = LayerLogger(folder.fresh_log_folder(run.settings.key)) if run.stage == "final" else None
    outcome = train(run.settings, images, device=device, observer=logger)
    if logger is not None:
        logger.close()
    return {"settings": dataclasses.asdict(run.settings), **_figures(outcome), "device": str(device)}


def _figures(outcome: Outcome) -> dict[str, Any]:
    figures = dataclasses.asdict(outcome)
    return {name: finite_or_none(v) if isinstance(v, list) else v for name, v in figures.items()}


def _diverged(run: Run, folder: ResultsFolder) -> bool:
    result = folder.get(run.settings.key)
    return result is not None and result["diverged_at"] is not None


def _show_progress(study: Study, folder: ResultsFolder, workers: list[Any]) -> None:
    every = 0.1 if sys.stderr.isatty() else LOG_EVERY
    with tqdm(total=study.most_runs(), desc=study.about, unit="run", smoothing=0.05, mininterval=every) as bar:
        first = True
        while True:
            alive = any(worker.is_alive() for worker in workers)
            runs = study.known_runs(folder.get)
            done = [run for run in runs if folder.get(run.settings.key) is not None]
            if first:
                bar.initial = bar.n = len(done)  # what an earlier session did says nothing of this one's speed
                first = False
            bar.set_postfix(diverged=sum(_diverged(run, folder) for run in done), refresh=False)
            bar.update(len(done) - bar.n)
            if not alive:
                bar.total = len(runs)
                return
            time.sleep(LOOK_AGAIN)
