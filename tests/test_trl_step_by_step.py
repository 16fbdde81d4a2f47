"""Promise: in a TRL run every measured step is exact, while weights move, under accumulation, packed or paired."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

peft = pytest.importorskip("peft", reason="needs peft: pip install 'hf_clars[trl]'")
trl = pytest.importorskip("trl", reason="needs trl: pip install 'hf_clars[trl]'")

from hf_clars.per_sample import PerSampleLog, PerSampleNormsCallback  # noqa: E402
from tests.test_trl_and_peft import LORA, NEAR, SETTINGS, llama, norm_of, pairs, row, texts, tokenizer  # noqa: E402

RUN = {**SETTINGS, "max_steps": 6, "learning_rate": 0.02, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}


class Run:
    """Keeps what each micro-batch computed its loss from, and the weights that it did it with."""

    def __init__(self, folder, kind, config, lora, **given):
        self.folder, self.kept = folder, []
        callback = PerSampleNormsCallback(every=1, top_k=16, strict=True)
        self.trainer = kind(
            llama(tied=True),
            args=config(str(folder), **RUN, **given.pop("settings", {})),
            processing_class=tokenizer(),
            callbacks=[callback],
            peft_config=peft.LoraConfig(**LORA) if lora else None,
            **given,
        )
        original = self.trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            kept = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
            weights = copy.deepcopy(self.model.state_dict())
            self.kept.append((self.trainer.state.global_step, kept, weights, kwargs.get("num_items_in_batch")))
            return original(model, inputs, *args, **kwargs)

        self.trainer.compute_loss = compute_loss
        self.trainer.train()

    @property
    def model(self):
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def compare(self, norms_of):
        """Each step with `norms_of(model, inputs, items)`, what each row adds to the gradient."""
        log, model = PerSampleLog.open(self.folder).read(), self.model.eval()
        assert log["steps"].tolist() == list(range(1, 7))
        for step in range(6):
            parts = []
            for _, inputs, weights, items in (kept for kept in self.kept if kept[0] == step):
                model.load_state_dict(weights)
                parts.append(norms_of(model, inputs, items))
            expected = torch.cat(parts)
            assert log["samples"][step] == len(expected)
            expected = len(expected) * expected.sort(descending=True).values
            torch.testing.assert_close(log["top_norm"][step][: len(expected)], expected, **NEAR)
        first, last = self.kept[0][2], self.kept[-1][2]
        assert any(not torch.allclose(first[name], last[name], atol=1e-3) for name in first)


def of_texts(model, inputs, items):
    rows = []
    for i, labels in enumerate(inputs["labels"]):
        logits = model(**row(inputs, i)).logits[0, :-1]
        rows.append(
            norm_of(cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum") / items, model).detach()
        )
    return torch.stack(rows)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"packing": True, "packing_strategy": "wrapped"}, {"packing": True, "packing_strategy": "bfd"}, {}],
    ids=["wrapped", "bfd", "padded"],
)
def test_packed_and_padded_texts(tmp_path, lora, settings):
    Run(tmp_path, trl.SFTTrainer, trl.SFTConfig, lora, settings=settings, train_dataset=texts(120)).compare(of_texts)


def log_prob(model, inputs, i):
    labels = inputs["input_ids"][i].masked_fill(inputs["completion_mask"][i] == 0, -100)
    return -cross_entropy(model(**row(inputs, i)).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("lora", [False, True])
def test_preferences(tmp_path, lora):
    reference = None if lora else llama(tied=True)

    def of_pairs(model, inputs, _):
        count = len(inputs["input_ids"])
        answers = [log_prob(model, inputs, i) for i in range(count)]
        with torch.no_grad():
            if lora:
                with model.disable_adapter():
                    before = torch.stack([log_prob(model, inputs, i) for i in range(count)])
            else:
                before = torch.stack([log_prob(llama(tied=True), inputs, i) for i in range(count)])
        values = torch.stack([a.detach() for a in answers]).requires_grad_()
        chosen, rejected = (values - before).chunk(2)
        (weights,) = torch.autograd.grad(-logsigmoid(0.5 * (chosen - rejected)).mean() / 2, values)
        return torch.stack([abs(w) * norm_of(a, model).detach() for w, a in zip(weights, answers, strict=True)])

    given = {} if lora else {"ref_model": reference}
    run = Run(tmp_path, trl.DPOTrainer, trl.DPOConfig, lora, settings={"beta": 0.5}, train_dataset=pairs(48), **given)
    run.compare(of_pairs)
