"""Promise: the command draws what it says, explains itself on one screen, and never replaces a user's file unasked."""

import pytest

from hf_clars.plots.command import main
from hf_clars.plots.style import MARK
from tests.picture_kit import make_history, make_log


@pytest.fixture
def run(tmp_path):
    make_log(tmp_path / "run").close()
    make_history(tmp_path / "run")
    return tmp_path / "run"


def names(folder):
    return {path.name for path in folder.iterdir()} - {"layer_rates.safetensors", "trainer_state.json"}


def test_a_run_gets_its_pictures_in_its_own_folder(run, capsys):
    assert main([str(run), "--html"]) == 0
    made = {"layer_rates.png", "gradient_variance.png", "training_curves.png", "layer_rates.html"}
    assert names(run) == made
    said = capsys.readouterr().out
    assert all(name in said for name in made)


def test_dark_pictures_and_svg_have_names_of_their_own_and_all_products_carry_the_mark(run, tmp_path):
    assert main([str(run), "--theme", "dark", "--format", "svg", "png", "--output", str(tmp_path / "new/out")]) == 0
    kinds = [
        f"{stem}_dark.{kind}"
        for stem in ("layer_rates", "gradient_variance", "training_curves")
        for kind in ("svg", "png")
    ]
    assert names(tmp_path / "new/out") == set(kinds)
    assert all(MARK.encode() in path.read_bytes() for path in (tmp_path / "new/out").iterdir())
    assert names(run) == set()


def test_own_products_are_replaced_and_anybody_elses_file_is_kept_unless_told(run, capsys):
    (run / "layer_rates.png").write_bytes(b"a photograph")
    (run / "layer_rates.html").write_text("a page")
    for _ in range(2):  # the second time over its own files
        assert main([str(run), "--html"]) == 1
        assert capsys.readouterr().err.count("was not made by hf_clars") == 2
    assert (run / "layer_rates.png").read_bytes() == b"a photograph"
    assert (run / "layer_rates.html").read_text() == "a page"
    assert main([str(run), "--html", "--overwrite"]) == 0
    assert (run / "layer_rates.png").read_bytes()[:4] == b"\x89PNG"
    assert "hf_clars" in (run / "layer_rates.html").read_text("utf-8")


def test_what_a_run_does_not_have_is_said_and_is_no_failure(tmp_path, capsys):
    make_log(tmp_path / "lars", method="lars").close()
    assert main([str(tmp_path / "lars")]) == 0
    said = capsys.readouterr().err
    assert "gradient_variance.png  not drawn: This log has no R_k" in said
    assert "training_curves.png  not drawn: No loss or accuracy" in said
    assert names(tmp_path / "lars") == {"layer_rates.png"}


def test_a_file_that_cannot_be_written_is_a_failure(run):
    (run / "layer_rates.png").mkdir()
    assert main([str(run)]) == 1


def test_a_comparison_holds_all_runs(run, tmp_path, monkeypatch):
    make_log(tmp_path / "lars", method="lars").close()
    make_history(tmp_path / "lars")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "lars", "--compare", "--html"]) == 0
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {
        "layer_rates_compared.png",
        "training_curves_compared.png",
        "layer_rates_compared.html",
    }
    assert names(run) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "There is no run at nowhere"),
        (["{run}", "--compare"], "at least two runs"),
        (["{run}", "{run}"], "given twice"),
        (["{run}", "{other}", "--output", "out"], "draw one at a time, or --compare"),
        (["{run}", "--output", "{run}/layer_rates.safetensors"], "cannot be made"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(run, tmp_path, capsys, arguments, message):
    make_log(tmp_path / "other").close()
    assert main([argument.format(run=run, other=tmp_path / "other") for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert names(run) == set()


def test_help_fits_one_screen(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 120
