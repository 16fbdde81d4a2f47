"""Promise: the adviser's M_k are the data's own where the log allows it, and biased as stated where it does not."""

import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_clars import CLARS, LayerRateLog
from hf_clars.errors import ConfigError, DataError
from hf_clars.hub import build_model_card
from hf_clars.theory import advice_table, advise, measure_gradient_moments, variance_factor
from tests.test_hub_card import SUMMARY

SCRIPT = Path(__file__).parent.parent / "scripts" / "advise_batch_size.py"
SAMPLES, BATCH = 512, 64


@settings(deadline=None, max_examples=200)
@given(
    st.floats(0.0, 50.0),
    st.floats(1e-2, 1e4),
    st.integers(2, 10**5),
    st.integers(0, 10**6),
)
def test_the_formula_inverts_the_expectation_it_was_derived_from(spread, factor, batch, more):
    data_size = batch + more if more else None
    correction = 1.0 if data_size is None else (data_size - batch) / (data_size - 1)
    mean_square = 1 + spread  # of norms with mean 1
    full_square = mean_square / (1 + factor)
    ratio_square = full_square + (mean_square - full_square) / batch * correction
    found = variance_factor(ratio_square, batch, norm_spread=spread, data_size=data_size)
    assert found == pytest.approx(factor, rel=1e-3, abs=1e-6)
    if ratio_square <= 1:  # else no batch can show it
        ignorant = variance_factor(ratio_square, batch, data_size=data_size)
        assert (ignorant + 1) * (1 + spread) <= (found + 1) * (1 + 1e-6)  # the stated bias


def test_agreement_is_no_variance_and_chance_is_beyond_resolution():
    np.testing.assert_allclose(variance_factor([1.0, 1 / 64, 0.01], 64), [0, np.inf, np.inf])
    assert variance_factor(1e-3, 10**6) == pytest.approx(1e3, rel=2e-3)  # B far above M_k: 1 / R_k^2
    for batch, data_size in ((1, None), (65, 64)):
        with pytest.raises(ConfigError, match="at least 2 samples"):
            variance_factor(0.5, batch, data_size=data_size)


def dataset():
    """Samples of one rule with noise, of very different sizes: so are the norms of their gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 6, generator=generator) * torch.randn(SAMPLES, 1, generator=generator).exp()
    noise = torch.randn(SAMPLES, generator=generator)
    return x, (x[:, 0] + 1.5 * noise > 0).long()


def mean_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module", params=["mean", "rms"])
def measured(request, tmp_path_factory):
    """(exact moments, log of 400 batches drawn at the same weights, its norm)."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), dataset()
    moments = measure_gradient_moments(model, [(x, y)], loss=mean_loss)
    optimizer = CLARS(model, lr=1e-30, norm=request.param)  # a rate that moves nothing
    folder = tmp_path_factory.mktemp(request.param)
    log = LayerRateLog.create(
        folder,
        layers=optimizer.layer_names,
        settings={"method": "clars", "global_batch": BATCH, "norm": request.param},
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(400):
        rows = torch.randint(0, SAMPLES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        mean_loss(model, (x[rows], y[rows])).backward()
        optimizer.step()
        log.append(step, optimizer.last_step.stacked())
    log.close()
    optimizer.remove_hooks()
    return moments, folder, request.param


def test_m_k_from_the_log_is_that_of_the_data_up_to_the_stated_bias(measured):
    moments, folder, norm = measured
    assert (moments.norm_spread > 0.1).all()  # so that mean and root mean square differ
    assert (moments.variance_factor > 2).all()
    advice = advise(folder, window=0.5)
    assert [layer.name for layer in advice.layers] == list(moments.layers)
    assert advice.lower_bounds == (norm == "mean")
    log = LayerRateLog.open(folder)
    for k, layer in enumerate(advice.layers):
        exact = moments.variance_factor[k]
        # Over all 400 steps, with the spread that the log does not know: right in either case.
        square = (log["ratio"][:, k].astype(float) ** 2).mean()
        spread = moments.norm_spread[k] if norm == "mean" else 0.0
        assert variance_factor(square, BATCH, norm_spread=spread) == pytest.approx(exact, rel=0.15)
        for window in (layer.early, layer.late):
            assert window.low < window.value
            if norm == "rms":
                assert window.value == pytest.approx(exact, rel=0.2)
            else:
                assert window.value + 1 < (exact + 1) / (1 + spread) * 1.1
                assert window.value > 0.3 * exact
    whole = moments.variance.sum() / moments.full_square.sum()
    if norm == "rms":
        assert advice.whole.early.value == pytest.approx(whole, rel=0.2)


def log_of(folder, ratios, *, rates=None, **changed):
    """A log with these R_k, [T, K]; n_k = 1."""
    ratios = np.asarray(ratios, float)
    names = [f"layer{k}" for k in range(ratios.shape[1])]
    run = {"method": "clars", "global_batch": 1024, "norm": "mean", **changed}
    log = LayerRateLog.create(folder, layers=names, settings={k: v for k, v in run.items() if v is not None})
    ones = np.ones_like(ratios)
    rates = ones if rates is None else np.asarray(rates, float)
    for step, rows in enumerate(zip(rates, ones, ratios, ones, ratios, strict=True), 1):
        log.append(step, torch.tensor(np.stack(rows)))
    log.close()
    return folder


def ratio_for(factor, batch=1024):
    return np.sqrt((1 - 1 / batch) / (np.asarray(factor, float) + 1) + 1 / batch)


def test_the_layer_with_the_smallest_factor_limits_and_the_batch_is_a_power_of_two_below_it(tmp_path):
    early, late = [900.0, 70.0, 300.0], [50.0, 5000.0, 20.0]
    ratios = [ratio_for(early)] * 10 + [ratio_for(400.0) * np.ones(3)] * 80 + [ratio_for(late)] * 10
    advice = advise(log_of(tmp_path / "mean", ratios))
    assert (advice.batch, advice.steps, advice.window) == (1024, 100, 10)
    np.testing.assert_allclose([layer.early.value for layer in advice.layers], early, rtol=1e-3)
    np.testing.assert_allclose([layer.late.value for layer in advice.layers], late, rtol=1e-3)
    assert (advice.limiting.name, advice.last.name, advice.largest_batch) == ("layer1", "layer0", 64)
    exact = advise(log_of(tmp_path / "rms", ratios, norm="rms"))
    assert (exact.limiting.name, exact.largest_batch) == ("layer2", 16)
    assert exact.limiting.linear_limit == pytest.approx(20, rel=1e-3)


def test_frozen_dead_and_unresolved_layers(tmp_path):
    ratios = np.tile(ratio_for([100.0, 100.0, 100.0, 100.0]), (20, 1))
    ratios[:, 1] = np.nan
    ratios[:, 2] = 1e-3
    rates = np.ones_like(ratios)
    rates[:, 3] = 0  # frozen
    advice = advise(log_of(tmp_path, ratios, rates=rates))
    assert np.isnan([advice.layers[k].linear_limit for k in (1, 3)]).all()
    assert np.isinf(advice.layers[2].early.value)
    assert [layer.name for layer in advice.measured] == ["layer0"]
    text = advice_table(advice)
    assert [line.split()[1:] for line in text.splitlines() if line.startswith("layer1")] == [["-"] * 4]


def test_a_screen_shows_the_layers_that_limit_and_all_shows_all(tmp_path):
    factors = np.linspace(10, 500, 60)
    folder = log_of(tmp_path, np.tile(ratio_for(factors), (20, 1)))
    text = advice_table(advise(folder))
    assert len(text.splitlines()) <= 30
    assert max(map(len, text.splitlines())) <= 110
    names = [line.split()[0] for line in text.splitlines() if line.startswith("layer")]
    assert names[1:] == [f"layer{k}" for k in range(15)] + ["layer59"]
    assert "44 layers" in text
    assert "layer0 ends first" in text
    assert "Largest batch by B <= M_k in every layer: 8." in text
    full = advice_table(advise(folder), all_layers=True)
    assert all(f"layer{k} " in full for k in range(60))


def test_what_gives_no_advice_is_refused_with_the_reason(tmp_path):
    with pytest.raises(DataError, match=r"log of LARS .* only CLARS measures them"):
        advise(log_without_norms(tmp_path / "lars"))
    folder = log_of(tmp_path / "nobatch", np.full((5, 2), 0.5), global_batch=None)
    with pytest.raises(ConfigError, match="batch size is None"):
        advise(folder)
    assert advise(folder, batch=256).batch == 256
    with pytest.raises(ConfigError, match="window=0"):
        advise(folder, batch=256, window=0)
    frozen = log_of(tmp_path / "frozen", np.full((5, 2), 0.5), rates=np.zeros((5, 2)))
    with pytest.raises(DataError, match="no layer had a gradient"):
        advise(frozen)


def log_without_norms(folder):
    log = LayerRateLog.create(folder, layers=["a"], settings={"method": "lars", "global_batch": 64})
    nan = float("nan")
    log.append(1, torch.tensor([[1.0], [1.0], [1.0], [nan], [nan]]))
    log.close()
    return folder


def test_the_script_prints_the_table_for_a_folder_or_a_file_and_one_paragraph_for_an_error(
    tmp_path, monkeypatch, capsys
):
    folder = log_of(tmp_path / "run", np.tile(ratio_for([100.0, 40.0]), (20, 1)))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code, capsys.readouterr()

    code, shown = run(folder)
    assert code == 0
    assert shown.out == advice_table(advise(folder)) + "\n"
    assert run(folder / "layer_rates.safetensors")[1].out == shown.out
    assert "B = 128. " in run(folder, "--batch", 128)[1].out
    code, shown = run(tmp_path / "nothing")
    assert code == 2
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "--data-size" in run("--help")[1].out


def test_the_card_has_one_short_section_with_the_same_numbers_or_none(tmp_path):
    advice = advise(log_of(tmp_path, np.tile(ratio_for([100.0, 40.0]), (20, 1))))
    text = build_model_card(dataclasses.replace(SUMMARY, batch_advice=advice)).text
    section = text.split("## What batch size this run could have used")[1].split("\n## ")[0]
    assert "every layer up to about **40** (layer1 ends first)" in section
    assert "in no layer beyond 100 (layer0)" in section
    assert len(section) < 900
    assert "What batch size" not in build_model_card(SUMMARY).text
