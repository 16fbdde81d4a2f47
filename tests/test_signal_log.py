"""Promise: a SignalLARS run keeps each layer's share of signal and its factor, and shows them where rates are shown."""

import json

import numpy as np
import pytest
import torch

from hf_clars import ClarsTrainer
from hf_clars.hub import build_model_card
from hf_clars.plots import plot_layer_rates
from hf_clars.plots.page_data import PageRun, page_data
from hf_clars.records import QUANTITIES, SIGNAL_QUANTITIES, LayerRateLog, RecordError
from hf_clars.trainer.card import gather_facts
from hf_clars.trainer.console import LogLine
from tests.picture_kit import texts
from tests.trainer_kit import Images, Plain, clars_args

LAYERS = ["conv", "norm", "classifier"]


def rows(step):
    """[7, K] that tell step, quantity and layer apart, all in (0, 1)."""
    return (torch.arange(21, dtype=torch.float32).reshape(7, 3) + 1) / (22 + step)


def write(folder, steps, **settings):
    log = LayerRateLog.create(folder, layers=LAYERS, signal=True, flush_every=2, **settings)
    for step in steps:
        log.append(step, rows(step))
    return log


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four steps of 16 samples, in two passes each."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"method": "signal_lars", "signal_n": 10.0, "log_layer_rates": True, "max_steps": 4}
    args = clars_args(folder, per_device_train_batch_size=8, gradient_accumulation_steps=2, **settings)
    trainer = ClarsTrainer(Plain(), args, train_dataset=Images())
    trainer.train()
    return trainer, folder


def test_the_log_gives_back_both_quantities_growing_merged_and_resumed(tmp_path):
    log = write(tmp_path, range(1, 6))
    log.flush()
    expected = np.stack([rows(step).numpy() for step in range(1, 6)])
    for read in (log, LayerRateLog.open(tmp_path)):
        for index, quantity in enumerate(QUANTITIES + SIGNAL_QUANTITIES):
            np.testing.assert_array_equal(read[quantity], expected[:, index])
    log.close()
    again = LayerRateLog.resume(tmp_path, 3, layers=LAYERS)
    again.append(4, rows(9))
    again.close()
    np.testing.assert_array_equal(LayerRateLog.open(tmp_path)["damping"][3], rows(9)[6])
    assert LayerRateLog.open(tmp_path).layer("norm").keys() == set(QUANTITIES + SIGNAL_QUANTITIES)


def test_a_log_of_another_method_has_neither_and_reads_as_nan(tmp_path):
    log = LayerRateLog.create(tmp_path, layers=LAYERS)
    log.append(1, rows(1)[:5])
    assert log.quantities == QUANTITIES
    assert np.isnan(log["signal"]).all()
    assert log["signal"].shape == (1, 3)
    with pytest.raises(RecordError, match="expected"):
        log.append(2, rows(2))


def test_pieces_with_and_without_are_not_mixed(tmp_path):
    write(tmp_path / "with", range(1, 5)).flush()
    other = LayerRateLog.create(tmp_path / "without", layers=LAYERS, flush_every=2)
    for step in range(1, 5):
        other.append(step, rows(step)[:5])
    source = sorted((tmp_path / "without" / "layer_rates").glob("part-*"))[0]
    (tmp_path / "with" / "layer_rates" / source.name).write_bytes(source.read_bytes())
    with pytest.raises(RecordError, match="mixed"):
        LayerRateLog.open(tmp_path / "with")


def test_a_run_logs_what_its_steps_measured(trained):
    _, folder = trained
    log = LayerRateLog.open(folder)
    share, factor = log["signal"], log["damping"]
    assert share.shape == (4, 3)
    assert ((share >= 0) & (share <= 1)).all()
    assert (share > 0).any()
    np.testing.assert_allclose(factor, (1 + 9 * (1 - share)) / 10, rtol=1e-5)
    lars = 1e-2 * log["weight_norm"] / log["grad_norm"]  # at the rate 1
    np.testing.assert_allclose(log["rate"], lars * factor, rtol=1e-4)
    assert log.settings["method"] == "signal_lars"
    assert log.settings["signal_n"] == 10.0


def test_the_picture_shows_share_and_factor_from_zero_to_one(trained):
    _, folder = trained
    log = LayerRateLog.open(folder)
    figure = plot_layer_rates(log)
    shown = texts(figure)
    assert "Share of signal" in shown
    assert "Factor $f_k$" in shown
    heat, lines = (axes for axes in figure.axes if axes.get_title(loc="left").startswith(("Share", "Factor")))
    (mesh,) = (c for c in heat.collections if c.get_array() is not None)
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(3, 4), log["signal"].T, atol=1e-6)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.0, 1.0)
    assert lines.get_yscale() == "linear"
    drawn = {line.get_label(): line.get_ydata() for line in lines.lines}
    np.testing.assert_allclose(drawn["largest"], log["damping"].max(1), rtol=1e-6)


def test_a_share_of_zero_is_drawn_as_zero_and_not_as_missing(tmp_path):
    log = write(tmp_path, [1])
    values = rows(2)
    values[5], values[6] = 0.0, 1.0
    log.append(2, values)
    log.flush()
    figure = plot_layer_rates(log)
    assert "white" not in texts(figure)
    assert "grey" not in texts(figure)


def test_the_page_offers_both_for_this_run_and_for_no_other(trained, tmp_path):
    _, folder = trained
    names = {q["name"] for q in page_data([PageRun("run", LayerRateLog.open(folder))])["quantities"]}
    assert names == set(QUANTITIES + SIGNAL_QUANTITIES)
    plain = LayerRateLog.create(tmp_path, layers=LAYERS)
    plain.append(1, rows(1)[:5])
    assert {q["name"] for q in page_data([PageRun("plain", plain)])["quantities"]} == set(QUANTITIES)


def test_the_console_has_the_median_share(trained):
    trainer, folder = trained
    last = [entry for entry in trainer.state.log_history if "signal_median" in entry][-1]
    assert last["signal_median"] == pytest.approx(float(np.median(LayerRateLog.open(folder)["signal"][-1])), abs=1e-6)
    line = LogLine().line(last, trainer.state)
    assert f"s {last['signal_median']:.2g}" in line
    assert "signal_median" not in line


def test_the_card_names_method_and_n(trained):
    trainer, _ = trained
    card = str(build_model_card(gather_facts(trainer, model_name="m", dataset="images"), pictures=["layer_rates.png"]))
    assert "SignalLARS: each layer k steps with the rate" in card
    assert "a step of pure signal is n times shorter" in card
    assert "share of signal" in card
    assert json.dumps(trainer.run_settings())
