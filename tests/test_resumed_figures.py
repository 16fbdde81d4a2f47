"""Promise: the figures at the end of a resumed run are those of the whole run, not of its last part."""

import json

import pytest
from transformers import Trainer

from hf_clars import CLARS
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.card import final_results
from tests.trainer_kit import Images, Plain, clars_args, plain_args

SETTINGS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 2,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0},
}


def run(folder, resume=None, **changes):
    trainer = ClarsTrainer(Plain(), clars_args(folder, **{**SETTINGS, **changes}), train_dataset=Images())
    return trainer, trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("logging", [{}, {"logging_steps": 1}, {"logging_strategy": "no"}])
@pytest.mark.parametrize("at", [3, 6])
def test_the_mean_loss_is_that_of_the_run_that_was_not_interrupted(tmp_path, at, logging):
    _, whole = run(tmp_path / "whole", **logging)
    trainer, resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{at}"), **logging)
    assert resumed.training_loss == pytest.approx(whole.training_loss, rel=1e-5)
    assert final_results(trainer)["train_loss"] == resumed.metrics["train_loss"] == resumed.training_loss


def test_time_and_speed_are_of_all_parts(tmp_path):
    trainer, _ = run(tmp_path / "whole")
    kept = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    before = kept["stateful_callbacks"]["RunClockCallback"]["attributes"]["seconds"]
    assert before > 0
    stored = trainer._clock.state()["attributes"]["seconds"]
    again, resumed = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-6"))
    assert before < resumed.metrics["train_runtime"]
    seconds = resumed.metrics["train_runtime"]
    assert resumed.metrics["train_samples_per_second"] == pytest.approx(8 * 8 / seconds, rel=1e-3)
    assert again._clock.state()["attributes"]["seconds"] > before
    assert stored > before


def test_a_run_resumed_after_its_last_step_has_the_figures_of_the_run(tmp_path):
    _, whole = run(tmp_path / "whole", save_steps=4)
    trainer, resumed = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-8"), save_steps=4)
    results = final_results(trainer)
    assert trainer.state.global_step == 8
    assert results["train_loss"] == pytest.approx(whole.training_loss, rel=1e-5)
    assert results["train_samples_per_second"] > 0
    assert resumed.training_loss == results["train_loss"]


def test_after_a_checkpoint_that_knows_no_time_none_is_made_up(tmp_path):
    model = Plain()
    settings = {**SETTINGS, "save_steps": 4, "logging_steps": 1}
    plain = Trainer(
        model, plain_args(tmp_path / "plain", **settings), train_dataset=Images(), optimizers=(CLARS(model, 1.0), None)
    )
    plain.train()
    for step, has_speed in ((4, True), (8, False)):
        trainer, _ = run(tmp_path / f"{step}", str(tmp_path / "plain" / f"checkpoint-{step}"), **settings)
        assert ("train_runtime" in final_results(trainer)) is has_speed
        assert final_results(trainer)["train_loss"] > 0.1


def test_a_second_training_starts_its_figures_anew(tmp_path):
    trainer, first = run(tmp_path, save_strategy="no")
    second = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert second.training_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert second.training_loss != first.training_loss


def test_a_log_method_of_the_old_signature_works(tmp_path):
    seen = []

    class Old(ClarsTrainer):
        def log(self, logs):
            seen.append(dict(logs))
            super().log(logs)

    trainer = Old(Plain(), clars_args(tmp_path, **SETTINGS), train_dataset=Images())
    trainer.train()
    assert [entry["loss"] for entry in seen if "loss" in entry]
    assert "train_loss" in seen[-1]
