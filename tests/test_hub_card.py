"""The model card says what the run was, in words for people and in metadata that the Hub's own classes read back."""

import ast
import dataclasses
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_clars.hub import HubError, RunSummary, build_model_card
from hf_clars.hub.markdown import one_line, plain

SUMMARY = RunSummary(
    model_name="quickstart",
    architecture="SmallNet",
    parameters=61_706,
    dataset="MNIST digits",
    method="clars",
    recipe={
        "global_batch": 1024,
        "eta": 0.01,
        "warmup_epochs": 0,
        "norm_samples": 0,
        "seed": 20260101,
        "crop": [28, 28],
    },
    results={"eval_accuracy": 0.97123456789, "eval_top5_accuracy": 0.999, "eval_loss": 1.5e-05, "train_runtime": 81.25},
    eval_split="test",
    splits={"train": 4000, "test": 1000},
    hardware="2 CPU cores",
    versions={"torch": "2.15.0"},
    history=[{"epoch": 1.0, "eval_accuracy": 0.9}, {"epoch": 2.0, "eval_accuracy": 0.97, "eval_loss": 0.1}],
)


def card(**changes: object) -> ModelCard:
    """Return the card of SUMMARY with changes, read back from its text as the Hub does."""
    return ModelCard(str(build_model_card(dataclasses.replace(SUMMARY, **changes), pictures=["layer_rates.png"])))


def cells(text: str, first: str) -> list[str]:
    """Return the unescaped cells of the table row that begins with `first`."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_the_metadata_reads_back_with_the_hubs_own_classes_and_the_given_numbers():
    data = card(dataset_id="ylecun/mnist", dataset_config="mnist", base_model="owner/base", license="mit").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-classification", "mit")
    assert (data.datasets, data.base_model, data.metrics) == (["ylecun/mnist"], "owner/base", ["accuracy"])
    assert {"clars", "large-batch-training"} <= set(data.tags)
    assert data.model_name == "quickstart"
    assert [(r.metric_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("Top-1 accuracy", "accuracy", 0.97123456789),
        ("Top-5 accuracy", "accuracy", 0.999),
        ("Evaluation loss", "loss", 1.5e-05),
    ]
    for result in data.eval_results:
        assert (result.task_type, result.dataset_type) == ("image-classification", "ylecun/mnist")
        assert (result.dataset_name, result.dataset_config, result.dataset_split) == ("MNIST digits", "mnist", "test")


def test_a_card_survives_saving_and_loading(tmp_path):
    built = build_model_card(SUMMARY)
    built.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert str(loaded) == str(built)
    assert loaded.data.eval_results == built.data.eval_results


def test_what_is_not_known_is_left_out_of_the_metadata():
    data = yaml.safe_load(str(card()).split("---")[1])
    assert not {"license", "datasets", "base_model", "language"} & set(data)
    assert "No licence was chosen" in card().text
    assert "No licence" not in card(license="mit").text


def test_a_run_without_results_has_no_model_index():
    found = card(results={}, history=())
    assert not found.data.eval_results
    assert "None recorded." in found.text
    assert "## By epoch" not in found.text


def test_nan_is_shown_to_people_but_is_no_result():
    found = card(results={"eval_accuracy": 0.5, "eval_loss": math.nan})
    assert [result.metric_value for result in found.data.eval_results] == [0.5]
    assert cells(found.text, "Evaluation loss") == ["Evaluation loss", "nan"]


def test_numbers_of_numpy_are_numbers():
    found = card(results={"eval_accuracy": np.float64(0.25), "eval_loss": np.float32(0.5)})
    assert [result.metric_value for result in found.data.eval_results] == [0.25, 0.5]
    assert cells(found.text, "Top-1 accuracy") == ["Top-1 accuracy", "25.00%"]


def test_the_tables_hold_results_recipe_epochs_and_environment():
    text = card().text
    assert cells(text, "Top-1 accuracy") == ["Top-1 accuracy", "97.12%"]
    assert cells(text, "Data") == ["Data", "MNIST digits (images: train 4,000, test 1,000)"]
    assert cells(text, "Optimizer") == ["Optimizer", "CLARS"]
    assert cells(text, "Global batch size") == ["Global batch size", "1,024"]
    assert cells(text, "Warmup epochs") == ["Warmup epochs", "0"]
    assert cells(text, "Samples per step for the norms")[1] == "every sample"
    assert cells(text, "Seed")[1] == "20260101"
    assert cells(text, "crop")[1] == "28, 28"
    assert cells(text, "2") == ["2", "97.00%", "0.1"]
    assert cells(text, "torch") == ["torch", "2.15.0"]
    assert cells(text, "Hardware") == ["Hardware", "2 CPU cores"]


def test_the_results_leave_out_what_trainer_keeps_for_itself():
    own = {"epoch": 24.0, "total_flos": 1.5e13, "eval_runtime": 0.3, "eval_steps_per_second": 7.2}
    text = card(results={"eval_accuracy": 0.5, "eval_balanced_accuracy": 0.4, "train_runtime": 2.0, **own}).text
    assert cells(text, "Training time (s)")[1] == "2"
    assert cells(text, r"eval\_balanced\_accuracy")[1] == "40.00%"
    assert not any(name.replace("_", r"\_") in text for name in own if name != "epoch")
    assert "| epoch |" not in text


def test_a_long_run_shows_about_twenty_epochs_and_always_the_last():
    text = card(history=[{"epoch": float(epoch), "eval_loss": 1.0} for epoch in range(1, 92)]).text
    shown = re.findall(r"^\| (\d+) \| 1 \|$", text, re.MULTILINE)
    assert len(shown) <= 21
    assert shown[-1] == "91"


def test_the_loading_code_is_python_and_imports_the_library_only_for_its_own_architectures():
    for needs_import in (False, True):
        text = card(needs_import=needs_import, repo_id="owner/name").text
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
        ast.parse(code)
        assert ("import hf_clars" in code) == needs_import
        assert code.count('from_pretrained("owner/name")') == 2
        assert len(code.strip().splitlines()) == 3 + needs_import


def test_pictures_are_relative_links_with_their_explanation(tmp_path):
    text = build_model_card(SUMMARY, pictures=["layer_rates.png", "figures/my loss.svg"]).text
    assert "![layer rates](layer_rates.png)" in text
    assert "](figures/my%20loss.svg)" in text
    assert "how far the samples of a batch agree" in text
    for bad in ("/data/p.png", tmp_path / "p.png", "../p.png", "C:\\p.png", "a\\..\\..\\p.png", "", "."):
        with pytest.raises(HubError, match="relative to that folder"):
            build_model_card(SUMMARY, pictures=[bad])


def test_the_paper_is_cited():
    assert "@inproceedings{huo2021large" in card().text
    assert "Huo, Zhouyuan and Gu, Bin and Huang, Heng" in card().text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset_id": "not an id"}, "dataset_id='not an id'"),
        ({"base_model": "a/b/c"}, "base_model='a/b/c'"),
        ({"repo_id": "x'); import os"}, "repo_id="),
        ({"results": {"eval_accuracy": "high"}}, "'eval_accuracy'.*'high'"),
        ({"model_name": " \n"}, "model_name"),
    ],
)
def test_what_cannot_be_on_a_card_is_refused_by_name(changes, says):
    with pytest.raises(HubError, match=says):
        card(**changes)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/someone/data/train", "train"),
        ("--output_dir=/scratch/u1/run/ --x", "--output_dir=run --x"),
        ("C:\\Users\\someone\\model", "model"),
        ("~/secret/model.bin", "model.bin"),
        ("file:///home/someone/x", "x"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("images/s and/or 1 / 2", "images/s and/or 1 / 2"),
        ("data/mnist", "data/mnist"),
        ("owner/name", "owner/name"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part_and_nothing_else_is(given, shown):
    assert one_line(given) == shown
    assert given == shown or given not in str(card(recipe={"output_dir": given}, hardware=given, dataset=given))


names = st.text(min_size=1) | st.sampled_from(
    [
        "a\n---\nb",
        "x | y",
        "'\"",
        "# head",
        "```\ncode",
        "{{ x }}",
        "<script>",
        "![a](b)",
        "- item",
        "a: b",
        "\ud800",
        "\x85\u2028",
    ]
)


def columns(row: str) -> int:
    """Return how many cells a table row has: a pipe ends a cell unless an odd number of backslashes precedes it."""
    return len([bars for bars in re.findall(r"(\\*)\|", row) if len(bars) % 2 == 0]) - 1


@settings(max_examples=80, deadline=None)
@example(name="a|b", dataset="a\\|b", key="a\n---\nb | c", value="| `")
@example(name="a\x00b", dataset="\x1b[0m", key="\ud800", value="\u2028|\x85")
@given(name=names, dataset=names, key=names, value=names)
def test_hostile_names_break_neither_yaml_nor_tables(name, dataset, key, value):
    if not one_line(name):
        return
    recipe = {key: value, "plain": "sign"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = card(
            model_name=name, dataset=dataset, recipe=recipe, versions={key: value}, architecture=value, hardware=name
        )
    assert found.data.model_name == one_line(name)
    assert {result.dataset_name for result in found.data.eval_results} == {one_line(dataset)}
    assert cells(found.text, "plain") == ["plain", "sign"]
    lines = found.text.splitlines()
    assert f"| {plain(key)} | {plain(value)} |" in lines
    reference = card(recipe={"key": "x", "plain": "sign"}, versions={"key": "x"}).text.splitlines()
    headings, expected = ([line for line in text if line.startswith("#")][1:] for text in (lines, reference))
    assert headings == expected
    assert len(lines) == len(reference)
    for above, line in itertools.pairwise(lines):
        if line.startswith("|") and above.startswith("|"):
            assert columns(line) == columns(above)
