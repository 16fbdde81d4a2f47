"""Promise: in any Trainer, with any optimizer, the callback measures exactly and changes nothing."""

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.graph.taint import DataTaint
from hf_clars.per_sample import PerSampleLog, PerSampleNormsCallback
from tests.callback_kit import Sentences, bert, brute_force, hooks_on, train
from tests.trainer_kit import Images, Plain, plain_args


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_norms_and_noise_are_exact_under_accumulation_and_clipping(tmp_path, accumulation, clip):
    class Head(Plain):
        """Says that it takes no num_items_in_batch, as Trainer wants of such a head."""

        accepts_loss_kwargs = False

    callback = PerSampleNormsCallback(every=1, top_k=16, strict=True)
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip, "max_steps": 1}
    train(tmp_path, callback, model=Head(), per_device_train_batch_size=16 // accumulation, **settings)
    data = Images()
    norms, square = brute_force(Head(), data.x[:16], data.y[:16])
    last = callback.monitor.last
    assert last.samples == 16
    torch.testing.assert_close(last.top_norm.float(), norms.sort(descending=True).values, rtol=1e-4, atol=0)
    torch.testing.assert_close(last.batch_square.sum().float(), square, rtol=1e-4, atol=0)
    order = norms.argsort(descending=True)
    places = last.top_micro_batch * (16 // accumulation) + last.top_row
    assert torch.equal(places, order)


def test_only_every_nth_step_is_measured_and_the_first(tmp_path):
    train(tmp_path, PerSampleNormsCallback(every=4, strict=True), max_steps=9)
    assert PerSampleLog.open(tmp_path).read()["steps"].tolist() == [1, 4, 8]


def test_between_measured_steps_one_hook_takes_the_index_and_at_the_end_none_is_on_the_model(tmp_path, monkeypatch):
    begun, hooks = [], []
    original = PerSampleGradNorms._begin
    monkeypatch.setattr(PerSampleGradNorms, "_begin", lambda self, *a: (begun.append(1), original(self, *a)))
    callback = PerSampleNormsCallback(every=3, strict=True)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            hooks.append(hooks_on(model))

    trainer = train(tmp_path, [callback, Watch()], max_steps=6)
    assert [number > 1 for number in hooks] == [True, False, True, False, False, True]
    assert [number for number in hooks if number < 2] == [1, 1, 1]
    assert len(begun) == 3
    assert hooks_on(trainer.model) == 0


def test_what_is_learned_of_the_model_is_learned_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("hf_clars.grad_norms.graph.taint.DataTaint", lambda batch: made.append(1) or DataTaint(batch))
    train(tmp_path, PerSampleNormsCallback(every=1, strict=True), max_steps=4)
    assert len(made) == 1


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_weights_are_those_of_a_run_without(tmp_path, precision):
    def weights(callbacks):
        torch.manual_seed(0)
        model = BertForSequenceClassification(bert()) if "gradient_checkpointing" in precision else Plain()
        data = Sentences() if "gradient_checkpointing" in precision else Images()
        return train(tmp_path, callbacks, model=model, dataset=data, **precision).model.state_dict()

    callback = PerSampleNormsCallback(every=2, strict=True)
    with_it, without = weights([callback]), weights([])
    assert callback.monitor.noise.steps == 4
    near = {"rtol": 0.05, "atol": 0.01} if "bf16" in precision else {"rtol": 1e-4, "atol": 1e-6}  # 8 bits
    for name in without:
        torch.testing.assert_close(with_it[name], without[name], **near)


class LowRank(nn.Module):
    """A frozen linear layer and its low-rank adapter, as LoRA has it."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        self.b = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_adapters_and_padded_sequences_with_checkpointing_are_exact(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert())
    model.requires_grad_(False)
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = LowRank(layer.attention.self.query)
    callback = PerSampleNormsCallback(every=1, top_k=8, strict=True)
    data = Sentences()
    trainer = train(
        tmp_path, callback, model=model, dataset=data, max_steps=1, learning_rate=0.0, gradient_checkpointing=True
    )
    assert all(".a" in layer.name or ".b" in layer.name for layer in callback.monitor.layers)
    model.gradient_checkpointing_disable()
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    norms = []
    for i in range(8):
        item = {k: v[None] for k, v in data[i].items()}
        grads = torch.autograd.grad(model(**item).loss, params)
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    expected = torch.stack(norms).sort(descending=True).values
    torch.testing.assert_close(callback.monitor.last.top_norm.float(), expected, rtol=1e-4, atol=1e-9)


def test_an_evaluation_between_steps_is_not_measured(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    callback = PerSampleNormsCallback(every=1, strict=True)
    args = plain_args(tmp_path, per_device_train_batch_size=8, **settings)
    Trainer(Plain(), args, train_dataset=Images(), eval_dataset=Images(16), callbacks=[callback]).train()
    assert PerSampleLog.open(tmp_path).read()["samples"].tolist() == [8, 8, 8]
