"""Promise: Trainer makes our optimizers by its factory protocol, without a model passed by hand."""

import pytest
import torch
from transformers import Trainer

from hf_clars import CLARS, LARS, ClarsFactory
from hf_clars.errors import ConfigError
from tests.trainer_kit import Images, Plain, plain_args


def trained(tmp_path, **how):
    trainer = Trainer(
        Plain(), plain_args(tmp_path, max_steps=3, per_device_train_batch_size=8), train_dataset=Images(), **how
    )
    trainer.train()
    return trainer


def test_the_factory_trains_as_the_optimizer_made_by_hand_does(tmp_path):
    ours = trained(tmp_path, optimizer_cls_and_kwargs=(ClarsFactory, {"lr": 0.5, "eta": 1e-2}))
    model = Plain()
    by_hand = Trainer(
        model,
        plain_args(tmp_path, max_steps=3, per_device_train_batch_size=8),
        train_dataset=Images(),
        optimizers=(CLARS(model, lr=0.5, eta=1e-2), None),
    )
    by_hand.train()
    assert isinstance(ours.optimizer.optimizer, CLARS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=0)


def test_every_method_can_be_named(tmp_path):
    trainer = trained(tmp_path, optimizer_cls_and_kwargs=(ClarsFactory, {"lr": 0.5, "method": "lars"}))
    assert type(trainer.optimizer.optimizer) is LARS


@pytest.mark.parametrize(("wrong", "said"), [({"method": "clras"}, "did you mean 'clars'"), ({"etta": 1}, "etta")])
def test_what_is_misspelt_is_named(wrong, said):
    with pytest.raises(ConfigError, match=said):
        ClarsFactory()(Plain(), **wrong)
