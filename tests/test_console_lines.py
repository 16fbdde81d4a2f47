"""Promise: each log is one readable line on the console, and the progress bars stay whole."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerState

from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.console import LinePrinterCallback, LineProgressCallback, LogLine
from tests.trainer_kit import Images, Plain, clars_args


def make_trainer(folder, **changes):
    options = {"per_device_train_batch_size": 16, "max_steps": 8, "logging_steps": 2, **changes}
    return ClarsTrainer(Plain(), clars_args(folder, **options), train_dataset=Images(), eval_dataset=Images(16))


def screen(output: str) -> list[str]:
    """What a terminal shows after `output`: carriage returns, line feeds, cursor up, erase to the end of the line."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\r|\n|[^\r\n\x1b]+", output):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[A":
            row = max(0, row - 1)
        elif token == "\x1b[K":
            lines[row] = lines[row][:column]
        elif token.startswith("\x1b"):
            raise AssertionError(f"unknown control {token!r}")
        else:
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + token + line[column + len(token) :], column + len(token)
    return [line.rstrip() for line in lines]


def on_a_terminal(work) -> list[str]:
    """Run `work` with standard output and error on a pseudo-terminal, and return the lines it ends with."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    kept = os.dup(1), os.dup(2)
    sys.stdout.flush()
    try:
        os.dup2(child, 1), os.dup2(child, 2)
        with open(1, "w", closefd=False) as out, open(2, "w", closefd=False) as err:
            before = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = out, err
            try:
                work()
            finally:
                sys.stdout, sys.stderr = before
    finally:
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        for descriptor in (*kept, child):
            os.close(descriptor)
    data = b""
    while True:
        try:
            chunk = os.read(parent, 1 << 16)
        except OSError:  # the other end is closed and everything was read
            break
        if not chunk:
            break
        data += chunk
    os.close(parent)
    return screen(data.decode())


TRAINING = re.compile(
    r"step (\d)/8  epoch [\d.]+  loss [\d.]+  lr 1  rates [\d.e-]+ < [\d.e-]+ < [\d.e-]+  R 0\.\d+"
    r"(  [\d,]+ images/s)?  ETA 0:00:\d\d"
)
EVALUATION = re.compile(r"step (\d)/8  epoch [12]  evaluation:  loss [\d.]+  in 0:00:\d\d")


def test_lines_stand_above_a_whole_progress_bar_on_a_terminal(tmp_path, capfd):
    trainer = make_trainer(tmp_path, disable_tqdm=False, eval_strategy="epoch")
    with capfd.disabled():
        shown = on_a_terminal(trainer.train)
    lines = [line for line in shown if line]
    training = [line for line in lines if TRAINING.fullmatch(line)]
    assert [TRAINING.fullmatch(line)[1] for line in training] == ["2", "4", "6", "8"]
    assert [EVALUATION.fullmatch(line)[1] for line in lines if EVALUATION.fullmatch(line)] == ["4", "8"]
    bars = [line for line in lines if "8/8 [" in line]
    assert len(bars) == 1
    assert bars[0].startswith("100%|")
    assert not any(("it/s" in line or "%|" in line) and line != bars[0] for line in lines)
    assert not any("{" in line for line in lines)


def test_without_progress_bars_the_lines_are_printed(tmp_path, capsys):
    make_trainer(tmp_path).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [bool(TRAINING.fullmatch(line)) for line in lines] == [True] * 4 + [False]
    assert re.fullmatch(r"step 8/8  epoch 2  trained for 0:00:\d\d  mean loss [\d.]+  [\d,]+ images/s", lines[-1])
    assert "images/s" in lines[1]


def test_trainers_own_callbacks_are_replaced_and_a_users_subclass_is_kept(tmp_path):
    kinds = [type(callback) for callback in make_trainer(tmp_path, disable_tqdm=False).callback_handler.callbacks]
    assert LineProgressCallback in kinds
    assert ProgressCallback not in kinds
    kinds = [type(callback) for callback in make_trainer(tmp_path).callback_handler.callbacks]
    assert LinePrinterCallback in kinds
    assert PrinterCallback not in kinds

    class Mine(ProgressCallback):
        pass

    trainer = ClarsTrainer(Plain(), clars_args(tmp_path), train_dataset=Images(), callbacks=[Mine()])
    assert Mine in [type(callback) for callback in trainer.callback_handler.callbacks]
    trainer.remove_callback(PrinterCallback)  # a user can still silence the run as before
    assert LinePrinterCallback not in [type(callback) for callback in trainer.callback_handler.callbacks]


def test_the_time_left_counts_from_where_a_run_was_resumed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_clars.trainer.console.time.perf_counter", lambda: now[0])
    lines, state = LogLine(), TrainerState(global_step=100, max_steps=1000)
    lines.begin(state)
    now[0], state.global_step = 20.0, 110  # 10 steps in 20 s, 890 to go
    assert lines.line({"loss": 1.0}, state).endswith("ETA 0:29:40")


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss": 0.123456, "learning_rate": 12.5, "epoch": 1.5}, "step 1,200/5,000  epoch 1.5  loss 0.1235  lr 12.5"),
        (
            {"loss": float("nan"), "mine": 3.25, "note": "hot"},
            "step 1,200/5,000  loss nan  mine 3.25  note hot",
        ),
        (
            {
                "eval_loss": 0.5,
                "eval_accuracy": 0.91234,
                "eval_runtime": 75.2,
                "eval_samples_per_second": 3,
                "epoch": 2,
            },
            "step 1,200/5,000  epoch 2  evaluation:  loss 0.5  accuracy 91.23%  in 0:01:15",
        ),
        ({"anything": 7}, "step 1,200/5,000  anything 7"),
        ({}, "step 1,200/5,000"),
    ],
)
def test_lines_say_what_the_log_holds(logs, line):
    assert LogLine().line(logs, TrainerState(global_step=1200, max_steps=5000)) == line


def test_a_full_line_fits_a_wide_terminal():
    logs = {
        "loss": 1.2345678,
        "learning_rate": 25.123456,
        "epoch": 12.345678,
        "images_per_second": 12345.6,
        "rate_smallest": 1.2345e-4,
        "rate_median": 0.12345,
        "rate_largest": 12.345,
        "ratio_median": 0.12345,
    }
    assert len(LogLine().line(logs, TrainerState(global_step=123_456, max_steps=999_999))) + len("  ETA 99:59:59") < 150
