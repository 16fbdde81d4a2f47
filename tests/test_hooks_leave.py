"""Promise: training leaves the model without hooks, and hooks work during a step's passes and at no other time."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_clars import CLARS
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.optimizers import layerwise
from tests.trainer_kit import Images, Plain, clars_args

ACCELERATES = {"_is_accelerate_prepared"}  # the plain Trainer leaves it too

METHODS = [
    {"method": "clars"},
    {"method": "clars", "estimator": "microbatch"},
    {"method": "signal_lars"},
    {"method": "lars"},
    {"method": "nag"},
]


def left_on(model: nn.Module) -> dict[str, set[str]]:
    """Everything on modules and parameters that is a hook, or an attribute that a bare copy has not."""
    bare = copy.deepcopy(Plain())
    found = {}
    for name, module in model.named_modules():
        hooks = {key for key, value in vars(module).items() if "hooks" in key and value}
        extra = set(vars(module)) ^ set(vars(bare.get_submodule(name))) ^ ACCELERATES.intersection(vars(module))
        found[name] = hooks | extra
    for name, p in model.named_parameters():
        found[name] = {key for key in ("_backward_hooks", "_post_accumulate_grad_hooks") if getattr(p, key, None)}
    return {name: hooks for name, hooks in found.items() if hooks}


def saliency(model):
    """Gradients of two classes through one forward pass, which hooks would refuse as a second backward."""
    x = torch.randn(4, 1, 8, 8, requires_grad=True)
    was, grad = model.training, torch.is_grad_enabled()
    with torch.enable_grad():
        y = model.eval()(x)["logits"]
        maps = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0] for k in range(2)]
    model.train(was)
    assert torch.is_grad_enabled() == grad
    return maps


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(s.values()))
def test_no_hook_is_left_and_the_model_can_be_differentiated(tmp_path, settings):
    trainer = ClarsTrainer(Plain(), clars_args(tmp_path, max_steps=2, **settings), train_dataset=Images())
    trainer.train()
    assert left_on(trainer.model) == {}
    saliency(trainer.model)
    torch.autograd.functional.jacobian(lambda x: trainer.model(x)["logits"], torch.randn(1, 1, 8, 8))
    trainer.model(torch.randn(8, 8)[None, None])


def test_no_hook_is_left_after_an_exception(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = ClarsTrainer(Plain(), clars_args(tmp_path, max_steps=2), train_dataset=Images(), callbacks=[Stops()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert left_on(trainer.model) == {}


def test_no_hook_is_left_when_the_layers_to_hold_do_not_exist(tmp_path):
    args = clars_args(tmp_path, max_steps=2, freeze_head_epochs=1.0, head_layers=["nothing"])
    trainer = ClarsTrainer(Plain(), args, train_dataset=Images())
    with pytest.raises(ValueError, match="head_layers"):
        trainer.train()
    assert left_on(trainer.model) == {}


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(s.values()))
def test_a_second_training_attaches_again_and_is_that_of_a_model_that_kept_its_hooks(tmp_path, settings):
    """The optimizer goes on with its momentum, as Trainer's does."""

    def twice(folder, keep):
        trainer = ClarsTrainer(Plain(), clars_args(folder, max_steps=2, **settings), train_dataset=Images())
        if keep:
            trainer._optimizer_is_the_users = True  # whose hooks stay
        trainer.train()
        trainer.train()
        return trainer.model

    first, second = twice(tmp_path / "first", keep=False), twice(tmp_path / "second", keep=True)
    assert left_on(first) == {}
    for p, q in zip(parameters(first), parameters(second), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_hooks_of_an_optimizer_that_the_user_made_are_the_users(tmp_path):
    model = Plain()
    optimizer = CLARS(model)
    before = left_on(model)
    trainer = ClarsTrainer(
        model, clars_args(tmp_path, max_steps=2), train_dataset=Images(), optimizers=(optimizer, None)
    )
    trainer.train()
    assert left_on(model) == before
    optimizer.remove_hooks()
    assert left_on(model) == {}


def test_evaluation_prediction_and_callbacks_between_steps_measure_and_keep_nothing(tmp_path):
    class Looks(TrainerCallback):
        """Does between steps what hooks would refuse, or would add to the next step's norms."""

        seen = 0

        def look(self, model, optimizer):
            saliency(model)
            with torch.enable_grad():
                model.train()(torch.randn(3, 1, 8, 8))["logits"].sum()
            self.seen += 1
            assert not layerwise(optimizer).norms._passes

        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.look(model, optimizer)

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.look(model, optimizer)
            control.should_evaluate = True

        def on_evaluate(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.look(model, optimizer)

    def metrics(prediction):
        saliency(trainer.model)
        return {"one": 1.0}

    settings = {"max_steps": 3, "gradient_accumulation_steps": 2}
    alone = ClarsTrainer(Plain(), clars_args(tmp_path / "alone", **settings), train_dataset=Images())
    alone.train()
    looks = Looks()
    trainer = ClarsTrainer(
        Plain(),
        clars_args(tmp_path / "looked", eval_on_start=True, eval_strategy="steps", **settings),
        train_dataset=Images(),
        eval_dataset=Images(10),
        compute_metrics=metrics,
        callbacks=[looks],
    )
    trainer.train()
    assert looks.seen == 10
    for p, q in zip(parameters(alone.model), parameters(trainer.model), strict=True):
        assert torch.equal(p, q)


def test_a_hyperparameter_search_leaves_no_hook_on_any_of_its_models(tmp_path, monkeypatch):
    models = []

    def make():
        models.append(Plain())
        return models[-1]

    class Trial:
        """What Trainer asks of optuna's, which is not installed here."""

        def __init__(self, number):
            self.number, self.params = number, {}

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    args = clars_args(tmp_path, max_steps=2)
    trainer = ClarsTrainer(args=args, model_init=make, train_dataset=Images(), eval_dataset=Images(8))
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {"eta": 0.01 * trial.number}
    for number in (1, 2):
        trainer.train(trial=Trial(number))
        trainer.evaluate()
    assert len(models) == 3
    assert [left_on(model) for model in models] == [{}, {}, {}]
