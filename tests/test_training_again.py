"""Promise: training can begin again in the same folder: a cell run twice, a search over settings, a failed start."""

import numpy as np
import pytest
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_clars import LayerRateLog
from hf_clars.errors import ConfigError
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.preflight import OutputError, claim_output_dir
from hf_clars.trainer.resuming import CheckpointMisfitError
from tests.trainer_kit import Images, Plain, clars_args

pytestmark = pytest.mark.draws
SETTINGS = {"log_layer_rates": True, "max_steps": 3}


def trained(folder, callbacks=None, resume=None, **changes):
    args = clars_args(folder, **{**SETTINGS, **changes})
    trainer = ClarsTrainer(Plain(), args, train_dataset=Images(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def steps(path):
    return LayerRateLog.open(path).steps.tolist()


def test_train_twice_goes_on_with_the_model_and_numbers_the_first_log(tmp_path):
    trainer = trained(tmp_path)
    first = LayerRateLog.open(tmp_path)["weight_norm"]
    trainer.train()
    assert steps(tmp_path) == [1, 2, 3]
    np.testing.assert_array_equal(LayerRateLog.open(tmp_path / "layer_rates-1.safetensors")["weight_norm"], first)
    assert (LayerRateLog.open(tmp_path)["weight_norm"][0] != first[0]).any()
    trainer.train()
    assert {p.name for p in tmp_path.glob("layer_rates*.safetensors")} == {
        "layer_rates.safetensors",
        "layer_rates-1.safetensors",
        "layer_rates-2.safetensors",
    }


def test_the_same_cell_run_twice_keeps_the_first_run(tmp_path):
    trained(tmp_path)
    first = LayerRateLog.open(tmp_path)["rate"]
    trained(tmp_path, seed=1)
    np.testing.assert_array_equal(LayerRateLog.open(tmp_path / "layer_rates-1.safetensors")["rate"], first)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_run_that_failed_before_a_checkpoint_does_not_block_its_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, [Fails()])
        assert (tmp_path / "layer_rates").is_dir()
    trained(tmp_path)
    assert steps(tmp_path) == [1, 2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {
        "layer_rates.safetensors",
        "layer_rates.png",
        "layer_rates.html",
    }


def test_the_same_trainer_trains_after_a_failure(tmp_path):
    trainer = ClarsTrainer(
        Plain(), clars_args(tmp_path, **SETTINGS), train_dataset=Images(), callbacks=[failing := Fails()]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.train()
    assert steps(tmp_path) == [1, 2, 3]


def test_the_log_of_a_run_that_can_be_resumed_is_kept_when_another_begins(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, [Fails()], **saving)
    trained(tmp_path, **saving)
    assert steps(tmp_path) == [1, 2, 3]
    assert steps(tmp_path / "layer_rates-1.safetensors")[0] == 1


def test_a_resumed_run_still_continues_its_log(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, [Fails()], **saving)
    trained(tmp_path, resume=True, **saving)
    assert steps(tmp_path) == [1, 2, 3]
    assert not list(tmp_path.glob("layer_rates-*"))


def test_a_failed_start_does_not_block_its_own_name(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(folder, [Fails()])
    assert claim_output_dir(folder) == folder
    (folder / "model.safetensors").touch()
    with pytest.raises(OutputError, match="not empty"):
        claim_output_dir(folder)


class Trial:
    """What Trainer asks of optuna's, which is not installed here."""

    def __init__(self, number, **params):
        self.number, self.params = number, params


@pytest.fixture
def search(monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    def begin(args):
        trainer = ClarsTrainer(args=args, model_init=Plain, train_dataset=Images())
        trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
        return trainer

    return begin


def test_each_trial_of_a_search_has_a_log_with_its_own_settings(tmp_path, search):
    trainer = search(clars_args(tmp_path, **SETTINGS))
    for number, eta in enumerate((0.01, 0.02)):
        trainer.train(trial=Trial(number, eta=eta))
    logs = [LayerRateLog.open(tmp_path / f"run-{number}") for number in (0, 1)]
    assert [log.settings["eta"] for log in logs] == [0.01, 0.02]
    np.testing.assert_allclose(logs[1]["rate"][0], 2 * logs[0]["rate"][0], rtol=1e-5)
    assert not list(tmp_path.glob("layer_rates*"))


def test_the_rate_follows_the_batch_of_a_trial(tmp_path, search):
    trainer = search(clars_args(tmp_path, **SETTINGS, learning_rate=None, base_batch_size=8))
    for number, size in enumerate((4, 16)):
        trainer.train(trial=Trial(number, per_device_train_batch_size=size))
    settings = [LayerRateLog.open(tmp_path / f"run-{number}").settings for number in (0, 1)]
    assert [s["global_batch"] for s in settings] == [4, 16]
    assert [s["gamma_scale"] for s in settings] == pytest.approx([0.05, 0.2])
    trainer.train(trial=Trial(2, learning_rate=0.7))
    assert LayerRateLog.open(tmp_path / "run-2").settings["gamma_scale"] == 0.7


def test_the_trust_coefficient_follows_the_method_of_a_trial(tmp_path, search):
    trainer = search(clars_args(tmp_path, **SETTINGS))
    for number, method in enumerate(("lars", "clars")):
        trainer.train(trial=Trial(number, method=method))
    assert [LayerRateLog.open(tmp_path / f"run-{n}").settings["eta"] for n in (0, 1)] == [1e-3, 1e-2]


def test_a_trial_that_contradicts_the_global_batch_is_refused(tmp_path, search):
    trainer = search(clars_args(tmp_path, **SETTINGS, global_batch_size=16))
    with pytest.raises(ConfigError, match="global_batch_size=16 was given"):
        trainer.train(trial=Trial(0, per_device_train_batch_size=4))


def test_a_checkpoint_without_an_optimizer_is_not_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trained(tmp_path / "run", **saving)
    with pytest.raises(CheckpointMisfitError, match="save_only_model"):
        trained(tmp_path / "again", resume=str(tmp_path / "run" / "checkpoint-2"))


def test_a_batch_that_would_shrink_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="auto_find_batch_size"):
        trained(tmp_path, auto_find_batch_size=True)


def test_optuna_itself(tmp_path):
    pytest.importorskip("optuna")
    args = clars_args(tmp_path, **SETTINGS, eval_strategy="no")
    trainer = ClarsTrainer(args=args, model_init=Plain, train_dataset=Images(), eval_dataset=Images(8))
    best = trainer.hyperparameter_search(lambda trial: {"eta": trial.suggest_float("eta", 0.01, 0.1)}, n_trials=2)
    assert best.run_id in ("0", "1")
    assert {p.name for p in tmp_path.glob("*")} == {"run-0", "run-1"}
