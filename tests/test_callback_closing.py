"""Promise: a watched training says at its end on which side of the noise scale its batch is, and what hurt most."""

import pytest
import torch

from hf_clars.per_sample import PerSampleNormsCallback, with_index
from tests.callback_kit import train
from tests.trainer_kit import Images, Plain


def closing(capsys, callback, folder, **settings):
    """The lines of the end, by their first words."""
    train(folder, callback, max_steps=4, **settings)
    text = capsys.readouterr().out
    begin = text.find("Per-sample gradient norms")
    return "" if begin < 0 else text[begin:]


@pytest.mark.parametrize(("alike", "words"), [(True, "is above it"), (False, "is below it")])
def test_the_side_of_the_noise_scale_that_the_batch_is_on_is_said(tmp_path, capsys, alike, words):
    data = Images()
    data.y = torch.zeros_like(data.y) if alike else data.y.roll(3)
    callback = PerSampleNormsCallback(every=1, strict=True, decay=1.0)
    text = closing(capsys, callback, tmp_path, dataset=data, learning_rate=0.0)
    read = callback.monitor.noise.layer(callback.monitor.noise.read(), -1)
    assert f"noise scale  {read['value']:.3g} samples" in text
    assert f"the batch of 8 {words}" in text
    assert read["high"] < 8 if alike else read["low"] > 8
    assert f"hf-clars plot {tmp_path}" in text


def test_the_hardest_examples_are_named_by_their_index_once_each(tmp_path, capsys):
    callback = PerSampleNormsCallback(every=1, top_k=8, strict=True)
    text = closing(capsys, callback, tmp_path, dataset=with_index(Images()), logging_steps=4)
    line = next(line for line in text.splitlines() if "hardest" in line)
    named = [piece.split(" ")[0] for piece in line.split("index ")[1:]]
    assert 1 <= len(named) == len(set(named)) <= 5


def test_it_is_said_why_a_noise_scale_or_an_index_is_not_known(tmp_path, capsys):
    def words(folder, *, model=None, batch=8, **settings):
        settings = {"every": 1, "strict": True, **settings}
        given = {"model": model, "per_device_train_batch_size": batch}
        return closing(capsys, PerSampleNormsCallback(**settings), tmp_path / folder, **given)

    class Normed(Plain):
        def __init__(self):
            super().__init__()
            self.before = torch.nn.BatchNorm2d(1)

        def forward(self, pixel_values, labels=None):
            return super().forward(pixel_values=self.before(pixel_values), labels=labels)

    assert "a step had one row only" in words("one", batch=1)
    assert "left out: a BatchNorm" in words("coupled", model=Normed())
    assert "noise scale" not in words("norms", noise_scale=False)
    assert "read a trend off it, and no batch size" in words("cheap", norm_layers_only=True)
    assert "with_index(dataset)" in words("index")
    assert "hardest" not in words("none", top_k=0)
    assert "left in" not in words("unkept", keep_log=False)


def test_a_training_that_was_not_measured_says_nothing(tmp_path, capsys):
    class Other(Plain):
        def forward(self, pixel_values, labels=None):
            raise_in_measuring()
            return super().forward(pixel_values, labels)

    def raise_in_measuring():
        callback.monitor and callback.monitor.end(RuntimeError("no"))

    callback = PerSampleNormsCallback(every=1)
    assert closing(capsys, callback, tmp_path, model=Other()) == ""
