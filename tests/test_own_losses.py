"""Promise: a loss of the user's own is as right under accumulation as the model's: gradient, logged loss, evaluation.

Right is what one pass over the whole batch gives.
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hf_clars.errors import ConfigError
from hf_clars.trainer import ClarsTrainer, ClarsTrainingArguments
from hf_clars.trainer.loss_scale import ItemCount
from tests.trainer_kit import COMMON, Images, Plain, clars_args, plain_args, tiny_resnet

WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


class TakesKwargs(Plain):
    """A head that takes `**kwargs`, as most of transformers', and uses the number of items."""

    def forward(self, pixel_values, labels=None, num_items_in_batch=None, **kwargs):
        out = super().forward(pixel_values, labels)
        if labels is not None and num_items_in_batch is not None:
            out["loss"] = cross_entropy(out["logits"], labels, reduction="sum") / num_items_in_batch
        return out


MODELS = {"no kwargs": Plain, "uses the number": TakesKwargs, "ignores the number": tiny_resnet}


def logits_of(outputs):
    return outputs["logits"]


def focal(logits, labels):
    each = cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-each)) ** 2 * each


class Focal(ClarsTrainer):
    """A mean, as most people write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = focal(logits_of(outputs), labels).mean()
        return (loss, outputs) if return_outputs else loss


class OtherWords(ClarsTrainer):
    """Without the number in its signature, as before transformers 4.46."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = focal(logits_of(outputs), inputs["labels"]).mean()
        return (loss, outputs) if return_outputs else loss


class Divides(ClarsTrainer):
    """Divides by the number where it is given."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        each = focal(logits_of(outputs), labels)
        loss = each.mean() if num_items_in_batch is None else each.sum() / num_items_in_batch.clamp(min=1)
        return (loss, outputs) if return_outputs else loss


class SaysSo(Divides):
    """Says that it does."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        number = 16 if model.training else None
        labels = inputs["labels"]
        outputs = model(**inputs)
        each = focal(logits_of(outputs), labels)
        loss = each.mean() if number is None else each.sum() / number
        return (loss, outputs) if return_outputs else loss


class AsksTheModel(ClarsTrainer):
    """Hands the number to the model itself, and takes its loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        number = {} if type(model) is Plain or not model.training else {"num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs, **number)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class WithPenalty(ClarsTrainer):
    """Adds to what Trainer computes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 0.1 * logits_of(outputs).square().mean()
        return (loss, outputs) if return_outputs else loss


class Seq2SeqArguments(ClarsTrainingArguments, Seq2SeqTrainingArguments):
    pass


def seq2seq_args(folder, **changes):
    return Seq2SeqArguments(str(folder), **COMMON, norm_samples=0, learning_rate=1.0, log_layer_rates=False, **changes)


class Seq2SeqFocal(Focal, Seq2SeqTrainer):
    def evaluate(self, *args, **kwargs):
        return ClarsTrainer.evaluate(self, *args, **kwargs)


def weighted_mean(outputs, labels, num_items_in_batch=None):
    return (WEIGHTS[labels] * cross_entropy(logits_of(outputs), labels, reduction="none")).mean()


def weighted_share(outputs, labels, num_items_in_batch=None):
    total = (WEIGHTS[labels] * cross_entropy(logits_of(outputs), labels, reduction="none")).sum()
    return total / num_items_in_batch


class LossFunction(ClarsTrainer):
    function = staticmethod(weighted_share)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=self.function, **kwargs)


class MeanFunction(LossFunction):
    function = staticmethod(weighted_mean)


KINDS = [
    ClarsTrainer,
    Focal,
    OtherWords,
    Divides,
    SaysSo,
    AsksTheModel,
    WithPenalty,
    Seq2SeqFocal,
    LossFunction,
    MeanFunction,
]


def first_step(kind, make, folder, size, passes, data, args=clars_args, **settings):
    """(gradients of the first step, its logged loss, the loss of an evaluation after it)."""
    if issubclass(kind, Seq2SeqTrainer):
        args = seq2seq_args
    arguments = args(
        folder,
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=passes,
        per_device_eval_batch_size=4,
        **settings,
    )
    seen = []
    trainer = kind(make(), arguments, train_dataset=data, eval_dataset=data)

    class Watches(TrainerCallback):
        def on_pre_optimizer_step(self, *args, model=None, **kwargs):
            seen.append([p.grad.clone() for p in model.parameters()])

    trainer.add_callback(Watches())
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return seen[0], loss, trainer.evaluate()["eval_loss"]


def same(first, second, rtol=1e-5, atol=1e-6):
    for p, q in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    assert first[1] == pytest.approx(second[1], rel=1e-4)
    assert first[2] == pytest.approx(second[2], rel=1e-3)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_four_passes_are_one_pass_over_the_batch(tmp_path, kind, make):
    data = Images(16, channels=1)
    whole = first_step(kind, make, tmp_path / "whole", 16, 1, data)
    parts = first_step(kind, make, tmp_path / "parts", 4, 4, data)
    same(whole, parts)


@pytest.mark.parametrize("kind", [ClarsTrainer, Focal, Divides, LossFunction])
def test_a_smaller_last_pass_is_weighted_by_its_items(tmp_path, kind):
    data = Images(14)
    same(
        first_step(kind, TakesKwargs, tmp_path / "whole", 14, 1, data),
        first_step(kind, TakesKwargs, tmp_path / "parts", 4, 4, data),
    )


def as_plain(kind):
    """The same methods on the plain Trainer."""
    names = ("compute_loss", "loss_is_scaled_for_ga")
    return type(f"Plain{kind.__name__}", (Trainer,), {name: vars(kind)[name] for name in names if name in vars(kind)})


@pytest.mark.parametrize("kind", [Focal, OtherWords, SaysSo])
def test_it_is_what_the_plain_trainer_gives_where_that_is_right(tmp_path, kind):
    data = Images(16)
    ours = first_step(kind, Plain, tmp_path / "ours", 4, 4, data, method="nag", log_layer_rates=False)
    plain = first_step(as_plain(kind), Plain, tmp_path / "plain", 4, 4, data, args=plain_args, optim="sgd")
    same((*ours[:2], 1.0), (*plain[:2], 1.0))


def test_a_function_gets_the_number_and_the_plain_trainers_result(tmp_path):
    numbers = []

    def function(outputs, labels, num_items_in_batch=None):
        numbers.append(num_items_in_batch)
        return weighted_share(outputs, labels, num_items_in_batch)

    results = []
    for kind, args, more in ((ClarsTrainer, clars_args, {"method": "nag"}), (Trainer, plain_args, {"optim": "sgd"})):

        class WithFunction(kind):
            def __init__(self, *given, **named):
                super().__init__(*given, compute_loss_func=function, **named)

        results.append(first_step(WithFunction, Plain, tmp_path / kind.__name__, 4, 4, Images(16), args, **more))
    same((*results[0][:2], 1.0), (*results[1][:2], 1.0))
    assert [int(n) for n in numbers[:4]] == [16, 16, 16, 16]
    assert len({int(n) for n in numbers[4:8]}) == 1  # in evaluation: the pass's own


def test_a_sum_of_a_share_and_a_mean_is_refused(tmp_path):
    class Mixes(ClarsTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if num_items_in_batch is not None:
                loss = loss + logits_of(outputs).square().sum() / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    with pytest.raises(ConfigError, match="loss_is_scaled_for_ga = True"):
        first_step(Mixes, TakesKwargs, tmp_path / "mixed", 4, 4, Images(16))

    class SaysThatItMixes(Mixes):
        loss_is_scaled_for_ga = True

    same(
        (*first_step(SaysThatItMixes, TakesKwargs, tmp_path / "parts", 4, 4, Images(16))[:2], 1.0),
        (*first_step(SaysThatItMixes, TakesKwargs, tmp_path / "whole", 16, 1, Images(16))[:2], 1.0),
    )


class Words(Dataset):
    """Sentences of different lengths, the rest of each being -100."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 40, (8, 6), generator=generator)
        self.labels = self.ids.clone()
        for i in range(8):
            self.labels[i, 1 + (i + 1) % 6 :] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def test_next_word_models_are_weighted_by_what_they_predict(tmp_path):
    """The first word of a sentence is predicted by nobody, and counts for nothing."""

    def make():
        torch.manual_seed(0)
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=8, **dropouts))

    settings = {"method": "lars", "eval_strategy": "no"}
    whole = first_step(ClarsTrainer, make, tmp_path / "whole", 8, 1, Words(), **settings)
    parts = first_step(ClarsTrainer, make, tmp_path / "parts", 2, 4, Words(), **settings)
    same((*whole[:2], 1.0), (*parts[:2], 1.0))


class SomeUnlabelled(Images):
    """The samples of the second pass have no label, and those of the last batch have none at all."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        unlabelled = 4 <= i < 8 or i >= 16
        return item | {"labels": torch.tensor(-100)} if unlabelled else item


@pytest.mark.parametrize("method", ["clars", "lars", "nag"])
def test_a_pass_without_labels_adds_nothing_to_the_logged_loss(tmp_path, method):
    data = SomeUnlabelled(32)
    losses = {}
    for size, passes in ((16, 1), (4, 4)):
        args = clars_args(
            tmp_path / f"{size}",
            method=method,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=passes,
        )
        trainer = ClarsTrainer(Plain(), args, train_dataset=data)
        trainer.train()
        losses[size] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert losses[4] == pytest.approx(losses[16], rel=1e-5)
    assert losses[4][1] == 0.0


def test_the_number_knows_what_was_done_with_it():
    def used(do):
        number = ItemCount.of(torch.tensor(8))
        result = do(number)
        return bool(number.use), result

    assert used(lambda n: torch.tensor(4.0) / n) == (True, torch.tensor(0.5))
    assert used(lambda n: torch.tensor(4.0) / n.to("cpu").float().clamp(min=1))[0]
    assert used(lambda n: 4.0 / n.item())[0]
    assert used(lambda n: torch.tensor(4.0).div(max(n, 1)))[0]
    assert used(lambda n: torch.tensor(4.0) * (1 / n))[0]
    assert not used(lambda n: n is None or n.device == torch.device("cpu") or n > 3)[0]
    number = ItemCount.of(torch.tensor(8))
    assert type(nn.Parameter(torch.tensor(4.0)) / number) is torch.Tensor
    loss = torch.tensor(4.0)
    loss /= number
    assert loss == 0.5


@pytest.mark.parametrize("given", [{"model": Plain()}, {"model_init": Plain}], ids=lambda given: min(given))
def test_smoothed_labels_of_a_module_without_a_config_are_refused_in_words(tmp_path, given):
    """Trainer asks the model's `config` first, and ends in its AttributeError."""
    with pytest.raises(
        ConfigError, match=r"label_smoothing_factor=0.1 needs a model of transformers.*label_smoothing=0.1"
    ):
        ClarsTrainer(**given, args=clars_args(tmp_path, label_smoothing_factor=0.1), train_dataset=Images())


def test_smoothed_labels_of_a_model_of_transformers_are_one_batch_too(tmp_path):
    whole = first_step(ClarsTrainer, tiny_resnet, tmp_path / "whole", 16, 1, Images(16), label_smoothing_factor=0.1)
    parts = first_step(ClarsTrainer, tiny_resnet, tmp_path / "parts", 4, 4, Images(16), label_smoothing_factor=0.1)
    same(whole, parts)
