"""Promise: a signal or a time limit ends a run after a checkpoint, with exit code 75, and it goes on from there."""

import os
import signal
import time

import pytest

from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.stopping import RESUME_ME, RunInterruptedError, StopCallback
from tests.killed_runs import COMMON, assert_same, run, save_images, start
from tests.processes import GROUP
from tests.trainer_kit import Images, Plain, clars_args

pytestmark = GROUP
SETTINGS = {
    "per_device_train_batch_size": 8,
    "max_steps": 12,
    "num_train_epochs": 2,
    "log_layer_rates": True,
}


class SignalAt(StopCallback):
    """Stops, and sends this process a signal at the start of a step."""

    def __init__(self, step, name, times=1):
        super().__init__()
        self.step, self.name, self.times = step, name, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(getattr(signal, self.name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_after_a_checkpoint_of_that_step(tmp_path, name):
    before = signal.getsignal(getattr(signal, name))
    trainer = ClarsTrainer(
        Plain(), clars_args(tmp_path, **SETTINGS), train_dataset=Images(), callbacks=[SignalAt(5, name)]
    )
    with pytest.raises(RunInterruptedError, match=rf"after step 5 of 12 because of {name}.*checkpoint-5 is complete"):
        trainer.train()
    assert signal.getsignal(getattr(signal, name)) is before
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


def test_a_second_signal_acts_as_usual(tmp_path):
    stop = SignalAt(5, "SIGINT", times=2)
    # What is usual: a shell starts its background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ClarsTrainer(Plain(), clars_args(tmp_path, **SETTINGS), train_dataset=Images(), callbacks=[stop]).train()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_last_step_is_not_interrupted(tmp_path):
    stop = SignalAt(12, "SIGTERM")
    ClarsTrainer(Plain(), clars_args(tmp_path, **SETTINGS), train_dataset=Images(), callbacks=[stop]).train()


@pytest.mark.parametrize("jump", [-(10**6), 10**6])
def test_the_time_limit_is_kept_whatever_the_time_of_day_does(tmp_path, monkeypatch, jump):
    real, clock = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: real() + jump)  # the clock was set
    stop = StopCallback(max_hours=1.0)
    trainer = ClarsTrainer(Plain(), clars_args(tmp_path, **SETTINGS), train_dataset=Images(), callbacks=[stop])

    class Later(StopCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                monkeypatch.setattr(time, "monotonic", lambda: clock() + 3601)

    trainer.add_callback(Later())
    with pytest.raises(RunInterruptedError, match="after step 4 of 12 because of the time limit"):
        trainer.train()


@pytest.mark.distributed
def test_two_processes_stop_after_the_same_step_whichever_is_signalled_and_go_on_exactly(tmp_path):
    data = save_images(tmp_path / "images")
    arguments = [*COMMON, f"--dataset={data}", "--global_batch_size=16", "--dataloader_num_workers=1"]
    assert run([*arguments, f"--output_dir={tmp_path / 'whole'}"], world=2)
    stopped = [*arguments, f"--output_dir={tmp_path / 'stopped'}"]
    processes = start(stopped, world=2)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "stopped").glob("checkpoint-*")):  # so training is under way
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [RESUME_ME, RESUME_ME]
    assert run(stopped, world=2)
    assert_same(tmp_path / "whole", tmp_path / "stopped", also_losses=False)
