"""Promise: a run that is killed at any moment, and resumed, ends bit for bit like one that was not."""

import random

import pytest

from tests.killed_runs import COMMON, assert_same, run, run_with_kills, save_images
from tests.processes import GROUP

pytestmark = GROUP
CASES = {
    "map-style, workers": (1, ["--global_batch_size=8", "--dataloader_num_workers=2"]),
    "streaming, workers": (
        1,
        ["--global_batch_size=8", "--dataloader_num_workers=2", "--streaming=true", "--shuffle_buffer=7"],
    ),
    "two processes": (2, ["--global_batch_size=16", "--dataloader_num_workers=1", "--save_steps=2"]),
    "two processes, streaming": (2, ["--global_batch_size=16", "--streaming=true", "--shuffle_buffer=7"]),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of the data, and of a run of each case that nothing disturbed, made when asked for."""
    folder = tmp_path_factory.mktemp("runs")
    data = save_images(folder / "images")
    made = {}

    def get(case):
        world = CASES[case][0]
        if case not in made:
            made[case] = folder / case.replace(" ", "_")
            assert run(arguments_of(case, data, made[case]), world=world)
        return data, made[case]

    return get


def arguments_of(case, data, output):
    return [*COMMON, *CASES[case][1], f"--dataset={data}", f"--output_dir={output}"]


def check(case, kills, seed, uninterrupted, tmp_path):
    data, expected = uninterrupted(case)
    happened = run_with_kills(
        arguments_of(case, data, tmp_path / "run"), kills, random.Random(seed), world=CASES[case][0]
    )
    assert_same(expected, tmp_path / "run")
    return happened


@pytest.mark.parametrize(
    ("case", "kills"), [("map-style, workers", 3), ("streaming, workers", 1), ("two processes", 1)]
)
def test_a_few_kills_leave_no_trace(case, kills, uninterrupted, tmp_path):
    assert check(case, kills, 1, uninterrupted, tmp_path) >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_thirty_kills_leave_no_trace(case, seed, uninterrupted, tmp_path):
    print(case, seed, "kills:", check(case, 10, 100 + seed, uninterrupted, tmp_path))
