"""Runs of the whole training command, in processes of their own that are killed, and what they left, compared.

Processes come from a fork server that has the imports done, so that a run starts at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from safetensors import safe_open
from safetensors.numpy import load_file

from hf_clars.errors import HfClarsError
from hf_clars.records import QUANTITIES, LayerRateLog
from tests.image_files import CLASSES, picture
from tests.processes import free_port
from tests.undrawn import draw_nothing

IMAGES = 44

COMMON = [
    "--model=resnet8",
    "--image_size=8",
    "--augment=imagenet",
    "--per_device_train_batch_size=4",
    "--norm_samples=0",
    "--max_steps=14",
    "--learning_rate=0.5",
    "--save_strategy=steps",
    "--save_steps=3",
    "--save_total_limit=2",
    "--logging_steps=2",
    "--eval_strategy=no",
    "--report_to=none",
    "--use_cpu=true",
    "--disable_tqdm=true",
    "--resume_from_checkpoint=auto",
]


def save_images(folder: Path, rows: int = IMAGES, files: int = 2) -> Path:
    """A data set that has several files, so that two workers can share its stream."""
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    data = {"image": [picture(i, (10, 12)) for i in range(rows)], "label": [i % 3 for i in range(rows)]}
    folder.mkdir(parents=True)
    whole = Dataset.from_dict(data, features=features)
    for n in range(files):
        whole.shard(files, n).to_parquet(str(folder / f"train-{n:05d}-of-{files:05d}.parquet"))
    return folder


@dataclass(frozen=True)
class Moment:
    """When to be killed: so long after the start of the n-th step, or before the n-th change to the file system."""

    step: int | None = None
    delay: float = 0.0
    operation: int | None = None


def _die_at(moment: Moment) -> None:
    """Let this process be killed."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == moment.step:
            threading.Timer(moment.delay, die).start()

    register_optimizer_step_pre_hook(count)
    if moment.operation is None:
        return
    left = moment.operation

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                die()
            return original(*args, **kwargs)

        return call

    for owner, names in ((os, ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")), (shutil, ("rmtree",))):
        for name in names:
            setattr(owner, name, dying(getattr(owner, name)))


def _run(arguments: list[str], rank: int, world: int, port: int, moment: Moment, ended: Any) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # for data-loader workers, as in a run of its own

    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from hf_clars.image_classification.run import parse_run, train_image_classifier
    from hf_clars.trainer.callbacks import LayerRateCallback
    from hf_clars.trainer.stopping import RESUME_ME, RunInterruptedError

    draw_nothing()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # 5 seconds at the end of each pass over parquet files
    LayerRateCallback.__init__.__kwdefaults__["flush_every"] = 2  # more pieces, more moments to be killed at
    settings = parse_run(arguments)
    _die_at(moment)
    try:
        train_image_classifier(settings)
    except RunInterruptedError:
        os._exit(RESUME_ME)
    except HfClarsError as error:
        message = Path(f"{settings.training.output_dir}.error.{rank}")
        message.write_text(str(error))
        os._exit(2)
    ended.value = True
    os._exit(0)  # two gloo processes sometimes abort at exit


_context = multiprocessing.get_context("forkserver")


def start(arguments: list[str], *, world: int = 1, moment: Moment | None = None) -> list[Any]:
    """Start the processes of a run, the first to be killed at a moment; `ended.value` tells if it ended."""
    port = free_port()
    processes: list[Any] = []
    for rank in range(world):
        ended = _context.Value("b", False)
        own = moment if rank == 0 and moment is not None else Moment()
        process = _context.Process(target=_run, args=(arguments, rank, world, port, own, ended))
        process.start()
        process.ended = ended
        processes.append(process)
    return processes


def run(arguments: list[str], *, world: int = 1, moment: Moment | None = None) -> bool:
    """Run to its end (True) or until killed; with two processes the second one is killed as well."""
    first, *others = start(arguments, world=world, moment=moment)
    wait_for(first)
    for process in others:
        if not first.ended.value and not process.ended.value:
            process.kill()
        wait_for(process)
    return bool(first.ended.value)


def wait_for(process: Any) -> None:
    """Until the process is gone; `join` would wait for its orphaned data-loader workers too, some seconds."""
    while Path(f"/proc/{process.pid}").exists():
        time.sleep(0.02)


def run_with_kills(arguments: list[str], kills: int, chance: random.Random, *, world: int = 1) -> int:
    """Run with `--resume_from_checkpoint auto` until it ends, killing it at random moments; how often it was killed."""
    for done in range(kills):
        in_a_step = Moment(step=chance.randint(1, 6), delay=0.1 * chance.random())
        moment = in_a_step if chance.random() < 0.5 else Moment(operation=chance.randrange(80))
        if run(arguments, world=world, moment=moment):
            return done
    assert run(arguments, world=world)
    return kills


def assert_same(expected: Path, found: Path, *, also_losses: bool = True) -> None:
    """Bit for bit: weights, layer-rate log, loss log; optimizer, schedule and random states of the checkpoints."""
    ours, theirs = load_file(expected / "model.safetensors"), load_file(found / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    log, other = LayerRateLog.open(expected), LayerRateLog.open(found)
    assert log.steps.tolist() == other.steps.tolist() == list(range(1, len(log) + 1))
    for quantity in QUANTITIES:
        np.testing.assert_array_equal(log[quantity], other[quantity], err_msg=quantity)
    assert not also_losses or losses(expected) == losses(found)
    newest = sorted(p.name for p in expected.glob("checkpoint-*"))
    assert newest == sorted(p.name for p in found.glob("checkpoint-*"))
    assert not (found / ".partial").exists()
    for name in newest:
        _assert_same_tensors(expected / name / "optimizer.safetensors", found / name / "optimizer.safetensors")
        _assert_same_tensors(expected / name / "scheduler.safetensors", found / name / "scheduler.safetensors")
        for path in (expected / name).glob("rng_state_*.safetensors"):
            _assert_same_tensors(path, found / name / path.name)


def _assert_same_tensors(expected: Path, found: Path) -> None:
    with safe_open(expected, framework="np") as one, safe_open(found, framework="np") as two:
        assert one.metadata() == two.metadata()
        assert set(one.keys()) == set(two.keys())
        for name in one.keys():  # noqa: SIM118 - a file is no dict
            np.testing.assert_array_equal(one.get_tensor(name), two.get_tensor(name), err_msg=name)


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every entry of the run's own log."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
