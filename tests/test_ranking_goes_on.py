"""Promise: a ranking goes on where it was stopped, and only where all that its numbers depend on is as before."""

import functools

import datasets
import pyarrow.parquet as parquet
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from hf_clars.errors import DataError
from hf_clars.layers import param_layers
from hf_clars.per_sample import rank_samples, ranking, with_index
from tests.callback_kit import Sentences, bert
from tests.trainer_kit import Images, Plain

SMOOTHING = 0.1


def smoothed(model, batch, smoothing):
    logits = model(**batch)["logits"]
    return nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=smoothing, reduction="none")


def by_the_module(model, batch):
    return smoothed(model, batch, SMOOTHING)


def by_its_default(smoothing):
    def losses(model, batch, smoothing=smoothing):
        return smoothed(model, batch, smoothing)

    return losses


def by_a_tensor(held):
    return lambda model, batch: smoothed(model, batch, float(held))


def by_another(inner):
    return lambda model, batch: inner(model, batch)


class ByItsObject:
    def __init__(self, smoothing):
        self.smoothing = smoothing

    def __call__(self, model, batch):
        return smoothed(model, batch, self.smoothing)

    def of_a_method(self, model, batch):
        return smoothed(model, batch, self.smoothing)


WAYS = {
    "closure": lambda value: lambda model, batch: smoothed(model, batch, value),
    "tensor": lambda value: by_a_tensor(torch.tensor(value)),
    "partial": lambda value: functools.partial(smoothed, smoothing=value),
    "default": by_its_default,
    "object": ByItsObject,
    "method": lambda value: ByItsObject(value).of_a_method,
    "function within": lambda value: by_another(by_its_default(value)),
}


def rank(folder, model=None, data=None, **settings):
    model, data = Plain() if model is None else model, Images(8) if data is None else data
    return rank_samples(model, data, output=folder, progress=False, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_a_function_with_another_value_is_another_function(tmp_path, way):
    first = rank(tmp_path, losses=WAYS[way](0.1))
    assert list(rank(tmp_path, losses=WAYS[way](0.1))["norm"]) == list(first["norm"])
    with pytest.raises(DataError, match="other functions"):
        rank(tmp_path, losses=WAYS[way](0.9))


def test_a_value_of_the_function_s_module_counts_too(tmp_path, monkeypatch):
    rank(tmp_path, losses=by_the_module)
    monkeypatch.setitem(by_the_module.__globals__, "SMOOTHING", 0.9)
    with pytest.raises(DataError, match="other functions"):
        rank(tmp_path, losses=by_the_module)


def test_a_function_that_calls_itself_is_told_too(tmp_path):
    def losses(model, batch, again=True):
        return losses(model, batch, again=False) if again else smoothed(model, batch, 0.1)

    assert list(rank(tmp_path, losses=losses)["norm"]) == list(rank(tmp_path, losses=losses)["norm"])


def test_other_parameters_that_train_are_another_ranking(tmp_path):
    rank(tmp_path)
    frozen, plain = Plain(), Plain()
    frozen.conv.requires_grad_(False)
    with pytest.raises(DataError, match="other parameters"):
        rank(tmp_path, frozen)
    with pytest.raises(DataError, match="other parameters"):
        rank(tmp_path, plain, layers=param_layers(plain)[-1:])


def test_another_configuration_or_module_with_the_same_weights_is_another_model(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert())
    rank(tmp_path / "config", model, Sentences(8))
    rank(tmp_path / "config", model, Sentences(8))  # calls have set an entry of its configuration meanwhile
    config = bert()
    config.hidden_act = "relu"
    other = BertForSequenceClassification(config)
    other.load_state_dict(model.state_dict())
    with pytest.raises(DataError, match="other model"):
        rank(tmp_path / "config", other, Sentences(8))
    rank(tmp_path / "module")
    plain = Plain()
    plain.norm.eps = 0.1
    with pytest.raises(DataError, match="other model"):
        rank(tmp_path / "module", plain)


@pytest.mark.parametrize("indexed", [False, True])
def test_one_label_that_was_corrected_is_other_data(tmp_path, indexed):
    images = Images(40)
    rows = [{"pixel_values": x.tolist(), "labels": int(y)} for x, y in zip(images.x, images.y, strict=True)]
    assert 3 % (40 // 8) != 0  # it is not among those that are looked at

    def data(rows):
        made = datasets.Dataset.from_list(rows).with_format("torch")
        return with_index(made) if indexed else made

    rank(tmp_path, data=data(rows))
    rank(tmp_path, data=data(rows))
    rows[3]["labels"] = (rows[3]["labels"] + 1) % 3
    with pytest.raises(DataError, match="other data"):
        rank(tmp_path, data=data(rows))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_was_ranked_before_a_stop_is_kept_to_the_last_batch(tmp_path, error):
    class Stops(Images):
        looks = 0

        def __getitem__(self, i):
            self.looks += 1
            if self.looks > 30:  # 20 at the beginning, to know the data set
                raise error
            return super().__getitem__(i)

    whole = rank_samples(Plain(), Images(20), batch_size=5, progress=False)
    with pytest.raises(error):
        rank(tmp_path, data=Stops(20), batch_size=5)
    assert sum(len(parquet.read_table(part)) for part in tmp_path.glob("part-*.parquet")) == 10
    again = rank(tmp_path, data=Images(20), batch_size=3)
    assert list(again["index"]) == list(range(20))
    torch.testing.assert_close(torch.tensor(list(again["norm"])), torch.tensor(list(whole["norm"])), rtol=1e-6, atol=0)


def test_a_call_that_is_killed_has_lost_a_minute_at_most(tmp_path, monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 25
        return now[0]

    monkeypatch.setattr(ranking.time, "monotonic", clock)
    rank(tmp_path, data=Images(20), batch_size=2)
    assert len(list(tmp_path.glob("part-*.parquet"))) >= 3
