"""Promise: `rank_samples` gives each sample's own loss and gradient norm, goes on where it stopped, changes nothing."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from hf_clars.errors import DataError, HfClarsError
from hf_clars.per_sample import rank_samples, ranking, with_index
from hf_clars.per_sample.losses import UnknownLossError
from tests.callback_kit import Sentences, brute_force
from tests.trainer_kit import Images, Plain


class Batch(Plain):
    """Train-mode BatchNorm and dropout: evaluation mode makes samples independent."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_var.fill_(2.0)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values, labels=None):
        logits = self.classifier(self.dropout(torch.relu(self.norm(self.conv(pixel_values))).flatten(1)))
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("kind", [Plain, Batch])
def test_norms_and_losses_are_those_of_each_sample_alone(kind):
    model, data = kind(), Images(20)
    ranked = rank_samples(model, data, batch_size=7, per_layer=True, progress=False)
    norms, _ = brute_force(kind().eval(), data.x, data.y)
    assert list(ranked["index"]) == list(range(20))
    torch.testing.assert_close(torch.tensor(list(ranked["norm"])).float(), norms, rtol=1e-4, atol=0)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model.eval()(data.x)["logits"], data.y, reduction="none")
    torch.testing.assert_close(torch.tensor(list(ranked["loss"])).float(), losses, rtol=1e-5, atol=1e-7)
    layers = torch.tensor([list(ranked[c]) for c in ranked.column_names if c.startswith("norm/")])
    torch.testing.assert_close(layers.norm(dim=0).float(), norms, rtol=1e-4, atol=0)


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


class Texts(Sentences):
    """Padded texts of different lengths, whose padding bears no loss."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return {**item, "labels": torch.where(item["attention_mask"] > 0, item["input_ids"], -100)}


def test_a_language_model_s_samples_are_whole_texts_whatever_they_are_padded_to():
    model, data = gpt2(), Texts(10)
    ranked = rank_samples(model, data, batch_size=4, progress=False)
    for i in range(10):
        loss = model(**{k: v[None] for k, v in data[i].items()}).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert ranked["norm"][i] == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-4)
        assert ranked["loss"][i] == pytest.approx(loss.item(), rel=1e-5)


def test_the_model_is_left_as_it_was():
    model = Batch().train()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rank_samples(model, Images(12), batch_size=5, progress=False)
    assert model.training
    assert all((param.grad == 1).all() for param in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_ranking_that_was_stopped_goes_on_and_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(ranking, "ROWS_A_FILE", 8)
    whole = rank_samples(Plain(), Images(30), batch_size=4, progress=False)

    class Fails(Images):
        def __getitem__(self, i):
            if i == 22:
                raise OSError("the disk is gone")
            return super().__getitem__(i)

    with pytest.raises(OSError, match="the disk is gone"):
        rank_samples(Plain(), Fails(30), batch_size=4, output=tmp_path / "r", progress=False)
    seen = []

    class Counts(Images):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    again = rank_samples(Plain(), Counts(30), batch_size=4, output=tmp_path / "r", progress=False)
    assert not {1, 2, 4, 5, 14} & set(seen)  # a few others are looked at, to know the data set again
    assert list(again["index"]) == list(range(30))
    assert list(again["norm"]) == list(whole["norm"])


def test_an_output_of_other_weights_is_refused(tmp_path):
    rank_samples(Plain(), Images(8), output=tmp_path, progress=False)
    other = Plain()
    nn.init.ones_(other.conv.bias)
    with pytest.raises(DataError, match="other weights"):
        rank_samples(other, Images(8), output=tmp_path, progress=False)


def test_weights_that_are_the_same_numbers_at_other_places_are_other_weights(tmp_path):
    rank_samples(Plain(), Images(8), output=tmp_path, progress=False)
    other = Plain()
    with torch.no_grad():
        other.classifier.weight.copy_(other.classifier.weight.flip(1))
    with pytest.raises(DataError, match="other weights"):
        rank_samples(other, Images(8), output=tmp_path, progress=False)


def test_an_output_of_other_data_of_the_same_length_is_refused(tmp_path):
    rank_samples(Plain(), Images(8), output=tmp_path, progress=False)
    other = Images(8)
    other.x = other.x * 2
    with pytest.raises(DataError, match="other data"):
        rank_samples(Plain(), other, output=tmp_path, progress=False)


def test_a_data_set_whose_items_change_at_each_look_goes_on_all_the_same(tmp_path):
    class Noisy(Images):
        def __getitem__(self, i):
            item = super().__getitem__(i)
            return {**item, "pixel_values": item["pixel_values"] + torch.randn(1, 8, 8)}

    first, again = (rank_samples(Plain(), Noisy(8), output=tmp_path, progress=False) for _ in range(2))
    assert list(first["norm"]) == list(again["norm"])


def test_only_the_indices_asked_for_are_ranked():
    ranked = rank_samples(Plain(), Images(), indices=[9, 3, 5], progress=False)
    assert list(ranked["index"]) == [9, 3, 5]
    with pytest.raises(DataError, match="between 0 and 63"):
        rank_samples(Plain(), Images(), indices=[64], progress=False)


@pytest.mark.parametrize(
    "given", [np.array([9, 3]), torch.tensor([9, 3]), iter([9, 3]), [np.int64(9), torch.tensor(3)]]
)
def test_indices_may_come_in_any_form(given):
    assert list(rank_samples(Plain(), Images(), indices=given, progress=False)["index"]) == [9, 3]


@pytest.mark.parametrize("given", [[True, False], np.zeros(64, bool), torch.ones(64) > 0, [1.5], ["a"], 3, [[1], [2]]])
def test_a_mask_is_not_taken_for_samples_0_and_1_nor_anything_else_for_indices(given):
    with pytest.raises(DataError, match="whole numbers"):
        rank_samples(Plain(), Images(), indices=given, progress=False)


class Smoothed(Plain):
    def forward(self, pixel_values, labels=None):
        out = super().forward(pixel_values, labels)
        out["loss"] = nn.functional.cross_entropy(out["logits"], labels, label_smoothing=0.3)
        return out


def test_another_loss_than_cross_entropy_is_refused_unless_it_is_given():
    with pytest.raises(UnknownLossError, match="smooths labels"):
        rank_samples(Smoothed(), Images(8), progress=False)

    def losses(model, batch):
        logits = model(**batch)["logits"]
        return nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.3, reduction="none")

    ranked = rank_samples(Smoothed(), Images(8), losses=losses, progress=False)
    norms, _ = brute_force(Smoothed(), Images(8).x, Images(8).y)
    torch.testing.assert_close(torch.tensor(list(ranked["norm"])).float(), norms, rtol=1e-4, atol=0)


def test_items_may_be_tuples_where_a_function_makes_batches_of_them():
    data = Images(10)
    pairs = TensorDataset(data.x, data.y)

    def collate(items):
        return {"pixel_values": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items])}

    ranked = rank_samples(Plain(), pairs, batch_size=4, collate=collate, progress=False)
    norms, _ = brute_force(Plain(), data.x, data.y)
    torch.testing.assert_close(torch.tensor(list(ranked["norm"])).float(), norms, rtol=1e-4, atol=0)
    with pytest.raises(DataError, match=r"Item 0 of the data set is a tuple.*give collate="):
        rank_samples(Plain(), pairs, progress=False)


def test_the_column_of_a_data_set_for_training_does_not_reach_the_model():
    ranked = rank_samples(Plain(), with_index(Images(6)), progress=False)
    assert list(ranked["norm"]) == list(rank_samples(Plain(), Images(6), progress=False)["norm"])


def test_an_output_of_another_loss_or_other_batches_is_refused(tmp_path):
    rank_samples(Plain(), Images(8), output=tmp_path, progress=False)
    with pytest.raises(DataError, match="other functions"):
        rank_samples(Plain(), Images(8), losses=lambda m, b: m(**b)["logits"].sum(1), output=tmp_path, progress=False)
    with pytest.raises(DataError, match="other functions"):
        rank_samples(Plain(), Images(8), collate=default_data_collator, output=tmp_path, progress=False)


def test_where_nothing_is_to_be_ranked_the_columns_are_as_promised():
    features = rank_samples(Plain(), Images(8), per_layer=True, indices=[], progress=False).features
    assert features == rank_samples(Plain(), Images(8), per_layer=True, indices=[3], progress=False).features


def test_a_model_that_does_not_train_is_refused():
    with pytest.raises(DataError, match="Plain has no trainable parameter"):
        rank_samples(Plain().requires_grad_(False), Images(8), progress=False)


@pytest.mark.parametrize(("dataset", "said"), [(iter([]), "no length"), ({"train": [1]}, "dict with the keys train")])
def test_what_has_no_items_by_number_is_refused(dataset, said):
    with pytest.raises(DataError, match=said):
        rank_samples(Plain(), dataset, progress=False)


class Strict(Plain):
    """Takes what it names, and nothing else."""

    def forward(self, pixel_values, labels):
        return super().forward(pixel_values, labels)


def test_columns_that_the_model_does_not_name_are_left_out_as_trainer_does():
    rows = [{"label": int(y), "pixel_values": x, "idx": i, "text": "a"} for i, (x, y) in enumerate(_pairs())]
    expected = rank_samples(Plain(), Images(6), progress=False)
    assert list(rank_samples(Strict(), rows, progress=False)["norm"]) == list(expected["norm"])


def _pairs():
    return list(zip(Images(6).x, Images(6).y, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixel_values": None}, "make no batch"),
        ({"pixel_values": torch.randn(1, 4, 4)}, "make no batch"),
        ({"labels": 3}, "cannot be called with the batch's pixel_values, labels .IndexError"),
        ({"labels": 1.0}, "whole-numbered"),
        ({}, "Plain cannot be called with the batch's labels .TypeError"),
    ],
)
def test_items_that_do_not_fit_are_an_error_in_a_sentence(change, said):
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in _pairs()]
    rows = [rows[0], {**rows[1], **change}] if change else [{"labels": 1}]
    with pytest.raises(HfClarsError, match=said):
        rank_samples(Plain(), rows, progress=False)


def test_what_is_no_module_and_no_number_of_samples_is_refused():
    with pytest.raises(DataError, match="no torch module"):
        rank_samples(None, Images(6), progress=False)
    with pytest.raises(DataError, match=r"batch_size=2\.5"):
        rank_samples(Plain(), Images(6), batch_size=2.5, progress=False)


def test_gradients_are_computed_also_where_the_caller_has_none():
    model, data = Plain(), Images(6)
    with torch.inference_mode():
        ranked = rank_samples(model, data, progress=False)
    assert list(ranked["norm"]) == list(rank_samples(model, data, progress=False)["norm"])


# ---- whose loss it is ------------------------------------------------------------------------------------------


class NearlyCrossEntropy(Plain):
    """Outputs so small that the losses differ by less than a part in a hundred."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, pixel_values, labels=None):
        logits = 0.02 * super().forward(pixel_values)["logits"]
        return {"loss": nn.functional.cross_entropy(logits, labels, **self.settings), "logits": logits}


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 5.0, 1.0])}], ids=str)
def test_another_loss_is_seen_too_where_it_is_nearly_the_same_number(settings):
    assert len(rank_samples(NearlyCrossEntropy(), Images(8), progress=False)) == 8
    with pytest.raises(UnknownLossError, match="smooths labels, weighs classes"):
        rank_samples(NearlyCrossEntropy(**settings), Images(8), progress=False)


class Words(nn.Module):
    """Predicts the next word, and its name does not say so; or this one's class."""

    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(0)
        self.shift, self.table, self.head = shift, nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids, labels):
        logits = self.head(self.table(input_ids))
        left, right = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return {"loss": nn.functional.cross_entropy(left.flatten(0, 1), right.flatten()), "logits": logits}


@pytest.mark.parametrize("shift", [False, True])
def test_whether_labels_are_shifted_is_read_off_the_model_s_loss(shift):
    ids = torch.randint(0, 9, (5, 7), generator=torch.Generator().manual_seed(0))
    ranked = rank_samples(Words(shift), [{"input_ids": row, "labels": row} for row in ids], progress=False)
    model = Words(shift)
    for row, norm in zip(ids, ranked["norm"], strict=True):
        grads = torch.autograd.grad(model(row[None], row[None])["loss"], list(model.parameters()))
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-5)


def test_where_nothing_tells_it_is_refused():
    model = Words(shift=True)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    with pytest.raises(UnknownLossError, match="whether it shifts labels"):
        rank_samples(model, [{"input_ids": torch.arange(7), "labels": torch.arange(7)}], progress=False)


def test_a_batch_without_a_label_that_counts_has_no_loss_and_no_gradient():
    ids = torch.arange(7)
    rows = [{"input_ids": ids, "labels": torch.full((7,), -100)}, {"input_ids": ids, "labels": ids}]
    ranked = rank_samples(Words(shift=False), rows, batch_size=1, progress=False)
    assert ranked["norm"][0] == ranked["loss"][0] == 0 < ranked["norm"][1]
