"""Promise: a run resumes bit for bit also where a shape of its first pass leaves it open whose rows are whose.

The weight gradients of such calls come from autograd until that is proven, and then from the samples' where it is
cheaper: the digits of a sum depend on which. What was proven is part of the optimizer's state.
"""

import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_clars import CLARS, PerSampleGradNorms, SignalLARS
from hf_clars.errors import HfClarsError
from hf_clars.grad_norms.resumed import expect_calls, proven_calls
from hf_clars.trainer import ClarsTrainer
from tests.oracle import layer_norms, one_by_one
from tests.trainer_kit import clars_args, plain_args

LENGTHS = [7, 12, 12, 14, 12, 8]  # 8 and 12 positions may be those of 4 samples; products are cheap for 10 and more


class Texts(torch.utils.data.Dataset):
    """Batches of four texts of one length."""

    def __len__(self):
        return 4 * len(LENGTHS)

    def __getitem__(self, i):
        ids = torch.arange(i, i + LENGTHS[i // 4]) * 7 % 40
        return {"input_ids": ids, "labels": ids}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_attention_heads=2, num_key_value_heads=1, **sizes))


SETTINGS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.5,
}


def in_ours(folder, method):
    args = clars_args(folder, method=method, **SETTINGS)
    return ClarsTrainer(llama(), args, train_dataset=Texts())


def in_the_plain(folder, kind):
    model = llama()
    settings = {"train_dataset": Texts(), "optimizers": (kind(model, lr=0.5), None)}
    return Trainer(model, plain_args(folder, **SETTINGS), **settings)


CASES = [(in_ours, "clars"), (in_ours, "signal_lars"), (in_the_plain, CLARS), (in_the_plain, SignalLARS)]


@pytest.mark.parametrize(("make", "method"), CASES)
@pytest.mark.parametrize("step", [1, 2])
def test_the_weights_at_the_end_are_those_of_the_run_that_went_on(tmp_path, make, method, step):
    whole, resumed = make(tmp_path, method), make(tmp_path, method)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    expected = whole.model.state_dict()
    assert [n for n, w in resumed.model.state_dict().items() if not torch.equal(w, expected[n])] == []


def test_what_is_proven_is_plain_and_a_state_without_it_loads_as_before():
    model = llama()
    optimizer = CLARS(model)
    ids = Texts()[0]["input_ids"].expand(4, -1)
    model(input_ids=ids, labels=ids)["loss"].backward()
    optimizer.step()
    proven = optimizer.state_dict()["proven_calls"]
    assert proven == json.loads(json.dumps(proven))
    assert proven["model.layers.0.self_attn.k_proj"] == [[1, 3]]
    bare = {name: value for name, value in optimizer.state_dict().items() if name != "proven_calls"}
    CLARS(llama()).load_state_dict(bare)


class TimeFirst(nn.Module):
    """As many steps as samples: nothing but the graph shows which axis is whose."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        steps = torch.tanh(self.first(x)).transpose(0, 1)  # [T, B, width]
        return torch.tanh(self.second(steps)).cumsum(0).transpose(0, 1).square().sum((1, 2))


def test_an_expectation_that_is_wrong_is_not_believed():
    model, x = TimeFirst(), torch.randn(12, 12, 3)
    for _ in range(3):
        with PerSampleGradNorms(model, loss_reduction="sum") as norms:
            expect_calls(norms, {"first": [[1, 3]], "second": [[1, 3]]})
            try:
                model(x).sum().backward()
                found = norms.per_sample
            except HfClarsError:
                return  # said, and not wrong
            assert proven_calls(norms).get("second") is None
        model.zero_grad()
        grads = one_by_one(model, lambda m, i: m(x[i : i + 1].double()).sum(), len(x))
        for name, norm in layer_norms(grads, norms.layers).items():
            torch.testing.assert_close(found[name].double(), norm, rtol=1e-4, atol=1e-6)
