"""Promise: the study's loop trains exactly as a plain PyTorch loop and as ClarsTrainer do."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import get_polynomial_decay_schedule_with_warmup

from hf_clars import CLARS, LARS, NAG, ClarsTrainer
from hf_clars.data import ImageTensors
from hf_clars.models import build_model
from research.study.images import MemoryImages, epoch_generator
from research.study.loop import Training, train
from research.study.settings import RunSettings
from tests.trainer_kit import clars_args

SIDE, CLASSES, TRAIN = 8, 3, 40
TINY = {
    "dataset": "random",
    "model": "clars-cnn",
    "model_kwargs": {"widths": [3, 4], "norm": "none"},
    "image_size": SIDE,
    "batch_size": 16,
    "micro_batch": 4,
    "epochs": 3,
    "learning_rate": 0.5,
    "eta": 0.05,
}


def tiny(method, **changes):
    values = {**TINY, "method": method, **changes}
    if method in ("nag", "lamb"):
        values.pop("eta")
    return RunSettings(**values)


def images(settings, count=TRAIN):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    tensors = ImageTensors(pixels, torch.randint(CLASSES, (count,), generator=generator), settings.pixels())
    return MemoryImages(tensors, tensors, [str(i) for i in range(CLASSES)])


def fresh_model(settings):
    torch.manual_seed(settings.seed)
    return build_model(
        settings.model,
        num_labels=CLASSES,
        image_size=SIDE,
        num_channels=1,
        model_kwargs=settings.model_kwargs,
    )


def weights_after(settings):
    kept = []

    def observer(training):
        kept.append(training.model)

    outcome = train(settings, images(settings), observer=observer)
    return kept[0], outcome


OPTIMIZERS = {
    "nag": lambda model: NAG(model, 0.5),
    "lars": lambda model: LARS(model, 0.5, eta=0.05),
    "clars": lambda model: CLARS(model, 0.5, eta=0.05),
}


@pytest.mark.parametrize("warmup_epochs", [0, 1.5])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_equals_a_plain_torch_loop_over_whole_batches(method, warmup_epochs):
    """Whole batches of 16 in float arithmetic of torch alone, under transformers' schedule: no passes, no helpers."""
    settings = tiny(method, warmup_epochs=warmup_epochs)
    model = fresh_model(settings)
    optimizer = OPTIMIZERS[method](model)
    a_epoch = TRAIN // 16
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, round(warmup_epochs * a_epoch), 3 * a_epoch, lr_end=0.0, power=2.0
    )
    data = images(settings).train
    x, y = (data.pixels.float() / 255 - 0.5) / 0.5, data.labels
    for epoch in range(3):
        order = torch.randperm(TRAIN, generator=epoch_generator(0, epoch))
        for step in range(a_epoch):
            chosen = order[16 * step : 16 * (step + 1)]
            optimizer.zero_grad()
            functional.cross_entropy(model(x[chosen]).logits, y[chosen]).backward()
            optimizer.step()
            schedule.step()
    trained, outcome = weights_after(settings)
    assert outcome.updates == 3 * a_epoch
    for p, q in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


class InOrder(Dataset):
    """The rows that the study's loop sees, one epoch after the other."""

    def __init__(self, settings):
        data = images(settings)
        self.rows = []
        for epoch in range(settings.epochs):
            for x, y in data.training_passes(settings.batch_size, seed=settings.seed, epoch=epoch):
                self.rows += [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_equals_clars_trainer(method, tmp_path):
    settings = tiny(method)
    model = fresh_model(settings)
    args = clars_args(
        tmp_path,
        method=method,
        learning_rate=0.5,
        eta=None if method == "nag" else 0.05,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        lr_scheduler_type="polynomial",
    )
    ClarsTrainer(model, args, train_dataset=InOrder(settings)).train()
    trained, _ = weights_after(settings)
    for p, q in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach().cpu(), rtol=1e-4, atol=1e-6)


def test_fc_freeze_holds_the_classifier_for_its_epochs_and_no_longer():
    settings = tiny("nag", freeze_epochs=1)
    data = images(settings)
    training = Training.prepare(settings, data, torch.device("cpu"))
    start = copy.deepcopy(training.model.classifier.weight.detach())
    a_epoch = TRAIN // 16
    for step in range(a_epoch + 1):
        before = training.model.features[0].weight.detach().clone()
        training.update(step, data.training_passes(16, seed=0, epoch=step))
        assert not torch.equal(before, training.model.features[0].weight)
        moved = not torch.equal(start, training.model.classifier.weight)
        assert moved == (step >= a_epoch)


def test_layer_rates_end_after_their_epochs():
    settings = tiny("clars", layer_rate_epochs=1, schedule="constant")
    data = images(settings)
    training = Training.prepare(settings, data, torch.device("cpu"))
    for step in range(4):
        training.update(step, data.training_passes(16, seed=0, epoch=step))
        rates = training.optimizer.last_step.rate
        assert bool((rates == 0.5).all()) == (step >= TRAIN // 16)


def test_reference_code_passes_its_first_samples_in_micro_batches_of_8():
    settings = tiny("reference_code", batch_size=1024, micro_batch=256)
    data = images(settings)
    training = Training.prepare(settings, data, torch.device("cpu"))
    passes = [(torch.zeros(256, 1, SIDE, SIDE), torch.zeros(256, dtype=torch.long))] * 4
    sizes = [len(y) for _, y in training._fine(passes)]
    assert sizes == [8] * 64 + [256, 256]
    large = [(torch.zeros(1024, 1, SIDE, SIDE), torch.zeros(1024, dtype=torch.long))]
    assert [len(y) for _, y in training._fine(large)] == [8] * 64 + [512]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_recorded():
    settings = tiny("nag", learning_rate=1e20, schedule="constant")
    _, outcome = weights_after(settings)
    assert outcome.diverged_at is not None
    assert outcome.updates < 3 * (TRAIN // 16)
    assert len(outcome.accuracy) == len(outcome.train_loss) < 3


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    first, again, other = (weights_after(tiny("clars", seed=seed))[1] for seed in (5, 5, 6))
    assert first.train_loss == again.train_loss
    assert first.train_loss != other.train_loss


def test_a_data_loader_gives_the_same_run_as_tensors_in_memory(tmp_path):
    """The path for sets that are too large to hold: the same order, the same passes, the same weights."""
    from datasets import ClassLabel, Dataset, Features, Image

    from research.study.images import open_images
    from tests.image_files import picture

    folder = tmp_path / "tiny"
    folder.mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=list("abc"))})
    for split, count in (("train", 40), ("test", 10)):
        rows = {"image": [picture(i, (SIDE, SIDE), "L") for i in range(count)], "label": [i % 3 for i in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    settings = tiny("clars", dataset="tiny", epochs=2, held_out=8)
    held, loaded = (
        train(settings, open_images(settings.replace(in_memory=in_memory), tmp_path, torch.device("cpu")))
        for in_memory in (True, False)
    )
    assert held.updates == loaded.updates == 2 * 2
    assert held.train_loss == pytest.approx(loaded.train_loss, rel=1e-5)
    assert held.accuracy == loaded.accuracy


def test_bfloat16_is_autocast_and_close_to_float32():
    plain = weights_after(tiny("clars"))[1]
    half = weights_after(tiny("clars", precision="bfloat16"))[1]
    assert half.train_loss != plain.train_loss
    assert half.train_loss == pytest.approx(plain.train_loss, rel=0.05)


def test_the_speed_comparison_runs_both_loops():
    from research.study.speed import speed_against_bare_loop

    settings = tiny("lars")
    share = speed_against_bare_loop(settings, images(settings), rounds=3)
    assert 0 < share.low <= share.median <= share.high
