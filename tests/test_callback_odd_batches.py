"""Promise: at steps of any size, in any order, each norm, index and the noise scale are those of brute force."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from hf_clars.per_sample import NoiseScaleAverage, PerSampleLog, PerSampleNormsCallback, with_index
from tests.trainer_kit import Images, Plain, plain_args


class Wide(Plain):
    """In float64; says that it takes no num_items_in_batch, as Trainer wants of such a head."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.double()

    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values.double(), labels)


class Keeps(Trainer):
    """Keeps what each pass saw: its step, the batch, the weights, and what its loss is a mean over."""

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        kept = {name: value.clone() for name, value in inputs.items()}
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.kept = [*getattr(self, "kept", []), (self.state.global_step, kept, weights, num_items_in_batch)]
        return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def of_images(model, batch, _, passes):
    """What each row adds to the batch gradient: Trainer divides each pass's mean by the number of passes."""
    for x, y in zip(batch["pixel_values"], batch["labels"], strict=True):
        yield gradient(model(x[None], y[None])["loss"], model) / len(batch["labels"]) / passes


def of_texts(model, batch, items, _):
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0, :-1]
        yield gradient(
            nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum") / items, model
        )


def compare(folder, trainer, callback, model, rows_of, *, rtol):
    log, average = PerSampleLog.open(folder).read(), NoiseScaleAverage(1, decay=0.9)
    for step in range(len(log["steps"])):
        passes = [kept for kept in trainer.kept if kept[0] == step]
        rows, index = [], []
        for _, batch, weights, items in passes:
            model.load_state_dict(weights)
            rows += rows_of(model, batch, items, len(passes))
            index += batch["sample_index"].tolist()
        g, count = torch.stack(rows), len(rows)
        norms = count * g.norm(dim=1)
        order = norms.argsort(descending=True)
        assert log["samples"][step] == count
        torch.testing.assert_close(log["top_norm"][step][:count], norms[order], rtol=rtol, atol=0)
        assert log["top_index"][step][:count].tolist() == [index[i] for i in order]
        batch_square = g.sum(0).square().sum()
        torch.testing.assert_close(log["batch_square"][step].sum(), batch_square, rtol=rtol, atol=0)
        average.update(batch_square[None], norms.square().mean()[None], count)
    found, expected = callback.monitor.noise.read(), average.read()
    for name in ("value", "standard_error", "share"):
        torch.testing.assert_close(getattr(found, name)[-1], getattr(expected, name)[-1], rtol=1e3 * rtol, atol=1e-9)
    return log["samples"].tolist()


CASES = {
    "a last batch that is smaller": (60, {}, [8] * 7 + [4]),
    "accumulation that does not divide the epoch": (60, {"gradient_accumulation_steps": 3}, [24, 24, 12]),
    "passes of two sizes in a step": (60, {"gradient_accumulation_steps": 2}, [16, 16, 16, 12]),
    "a last pass alone, and small": (52, {"gradient_accumulation_steps": 2}, [16, 16, 16, 4]),
    "clipping": (40, {"max_grad_norm": 1e-3}, [8] * 5),
    "shuffling, workers and two epochs": (
        28,
        {"train_sampling_strategy": "random", "dataloader_num_workers": 2, "num_train_epochs": 2},
        [8, 8, 8, 4] * 2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_images(tmp_path, case):
    count, settings, samples = CASES[case]
    callback = PerSampleNormsCallback(every=1, top_k=24, strict=True)
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 0.05, **settings}
    trainer = Keeps(
        Wide(), plain_args(tmp_path, **settings), train_dataset=with_index(Images(count)), callbacks=[callback]
    )
    trainer.train()
    assert compare(tmp_path, trainer, callback, Wide(), of_images, rtol=1e-12) == samples


class Texts(torch.utils.data.Dataset):
    def __init__(self, count=40):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
        self.texts = [torch.randint(1, 50, (length,), generator=generator) for length in lengths]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return {"input_ids": self.texts[i], "length": len(self.texts[i])}


def padded(items):
    texts = [item["input_ids"] for item in items]
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    labels = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    index = torch.tensor([item["sample_index"] for item in items])
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels, "sample_index": index}


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).double()


@pytest.mark.parametrize(
    ("settings", "samples"),
    [
        ({"gradient_accumulation_steps": 2}, [16, 16, 8]),
        ({"train_sampling_strategy": "group_by_length", "length_column_name": "length"}, [8] * 5),
        ({"gradient_accumulation_steps": 3, "gradient_checkpointing": True}, [24, 16]),
    ],
    ids=["padded", "grouped by length", "checkpointed"],
)
def test_texts(tmp_path, settings, samples):
    """transformers takes the loss in float32, whatever the model is in."""
    callback = PerSampleNormsCallback(every=1, top_k=24, strict=True)
    args = plain_args(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=0.05, max_grad_norm=0, **settings
    )
    trainer = Keeps(gpt2(), args, train_dataset=with_index(Texts()), callbacks=[callback], data_collator=padded)
    trainer.train()
    assert compare(tmp_path, trainer, callback, gpt2(), of_texts, rtol=1e-6) == samples


def test_texts_made_within_evaluations_and_steps_change_nothing(tmp_path):
    class Writes(TrainerCallback):
        def write(self, model):
            model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, do_sample=False, pad_token_id=0)

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            self.write(model)

        def on_substep_end(self, args, state, control, model=None, **kwargs):
            self.write(model)

    def log_with(name, others):
        callback = PerSampleNormsCallback(every=1, top_k=4, strict=True)
        args = plain_args(
            tmp_path / name,
            per_device_train_batch_size=8,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
            gradient_accumulation_steps=2,
        )
        data = with_index(Texts(48))
        Trainer(
            gpt2(), args, train_dataset=data, eval_dataset=data, data_collator=padded, callbacks=[callback, *others]
        ).train()
        return PerSampleLog.open(tmp_path / name).read()

    plain, written = log_with("plain", []), log_with("written", [Writes()])
    assert plain["samples"].tolist() == [16, 16, 16]
    for name, values in plain.items():
        torch.testing.assert_close(written[name], values, rtol=0, atol=0, equal_nan=True)
