"""Promise: pictures of variance, of training and of several runs show the logged numbers, readably, in both themes."""

import json

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from PIL import Image

from hf_clars.plots import (
    PlotError,
    open_runs,
    plot_comparison,
    plot_gradient_variance,
    plot_layer_rates,
    plot_training_curves,
)
from hf_clars.plots.style import THEMES
from tests.picture_kit import NAN, make_history, make_log, misplaced, texts


def make_run(folder, **options):
    history = {key: options.pop(key) for key in ("nan_from", "steps_an_epoch") if key in options}
    log = make_log(folder, **options)
    log.close()
    make_history(folder, steps=len(log), **history)
    return folder


# ---- R_k and the estimate of M_k ------------------------------------------------------------------------------------


def test_the_estimate_is_one_over_the_squared_ratio_and_is_called_an_estimate(tmp_path):
    log = make_log(tmp_path, layers=5, steps=20)
    figure = plot_gradient_variance(log)
    mesh = next(c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    expected = 1 / log["ratio"].astype(np.float64).T ** 2
    np.testing.assert_allclose(mesh.get_array(), expected.clip(mesh.norm.vmin, mesh.norm.vmax), rtol=1e-6)
    drawn = texts(figure)
    assert drawn.count("R_k^2$  (estimate of $M_k$)") >= 3
    assert "a lower bound: norm = mean" in drawn
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[3].lines}
    np.testing.assert_allclose(list(lines.values()), expected, rtol=1e-6)


def test_with_norm_rms_the_estimate_is_that_of_the_batch_and_no_bound(tmp_path):
    log = make_log(tmp_path, settings={"norm": "rms"})
    assert "lower bound" not in texts(plot_gradient_variance(log))


def test_the_estimate_brackets_the_batchs_own_factor_as_its_docstring_says():
    """M_k of a batch of random gradients, against 1 / R_k^2 by both readings of n_k."""
    gradients = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)) + 0.5
    norms, mean = gradients.norm(dim=1), gradients.mean(0).norm()
    factor = norms.square().mean() / mean.square()
    assert torch.isclose((norms.square().mean().sqrt() / mean) ** 2, factor)
    assert (norms.mean() / mean) ** 2 < factor


def test_the_profile_has_the_median_of_each_quarter_by_layer(tmp_path):
    log = make_log(tmp_path, layers=7, steps=40)
    lines = plot_gradient_variance(log).axes[1].lines
    assert len(lines) == 4
    for index, line in enumerate(lines):
        part = 1 / log["ratio"][10 * index : 10 * index + 10].astype(np.float64) ** 2
        np.testing.assert_allclose(line.get_xdata(), np.median(part, axis=0), rtol=1e-6)


def test_a_log_without_ratios_or_with_one_step_is_no_crash(tmp_path):
    with pytest.raises(PlotError, match="only CLARS measures"):
        plot_gradient_variance(make_log(tmp_path / "lars", method="lars"))
    assert not misplaced(plot_gradient_variance(make_log(tmp_path / "one", steps=1)))


def test_zero_and_missing_ratios_have_their_own_colours(tmp_path):
    def odd(step, values):
        values[4, :2] = torch.tensor([0.0, NAN])

    drawn = texts(plot_gradient_variance(make_log(tmp_path, layers=6, change=odd)))
    assert "grey: no value; orange: infinite" in drawn


# ---- loss and accuracy ----------------------------------------------------------------------------------------------


def test_one_run_has_an_axis_of_steps_and_one_of_epochs(tmp_path):
    (run,) = open_runs([make_run(tmp_path / "run")])
    figure = plot_training_curves([run])
    loss, accuracy = figure.axes[:2]
    for axes in (loss, accuracy):
        (above,) = axes.child_axes
        assert (axes.get_xlabel(), above.get_xlabel()) == ("optimizer step (one batch each)", "epoch")
        figure.canvas.draw()
        np.testing.assert_allclose(np.array(above.get_xlim()) * 10, axes.get_xlim())
    training, evaluation = loss.lines
    entries = [entry for entry in run.history if "loss" in entry]
    np.testing.assert_allclose(training.get_xydata(), [(entry["step"], entry["loss"]) for entry in entries])
    entries = [entry for entry in run.history if "eval_loss" in entry]
    np.testing.assert_allclose(evaluation.get_xydata(), [(entry["step"], entry["eval_loss"]) for entry in entries])
    points = [(entry["step"], 100 * entry["eval_accuracy"]) for entry in entries]
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), points)


def test_a_single_evaluation_has_whole_steps_on_its_axis_each_once(tmp_path):
    make_log(tmp_path).close()
    entry = {"step": 12, "epoch": 3.0, "loss": 0.6, "eval_loss": 0.5, "eval_accuracy": 0.9}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [entry]}))
    figure = plot_training_curves(open_runs([tmp_path]))
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        ticks = [label.get_text() for label in axes.get_xticklabels()]
        assert len(set(ticks)) == len(ticks)
        assert axes.get_xlim()[0] == 0


def test_several_runs_are_drawn_over_steps_over_epochs_and_over_batch_sizes(tmp_path):
    small = make_run(tmp_path / "small", steps=60, settings={"global_batch": 512}, steps_an_epoch=20)
    large = make_run(tmp_path / "large", steps=30, settings={"global_batch": 1024}, steps_an_epoch=10)
    runs = open_runs([small, large])
    figure = plot_training_curves(runs)
    over_steps, over_epochs, by_batch, _, _, best = figure.axes
    assert [axes.get_xlabel() for axes in (over_steps, over_epochs)] == ["optimizer step (one batch each)", "epoch"]
    np.testing.assert_allclose([line.get_xdata()[-1] for line in over_epochs.lines], 3)
    assert [line.get_xdata()[-1] for line in over_steps.lines] == [60, 60, 30, 30]  # training, evaluation; of each run
    last = [[entry["loss"] for entry in run.history if "loss" in entry][-1] for run in runs]
    np.testing.assert_allclose(by_batch.lines[0].get_xydata(), [(512, last[0]), (1024, last[1])])
    highest = [max(entry.get("eval_accuracy", 0) for entry in run.history) for run in runs]
    np.testing.assert_allclose(best.lines[0].get_xydata(), [(512, 100 * highest[0]), (1024, 100 * highest[1])])
    assert not misplaced(figure)


def test_runs_of_one_batch_size_have_no_third_column(tmp_path):
    runs = open_runs([make_run(tmp_path / name) for name in "ab"])
    assert len(plot_training_curves(runs).axes) == 4


@pytest.mark.parametrize("names", ["a", "ab"])
def test_without_an_accuracy_there_is_no_empty_panel_for_it(tmp_path, names):
    """As of language models."""
    for name in names:
        make_run(tmp_path / name)
        entries = [{"step": step, "epoch": step / 10, "loss": 2 / step} for step in range(3, 31, 3)]
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    figure = plot_training_curves(open_runs([tmp_path / name for name in names]), tmp_path / "curves.png")
    assert {axes.get_title("left").split(" ")[0] for axes in figure.axes} == {"Loss"}


def test_a_diverged_run_says_from_which_step(tmp_path):
    run = make_run(tmp_path / "bad", nan_from=12)
    figure = plot_training_curves(open_runs([run]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["bad  (loss not finite from step 12)"]


def test_a_run_that_logged_nothing_yet_is_an_error_with_advice(tmp_path):
    make_log(tmp_path).close()
    with pytest.raises(PlotError, match="after the first checkpoint"):
        plot_training_curves(open_runs([tmp_path]))


# ---- several runs ---------------------------------------------------------------------------------------------------


def test_a_comparison_has_one_scale_for_all_maps_and_a_line_for_each_run(tmp_path):
    def tenfold(step, values):
        values[0] *= 10

    folders = [tmp_path / name for name in ("one", "two", "three")]
    logs = [
        make_log(folder, layers=7, change=change) for folder, change in zip(folders, (None, tenfold, None), strict=True)
    ]
    runs = open_runs(folders)
    figure = plot_comparison(runs)
    meshes = [c for axes in figure.axes for c in axes.collections if isinstance(c, QuadMesh) and axes.get_title("left")]
    assert len(meshes) == 3
    assert len({(mesh.norm.vmin, mesh.norm.vmax) for mesh in meshes}) == 1
    rates = next(axes for axes in figure.axes if axes.get_title("left").startswith("Rate of the median layer"))
    for line, log in zip(rates.lines, logs, strict=True):
        np.testing.assert_allclose(line.get_ydata(), np.median(log["rate"], axis=1), rtol=1e-6)


@pytest.mark.parametrize("layers", [5, 161])
def test_no_text_overlaps_in_any_picture(tmp_path, layers):
    folders = [make_run(tmp_path / name, layers=layers, method=name) for name in ("clars", "lars", "nag")]
    runs = open_runs(folders)
    for figure in (
        plot_gradient_variance(runs[0].log),
        plot_comparison(runs[:2]),
        plot_comparison(runs),
        plot_training_curves(runs[:1]),
        plot_training_curves(runs),
    ):
        assert not misplaced(figure)


def test_a_method_without_ratios_is_named_in_the_comparison(tmp_path):
    runs = open_runs([make_run(tmp_path / name, method=name) for name in ("clars", "lars")])
    assert "(not measured: lars)" in texts(plot_comparison(runs))


def test_names_with_dollars_and_markup_are_shown_as_they_are(tmp_path):
    names = ["$\\frac$", "<b>&", "100% _^"]
    runs = open_runs([make_run(tmp_path / name.replace("/", "")) for name in names])
    for draw in (plot_comparison, plot_training_curves):
        for suffix in ("png", "svg"):
            draw(runs, tmp_path / f"p.{suffix}")


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_runs_are_named_by_their_folders_as_long_as_needed(tmp_path):
    folders = [make_run(tmp_path / place) for place in ("a/run", "b/run")]
    assert [run.name for run in open_runs(folders)] == ["a/run", "b/run"]
    assert [run.name for run in open_runs(folders[:1])] == ["run"]
    with pytest.raises(PlotError, match="given twice"):
        open_runs([folders[0], folders[0]])


def test_a_running_run_shows_the_history_of_its_last_checkpoint(tmp_path):
    make_log(tmp_path)
    for step in (9, 10, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    (run,) = open_runs([tmp_path])
    assert run.points("loss")[0][0] == 10


def test_a_damaged_state_or_no_run_is_named(tmp_path):
    make_log(tmp_path / "run")
    (tmp_path / "run" / "trainer_state.json").write_text("[")
    with pytest.raises(PlotError, match="no state that Trainer wrote"):
        open_runs([tmp_path / "run"])
    with pytest.raises(PlotError, match="There is no run at"):
        open_runs([tmp_path / "nowhere"])


# ---- themes and colours ---------------------------------------------------------------------------------------------


def test_dark_pictures_are_dark_and_light_ones_light_also_when_drawn_later(tmp_path):
    log = make_log(tmp_path)
    for theme, paper in (("light", 255), ("dark", 24)):
        plot_layer_rates(log, tmp_path / "p.png", theme=theme)
        with Image.open(tmp_path / "p.png") as image:
            colours = image.convert("L").getcolors(256)
        assert abs(max(colours)[1] - paper) < 5
        figure = plot_layer_rates(log, theme=theme)
        figure.canvas.draw()  # outside of the theme's block
        assert {tick.get_color() for tick in figure.axes[0].get_xticklabels()} == {THEMES[theme].ink}
    with pytest.raises(PlotError, match="choose one of light, dark"):
        plot_layer_rates(log, theme="sepia")


# Machado, Oliveira and Fernandes (2009), severity 1: what each kind of colour blindness sees, in linear RGB.
SIGHTS = {
    "ordinary": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(linear_rgb) -> np.ndarray:
    """CIELAB of linear sRGB, white at D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear_rgb / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("sight", SIGHTS)
def test_lines_are_told_apart_by_every_eye(theme, sight):
    seen = [lab(np.clip(np.array(SIGHTS[sight]) @ linear(colour), 0, 1)) for colour in THEMES[theme].series]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[i + 1 :]]
    assert min(distances) > 30  # 2.3 is a just noticeable difference


@pytest.mark.parametrize("theme", THEMES)
def test_lines_and_text_stand_out_from_the_paper(theme):
    look = THEMES[theme]
    light = {colour: linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (look.paper, look.ink, *look.series)}
    for colour in look.series:
        bright, dark = sorted((light[colour], light[look.paper]), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= (7 if colour == look.ink else 3)  # WCAG 2: text AAA, graphics AA


@pytest.mark.parametrize("colours", ["viridis", "cividis"])
@pytest.mark.parametrize("sight", SIGHTS)
def test_heat_maps_grow_lighter_with_the_value_for_every_eye(colours, sight):
    steps = [np.array(SIGHTS[sight]) @ linear(colour) for colour in colormaps[colours](np.linspace(0, 1, 24))[:, :3]]
    lightness = [lab(np.clip(step, 0, 1))[0] for step in steps]
    assert (np.diff(lightness) > 0).all()


# ---- one axis of steps, and short names ------------------------------------------------------------------------------


def test_all_panels_of_a_comparison_share_the_steps_of_the_longest_run(tmp_path):
    make_log(tmp_path / "short", steps=10, layers=2)
    make_log(tmp_path / "long", steps=40, layers=2)
    figure = plot_comparison(open_runs([tmp_path / "short", tmp_path / "long"]))
    over_steps = [axes for axes in figure.axes if axes.get_xlabel().startswith("optimizer step")]
    assert len(over_steps) == 4
    assert {axes.get_xlim() for axes in over_steps} == {(0.5, 40.5)}


def test_names_leave_out_what_they_have_in_common_and_the_axis_says_so(tmp_path):
    log = make_log(tmp_path / "run", names=["net.body.conv1", "net.body.conv2", "net.head"], steps=3)
    figure = plot_layer_rates(log)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["body.conv1", "body.conv2", "head"]
    assert "names without net" in figure.axes[0].get_ylabel()
