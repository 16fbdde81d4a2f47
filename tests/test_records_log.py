"""The layer-rate log gives back what was appended, and says what is wrong with anything else."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from hf_clars.errors import HfClarsError
from hf_clars.records import QUANTITIES, LayerRateLog, RecordError

LAYERS = ["conv1", "stages.0.conv2", "fc"]


def values_of(step: int, layers: int = 3) -> torch.Tensor:
    """Return values that tell step, quantity and layer apart."""
    return step + torch.arange(5 * layers, dtype=torch.float32).reshape(5, layers) / 100


def write(folder: Path, steps: range, flush_every: int = 4, **options: object) -> LayerRateLog:
    log = LayerRateLog.create(folder, layers=LAYERS, flush_every=flush_every, **options)
    for step in steps:
        log.append(step, values_of(step))
    return log


def check(log: LayerRateLog, steps: list[int]) -> None:
    assert log.steps.tolist() == steps
    expected = np.stack([values_of(step).numpy() for step in steps]) if steps else np.empty((0, 5, 3), np.float32)
    for index, quantity in enumerate(QUANTITIES):
        np.testing.assert_array_equal(log[quantity], expected[:, index])


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), names=st.lists(st.text(), min_size=1, max_size=4, unique=True), flush_every=st.integers(1, 7))
def test_any_values_steps_and_names_come_back_exactly_before_and_after_the_merge(data, names, flush_every):
    gaps = data.draw(st.lists(st.integers(1, 10**9), max_size=40))
    rows = [torch.tensor(data.draw(st.lists(numbers, min_size=5 * len(names), max_size=5 * len(names)))) for _ in gaps]
    steps = np.cumsum(gaps)
    with tempfile.TemporaryDirectory() as folder:
        log = LayerRateLog.create(folder, layers=names, settings={"a": [1, "x"]}, flush_every=flush_every)
        for step, row in zip(steps, rows, strict=True):
            log.append(int(step), row.reshape(5, len(names)))
        log.flush()
        running = LayerRateLog.open(folder)
        log.close()
        merged = LayerRateLog.open(folder)
        expected = torch.stack(rows).reshape(-1, 5, len(names)).numpy() if rows else np.empty((0, 5, len(names)))
        for found in (running, merged, log):
            assert (found.layers, found.settings, len(found)) == (names, {"a": [1, "x"]}, len(gaps))
            np.testing.assert_array_equal(found.steps, steps)
            for index, quantity in enumerate(QUANTITIES):
                np.testing.assert_array_equal(found[quantity], expected[:, index])


def test_the_merged_file_is_plain_safetensors_with_names_and_settings_as_metadata(tmp_path):
    write(tmp_path, range(1, 11), settings={"method": "clars", "eta": 0.01}).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer_rates.safetensors"]
    arrays = load_file(tmp_path / "layer_rates.safetensors")
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "steps": ("int64", (10,)),
        **dict.fromkeys(QUANTITIES, ("float32", (10, 3))),
    }
    with safe_open(tmp_path / "layer_rates.safetensors", framework="np") as file:
        metadata = file.metadata()
    assert metadata["version"] == "1"
    assert json.loads(metadata["layers"]) == LAYERS
    assert json.loads(metadata["settings"]) == {"method": "clars", "eta": 0.01}


def test_a_layer_gives_its_quantities_by_name(tmp_path):
    write(tmp_path, range(1, 6)).close()
    column = LayerRateLog.open(tmp_path).layer("stages.0.conv2")
    assert list(column) == list(QUANTITIES)
    for index, quantity in enumerate(QUANTITIES):
        np.testing.assert_array_equal(column[quantity], [values_of(step)[index, 1] for step in range(1, 6)])


def test_append_runs_no_operation_that_could_wait_for_a_device(tmp_path):
    class Recorder(TorchDispatchMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    log = write(tmp_path, range(0), flush_every=100)
    values = values_of(1)
    with Recorder() as recorder:
        log.append(1, values)
    assert set(recorder.seen) <= {"aten.detach.default"}
    assert not list((tmp_path / "layer_rates").glob("part-*"))


def test_float64_and_values_that_require_grad_are_stored_as_float32(tmp_path):
    log = write(tmp_path, range(0))
    log.append(3, values_of(3).double().requires_grad_())
    log.close()
    check(LayerRateLog.open(tmp_path), [3])


def test_a_running_log_is_read_as_it_was_when_opened_even_if_pieces_are_joined_and_merged_meanwhile(tmp_path):
    log = write(tmp_path, range(1, 41), flush_every=5)
    reader = LayerRateLog.open(tmp_path)
    for step in range(41, 400):
        log.append(step, values_of(step))
    check(reader, list(range(1, 41)))
    log.close()
    check(reader, list(range(1, 41)))
    check(LayerRateLog.open(tmp_path), list(range(1, 400)))


def test_an_empty_log_opens_and_merges(tmp_path):
    log = write(tmp_path, range(0), settings={"method": "nag"})
    check(LayerRateLog.open(tmp_path), [])
    log.close()
    check(LayerRateLog.open(tmp_path), [])
    assert LayerRateLog.open(tmp_path).last_step is None


def test_a_log_opens_by_its_run_folder_its_pieces_folder_or_its_file(tmp_path):
    log = write(tmp_path, range(1, 9))
    check(LayerRateLog.open(tmp_path / "layer_rates"), list(range(1, 9)))
    log.merge(tmp_path / "copy.safetensors")
    check(LayerRateLog.open(str(tmp_path / "copy.safetensors")), list(range(1, 9)))
    log.append(9, values_of(9))
    log.close()
    check(LayerRateLog.open(tmp_path / "layer_rates.safetensors"), list(range(1, 10)))


def test_reading_a_log_that_is_being_written_includes_the_last_step(tmp_path):
    log = write(tmp_path, range(1, 7), flush_every=50)
    assert len(log) == 6
    check(log, list(range(1, 7)))


def test_the_number_of_pieces_grows_with_the_steps_over_256_not_with_the_flushes(tmp_path):
    log = write(tmp_path, range(1, 600), flush_every=1)
    pieces = list((tmp_path / "layer_rates").glob("part-*"))
    assert len(pieces) <= 600 / 256 + 45
    assert max(len(load_file(path)["steps"]) for path in pieces) <= 16 * 256
    check(log, list(range(1, 600)))


def broken(log: LayerRateLog, action: str) -> None:
    actions = {
        "a step twice": lambda: log.append(5, values_of(5)),
        "a negative step": lambda: LayerRateLog.append(log, -1, values_of(0)),
        "a wrong shape": lambda: log.append(6, torch.zeros(5, 2)),
        "an unknown layer": lambda: log.layer("conv2"),
        "an unknown quantity": lambda: log["rates"],
    }
    actions[action]()


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("a step twice", "Step 5 cannot follow step 5"),
        ("a negative step", "Step -1"),
        ("a wrong shape", r"\(5, 2\); expected \(5, 3\)"),
        ("an unknown layer", "Did you mean 'conv1'"),
        ("an unknown quantity", "Did you mean 'rate'"),
    ],
)
def test_misuse_raises_and_leaves_the_log_as_it_was(tmp_path, action, says):
    log = write(tmp_path, range(1, 6))
    with pytest.raises(RecordError, match=says):
        broken(log, action)
    check(log, [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": ["a", "b", "a"]}, "more than once: a"),
        ({"layers": []}, "at least one layer"),
        ({"layers": ["a"], "settings": {"x": object()}}, "cannot be stored as JSON"),
        ({"layers": ["a"], "settings": {"x": float("nan")}}, "cannot be stored as JSON"),
        ({"layers": ["a"], "flush_every": 0}, "flush_every"),
    ],
)
def test_unfit_arguments_are_refused_before_anything_is_written(tmp_path, options, says):
    with pytest.raises(RecordError, match=says):
        LayerRateLog.create(tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


def test_a_log_is_never_overwritten_by_a_new_one(tmp_path):
    log = write(tmp_path, range(1, 4))
    for _ in range(2):
        with pytest.raises(RecordError, match="is a layer-rate log already"):
            LayerRateLog.create(tmp_path, layers=LAYERS)
        log.close()
    check(LayerRateLog.open(tmp_path), [1, 2, 3])


def test_a_closed_or_opened_log_refuses_new_steps(tmp_path):
    log = write(tmp_path, range(1, 4))
    log.close()
    log.close()
    for reader in (log, LayerRateLog.open(tmp_path)):
        with pytest.raises(RecordError, match="reading only"):
            reader.append(9, values_of(9))


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(RecordError, match="no layer-rate log at"):
        LayerRateLog.open(tmp_path / "nowhere")
    assert issubclass(RecordError, HfClarsError)
