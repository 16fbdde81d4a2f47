"""Small trainings with the callback, and norms by plain autograd."""

import torch
from transformers import BertConfig, Trainer, TrainerCallback

from tests.trainer_kit import Images, Plain, plain_args

LOGGER = "hf_clars.per_sample"


def train(folder, callback, *, model=None, dataset=None, **settings):
    model = Plain() if model is None else model
    settings = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 0.05, **settings}
    dataset = Images() if dataset is None else dataset
    callbacks = [callback] if isinstance(callback, TrainerCallback) else callback
    trainer = Trainer(model, plain_args(folder, **settings), train_dataset=dataset, callbacks=callbacks)
    trainer.train()
    return trainer


def accelerated_epoch(accelerator, wrapped, optimizer, loader, monitor):
    """An epoch of an accelerate loop, with what its `prepare` returned."""
    for batch in loader:
        with accelerator.accumulate(wrapped):
            with monitor.batch(last=accelerator.sync_gradients):
                accelerator.backward(wrapped(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()


def hooks_on(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def brute_force(model, x, y):
    """Whole-network norms one by one, and the batch gradient's square, by plain autograd."""
    rows = []
    for i in range(len(x)):
        loss = model(pixel_values=x[i : i + 1], labels=y[i : i + 1])["loss"]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(rows)
    return g.norm(dim=1), g.mean(0).square().sum()


def bert():
    return BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )


class Sentences(Images):
    """Padded sequences of different lengths."""

    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(3, 13, (count,), generator=generator)
        self.ids = torch.randint(1, 50, (count, 12), generator=generator)
        self.x, self.y = self.ids, torch.randint(0, 3, (count,), generator=generator)

    def __getitem__(self, i):
        mask = (torch.arange(12) < self.lengths[i]).long()
        return {"input_ids": self.ids[i] * mask, "attention_mask": mask, "labels": self.y[i]}
