"""Promise: a run survives steps with NaN or infinity, or stops at them as chosen, and names steps and layers."""

import copy

import pytest
import torch
from torch import nn

from hf_clars.optim import CLARS
from hf_clars.records import LayerRateLog
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.nonfinite import HOPELESS, NonFiniteError
from tests.trainer_kit import Images, clars_args


class Normalised(nn.Module):
    """With BatchNorm, whose running statistics the forward pass changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4 * 36, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.classifier(torch.relu(self.norm(self.conv(pixel_values))).flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def poisoned(at, value=float("nan"), count=64):
    data = Images(count)
    data.x[at] = value
    return data


def trainer_of(folder, data, **changes):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1, **changes}
    return ClarsTrainer(Normalised(), clars_args(folder, **settings), train_dataset=data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["clars", "lars", "nag"])
def test_a_poisoned_step_is_skipped_named_and_counted(tmp_path, method, value, caplog):
    trainer = trainer_of(tmp_path, poisoned(20, value), method=method, log_layer_rates=True)
    trainer.train()
    assert "Step 3 was not taken: NaN or infinity in the gradient norms of conv, norm, classifier" in caplog.text
    assert "1 such steps so far" in caplog.text
    assert all(t.isfinite().all() for t in trainer.model.state_dict().values())
    log = LayerRateLog.open(tmp_path)
    assert log.steps.tolist() == list(range(1, 9))
    assert (log["rate"][2] == 0).all()
    assert (log["rate"][[0, 1, 3]] > 0).all()


def test_weights_momentum_and_running_statistics_are_those_of_the_step_before(tmp_path):
    trainer = trainer_of(tmp_path, poisoned(20), max_steps=3)
    states = []

    class Watch(trainer.callback_handler.callbacks[0].__class__.__mro__[1]):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            momentum = [s["momentum_buffer"] for s in optimizer.optimizer.state.values()]
            states.append(copy.deepcopy([*model.state_dict().values(), *momentum]))

    trainer.add_callback(Watch())
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))


def test_the_run_stops_if_so_chosen(tmp_path):
    with pytest.raises(NonFiniteError, match=r"Step 3 was not taken.*nonfinite=stop.*--nonfinite skip"):
        trainer_of(tmp_path, poisoned(20), nonfinite="stop").train()


def test_a_run_that_does_not_get_out_of_it_ends(tmp_path):
    trainer = trainer_of(tmp_path, poisoned(slice(None)), num_train_epochs=20)
    with pytest.raises(NonFiniteError, match=f"the last of {HOPELESS} in a row"):
        trainer.train()
    assert trainer.state.global_step == HOPELESS


@pytest.mark.parametrize("changes", [{}, {"method": "nag", "log_layer_rates": False}])
def test_losses_in_the_log_stay_numbers(tmp_path, changes):
    trainer = trainer_of(tmp_path, poisoned(20), **changes)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(0 < loss < 10 for loss in losses)


@pytest.fixture
def skip_steps(monkeypatch):
    """Keep the optimizer from being called at these steps, as DeepSpeed and fp16's loss scaler do."""

    def skip(numbers):
        step, calls = CLARS.step, iter(range(1, 1000))

        def step_or_not(optimizer, closure=None):
            return optimizer.zero_grad() if next(calls) in numbers else step(optimizer, closure)

        monkeypatch.setattr(CLARS, "step", step_or_not)

    return skip


def test_running_statistics_of_a_step_that_is_skipped_around_the_optimizer_are_put_back(tmp_path, caplog, skip_steps):
    trainer = trainer_of(tmp_path, poisoned(20), max_steps=3)
    skip_steps({3})
    trainer.train()
    assert "Step 3 was not taken: DeepSpeed found NaN or infinity in the gradients" in caplog.text
    assert "1 such steps so far" in caplog.text
    assert all(t.isfinite().all() for t in trainer.model.state_dict().values())
    # what the forward pass counted was put back with the rest
    assert trainer.model.norm.num_batches_tracked == 2 * 2


def test_the_run_stops_at_a_step_that_is_skipped_around_the_optimizer_if_so_chosen(tmp_path, skip_steps):
    trainer = trainer_of(tmp_path, poisoned(20), nonfinite="stop")
    skip_steps({3})
    with pytest.raises(NonFiniteError, match=r"Step 3 was not taken: DeepSpeed.*nonfinite=stop"):
        trainer.train()


def test_a_run_that_skips_every_step_ends(tmp_path, skip_steps):
    trainer = trainer_of(tmp_path, poisoned(slice(None)), num_train_epochs=20)
    skip_steps(range(1000))
    with pytest.raises(NonFiniteError, match=f"the last of {HOPELESS} in a row"):
        trainer.train()
