"""Promise: under TRL's trainers of rewards, preferences and groups too, the callback measures each row exactly.

The oracle gives every row a copy of the model, lets the trainer compute its loss from what the copies return, and takes
the gradient of each copy.
"""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs peft: pip install 'hf_clars[trl]'")
trl = pytest.importorskip("trl", reason="needs trl: pip install 'hf_clars[trl]'")

import datasets  # noqa: E402
from transformers import LlamaForSequenceClassification, TrainerCallback  # noqa: E402

from hf_clars.per_sample import PerSampleNormsCallback  # noqa: E402
from tests.test_trl_and_peft import NEAR, SETTINGS, llama, pairs, tokenizer  # noqa: E402

cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")


class OneCopyARow(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.copies = model, []

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("model", "copies") else getattr(self.model, name)

    def forward(self, input_ids, **others):
        rows = len(input_ids)
        self.copies[:] = [copy.deepcopy(self.model) for _ in range(rows)]
        given = {"input_ids": input_ids, **others}

        def row(i):
            return {
                k: v[i : i + 1] if torch.is_tensor(v) and v.dim() and len(v) == rows else v for k, v in given.items()
            }

        found = [model(**row(i)) for i, model in enumerate(self.copies)]
        for name, value in found[0].items():
            if torch.is_tensor(value) and value.dim():
                found[0][name] = torch.cat([each[name] for each in found])
        return found[0]


class Compares(TrainerCallback):
    """In each step, every row's norm with that of its copy."""

    def __init__(self, callback, trainer):
        self.callback, self.trainer, self.rows, self.steps = callback, trainer, [], 0
        self.original, trainer.compute_loss = trainer.compute_loss, self.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        kept = dict(inputs)
        rows = OneCopyARow(copy.deepcopy(self.bare))
        self.bare_loss(rows, kept, **kwargs).backward()
        self.rows += [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in rows.copies]
        return self.original(model, inputs, *args, **kwargs)

    def bare_loss(self, rows, inputs, num_items_in_batch=None, **_):
        found = type(self.trainer).compute_loss(self.trainer, rows, inputs, num_items_in_batch=num_items_in_batch)
        scaled = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        takes = self.trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return (
            found if (takes if scaled is None else scaled) else found / self.trainer.current_gradient_accumulation_steps
        )

    def on_step_begin(self, *args, **kwargs):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.bare = copy.deepcopy(model)  # hooks stay with the model that they were placed on
        self.bare.zero_grad()

    def on_step_end(self, *args, **kwargs):
        last, expected = self.callback.monitor.last, torch.stack(self.rows)
        assert last.samples == len(expected)
        assert expected.any()
        norms = (len(expected) * expected.norm(dim=1)).sort(descending=True).values
        torch.testing.assert_close(last.top_norm[: len(norms)], norms, **NEAR)
        torch.testing.assert_close(last.batch_square.sum().sqrt(), expected.sum(0).norm(), **NEAR)
        self.steps += 1
        self.rows.clear()


def reward_model():
    torch.manual_seed(0)
    config = llama(tied=False).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config).double()


def without_prompt(row):
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def answers():
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(pairs(16))]
    return datasets.Dataset.from_list(rows)


CASES = {
    "reward": lambda: (trl.RewardTrainer, trl.RewardConfig, reward_model(), pairs(16).map(without_prompt), {}),
    "kto": lambda: (trl.KTOTrainer, trl.KTOConfig, llama(False), answers(), {"ref_model": llama(False)}),
    "orpo": lambda: (orpo.ORPOTrainer, orpo.ORPOConfig, llama(False), pairs(16), {}),
    "cpo": lambda: (cpo.CPOTrainer, cpo.CPOConfig, llama(False), pairs(16), {}),
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_exact_while_the_model_learns(tmp_path, case, passes):
    kind, config, model, data, others = CASES[case]()
    settings = {**SETTINGS, "learning_rate": 1e-2, "max_steps": 4, "gradient_accumulation_steps": passes}
    callback = PerSampleNormsCallback(every=1, top_k=16, strict=True)
    args = config(str(tmp_path), **settings)
    trainer = kind(model, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=[callback], **others)
    compares = Compares(callback, trainer)
    trainer.add_callback(compares)
    trainer.train()
    assert compares.steps == 4


def test_answers_of_a_group_are_exact(tmp_path):
    callback = PerSampleNormsCallback(every=1, top_k=16, strict=True)
    prompts = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in pairs(8)])
    settings = {k: v for k, v in SETTINGS.items() if k not in ("max_length", "train_sampling_strategy")}
    settings |= {"learning_rate": 1e-2, "max_steps": 3, "num_generations": 4, "max_completion_length": 5}
    model = llama(False)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [len(set(text)) + 0.3 * i for i, text in enumerate(completions)],
        args=trl.GRPOConfig(str(tmp_path), **settings),
        train_dataset=prompts,
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    compares = Compares(callback, trainer)
    trainer.add_callback(compares)
    trainer.train()
    assert compares.steps == 3
