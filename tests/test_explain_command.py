"""Promise: `hf-clars explain` says how each parameter of a model is measured."""

import pytest

from hf_clars.cli.commands import main


def test_a_network_with_rules_only(capsys):
    assert main(["explain", "resnet20"]) == 0
    shown = capsys.readouterr().out
    assert "ConvolutionRule of" in shown
    assert shown.splitlines()[0].split()[1].endswith("%")
    assert "BatchNormRule of" in shown
    assert "can be compiled as a whole" in shown


def test_the_form_of_each_layer_and_why(capsys):
    assert main(["explain", "resnet8", "--forms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("features.5.conv2 ") and "kernel 3x3" in line)
    assert row[row.index("bytes") + 2 :][:3] == ["gram", "model", "gram"]


def test_a_language_model_in_a_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1).save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--tokens", "7"]) == 0
    shown = capsys.readouterr().out
    assert "TransposedLinearRule of transformer.h.0.attn.c_attn" in shown
    assert "transformer.wpe.weight" in shown


def test_what_is_no_model_is_refused_in_one_paragraph(tmp_path, capsys):
    assert main(["explain", str(tmp_path), "--tokens", "7"]) == 2
    assert "no model's configuration" in capsys.readouterr().err
