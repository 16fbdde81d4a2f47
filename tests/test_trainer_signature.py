"""Promise: `ClarsTrainer` is called as `Trainer` is: the same words, in the same order, with the same defaults."""

import inspect
import os

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_clars.trainer import ClarsTrainer, ClarsTrainingArguments
from tests.trainer_kit import Images, Plain, clars_args


def test_the_words_their_order_and_their_defaults_are_trainers():
    theirs = inspect.signature(Trainer.__init__).parameters
    ours = inspect.signature(ClarsTrainer.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[name].default for name in theirs] == [p.default for p in theirs.values()]


def test_a_model_may_be_made_by_model_init(tmp_path):
    trainer = ClarsTrainer(args=clars_args(tmp_path, max_steps=2), model_init=Plain, train_dataset=Images())
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_third_argument_is_the_collator_and_so_on(tmp_path):
    def collate(samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    trainer = ClarsTrainer(Plain(), clars_args(tmp_path, max_steps=1), collate, Images(), Images(8))
    assert trainer.data_collator is collate
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_without_arguments_defaults_are_trainers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.environ.pop("WORLD_SIZE", None)
    trainer = ClarsTrainer(Plain())
    assert isinstance(trainer.args, ClarsTrainingArguments)
    assert trainer.args.output_dir == "tmp_trainer"


def test_without_any_model_one_sentence_says_so(tmp_path):
    with pytest.raises((RuntimeError, ValueError), match="model_init"):
        ClarsTrainer(args=clars_args(tmp_path))
    with pytest.raises((RuntimeError, ValueError), match="model_init"):
        ClarsTrainer(Plain(), clars_args(tmp_path), model_init=Plain)


def test_arguments_of_another_type_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="ClarsTrainingArguments, not Seq2SeqTrainingArguments"):
        ClarsTrainer(Plain(), Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True))


def test_a_class_that_is_mixed_in_gets_words_of_its_own(tmp_path):
    class Named(Trainer):
        def __init__(self, model, args, *, word, train_dataset=None, optimizers=(None, None)):
            super().__init__(model, args, train_dataset=train_dataset, optimizers=optimizers)
            self.word = word

    class Both(ClarsTrainer, Named):
        pass

    assert Both(Plain(), clars_args(tmp_path), train_dataset=Images(), word="mine").word == "mine"


class BothArguments(ClarsTrainingArguments, Seq2SeqTrainingArguments):
    pass


def test_mixed_with_seq2seq_trainer(tmp_path):
    class Both(ClarsTrainer, Seq2SeqTrainer):
        pass

    args = BothArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = Both(Plain(), args, train_dataset=Images())
    trainer.train()
    assert trainer.state.global_step == 2
