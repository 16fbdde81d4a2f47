"""Promise: what a launcher would do silently raises before anything is trained, and says what to do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_clars import ClarsTrainer, ClarsTrainingArguments
from hf_clars.distributed import zero_pieces
from hf_clars.errors import ConfigError
from hf_clars.optim import CLARS, OptimizerNotSteppedError, UnsupportedEngineError
from hf_clars.trainer.launch_checks import allow_missing_embeddings, check_launch
from tests.launchers.cases import group_norm
from tests.trainer_kit import Images, Plain

ZERO = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}


@pytest.fixture
def trainer(tmp_path):
    """A trainer in one process; tests change what the launcher has told it."""
    args = ClarsTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", log_layer_rates=False)
    return ClarsTrainer(Plain(), args, train_dataset=Images())


def under_deepspeed(trainer, **config):
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={**ZERO, **config}))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    return trainer


def test_an_ordinary_run_passes(trainer):
    check_launch(trainer, trainer.args)
    check_launch(under_deepspeed(trainer), trainer.args)


def test_an_optimizer_that_deepspeed_would_drop(trainer):
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    with pytest.raises(ConfigError, match="dropped under DeepSpeed, and AdamW would train"):
        check_launch(under_deepspeed(trainer), trainer.args)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "would train instead of clars"),
        ({"optimizer": {"type": "OneBitAdam"}}, "1-bit optimizers compress"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "remove offload_optimizer"),
        ({"gradient_clipping": 1.0}, r"clips gradients at 1\.0, .* Set gradient_clipping to 0"),
    ],
)
def test_deepspeed_settings_that_cannot_work(trainer, config, message):
    with pytest.raises(ConfigError, match=message):
        check_launch(under_deepspeed(trainer, **config), trainer.args)


def test_deepspeed_clips_where_nothing_is_said(trainer):
    under_deepspeed(trainer).accelerator.state.deepspeed_plugin.hf_ds_config.config.pop("gradient_clipping")
    with pytest.raises(ConfigError, match=r"leaves gradient_clipping out, .* Set gradient_clipping to 0"):
        check_launch(trainer, trainer.args)


def test_fsdp_asked_for_and_data_parallelism_given(trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP was asked for"):
        check_launch(trainer, trainer.args)


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (1, {}, "fsdp_version: 2"),
        (2, {"estimator": "microbatch"}, "estimator='samples'"),
    ],
)
def test_fsdp_settings_that_cannot_work(trainer, version, changes, message):
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version)))
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ConfigError, match=message):
        check_launch(trainer, trainer.args)


def test_two_processes_started_that_do_not_know_each_other(trainer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="add --use_cpu true"):
        check_launch(trainer, trainer.args)


def test_two_processes_asked_for_and_one_started(trainer, monkeypatch):
    # what `accelerate launch --cpu --num_processes 2` leaves in the environment
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="accelerate has started one"):
        check_launch(trainer, trainer.args)


def test_fp16_on_a_cpu(tmp_path):
    args = ClarsTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.fp16 = True
    with pytest.raises(ConfigError, match="silently computes in float32"):
        ClarsTrainer(Plain(), args, train_dataset=Images())


def test_models_without_embeddings_get_an_answer_for_accelerate():
    model = group_norm()
    allow_missing_embeddings(model)
    assert model.get_input_embeddings() is None
    plain = nn.Linear(2, 2)
    allow_missing_embeddings(plain)
    assert not hasattr(plain, "get_input_embeddings")


def partitioned(model):
    """Mark parameters as ZeRO does when it has flattened them."""
    for p in model.parameters():
        p._hp_mapping = object()


def test_a_plain_trainer_under_deepspeed_is_told_at_the_first_step_that_its_optimizer_was_dropped():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = CLARS(model, 0.1)
    partitioned(model)  # for another optimizer: this one's groups still hold the parameters
    with pytest.raises(OptimizerNotSteppedError, match="use ClarsTrainer"):
        model(torch.randn(2, 4))
    optimizer.remove_hooks()


def test_a_step_with_a_part_of_the_layers_asks_for_the_engine():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = CLARS(model, 0.1)
    model(torch.randn(2, 4)).sum().backward()
    groups = optimizer.param_groups
    optimizer.param_groups = groups[:1]  # what ZeRO 1 and 2 do around each call
    with pytest.raises(UnsupportedEngineError, match="attach_engine"):
        optimizer.step()


def test_an_engine_that_trains_with_another_optimizer_is_refused():
    optimizer = CLARS(nn.Linear(2, 2), 0.1)
    with pytest.raises(UnsupportedEngineError, match="not inside the engine"):
        zero_pieces(SimpleNamespace(optimizer=SimpleNamespace(optimizer=None)), optimizer)


def engine_around(optimizer):
    """What is read of an engine of ZeRO 2 when it is attached."""
    zero = SimpleNamespace(
        optimizer=optimizer, single_partition_of_fp32_groups=[], real_dp_process_group=[], clip_grad=0.0
    )
    return SimpleNamespace(optimizer=zero, skipped_steps=0)


def test_an_engine_that_clips_is_refused():
    optimizer = CLARS(nn.Linear(2, 2), 0.1)
    assert zero_pieces(engine_around(optimizer), optimizer) is not None
    clipping = engine_around(optimizer)
    clipping.optimizer.clip_grad = 1.0
    with pytest.raises(UnsupportedEngineError, match='set "gradient_clipping": 0'):
        zero_pieces(clipping, optimizer)


def test_a_prepared_optimizer_is_not_the_engine():
    optimizer = CLARS(nn.Linear(2, 2), 0.1)
    with pytest.raises(UnsupportedEngineError, match="give attach_engine the engine itself"):
        zero_pieces(SimpleNamespace(optimizer=engine_around(optimizer).optimizer), optimizer)
