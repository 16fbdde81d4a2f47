"""Promise: a measured step's loss is the one whose gradient the batch gradient is, or it is not told at all."""

import math

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_clars.per_sample import NormMonitor, PerSampleNormsCallback
from tests.callback_kit import Sentences, bert, train
from tests.trainer_kit import Images, Plain


class Texts(Images):
    """Every label counts, or only a few."""

    def __getitem__(self, i):
        ids = torch.arange(i, i + 9) % 30
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < i % 5, -100)}


def gpt2():
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1, n_positions=16, **none))


def sentences():
    torch.manual_seed(0)
    return BertForSequenceClassification(bert())


class Seen(TrainerCallback):
    def __init__(self, callback):
        self.callback, self.losses = callback, []

    def on_step_end(self, *args, **kwargs):
        self.losses.append(float(self.callback.monitor.last.loss))


def both(folder, model, dataset, **settings):
    """The losses that were measured, and those that Trainer logs."""
    callback = PerSampleNormsCallback(every=1, strict=True)
    seen = Seen(callback)
    trainer = train(folder, [callback, seen], model=model, dataset=dataset, **{"max_steps": 4, **settings})
    return seen.losses, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("model", "dataset"),
    [(Plain, Images(28)), (gpt2, Texts(28)), (sentences, Sentences(28))],
    ids=["mean of a pass", "share of all tokens", "divided by no one"],
)
def test_it_is_what_trainer_logs_also_in_a_shorter_last_window(tmp_path, model, dataset):
    found, logged = both(tmp_path, model(), dataset, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert found == pytest.approx(logged, rel=1e-5)


class Tuples(Plain):
    def forward(self, pixel_values, labels=None):
        out = super().forward(pixel_values, labels)
        return out["loss"], out["logits"]


def test_a_model_may_return_a_tuple_that_begins_with_it(tmp_path):
    found, logged = both(tmp_path, Tuples(), Images(28))
    assert found == pytest.approx(logged, rel=1e-5)


def test_where_trainer_computes_another_loss_the_model_s_is_not_told_in_its_place(tmp_path):
    found, _ = both(tmp_path, sentences(), Sentences(28), label_smoothing_factor=0.1)
    assert all(math.isnan(loss) for loss in found)


class OwnLoss(Plain):
    """Returns a loss, and something else to train on, as the models of trainers that compute their own."""

    def forward(self, pixel_values, labels=None):
        out = super().forward(pixel_values, labels)
        return {**out, "own": out["logits"].square().mean()}


def test_in_a_loop_a_loss_counts_as_much_as_it_is_trained_on():
    model, data = OwnLoss(), Images(8)
    batches = [{"pixel_values": data.x[i : i + 4], "labels": data.y[i : i + 4]} for i in (0, 4)]
    with NormMonitor(model, every=1, strict=True) as monitor:
        losses = []
        for batch in batches:
            with monitor.batch(last=batch is batches[-1], loss_scale=128):
                loss = model(**batch)["loss"]
                (128 * loss / 2).backward()
            losses.append(loss.detach())
        torch.testing.assert_close(monitor.last.loss.float(), torch.stack(losses).mean())
        model.zero_grad()
        with monitor.batch():
            model(**batches[0])  # looked at, and thrown away
            model(**batches[0])["own"].backward()
        assert monitor.last.samples == 4
        assert math.isnan(monitor.last.loss)
        model.zero_grad()
        with monitor.batch():
            out = model(**batches[1])
            (out["loss"] + nn.functional.relu(out["loss"])).backward()  # twice over
        torch.testing.assert_close(monitor.last.loss.float(), 2 * out["loss"].detach())
