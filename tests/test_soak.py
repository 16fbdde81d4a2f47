"""Promise: long runs and many saves leak neither memory, time, hooks nor files.

`python -m tests.test_soak 10000` trains so many steps and prints the slope of memory and how step time changed.
"""

import gc
import sys
import tempfile
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerCallback

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.optim import CLARS
from hf_clars.trainer import ClarsTrainer
from tests.trainer_kit import Images, Plain, clars_args


def resident() -> int:
    """Bytes of memory that this process holds now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


class Watch(TrainerCallback):
    """Notes processor time of each step, which other programs change little, and memory after every n-th."""

    def __init__(self, every):
        self.every, self.memory, self.times = every, [], []
        self._begin = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.process_time() - self._begin)
        if state.global_step % self.every == 0:
            gc.collect()
            self.memory.append(resident())


def soak(folder: Path, steps: int, *, readings: int = 100) -> dict[str, float]:
    """Train so many steps of a tiny model, with the log and checkpoints, and read the memory so many times.

    Returns:
        Slope of memory in bytes a step over the last four fifths; median processor time of a step of the last fifth as
        a multiple of that of the second; checkpoints left.
    """
    args = clars_args(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        log_layer_rates=True,
        logging_steps=steps // 10,
        save_strategy="steps",
        save_steps=steps // 20,
        save_total_limit=2,
    )
    watch = Watch(max(1, steps // readings))
    ClarsTrainer(Plain(), args, train_dataset=Images(), callbacks=[watch]).train()
    memory, fifth = watch.memory[len(watch.memory) // 5 :], steps // 5
    return {
        "bytes a step": float(np.polyfit(np.arange(len(memory)) * watch.every, memory, 1)[0]),
        "growth, bytes": memory[-1] - memory[0],
        "step, ms": 1000 * float(np.median(watch.times[-fifth:])),
        "last to second fifth": float(np.median(watch.times[-fifth:]) / np.median(watch.times[fifth : 2 * fifth])),
        "checkpoints": len(list(folder.glob("checkpoint-*"))),
    }


def test_a_short_soak_keeps_its_memory(tmp_path):
    found = soak(tmp_path, 400, readings=20)  # each one collects garbage, which takes longer than its steps
    assert found["growth, bytes"] < 8 * 2**20
    assert found["checkpoints"] == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_soak_is_flat_in_memory_and_time(tmp_path):
    found = soak(tmp_path, 10_000)
    print(found)
    # An entry of Trainer's own log is some 500 bytes; a kept tensor of this model would be 2,000 bytes a step.
    assert found["bytes a step"] < 500
    assert found["last to second fifth"] < 1.5


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = sum(len(getattr(m, name)) for m in model.modules() for name in names)
    return on_modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("attach", [lambda m: PerSampleGradNorms(m), lambda m: CLARS(m, 0.1)])
def test_a_hundred_times_attached_and_removed_leaves_no_hook(attach):
    model, data = Plain(), Images(8)
    batch = {"pixel_values": data.x, "labels": data.y}
    before, made = hooks_of(model), []
    for _ in range(100):
        attached = attach(model)
        made.append(weakref.ref(attached))
        assert hooks_of(model) > before
        model(**batch)["loss"].backward()
        attached.remove_hooks() if isinstance(attached, CLARS) else attached.remove()
        model.zero_grad()
    assert hooks_of(model) == before
    del attached
    gc.collect()
    assert not [one for one in made if one() is not None]


def test_thirty_checkpoints_leave_no_file_behind(tmp_path):
    args = clars_args(
        tmp_path, max_steps=30, per_device_train_batch_size=8, save_strategy="steps", save_steps=1, save_total_limit=3
    )
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    ClarsTrainer(Plain(), args, train_dataset=Images()).train()
    gc.collect()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-28", "checkpoint-29", "checkpoint-30"]
    assert {len(list(p.iterdir())) for p in tmp_path.iterdir()} == {7}
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, value in soak(Path(folder), int(sys.argv[1])).items():
            print(f"{name:22} {value:,.3f}")
