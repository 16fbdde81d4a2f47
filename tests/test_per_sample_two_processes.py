"""Promise: on two real processes, Trainer or not, weights whole or split, the measures are those of one process."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_clars.errors import HfClarsError
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.per_sample import NormMonitor, PerSampleNormsCallback, with_index
from tests.processes import GROUP, leave, results_of_two
from tests.trainer_kit import Images, Plain, plain_args
from tests.twin import batch, loss_on

pytestmark = GROUP
SETTINGS = {"max_steps": 3, "learning_rate": 0.05, "remove_unused_columns": False, "max_grad_norm": 1e-2}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 3)).double()


def measured(model, wrapped, rank, world, *, first=None):
    """One step of 32 samples in two passes, rank r having every world-th of each pass, or rank 0 the first ones."""
    x, y = batch(0, 32)
    index = torch.arange(32)
    with NormMonitor(model, every=1, top_k=6, strict=True) as monitor:
        for number, part in enumerate((slice(0, 16), slice(16, 32))):
            own = index[part][rank::world]
            if first is not None:
                own = index[part][:first] if rank == 0 else index[part][first:]
            share = len(own) * world / 32
            with monitor.batch(own, last=number == 1):
                out = wrapped(x[own].double())
                loss = nn.functional.cross_entropy(out, y[own]) if len(own) else out.sum()
                (loss * share).backward()
        return monitor.last, monitor.noise.read().value


def trained(folder, world):
    """Trainer's own process group; a head that takes no num_items_in_batch."""

    class Head(Plain):
        accepts_loss_kwargs = False

    callback = PerSampleNormsCallback(every=1, top_k=5, strict=True)
    args = plain_args(folder, per_device_train_batch_size=16 // world, ddp_find_unused_parameters=False, **SETTINGS)
    Trainer(Head(), args, train_dataset=with_index(Images()), callbacks=[callback]).train()
    return callback.monitor.last, callback.monitor.noise.read().value


def one_process_fails(rank):
    """The second process cannot read its norms: both end the measuring, and neither waits for the other."""
    model = make_model()
    original = PerSampleGradNorms.check_all_captured
    if rank == 1:
        PerSampleGradNorms.check_all_captured = lambda self: 1 / 0
    x, y = batch(0, 8)
    with NormMonitor(model, every=1) as monitor:
        for _ in range(3):
            with monitor.batch():
                loss_on(x.double(), y)(model).backward()
        ended = monitor.ended
    PerSampleGradNorms.check_all_captured = original
    return ended


def worker(rank, world, port, folder):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    results = {"trainer": trained(f"{folder}/trainer", world)}  # Trainer makes the process group
    model = make_model()
    wrapped = DistributedDataParallel(model)
    results["ddp"] = measured(model, wrapped, rank, world)
    results["uneven"] = measured(make_ready(model), wrapped, rank, world, first=10)
    results["none on one"] = measured(make_ready(model), wrapped, rank, world, first=16)
    from torch.distributed.fsdp import fully_shard

    split = make_model()
    for module in (split[0], split[3], split):
        fully_shard(module)
    results["fsdp"] = measured(split, split, rank, world)
    results["failed"] = one_process_fails(rank)
    leave(results, folder, rank)


def make_ready(model):
    model.zero_grad()
    return model


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_two(worker, folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    model = make_model()
    return {
        "trainer": trained(tmp_path_factory.mktemp("one"), 1),
        "loop": measured(model, model, 0, 1),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["trainer", "ddp", "uneven", "none on one", "fsdp"])
def test_two_processes_measure_what_one_does(two, one, case):
    expected, scale = copy.deepcopy(one["trainer" if case == "trainer" else "loop"])
    near = {"rtol": 1e-3, "atol": 1e-7} if case == "trainer" else {"rtol": 1e-9, "atol": 1e-12}
    for rank in range(2):
        found, noise = two[rank][case]
        assert found.samples == expected.samples
        for name in ("batch_square", "sample_square", "sample_norm", "quantiles", "top_norm", "top_share"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), **near)
        torch.testing.assert_close(noise, scale, rtol=1e-2 if case == "trainer" else 1e-8, atol=0)
        assert torch.equal(found.top_index, expected.top_index)


@pytest.mark.distributed
def test_the_hardest_samples_are_named_with_their_process(two):
    found, _ = two[0]["ddp"]
    assert torch.equal(found.top_rank, found.top_index % 2)
    assert torch.equal(found.top_micro_batch, found.top_index // 16)
    assert torch.equal(found.top_row, found.top_index % 16 // 2)


@pytest.mark.distributed
def test_a_process_that_cannot_measure_ends_it_for_all_and_no_one_waits(two):
    assert "ZeroDivisionError" in two[1]["failed"]
    assert "Another process could not measure" in two[0]["failed"]


def test_the_error_for_that_is_one_of_ours():
    from hf_clars.per_sample.monitor import NothingMeasuredError

    assert issubclass(NothingMeasuredError, HfClarsError)
