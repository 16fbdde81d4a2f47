"""Promise: the picture of a log is complete and readable: names, scales, no overlap, a word where values miss."""

import sys
import warnings
from importlib import import_module
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from hf_clars.plots import PlotError, plot_layer_rates
from hf_clars.plots.columns import Columns, log_range, shortened
from hf_clars.plots.panels import INFINITE, NO_VALUE, ZERO
from tests.picture_kit import NAN, make_log, misplaced, texts


def labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize(
    ("layers", "method"), [(1, "clars"), (5, "clars"), (5, "nag"), (40, "clars"), (161, "clars"), (161, "lars")]
)
def test_no_text_overlaps_or_sticks_out_with_few_or_many_layers(tmp_path, layers, method):
    assert not misplaced(plot_layer_rates(make_log(tmp_path, layers=layers, method=method)))


def test_every_layer_is_named_up_to_40_and_evenly_chosen_ones_of_more(tmp_path):
    assert len(labels(plot_layer_rates(make_log(tmp_path / "a", layers=40)))) == 40
    figure = plot_layer_rates(make_log(tmp_path / "b", layers=161))
    assert labels(figure) == [f"stages.{index}.convolution" for index in range(0, 161, 5)]
    assert "1 of 5 named" in texts(figure)


def test_the_heat_maps_hold_the_logged_values_by_layer_and_step(tmp_path):
    log = make_log(tmp_path, layers=6, steps=20)
    figure = plot_layer_rates(log)
    rate_map, ratio_map = (next(c for c in figure.axes[i].collections if isinstance(c, QuadMesh)) for i in (0, 2))
    low, high = rate_map.norm.vmin, rate_map.norm.vmax
    np.testing.assert_allclose(rate_map.get_array(), np.clip(log["rate"].T, low, high), rtol=1e-6)
    np.testing.assert_allclose(ratio_map.get_array(), log["ratio"].T.clip(ratio_map.norm.vmin), rtol=1e-6)
    assert figure.axes[0].get_ylim() == (6, 0)  # the first layer is on top
    assert figure.axes[0].get_xlim() == (0.5, 20.5)
    for axes in figure.axes[:4]:
        assert axes.get_xlabel().startswith("optimizer step")


def test_the_lines_are_the_largest_median_and_smallest_layer_of_each_step(tmp_path):
    log = make_log(tmp_path, layers=7)
    lines = {line.get_label(): line.get_ydata() for line in plot_layer_rates(log).axes[1].lines}
    for name, how in (("largest", np.max), ("median", np.median), ("smallest", np.min)):
        np.testing.assert_allclose(lines[name], how(log["rate"], axis=1), rtol=1e-6)


@pytest.mark.parametrize("method", ["lars", "nag"])
def test_a_method_without_per_sample_norms_says_so_instead_of_showing_an_empty_panel(tmp_path, method):
    figure = plot_layer_rates(make_log(tmp_path, method=method))
    assert "is not shown: the log has no $n_k$" in texts(figure)
    assert len([axes for axes in figure.axes if axes.collections or axes.lines]) == 3  # map, its colour bar, lines


def test_equal_rates_of_all_layers_are_one_line_that_says_so(tmp_path):
    def equal(step: int, values: torch.Tensor) -> None:
        values[0] = 0.1

    figure = plot_layer_rates(make_log(tmp_path, method="nag", change=equal))
    assert [line.get_label() for line in figure.axes[1].lines] == ["every layer"]


def test_zero_nan_and_infinite_rates_are_coloured_apart_and_named(tmp_path):
    def odd(step: int, values: torch.Tensor) -> None:
        values[0, :3] = torch.tensor([0.0, NAN, float("inf")])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_layer_rates(make_log(tmp_path, layers=6, change=odd))
        figure.canvas.draw()
    assert "white: 0; grey: no value; orange: infinite" in figure.axes[0].get_xlabel()
    mesh = next(c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    colours = mesh.to_rgba(mesh.get_array())[:3, 0]
    np.testing.assert_allclose(colours, [to_rgba(ZERO), to_rgba(NO_VALUE), to_rgba(INFINITE)], atol=0.01)


@pytest.mark.parametrize("value", [0.0, NAN, float("inf")])
def test_a_log_without_a_usable_rate_says_so(tmp_path, value):
    def useless(step: int, values: torch.Tensor) -> None:
        values[:] = value

    assert texts(plot_layer_rates(make_log(tmp_path, change=useless))).count("no finite value above zero") == 2


def test_one_spike_or_the_end_of_a_schedule_does_not_squeeze_the_scale(tmp_path):
    def spike(step: int, values: torch.Tensor) -> None:
        values[0] = torch.linspace(0.1, 1, 5) * (1e11 if step == 7 else 1e-9 if step > 298 else 1)

    ends = log_range(make_log(tmp_path, steps=300, change=spike)["rate"])
    assert ends == pytest.approx((0.1, 1), rel=1e-3)


def test_many_steps_are_gathered_into_columns_without_losing_the_extremes(tmp_path):
    log = make_log(tmp_path, steps=997)
    axes = plot_layer_rates(log, max_columns=100).axes[1]
    largest = next(line for line in axes.lines if line.get_label() == "largest").get_ydata()
    assert len(largest) == 100
    assert largest.max() == log["rate"].max()


def test_columns_cover_uneven_steps_without_a_gap():
    columns = Columns(np.array([1, 2, 5, 6, 100, 101, 200]), limit=3)
    assert columns.edges.tolist() == [0.5, 5.5, 150.5, 249.5]
    assert columns.reduce(np.arange(7.0), np.nanmax).tolist() == [2, 5, 6]


def test_a_name_is_shortened_from_the_left_but_keeps_its_numbers_and_end():
    assert (
        shortened("resnet.encoder.stages.12.layers.3.layer.0.convolution") == "res.enc.sta.12.lay.3.layer.0.convolution"
    )
    assert shortened("fc") == "fc"
    assert len(shortened("x" * 500)) == 40
    assert shortened("a\nb") == "a b"


def test_hostile_names_and_titles_are_shown_and_not_interpreted(tmp_path):
    names = ["$\\frac$", "a\nb", "<svg>", "%s", "_" * 300, ""]
    for suffix in ("png", "svg"):
        log = make_log(tmp_path / suffix, names=names)
        plot_layer_rates(log, tmp_path / f"p.{suffix}", title="$\\frac$ \n {}" + "long " * 100)
    assert labels(plot_layer_rates(log))[0] == "$\\frac$"


def test_png_and_svg_are_saved_by_the_names_ending_and_are_the_same_each_time(tmp_path):
    make_log(tmp_path).close()
    for name in ("p.png", "again.png", "p.svg", "again.svg"):
        plot_layer_rates(tmp_path, tmp_path / name)
    for suffix in ("png", "svg"):
        assert (tmp_path / f"p.{suffix}").read_bytes() == (tmp_path / f"again.{suffix}").read_bytes()
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 1200
        pixels = np.asarray(image.convert("RGB").resize((200, 100))).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 200
    assert ElementTree.parse(tmp_path / "p.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_one_step_is_enough_for_a_picture_and_none_is_an_error(tmp_path):
    assert not misplaced(plot_layer_rates(make_log(tmp_path / "one", steps=1)))
    with pytest.raises(PlotError, match="holds no steps yet"):
        plot_layer_rates(make_log(tmp_path / "none", steps=0))


def test_an_unknown_ending_or_a_missing_folder_is_named(tmp_path):
    log = make_log(tmp_path)
    with pytest.raises(PlotError, match=r"\.png or \.svg"):
        plot_layer_rates(log, tmp_path / "p.jpg")
    with pytest.raises(PlotError, match="could not be saved"):
        plot_layer_rates(log, tmp_path / "nowhere" / "p.png")


def test_drawing_needs_no_display_and_leaves_pyplot_alone(tmp_path, monkeypatch):
    """The pictures' modules are imported anew where pyplot and every toolkit's window cannot be had."""
    make_log(tmp_path).close()
    for name in [name for name in sys.modules if name.startswith("hf_clars.plots")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib.pyplot", "tkinter", "matplotlib.backends.backend_tkagg", "PyQt6", "PySide6", "gi", "wx"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it now raises
    monkeypatch.delenv("DISPLAY", raising=False)
    with rc_context({"backend": "TkAgg"}):  # what MPLBACKEND=TkAgg sets
        import_module("hf_clars.plots").plot_layer_rates(tmp_path, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
