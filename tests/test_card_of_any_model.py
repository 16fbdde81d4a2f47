"""A card says what is known of a model and nothing else: no task, library, origin or licence is guessed."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from hf_clars.hub import HubError, build_model_card
from hf_clars.hub.licences import licence_identifier
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.card import gather_facts
from tests.test_hub_card import SUMMARY
from tests.trainer_kit import Images, clars_args, tiny_resnet


class Table(Dataset):
    """Rows of numbers."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return {"columns": torch.full((4,), float(i) / 32), "labels": torch.tensor(i % 2)}


class Tabular(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, columns, labels=None):
        logits = self.layer(columns)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def card_of(model, data, folder):
    args = clars_args(folder, max_steps=1, per_device_train_batch_size=8)
    trainer = ClarsTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    return build_model_card(gather_facts(trainer, model_name="net", dataset="rows"))


def test_a_bare_module_on_a_table_is_no_image_classifier_of_transformers(tmp_path):
    card = card_of(Tabular(), Table(), tmp_path)
    data = card.data.to_dict()
    assert not {"library_name", "pipeline_tag", "metrics", "model-index"} & set(data)
    assert not any("image" in tag for tag in data["tags"])
    assert "A network (Tabular, 10 parameters), trained on rows" in card.text
    assert "load_model" in card.text
    for word in ("image classifier", "scratch", "AutoModel", "any image"):
        assert word not in card.text


def test_an_image_classifier_of_transformers_is_called_one_but_not_said_to_be_from_scratch(tmp_path):
    card = card_of(tiny_resnet(), Images(32), tmp_path)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert "An image classifier (ResNetForImageClassification" in card.text
    assert "scratch" not in card.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "trained on MNIST digits"),
        ({"origin": "scratch"}, "trained from scratch on"),
        ({"origin": "checkpoint"}, "trained from the weights of a checkpoint that is not on the Hub on"),
        ({"base_model": "owner/net"}, "trained from owner/net on"),
    ],
)
def test_the_origin_is_told_where_it_is_known(changes, words):
    assert words in build_model_card(dataclasses.replace(SUMMARY, **changes)).text


@pytest.mark.parametrize("word", ["mit", "Apache-2.0", " cc-by-4.0 ", "openrail++", "other"])
def test_licences_of_the_hub_are_written_as_the_hub_spells_them(word):
    assert build_model_card(dataclasses.replace(SUMMARY, license=word)).data.license == word.strip().lower()


@pytest.mark.parametrize(("word", "near"), [("apache", "apache-2.0"), ("GPL3", "gpl-3.0"), ("mine", ""), ("", "")])
def test_other_words_are_no_licences(word, near):
    with pytest.raises(HubError, match=f"no licence that the Hub knows.*{near}.*'other'"):
        licence_identifier(word)
    with pytest.raises(HubError):
        build_model_card(dataclasses.replace(SUMMARY, license=word))


def test_the_paragraph_on_the_batch_size_is_written_only_when_asked_for(tmp_path, monkeypatch):
    from hf_clars.hub import card_files, write_card

    asked = []
    monkeypatch.setattr(card_files, "_batch_advice", lambda *given: asked.append(given))
    write_card(tmp_path, SUMMARY)
    assert not asked
    write_card(tmp_path, SUMMARY, batch_advice=True)
    assert len(asked) == 1
