"""Promise: the layer-rate log takes bounded memory and work a step, and next to no time beside the step itself.

`python -m tests.test_log_size 100000` appends so many steps of 161 layers (as ResNet-50 has) and prints the figures.
"""

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_clars.records import LayerRateLog

LAYERS = [f"layer.{k}" for k in range(161)]


def fill(folder: Path, steps: int) -> dict[str, float]:
    """Append so many steps, then merge.

    Returns:
        Microseconds a step (mean, and of the slowest flush), bytes written for each byte of values, the largest number
        of files at a time, the peak of Python's and NumPy's memory in MB, and seconds and MB of the merge.
    """
    values = torch.rand(5, len(LAYERS))
    log = LayerRateLog.create(folder, layers=LAYERS)
    written, slowest, files, begin_bytes = 0.0, 0.0, 0, _bytes_written()
    tracemalloc.start()
    spent = 0.0
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        log.append(step, values)
        took = time.perf_counter() - begin
        spent, slowest = spent + took, max(slowest, took)
        if step % 1000 == 0:
            files = max(files, len(list((folder / "layer_rates").iterdir())))
    peak = tracemalloc.get_traced_memory()[1]
    written = _bytes_written() - begin_bytes
    tracemalloc.reset_peak()
    begin = time.perf_counter()
    log.close()
    merged = time.perf_counter() - begin
    merge_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "microseconds a step": 1e6 * spent / steps,
        "slowest append, ms": 1e3 * slowest,
        "bytes written a byte": written / (steps * values.numel() * 4),
        "files at most": files,
        "peak memory, MB": peak / 2**20,
        "merge, s": merged,
        "merge peak memory, MB": merge_peak / 2**20,
        "file, MB": (folder / "layer_rates.safetensors").stat().st_size / 2**20,
    }


def _bytes_written() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def check(found: dict[str, float]) -> None:
    assert found["bytes written a byte"] < 3.5
    assert found["peak memory, MB"] < 16
    assert found["merge peak memory, MB"] < 32


def test_three_thousand_steps_take_bounded_memory_and_work(tmp_path):
    found = fill(tmp_path, 3000)
    check(found)
    log = LayerRateLog.open(tmp_path)
    assert np.array_equal(log.steps, np.arange(1, 3001))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_steps_take_no_more(tmp_path):
    found = fill(tmp_path, 100_000)
    print(found)
    check(found)
    assert found["files at most"] < 500


@pytest.mark.slow
def test_the_log_takes_less_than_a_hundredth_of_a_step(tmp_path):
    """Of ResNet-50 over 4 images of 64 pixels, forward and backward: far smaller than any step it is trained with."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        model(pixel_values=x, labels=y).loss.backward()
        times.append(time.perf_counter() - begin)
    logged = fill(tmp_path, 2000)["microseconds a step"] / 1e6
    print(f"log {1e3 * logged:.3f} ms, step {1e3 * np.median(times):.1f} ms, share {logged / np.median(times):.2%}")
    assert logged < 0.01 * np.median(times)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        for name, value in fill(Path(where), int(sys.argv[1])).items():
            print(f"{name:22} {value:,.2f}")
