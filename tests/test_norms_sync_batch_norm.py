"""Promise: SyncBatchNorm is exact in one process and with frozen statistics, and refused where processes share them."""

import copy

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import SharedStatisticsError
from hf_clars.grad_norms.rules import normalization


def norms_of(model):
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    with PerSampleGradNorms(model) as norms:
        model(x).square().mean().backward()
    return norms.per_sample["1"]


def models():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).double()
    return plain, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))


@pytest.mark.parametrize("training", [True, False])
def test_in_one_process_it_is_batch_norm(training):
    plain, sync = models()
    torch.testing.assert_close(norms_of(sync.train(training)), norms_of(plain.train(training)), rtol=1e-12, atol=0)


def test_statistics_of_several_processes_are_refused_and_frozen_ones_are_not(monkeypatch):
    monkeypatch.setattr(normalization, "world_size", lambda: 2)
    _, sync = models()
    with pytest.raises(SharedStatisticsError, match="leave BatchNorm as it is"):
        norms_of(sync)
    plain, sync = models()
    torch.testing.assert_close(norms_of(sync.eval()), norms_of(plain.eval()), rtol=1e-12, atol=0)
