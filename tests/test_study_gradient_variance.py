"""Promise: M_k is mean_i ||g_i||^2 / ||mean_i g_i||^2 over the whole set, exactly, and measuring leaves no trace."""

import csv

import datasets
import pytest
import torch
from torch.nn import functional

from hf_clars.layers import param_layers
from hf_clars.models import build_model
from research import measure_gradient_variance
from research.plots.variance_factors import plot_variance_factors
from research.study.gradient_variance import depth_correlation, measure_run, sentence, variance_factors, write_csv
from research.study.images import open_images
from research.study.loop import train
from tests.oracle import one_by_one, per_sample_grads
from tests.test_study_cifar10_report import encoded
from tests.test_study_loop import images, tiny

SIDE, CLASSES = 12, 4
NETWORKS = {
    "fcn5": {"hidden_size": 7},
    "cnn5": {"width": 2, "hidden_size": 6},
    "resnet8": {"width": 2, "norm": "group"},
}


def network(name, **kwargs):
    torch.manual_seed(0)
    model = build_model(name, num_labels=CLASSES, image_size=SIDE, num_channels=1, model_kwargs=kwargs)
    return model.double().train()


def data(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def literal(layers, grads, count):
    """{layer: M} from per-sample gradients {name: [N, *shape]} of the samples' own losses."""
    factors = {}
    for layer in layers:
        rows = torch.cat([grads[n].flatten(1) for n in layer.param_names], dim=1)
        factors[layer.name] = float(rows.square().sum(1).mean() / rows.mean(0).square().sum())
    return factors


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_brute_force_over_uneven_passes(name):
    model, (x, y) = network(name, **NETWORKS[name]), data(11)
    grads = one_by_one(model, lambda net, i: functional.cross_entropy(net(x[i : i + 1]).logits, y[i : i + 1]), 11)
    layers, factors = variance_factors(model, zip(x.split(4), y.split(4), strict=True))
    expected = literal(layers, grads, 11)
    for layer, factor in zip(layers, factors.tolist(), strict=True):
        assert factor == pytest.approx(expected[layer.name], rel=1e-9)
        assert factor >= 1 - 1e-12
    assert all(p.grad is None for p in model.parameters())


def test_equals_brute_force_under_train_mode_batch_norm():
    """A sample's gradient is what reaches the weights through its own use: one copy of the weights a sample."""
    model, (x, y) = network("resnet8", width=2), data(8)
    parts = []
    for chosen in (slice(0, 4), slice(4, 8)):
        loss = lambda net, c=chosen: functional.cross_entropy(net(x[c]).logits, y[c], reduction="sum")  # noqa: E731
        parts.append(per_sample_grads(model, loss, 4))
    grads = {n: torch.cat([part[n] for part in parts]) for n in parts[0]}
    layers, factors = variance_factors(model, zip(x.split(4), y.split(4), strict=True))
    expected = literal(layers, grads, 8)
    for layer, factor in zip(layers, factors.tolist(), strict=True):
        assert factor == pytest.approx(expected[layer.name], rel=1e-8)


def test_identical_samples_have_factor_1():
    model, (x, y) = network("fcn5", hidden_size=5), data(1)
    _, factors = variance_factors(model, [(x.expand(6, -1, -1, -1), y.expand(6))])
    torch.testing.assert_close(factors, torch.ones_like(factors))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_measuring_does_not_change_the_training(norm):
    settings = tiny("nag", model_kwargs={"widths": [3, 4], "norm": norm}, schedule="constant", learning_rate=0.01)
    alone = train(settings, images(settings))
    history = measure_run(settings, images(settings))
    assert history.accuracy == alone.accuracy[-1]
    assert history.epochs == [0, 1, 2, 3]
    assert history.stacked().shape == (4, len(history.layers))
    again = measure_run(settings, images(settings))
    assert (history.stacked() == again.stacked()).all()


def test_csv_picture_and_sentence(tmp_path):
    settings = tiny("nag", schedule="constant", learning_rate=0.01)
    history = measure_run(settings, images(settings))
    write_csv(history, tmp_path / "m.csv")
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert len(rows) == 4 * len(history.layers)
    assert float(rows[-1]["M"]) == pytest.approx(history.values[-1][-1], rel=1e-5)
    plot_variance_factors(
        tmp_path / "m.png",
        title="tiny",
        layers=history.layers,
        thin=history.norm_or_bias,
        epochs=history.epochs,
        values=history.stacked(),
    )
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"
    history.values = [torch.arange(1, len(history.layers) + 1).double().numpy()] * 4
    assert depth_correlation(history) == pytest.approx(1)
    assert "top layers do have the larger M_k" in sentence("tiny", history)
    history.values = [values[::-1] for values in history.values]
    assert "top layers do not have the larger M_k" in sentence("tiny", history)


def test_layers_are_the_partition_of_the_optimizers():
    model = network("cnn5", width=2, hidden_size=6)
    layers, _ = variance_factors(model, [data(3)])
    assert [layer.name for layer in layers] == [layer.name for layer in param_layers(model)]


def test_the_command_measures_resnet8_on_a_folder_of_cifar10(tmp_path, monkeypatch, capsys):
    """Of the Hub's layout: parquet with `img` and `label`."""
    (tmp_path / "cifar10").mkdir()
    for split, count in (("train", 256), ("test", 32)):
        columns = {"img": [encoded(i) for i in range(count)], "label": [i % 10 for i in range(count)]}
        names = datasets.ClassLabel(names=[str(i) for i in range(10)])
        features = datasets.Features({"img": datasets.Image(), "label": names})
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet")
    command = ["measure", "--networks", "resnet8", "--epochs", "1", "--data", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--threads", "1"])
    assert measure_gradient_variance.main() == 0
    assert "resnet8: top layers" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "resnet8.csv").open()))
    assert {row["epoch"] for row in rows} == {"0", "1"}
    assert all(float(row["M"]) >= 1 for row in rows)
    assert (tmp_path / "resnet8.png").exists()


@pytest.mark.slow
def test_the_real_set_is_found(monkeypatch):
    import os
    from pathlib import Path

    folder = os.environ.get("HF_CLARS_TEST_DATA")
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("HF_CLARS_TEST_DATA names no folder with mnist")
    settings = tiny("nag", dataset="mnist", image_size=28, held_out=6000)
    found = open_images(settings, None, torch.device("cpu"))
    assert found.train_size == 54_000
    assert sum(len(y) for _, y in found.evaluation_passes()) == 6000
    assert len(found.label_names) == 10
