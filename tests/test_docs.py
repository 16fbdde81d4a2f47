"""Promise: README and docs name commands, flags, files, tests, links and error messages that exist."""

import ast
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from hf_clars.cli.commands import COMMANDS
from hf_clars.cli.commands import main as command_line
from hf_clars.hub.card_text import CITATION
from hf_clars.image_classification.run import parse_run
from hf_clars.version import __version__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BESIDE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in [*PAGES, *BESIDE]}
ALL = "\n".join(TEXTS.values())
OURS = ("hf-clars ", "python scripts/", "accelerate launch ", "torchrun ", "make ", "pip install ")


def command_lines():
    """Each line of a bash block, and each inline piece that begins like a command of ours, as words."""
    found = {}
    for page, text in TEXTS.items():
        shown = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in joined(block)]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        inline = [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith(OURS)]
        for line in [*shown, *inline]:
            if words := shlex.split(line, comments=True):
                found[f"{page.name}: {' '.join(words)}"] = words
    return found


def joined(block):
    return block.replace("\\\n", " ").splitlines()


COMMAND_LINES = command_lines()


def flags_of_help(text):
    return set(re.findall(r"--[a-z][\w-]*", text))


def check_flags(words, capsys, run_help):
    """The flags among the words are in what `run_help` prints."""
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    if given:
        with pytest.raises(SystemExit) as end:
            run_help()
        assert end.value.code in (0, None)
        assert given <= flags_of_help(capsys.readouterr().out) | {"--help"}


def check_training(arguments, monkeypatch):
    """All settings of a training command parse, and fit together on one process."""
    if arguments in ([], ["--help"]):
        return
    monkeypatch.chdir(ROOT)
    without_gpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]  # bf16 is refused otherwise
    parse_run([*arguments, *without_gpu])


def check_script(words, capsys, monkeypatch):
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    script = ROOT / words[0]
    assert script.is_file()
    if script.name == "train_imagenet.py":
        return check_training(words[1:], monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(script.parent)  # as python does
    return check_flags(words[1:], capsys, lambda: runpy.run_path(str(script), run_name="__main__"))


def check_hf_clars(words, capsys, monkeypatch):
    if words[0] == "train":
        return check_training(words[1:], monkeypatch)
    assert words[0] in COMMANDS
    monkeypatch.setattr(sys, "argv", ["hf-clars"])
    return check_flags(words[1:], capsys, lambda: command_line([words[0], "--help"]))


def check_launch(arguments, capsys, monkeypatch):
    if not arguments.training_script:
        return
    if getattr(arguments, "config_file", None):
        assert (ROOT / arguments.config_file).is_file()
    check_script([arguments.training_script, *arguments.training_script_args], capsys, monkeypatch)


def check_accelerate(words, capsys, monkeypatch):
    if words[0] == "launch" and any(word.endswith(".py") for word in words):
        check_launch(launch_command_parser().parse_args(words[1:]), capsys, monkeypatch)
    else:  # named without a script, in a sentence: flags only
        assert words[0] == "launch"
        known = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= known


def check_torchrun(words, capsys, monkeypatch):
    if any(word.endswith(".py") for word in words):
        check_launch(get_args_parser().parse_args(words), capsys, monkeypatch)


def check_make(words, capsys, monkeypatch):
    assert re.search(rf"^{re.escape(words[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def check_pip(words, capsys, monkeypatch):
    installed = re.sub(r"^\.\[", "hf_clars[", words[-1])  # from a checkout
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.fullmatch(r"hf_clars\[(.+)\]", installed)[1].split(",")) <= set(extras)


CHECKS = {
    "hf-clars": check_hf_clars,
    "python": check_script,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
}


@pytest.mark.parametrize("words", COMMAND_LINES.values(), ids=COMMAND_LINES.keys())
def test_a_command_line_names_what_exists(words, capsys, monkeypatch):
    CHECKS[words[0]](words[1:], capsys, monkeypatch)


def test_command_lines_are_found():
    assert {words[0] for words in COMMAND_LINES.values()} == set(CHECKS)


@pytest.mark.parametrize(
    "wrong",
    [
        "hf-clars plot RUN --htlm",
        "hf-clars polt RUN",
        "hf-clars train --config quickstart --norm_sample 3",
        "python scripts/compare.py",
        "python -m benchmarks.scale --device 8",
        "accelerate launch --config_file configs/accelerate/dpp.yaml scripts/train_imagenet.py --config quickstart",
        "make quick",
        "pip install 'hf_clars[nothing]'",
    ],
)
def test_a_command_line_that_names_something_else_is_noticed(wrong, capsys, monkeypatch):
    words = shlex.split(wrong)
    with pytest.raises((AssertionError, ValueError)):  # ConfigError is a ValueError
        CHECKS[words[0]](words[1:], capsys, monkeypatch)


def test_the_readme_fits_two_screens_and_pages_are_short():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 125
    made = "coverage.md"  # a table, by a command
    long = {page.name: len(text.splitlines()) for page, text in TEXTS.items() if len(text.splitlines()) > 150}
    assert long.keys() <= {made}


def headings(page):
    """Anchors, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", TEXTS[ROOT / "README.md"]))
    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES[1:]}


def test_files_and_tests_that_are_named_exist():
    named = set(re.findall(r"`((?:tests|scripts|configs|model_cards|hf_clars)/[\w./-]*)(?:::(\w+))?`", ALL))
    assert len(named) > 20
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (path, test)


def test_the_rates_of_the_recipe_are_the_formulas():
    page = TEXTS[ROOT / "docs" / "large-batch-recipe.md"]
    rows = re.findall(r"^\| ([\d,]+) \| (\d+|1 of 256) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 8
    for size, passes, ours, papers in rows:
        batch = int(size.replace(",", ""))
        assert passes == ("1 of 256" if batch < 512 else str(batch // 512))
        assert float(ours) == pytest.approx(0.1 * batch / 128, abs=1e-9)
        assert float(papers) == pytest.approx(25 * batch / 16384, abs=0.005)


def said_by_the_code():
    """Every string of the package; what is filled in is left out, and what adjoins it is a string of its own."""
    for path in (ROOT / "hf_clars").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_of_the_faq_are_the_code_s():
    quoted = re.findall(r"^### `(.+)`$", TEXTS[ROOT / "docs" / "faq.md"], re.MULTILINE)
    assert len(quoted) > 25
    said = list(said_by_the_code())
    for heading in quoted:
        for piece in heading.split("..."):
            assert any(piece.strip() in text for text in said), piece


def test_the_citation_names_the_version_and_the_paper_as_cards_do():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == __version__
    (paper,) = citation["references"]
    assert paper["title"] in CITATION
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) in CITATION
    assert str(paper["year"]) in CITATION
