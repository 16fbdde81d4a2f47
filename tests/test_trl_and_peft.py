"""Promise: under TRL's SFTTrainer and DPOTrainer, and on PEFT's models, the callback measures each row exactly.

Their losses never call the model's head: it is a function of their own, which makes the logits in chunks.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

peft = pytest.importorskip("peft", reason="needs peft: pip install 'hf_clars[trl]'")
trl = pytest.importorskip("trl", reason="needs trl: pip install 'hf_clars[trl]'")

import datasets  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_clars.per_sample import PerSampleNormsCallback, keep_index, with_index  # noqa: E402
from tests.callback_kit import Sentences, bert, train  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz "
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_steps": 1,
    "learning_rate": 0.0,
    "per_device_train_batch_size": 4,
    "max_length": 32,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
}
NEAR = {"rtol": 2e-5, "atol": 1e-9}  # TRL adds gradients of the head up in float32, also for a model in float64


def tokenizer():
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).double()


def text(number, generator):
    return torch.randint(3, 29, (number,), generator=generator).tolist()


def texts(count=40):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(4, 20, (count,), generator=generator).tolist()
    return datasets.Dataset.from_list([{"input_ids": text(n, generator)} for n in sizes])


def pairs(count=8):
    generator = torch.Generator().manual_seed(0)

    def letters(n):
        return "".join(LETTERS[i - 3] for i in text(n, generator))

    return datasets.Dataset.from_list(
        [{"prompt": letters(3), "chosen": letters(4 + i % 5), "rejected": letters(9 - i % 4)} for i in range(count)]
    )


def watched(trainer):
    """Keeps what each micro-batch computed its loss from."""
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}, kwargs.get("num_items_in_batch")))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    return seen


def norm_of(loss, model):
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None]).norm()


def row(inputs, i):
    return {k: v[i : i + 1] for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}


def one_by_one(model, seen):
    """Each row's norm, by a backward pass of its own through the ordinary forward."""
    total = sum(len(inputs["labels"]) for inputs, _ in seen)
    found = []
    for inputs, items in seen:
        for i, labels in enumerate(inputs["labels"]):
            logits = model(**row(inputs, i)).logits[0, :-1]
            loss = cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum") / items
            found.append(total * norm_of(loss, model))
    return torch.stack(found).sort(descending=True).values


def sft(folder, *, tied=True, lora=False, **settings):
    callback = PerSampleNormsCallback(every=1, top_k=8, strict=True)
    trainer = trl.SFTTrainer(
        llama(tied),
        args=trl.SFTConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=[callback],
        peft_config=peft.LoraConfig(**LORA) if lora else None,
    )
    seen = watched(trainer)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.gradient_checkpointing_disable()
    model.eval()
    return callback.monitor, model, seen


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_padded_rows_are_exact(tmp_path, tied, checkpointing):
    monitor, model, seen = sft(tmp_path, tied=tied, gradient_checkpointing=checkpointing)
    assert not bool(seen[0][0]["attention_mask"].all())
    assert monitor.last.samples == 4
    torch.testing.assert_close(monitor.last.top_norm[:4].double(), one_by_one(model, seen), **NEAR)


def test_rows_of_several_micro_batches_are_exact(tmp_path):
    monitor, model, seen = sft(tmp_path, gradient_accumulation_steps=2)
    assert len(seen) == 2
    assert monitor.last.samples == 8
    torch.testing.assert_close(monitor.last.top_norm.double(), one_by_one(model, seen), **NEAR)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_steps_after_those_that_are_checked_by_their_sums_are_exact_too(tmp_path, tied, lora):
    monitor, model, seen = sft(tmp_path, tied=tied, lora=lora, max_steps=5)
    assert len(seen) == monitor.last.step == 5
    torch.testing.assert_close(monitor.last.top_norm[:4].double(), one_by_one(model, seen[-1:]), **NEAR)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd"])
def test_packed_rows_are_measured_together_and_exact(tmp_path, strategy):
    """`bfd` lays all texts of a batch in one row, so that it is one sample."""
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 24, "gradient_accumulation_steps": 2}
    monitor, model, seen = sft(tmp_path, **settings)
    rows = sum(len(inputs["labels"]) for inputs, _ in seen)
    assert monitor.last.samples == rows
    assert rows == (2 if strategy == "bfd" else 8)
    torch.testing.assert_close(monitor.last.top_norm[:rows].double(), one_by_one(model, seen), **NEAR)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_a_lora_model_adapters_alone_are_measured_and_exact(tmp_path, checkpointing):
    monitor, model, seen = sft(tmp_path, lora=True, gradient_checkpointing=checkpointing)
    assert all("lora_" in name for layer in monitor.layers for name in layer.param_names)
    torch.testing.assert_close(monitor.last.top_norm[:4].double(), one_by_one(model, seen), **NEAR)


def test_the_noise_scale_reads_the_batch_gradient(tmp_path):
    monitor, model, seen = sft(tmp_path)
    ((inputs, items),) = seen
    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum") / items
    torch.testing.assert_close(monitor.last.batch_square.sum().sqrt().double(), norm_of(loss, model), **NEAR)


def test_rows_have_their_index_in_the_data_set_where_the_collator_is_told_to_keep_it(tmp_path):
    data, callback = texts(), PerSampleNormsCallback(every=1, top_k=8, strict=True)
    shuffled = {"train_sampling_strategy": "random", "remove_unused_columns": False, "gradient_accumulation_steps": 2}
    trainer = trl.SFTTrainer(
        llama(tied=True),
        args=trl.SFTConfig(str(tmp_path), **{**SETTINGS, **shuffled}),
        train_dataset=with_index(data),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    trainer.data_collator = keep_index(trainer.data_collator)
    seen = watched(trainer)
    trainer.train()
    last = callback.monitor.last
    assert len(set(last.top_index.tolist())) == 8
    for index, passed, place in zip(last.top_index, last.top_micro_batch, last.top_row, strict=True):
        inputs, _ = seen[passed]
        assert inputs["input_ids"][place][inputs["attention_mask"][place] > 0].tolist() == data[int(index)]["input_ids"]


@pytest.mark.parametrize("lora", [False, True])
def test_of_preferences_each_answer_is_a_sample_and_exact(tmp_path, lora):
    """The pair's loss ties both answers; what is measured is what each adds to the batch gradient."""
    callback = PerSampleNormsCallback(every=1, top_k=8, strict=True)
    trainer = trl.DPOTrainer(
        llama(tied=True),
        None if lora else llama(tied=True),
        args=trl.DPOConfig(str(tmp_path), beta=0.5, **SETTINGS),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        callbacks=[callback],
        peft_config=peft.LoraConfig(**LORA) if lora else None,
    )
    seen = watched(trainer)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    ((inputs, _),) = seen

    def log_prob(model, i):
        labels = inputs["input_ids"][i].masked_fill(inputs["completion_mask"][i] == 0, -100)
        return -cross_entropy(model(**row(inputs, i)).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")

    answers = [log_prob(model, i) for i in range(8)]
    with torch.no_grad():
        if lora:
            with model.disable_adapter():
                before = torch.stack([log_prob(model, i) for i in range(8)])
        else:
            before = torch.stack([a.detach() for a in answers])  # a rate of 0: the model is its own reference
    values = torch.stack([a.detach() for a in answers]).requires_grad_()
    chosen, rejected = (values - before).chunk(2)
    (weights,) = torch.autograd.grad(-logsigmoid(0.5 * (chosen - rejected)).mean(), values)
    expected = torch.stack([8 * abs(w) * norm_of(a, model) for w, a in zip(weights, answers, strict=True)])
    assert callback.monitor.last.samples == 8
    found = callback.monitor.last.top_norm.double()
    torch.testing.assert_close(found, expected.sort(descending=True).values, **NEAR)


def test_a_peft_model_in_an_ordinary_trainer_is_exact_with_the_head_that_trains_beside_it(tmp_path):
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False
    )
    model = peft.get_peft_model(BertForSequenceClassification(bert()), lora).double()
    callback = PerSampleNormsCallback(every=1, top_k=8, strict=True)
    data = Sentences()
    train(tmp_path, callback, model=model, dataset=data, max_steps=1, learning_rate=0.0)
    names = {name for layer in callback.monitor.layers for name in layer.param_names}
    assert all("lora_" in name or "classifier" in name for name in names)
    assert any("classifier" in name for name in names)
    items = [{k: v[None] for k, v in data[i].items()} for i in range(8)]
    expected = torch.stack([norm_of(model(**item).loss, model) for item in items]).sort(descending=True).values
    torch.testing.assert_close(callback.monitor.last.top_norm.double(), expected, rtol=1e-6, atol=0)
