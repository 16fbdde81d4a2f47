"""Promise: data may be ranked at any point of a training, also between two passes of a step: it goes on as without."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_clars import CLARS
from hf_clars.per_sample import PerSampleLog, PerSampleNormsCallback, rank_samples
from tests.callback_kit import brute_force
from tests.trainer_kit import Images, Plain, plain_args


class Ranks(TrainerCallback):
    """Ranks at one of Trainer's events, and keeps what came out with the weights of that moment."""

    def __init__(self, event):
        self.found = []
        setattr(self, event, self.rank)

    def rank(self, args, state, control, model=None, **kwargs):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.found.append((weights, list(rank_samples(model, Images(6), batch_size=4, progress=False)["norm"])))


class Drops(Plain):
    """Draws random numbers, which a ranking must not take from it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Sequential(self.norm, nn.Dropout(0.2))


def trained(folder, *callbacks, every=1):
    model, watch = Drops(), PerSampleNormsCallback(every=every, top_k=3, strict=True)
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    Trainer(
        model,
        plain_args(folder, **settings),
        train_dataset=Images(60),
        callbacks=[watch, *callbacks],
        optimizers=(CLARS(model, lr=0.5), None),
    ).train()
    return model.state_dict(), PerSampleLog.open(folder).read()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_weights_and_log_are_those_of_a_training_without_and_the_ranking_is_right(tmp_path, event, every):
    ranks = Ranks(event)
    (expected, log), (found, other) = trained(tmp_path / "a", every=every), trained(tmp_path / "b", ranks, every=every)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    for name, values in log.items():
        torch.testing.assert_close(other[name], values, rtol=0, atol=0, equal_nan=True)
    assert len(ranks.found) >= 4
    for weights, norms in ranks.found:
        model, data = Drops().eval(), Images(6)
        model.load_state_dict(weights)
        torch.testing.assert_close(
            torch.tensor(norms).float(), brute_force(model, data.x, data.y)[0], rtol=1e-4, atol=0
        )


def test_an_optimizer_that_steps_inside_backward_does_not_step_for_it():
    model = Plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: p.data.add_(p.grad, alpha=-1.0))
    rank_samples(model, Images(6), batch_size=4, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param._post_accumulate_grad_hooks for param in model.parameters())


def test_a_gradient_that_a_frozen_part_has_kept_stays():
    model = Plain()
    model.conv.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    rank_samples(model, Images(6), progress=False)
    assert (model.conv.weight.grad == 1).all()
