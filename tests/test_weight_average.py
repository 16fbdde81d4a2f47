"""Promise: a run may end with the average of its weights, which is its formula, and resumes exactly."""

import pytest
import torch
from safetensors.torch import load_file

from hf_clars.errors import ConfigError
from hf_clars.image_classification.averaging import FILE, AveragingTrainer, WeightAverage
from hf_clars.trainer import ClarsTrainer
from tests.trainer_kit import Images, Plain, clars_args


def test_the_average_is_the_formula_and_a_swap_gives_back_what_was():
    model = torch.nn.BatchNorm1d(2)
    average, expected = WeightAverage(model, 0.5), model.weight.detach().clone()
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(1.0)
            model.running_mean.add_(1.0)
            model.num_batches_tracked.add_(1)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    now = model.weight.detach().clone()
    average.swap()
    assert torch.allclose(model.weight, expected)
    assert model.running_mean[0] != 8
    assert model.num_batches_tracked == 8
    average.swap()
    assert torch.equal(model.weight, now)


def averaging(folder, **changes):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 8}
    args = clars_args(folder, **{**options, **changes})
    return AveragingTrainer(Plain(), args, ema_decay=0.9, train_dataset=Images(), eval_dataset=Images(16))


def test_a_run_ends_with_the_average_and_training_is_not_touched_by_evaluations(tmp_path):
    watched = averaging(tmp_path / "watched", eval_strategy="steps", eval_steps=2)
    watched.train()
    plain = ClarsTrainer(
        Plain(), clars_args(tmp_path / "plain", max_steps=8, per_device_train_batch_size=8), train_dataset=Images()
    )
    plain.train()
    stored = load_file(tmp_path / "watched" / "checkpoint-8" / "model.safetensors")
    average = load_file(tmp_path / "watched" / "checkpoint-8" / FILE)
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(stored[name], parameter)
        assert not torch.equal(average[name], parameter)
        assert torch.equal(average[name], watched.model.get_parameter(name))
    last = [entry["eval_loss"] for entry in watched.state.log_history if "eval_loss" in entry][-1]
    assert watched.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-6)


def test_a_resumed_run_ends_with_the_same_average(tmp_path):
    whole, resumed = averaging(tmp_path), averaging(tmp_path)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "checkpoint-4" / FILE).unlink()
    with pytest.raises(Exception, match=r"not complete|holds no average"):
        averaging(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_average_and_the_best_model_are_not_both_to_be_had(tmp_path):
    with pytest.raises(ConfigError, match="do not go together"):
        averaging(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4)
