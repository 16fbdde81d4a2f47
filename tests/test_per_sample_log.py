"""Promise: the log of per-sample norms can be read at any moment, is refused when damaged, and is drawn."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_clars.per_sample import PerSampleLog, StepMeasures
from hf_clars.per_sample import log as log_module
from hf_clars.plots import PlotError, open_runs, plot_noise_scale
from hf_clars.plots.command import main as plot
from hf_clars.records import RecordError


def step(number, samples=16, layers=3, noisy=True):
    generator = torch.Generator().manual_seed(number)
    mean = torch.ones(layers, dtype=torch.float64)
    g = mean[:, None, None] / 5 + torch.randn(layers, samples, 20, generator=generator, dtype=torch.float64) * noisy
    norms = g.square().sum(2)
    places = [torch.tensor([number, -1])] * 4
    top = torch.tensor([2.0, float("nan")])
    batch = g.mean(1).square().sum(1)
    nothing = torch.tensor(float("nan"))
    return StepMeasures(
        number, samples, 1, batch, norms.mean(1), norms.sqrt().mean(1), torch.ones(5), nothing, top, top, *places
    )


def written(folder, steps=12, **settings):
    log = PerSampleLog.create(folder, layers=["a", "b", "c"], settings=settings)
    for number in range(1, steps + 1):
        log.append(step(number))
    log.flush()
    return log


def test_what_is_written_is_read_in_pieces_or_not(tmp_path, monkeypatch):
    written(tmp_path / "one")
    monkeypatch.setattr(log_module, "ROWS", 5)
    written(tmp_path / "many")
    assert len(list((tmp_path / "many").rglob("part-*"))) == 3
    one, many = PerSampleLog.open(tmp_path / "one").read(), PerSampleLog.open(tmp_path / "many").read()
    assert one["steps"].tolist() == list(range(1, 13))
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(next(PerSampleLog.open(tmp_path / "one").rows()).batch_square, step(1).batch_square)


def test_a_log_that_is_continued_drops_what_came_later(tmp_path):
    written(tmp_path)
    log = PerSampleLog.resume(tmp_path, 7, layers=["a", "b", "c"])
    log.append(step(8))
    log.flush()
    assert PerSampleLog.open(tmp_path).read()["steps"].tolist() == list(range(1, 9))
    with pytest.raises(RecordError, match="other layers"):
        PerSampleLog.resume(tmp_path, 7, layers=["a", "b"])


def damaged(folder, how):
    path = next(folder.rglob("part-*"))
    if how == "cut":
        path.write_bytes(path.read_bytes()[:100])
        return
    arrays = load_file(path)
    metadata = {"format": log_module.FORMAT, "version": "1", "layers": '["a", "b", "c"]', "settings": "{}"}
    if how == "other":
        metadata["format"] = "something"
    if how == "shape":
        arrays["batch_square"] = arrays["batch_square"][:, :2].contiguous()
    if how == "order":
        arrays["steps"] = arrays["steps"].flip(0).contiguous()
    if how == "missing":
        del arrays["loss"]
    save_file(arrays, path, metadata=metadata)


@pytest.mark.parametrize("how", ["cut", "other", "shape", "order", "missing"])
def test_a_damaged_log_is_an_error_that_names_the_file(tmp_path, how):
    written(tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(RecordError, match="per_sample_norms"):
        PerSampleLog.open(tmp_path).read()


def test_the_noise_scale_of_a_log_is_that_of_the_run(tmp_path):
    from hf_clars.per_sample import NoiseScaleAverage

    written(tmp_path, decay=0.7)
    average = NoiseScaleAverage(3, decay=0.7)
    for number in range(1, 13):
        s = step(number)
        average.update(s.batch_square, s.sample_square, s.samples)
    steps, read = PerSampleLog.open(tmp_path).noise_scale()
    assert len(steps) == 12
    torch.testing.assert_close(read.value[-1], average.read().value, rtol=0, atol=0)


def test_a_layer_that_is_misspelt_is_named(tmp_path):
    log = written(tmp_path)
    assert log.layer("b") == 1
    with pytest.raises(RecordError, match="no layer 'd'"):
        log.layer("d")


def test_a_run_with_nothing_but_per_sample_norms_is_drawn_by_the_command(tmp_path, capsys):
    written(tmp_path)
    (run,) = open_runs([tmp_path])
    assert run.log is None
    plot([str(tmp_path)])
    assert (tmp_path / "noise_scale.png").stat().st_size > 20_000
    assert "noise_scale.png" in capsys.readouterr().out


def test_the_picture_shows_scale_band_batch_size_and_share(tmp_path):
    figure = plot_noise_scale(written(tmp_path, steps=40))
    assert "Share of signal, whole model" in [axes.get_title(loc="left") for axes in figure.axes]
    lines = next(a for a in figure.axes if a.get_ylabel() == "whole model, samples")
    _, read = PerSampleLog.open(tmp_path).noise_scale()
    drawn = torch.tensor(lines.lines[0].get_ydata())
    torch.testing.assert_close(drawn, read.value[:, -1], equal_nan=True)
    assert set(lines.lines[1].get_ydata()) == {16.0}
    assert len(lines.collections) == 1


def test_a_log_without_a_noise_scale_says_so(tmp_path):
    log = PerSampleLog.create(tmp_path, layers=["a", "b", "c"])
    s = step(1)
    log.append(StepMeasures(**{**vars(s), "batch_square": torch.full((3,), float("nan"))}))
    log.flush()
    with pytest.raises(PlotError, match="no batch gradient was read"):
        plot_noise_scale(tmp_path)
