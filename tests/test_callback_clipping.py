"""Promise: what a trainer makes of gradients before the callback sees them is told, a factor or worse, in any model."""

import math

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, TrainerCallback

from hf_clars.per_sample import PerSampleNormsCallback
from hf_clars.per_sample.gradient import GradientProbe
from tests.callback_kit import Sentences, bert, train


def table_alone():
    """Of whose 30,000 rows a batch uses a few. The gradient of each adds up to 0, as a LayerNorm comes next."""
    torch.manual_seed(0)
    config = bert()
    config.vocab_size = 30_000
    model = BertForSequenceClassification(config).requires_grad_(False)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    return model


def head_alone():
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert()).requires_grad_(False)
    model.classifier.requires_grad_(True)  # a softmax comes next: each column adds up to 0
    return model


@pytest.mark.parametrize("model", [table_alone, head_alone])
@pytest.mark.parametrize("clip", [0.0, 1e-4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_batch_gradient_is_the_one_before_clipping(tmp_path, model, clip, accumulation):
    callback = PerSampleNormsCallback(every=1, strict=True)
    settings = {"max_grad_norm": clip, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    trainer = train(tmp_path, callback, model=model(), dataset=Sentences(), **settings)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert callback.monitor.last.step == 3
    assert float(callback.monitor.last.batch_square.sum().sqrt()) == pytest.approx(logged[-1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (30_000, 16), (1001, 3)])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_factor_is_told_from_other_changes(dtype, shape, sparse):
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    grad = torch.randn(shape, generator=generator)
    grad[3 if sparse else len(grad) :] = 0
    grad = grad.flip(0) if sparse else grad  # the last three rows, or all

    def factor_after(change):
        probe = GradientProbe([param])
        param.grad = None
        (param * grad.to(dtype)).sum().backward()
        change(param.grad)
        probe.remove()
        return float(probe.factor())

    assert factor_after(lambda g: g.mul_(0.3)) == pytest.approx(0.3, rel=0.01)
    assert factor_after(lambda g: None) == 1
    assert math.isnan(factor_after(lambda g: g.clamp_(-0.1, 0.1)))
    assert math.isnan(factor_after(lambda g: g.add_(torch.randn(shape, generator=generator))))


class ByValue(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        nn.utils.clip_grad_value_(model.parameters(), 1e-6)


def test_clipping_by_value_of_a_table_alone_is_seen(tmp_path):
    callback = PerSampleNormsCallback(every=1)
    train(tmp_path, [ByValue(), callback], model=table_alone(), dataset=Sentences())
    assert "by something else than a factor" in callback.monitor.ended
