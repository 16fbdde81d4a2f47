"""Promise: under data parallelism on two real processes, rates and weights are those of one process."""

import copy
import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_clars.grad_norms.errors import SharedStatisticsError
from hf_clars.optim import CLARS, LARS, NAG
from tests.processes import GROUP, leave, results_of_two
from tests.twin import batch, loss_on

pytestmark = GROUP
STEPS = 4
CASES = {
    "CLARS": (CLARS, {}),
    "CLARS, rms": (CLARS, {"norm": "rms"}),
    "CLARS, 8 samples": (CLARS, {"samples": 8}),
    "CLARS, micro-batches": (CLARS, {"estimator": "microbatch"}),
    "LARS": (LARS, {}),
    "NAG": (NAG, {}),
}
SHARDED = [case for case in CASES if "micro" not in case and "8 samples" not in case and case != "NAG"]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 3)).double()


@contextmanager
def counted_reductions(counts):
    """Note every all-reduce that is called inside."""
    original = dist.all_reduce

    def counted(*args, **kwargs):
        counts.append(1)
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        yield
    finally:
        dist.all_reduce = original


def train(case, rank, world, accumulation):
    """Four steps on 32 samples each; rank r has every world-th of them, in `accumulation` passes."""
    cls, settings = CASES[case]
    model = make_model()
    optimizer = cls(model, 0.5, **settings)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    reductions = []
    for step in range(STEPS):
        x, y = batch(step, 32)
        x, y = x.double()[rank::world], y[rank::world]
        optimizer.zero_grad()
        for i, (part_x, part_y) in enumerate(zip(x.chunk(accumulation), y.chunk(accumulation), strict=True)):
            last = i == accumulation - 1
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                (loss_on(part_x, part_y)(wrapped) / accumulation).backward()
        with counted_reductions(reductions):
            optimizer.step()
    return model, optimizer, len(reductions)


def train_sharded(case, rank, world):
    """The same after torch's fully_shard, the optimizer being created on weights that are split already."""
    from torch.distributed.fsdp import fully_shard

    cls, settings = CASES[case]
    model = make_model()
    for module in (model[0], model[3], model):
        fully_shard(module)
    optimizer = cls(model, 0.5, **settings)
    reductions = []
    for step in range(STEPS):
        x, y = batch(step, 32)
        optimizer.zero_grad()
        loss_on(x.double()[rank::world], y[rank::world])(model).backward()
        with counted_reductions(reductions):
            optimizer.step()
    return {n: t.full_tensor() for n, t in model.state_dict().items()}, optimizer.last_step.rate, len(reductions)


def train_unevenly(rank, world, *, first=20, loss_scale=None):
    """Rank 0 has `first` of the 32 samples, rank 1 the others: each gives its share of the mean loss, times the ranks.

    With a loss scale the gradients are unscaled before the step, as fp16 training does.
    """
    model = make_model()
    optimizer = CLARS(model, 0.5)
    wrapped = DistributedDataParallel(model)
    own = slice(0, first) if rank == 0 else slice(first, 32)
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale or 1.0, enabled=loss_scale is not None)
    for step in range(STEPS):
        x, y = batch(step, 32)
        x, y = x.double()[own], y[own]
        optimizer.zero_grad()
        share = loss_on(x, y)(wrapped) * (len(y) * world / 32) if len(y) else wrapped(x).sum()
        scaler.scale(share).backward()
        scaler.step(optimizer)
        scaler.update()
    return {n: t.detach().clone() for n, t in model.state_dict().items()}, optimizer.last_step.rate, None


def what_shared_statistics_say():
    """The refusal of statistics over two processes that are really there.

    torch computes them on GPUs only, and puts no DistributedDataParallel around them elsewhere: what the module
    computes is plain BatchNorm here. Called last: it changes the class.
    """
    nn.SyncBatchNorm.forward = nn.BatchNorm2d.forward
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.SyncBatchNorm(3), nn.Flatten(), nn.Linear(48, 3))
    optimizer = CLARS(model, 0.5)
    try:
        model(batch(0, 32)[0])
    except SharedStatisticsError as error:
        return str(error)
    return f"{type(optimizer).__name__} said nothing"


def worker(rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = {}
    for case in CASES:
        for accumulation in (1, 2):
            model, optimizer, reductions = train(case, rank, world, accumulation)
            results[case, accumulation] = (
                copy.deepcopy({k: v.detach() for k, v in model.state_dict().items()}),
                optimizer.last_step.rate,
                reductions,
            )
    for case in SHARDED:
        results[case, "sharded"] = train_sharded(case, rank, world)
    results["uneven"] = train_unevenly(rank, world)
    results["uneven, scaled"] = train_unevenly(rank, world, loss_scale=2.0**12)
    results["one without samples"] = train_unevenly(rank, world, first=32)
    results["shared statistics"] = what_shared_statistics_say()
    leave(results, folder, rank)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_two(worker, folder)


@pytest.mark.distributed
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", [c for c in CASES if c != "CLARS, 8 samples"])  # each rank's own first samples
def test_two_processes_equal_one(two, case, accumulation):
    # a micro-batch is one pass of one process, so one process must make the same passes
    passes = 2 * accumulation if case == "CLARS, micro-batches" else accumulation
    model, optimizer, _ = train_as_two(case, passes)
    for rank in range(2):
        weights, rate, _ = two[rank][case, accumulation]
        torch.testing.assert_close(rate, optimizer.last_step.rate, rtol=1e-9, atol=0)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)


def train_as_two(case, passes):
    """One process that sees the two ranks' samples, rank 0's half of each step first."""
    cls, settings = CASES[case]
    model = make_model()
    optimizer = cls(model, 0.5, **settings)
    for step in range(STEPS):
        x, y = batch(step, 32)
        x, y = torch.cat([x[0::2], x[1::2]]).double(), torch.cat([y[0::2], y[1::2]])
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(passes), y.chunk(passes), strict=True):
            (loss_on(part_x, part_y)(model) / passes).backward()
        optimizer.step()
    return model, optimizer, None


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_both_processes_agree_and_a_step_adds_one_small_reduction_at_most(two, case):
    for accumulation in (1, 2):
        (first, rate, reductions), (second, other, _) = two[0][case, accumulation], two[1][case, accumulation]
        assert torch.equal(rate, other)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert reductions == (STEPS if case.startswith("CLARS") else 0)


@pytest.mark.distributed
def test_a_subset_shared_by_two_processes_estimates_what_every_sample_gives(two):
    subset, every = two[0]["CLARS, 8 samples", 1][1], two[0]["CLARS", 1][1]
    torch.testing.assert_close(subset, every, rtol=0.5, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("case", SHARDED)
def test_weights_split_by_fsdp_equal_one_process_with_one_reduction_a_step(two, case):
    model, optimizer, _ = train_as_two(case, 1)
    for rank in range(2):
        weights, rate, reductions = two[rank][case, "sharded"]
        torch.testing.assert_close(rate, optimizer.last_step.rate, rtol=1e-9, atol=0)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)
        assert reductions == STEPS


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["uneven", "uneven, scaled", "one without samples"])
def test_ranks_with_different_numbers_of_samples_and_a_loss_scale_equal_one_process(two, kind):
    model, optimizer, _ = train_as_two("CLARS", 1)
    for rank in range(2):
        weights, rate, _ = two[rank][kind]
        torch.testing.assert_close(rate, optimizer.last_step.rate, rtol=1e-9, atol=0)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.distributed
def test_statistics_over_both_processes_are_refused(two):
    for rank in range(2):
        assert "leave BatchNorm as it is" in two[rank]["shared statistics"]
