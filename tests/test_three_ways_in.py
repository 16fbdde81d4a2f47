"""Promise: ClarsTrainer, Trainer in two ways and a plain loop give the same weights; accumulation changes nothing."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_clars.optim import CLARS, LARS, NAG
from hf_clars.optim.loop_guard import AccumulationIgnoredError
from hf_clars.trainer import ClarsTrainer
from tests.trainer_kit import Images, Plain, clars_args, plain_args, tiny_resnet

STEPS = 20


def by_loop(model, optimizer, data, *, size=16, micro=1, steps=STEPS):
    model.train()
    done = 0
    while done < steps:
        for rows in DataLoader(data, batch_size=size * micro):
            optimizer.zero_grad()
            for part in range(micro):
                x = rows["pixel_values"][part * size :][:size]
                y = rows["labels"][part * size :][:size]
                (model(pixel_values=x, labels=y)["loss"] / micro).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return model


def assert_same_weights(model, other, tolerance=1e-6):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def data():
    return Images()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_four_ways_give_the_same_weights_after_20_steps(tmp_path, data, accumulation):
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": accumulation}
    settings["per_device_train_batch_size"] = 16 // accumulation

    looped = Plain()
    by_loop(looped, CLARS(looped, 1.0), data, size=16 // accumulation, micro=accumulation)

    own = ClarsTrainer(Plain(), clars_args(tmp_path, **settings), train_dataset=data)
    own.train()

    model = Plain()
    given = Trainer(model, plain_args(tmp_path, **settings), train_dataset=data, optimizers=(CLARS(model, 1.0), None))
    given.train()

    model = Plain()
    by_class = Trainer(
        model,
        plain_args(tmp_path, **settings),
        train_dataset=data,
        optimizer_cls_and_kwargs=(CLARS, {"model": model, "lr": 1.0}),
    )
    by_class.train()

    start = Plain()
    assert (looped.conv.weight - start.conv.weight).norm() > 1e-2
    for trainer in (own, given, by_class):
        assert_same_weights(trainer.model, looped)


@pytest.mark.parametrize("method", ["clars", "lars", "nag"])
@pytest.mark.parametrize("make", [Plain, tiny_resnet], ids=["own module", "ResNetForImageClassification"])
def test_accumulation_1x64_4x16_16x4_give_the_same_rates_and_weights(tmp_path, data, make, method):
    results = []
    for accumulation, size in ((1, 64), (4, 16), (16, 4)):
        rate = 0.05 if method == "nag" else 1.0
        args = clars_args(
            tmp_path,
            method=method,
            learning_rate=rate,
            max_steps=5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            weight_decay=1e-3,
            log_layer_rates=False,
        )
        trainer = ClarsTrainer(make(), args, train_dataset=data)
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        results.append((trainer.model, optimizer.last_step.rate, trainer.state.log_history[0]["loss"]))
    for model, rate, loss in results[1:]:
        torch.testing.assert_close(rate, results[0][1], rtol=1e-4, atol=0)
        assert loss == pytest.approx(results[0][2], rel=1e-5)
        assert_same_weights(model, results[0][0], tolerance=1e-5)


def test_an_uneven_last_pass_is_weighted_by_its_samples(tmp_path):
    data = Images(count=40)  # 16 + 16 + 8: the mean of the three means is not the mean of the 40
    args = clars_args(
        tmp_path,
        method="nag",
        learning_rate=0.1,
        max_steps=1,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=3,
    )
    trainer = ClarsTrainer(Plain(), args, train_dataset=data)
    trainer.train()
    model = Plain()
    by_loop(model, NAG(model, 0.1), data, size=40, steps=1)
    assert_same_weights(trainer.model, model)


def test_the_plain_trainer_refuses_a_head_that_ignores_accumulation_and_says_how_to_mend_it(tmp_path, data):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    for make in (lambda m: NAG(m, 0.1), lambda m: LARS(m, 1.0, weight_decay=1e-3)):
        model = tiny_resnet()
        trainer = Trainer(model, plain_args(tmp_path, **settings), train_dataset=data, optimizers=(make(model), None))
        with pytest.raises(AccumulationIgnoredError, match=r"4 times too large.*accepts_loss_kwargs = False"):
            trainer.train()

    model = tiny_resnet()
    model.accepts_loss_kwargs = False
    trainer = Trainer(model, plain_args(tmp_path, **settings), train_dataset=data, optimizers=(CLARS(model, 1.0), None))
    trainer.train()
    own = ClarsTrainer(tiny_resnet(), clars_args(tmp_path, **settings), train_dataset=data)
    own.train()
    assert_same_weights(own.model, trainer.model)


@pytest.mark.parametrize("method", [CLARS, LARS])
def test_it_only_warns_where_steps_do_not_depend_on_the_gradients_scale(tmp_path, data, method):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    weights = []
    for mended in (False, True):
        model = tiny_resnet()
        if mended:
            model.accepts_loss_kwargs = False
        args = plain_args(tmp_path, **settings)
        trainer = Trainer(model, args, train_dataset=data, optimizers=(method(model, 1.0), None))
        with nullcontext() if mended else pytest.warns(UserWarning, match="ignores it.* The steps are right"):
            trainer.train()
        weights.append(trainer.model)
    assert_same_weights(*weights, tolerance=1e-5)


def test_the_plain_trainer_is_not_disturbed_where_the_head_is_right(tmp_path, data):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    args = plain_args(tmp_path, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    Trainer(model, args, train_dataset=data, optimizers=(CLARS(model, 1.0), None)).train()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_accelerate_loop_gives_the_same_weights_too(data, accumulation):
    from accelerate import Accelerator

    looped = Plain()
    by_loop(looped, CLARS(looped, 1.0), data, size=16 // accumulation, micro=accumulation)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    raw = Plain()
    model, optimizer, loader = accelerator.prepare(raw, CLARS(raw, 1.0), DataLoader(data, 16 // accumulation))
    for _ in range(STEPS * 16 // len(data)):
        for rows in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**rows)["loss"])
                optimizer.step()
                optimizer.zero_grad()
    assert_same_weights(raw, looped)
