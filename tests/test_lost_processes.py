"""Promise: when a worker or a rank dies or hangs, the others end in bounded time, with one paragraph that says so."""

import os
import signal
import time
from pathlib import Path

import pytest

from hf_clars.trainer import outside_failures
from hf_clars.trainer.outside_failures import ProcessLostError, outside_failures_explained
from tests.image_files import picture
from tests.killed_runs import COMMON, run, save_images, start
from tests.processes import GROUP

pytestmark = GROUP
LONG = [*COMMON, "--max_steps=100000", "--save_steps=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data") / "images")


def begun(folder, seconds=120):
    deadline = time.monotonic() + seconds
    while not list(folder.glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_is_killed(tmp_path, data):
    output = tmp_path / "run"
    arguments = [*LONG, f"--dataset={data}", f"--output_dir={output}", "--dataloader_num_workers=2"]
    (process,) = start([*arguments, "--global_batch_size=8", "--dataloader_persistent_workers=true"])
    begun(output)
    victims = children(process.pid)
    os.kill(victims[0], signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 2
    message = Path(f"{output}.error.0").read_text()
    assert message.startswith("A data-loading worker died (")
    assert message.endswith("go on with --resume_from_checkpoint true.")


def test_what_a_worker_raises_is_one_sentence(tmp_path):
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for i in range(6):
            picture(i).save(folder / f"{i:02d}.png")
    (folder / "01.png").write_bytes(b"")
    output = tmp_path / "run"
    arguments = [*COMMON, f"--dataset={tmp_path / 'images'}", f"--output_dir={output}", "--global_batch_size=8"]
    assert not run([*arguments, "--dataloader_num_workers=2"])
    message = Path(f"{output}.error.0").read_text()
    assert message.startswith("Image 7 of the training split (")
    assert "01.png) cannot be decoded: it is an empty file" in message
    assert "\n" not in message
    assert run([*arguments, "--dataloader_num_workers=2", "--bad_images=skip"])


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "timeout"), [("SIGKILL", 1800), ("SIGSTOP", 5)])
def test_a_rank_that_dies_or_hangs(tmp_path, data, name, timeout):
    output = tmp_path / "run"
    arguments = [*LONG, f"--dataset={data}", f"--output_dir={output}", f"--ddp_timeout={timeout}"]
    first, second = start([*arguments, "--global_batch_size=16"], world=2)
    begun(output)
    os.kill(second.pid, getattr(signal, name))
    first.join(250)  # it ends by itself, long before the longer limit
    second.kill()
    assert first.exitcode == 2
    message = Path(f"{output}.error.0").read_text()
    assert message.startswith(
        f"Another process of this run has ended, or did not answer for {timeout} s (--ddp_timeout)"
    )


@pytest.mark.parametrize(
    "words",
    [
        "Application timeout caused pair closure",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4242",
        "Connection closed by peer [127.0.0.1]:4242",
        "Read error [127.0.0.1]:4242: Connection reset by peer",
        "Write error: Broken pipe",
        "Wait timeout",
    ],
)
def test_each_way_in_which_gloo_says_that_a_rank_is_gone(monkeypatch, words):
    monkeypatch.setattr(outside_failures, "world_size", lambda: 2)
    with pytest.raises(ProcessLostError, match="did not answer for 5 s"), outside_failures_explained(5):
        raise RuntimeError(words)


def test_an_error_of_this_process_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(outside_failures, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), outside_failures_explained(5):
        raise RuntimeError("shapes differ")
