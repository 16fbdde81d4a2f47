"""Promise: every launcher and every accumulation gives the numbers of one process: rates, n_k, log and weights.

Two real CPU processes (gloo) are started by `accelerate launch` with the files in configs/accelerate/ that users get.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_clars import ClarsTrainer
from tests.launchers import started
from tests.launchers.cases import (
    BF16,
    MODELS,
    Case,
    Images,
    cases,
    floor_of,
    outcome,
    run,
    save_weights,
    subset_order,
    weights_file,
)
from tests.launchers.extras import (
    AROUND,
    CHANGED,
    CHECKPOINTING,
    OWN_LOSSES,
    PLAIN,
    SHARDED,
    Averaging,
    average_of,
)
from tests.launchers.started import GROUP, LAUNCHERS, launch

pytestmark = [GROUP, pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Runs in this one process, each made when it is first asked for."""
    made = {}

    def outcome_of(model, method, accumulation=1, order=None, **changes):
        own = changes.get("trainer_class")
        key = (model, method, accumulation, None if order is None else tuple(order[:32]), tuple(changes), own)
        if key not in made:
            folder = tmp_path_factory.mktemp("single")
            data = changes.pop("data", Images(order))
            trainer = run(Case(model, method, accumulation), folder, 1, data=data, **changes)
            save_weights(trainer.model.state_dict(), folder)
            made[key] = outcome(folder)
        return made[key]

    return outcome_of


@pytest.fixture(scope="module", params=LAUNCHERS)
def launched(request, tmp_path_factory):
    """All cases under one launcher."""
    return request.param, started.launched(request.param, tmp_path_factory)


def assert_same(found, expected):
    (arrays, layers), (wanted, wanted_layers) = found, expected
    assert layers == wanted_layers
    assert arrays.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(arrays[name], value, rtol=1e-5, atol=floor_of(name), equal_nan=True, err_msg=name)


def largest_difference(found, expected):
    """In the log's numbers and in the weights, on the scale on which `assert_same` allows 1e-5."""
    (arrays, _), (wanted, _) = found, expected
    worst = {"log": 0.0, "weight": 0.0}
    for name, value in wanted.items():
        kind = name.split(" ", 1)[0]
        scale = np.abs(value) + 1e5 * floor_of(name)
        # A layer without a norm is NaN in both; 0 in both is no difference.
        shares = np.abs(arrays[name] - value)[scale > 0] / scale[scale > 0]
        worst[kind] = max(worst[kind], float(np.nanmax(shares, initial=0.0)))
    return worst


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_launcher_gives_the_numbers_of_one_process(launched, single, case):
    _, out = launched
    order = subset_order(case, 2) if case.method == "clars subset" else None
    assert_same(outcome(out / case.name), single(case.model, case.method, order=order))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_model_with_every_method_on_more_processes(launcher, processes, single, tmp_path):
    launch(launcher, "tests.launchers.worker", tmp_path, launcher, "every", processes=processes, seconds=2900)
    worst = {}
    for case in cases(every=True):
        order = subset_order(case, processes) if case.method == "clars subset" else None
        found, expected = outcome(tmp_path / case.name), single(case.model, case.method, order=order)
        assert_same(found, expected)
        for kind, value in largest_difference(found, expected).items():
            worst[kind] = max(value, worst.get(kind, 0.0))
    print(f"\n{launcher}, {processes} processes: largest relative difference {worst}")


def test_bf16_gives_the_rates_of_float32_to_its_own_precision(launched, single):
    """Eight bits of mantissa: 0.4 % a number. Weights that train in bf16 themselves (DeepSpeed) move in such steps."""
    _, out = launched
    arrays, _ = outcome(out / "bf16")
    wanted, _ = single(BF16.model, BF16.method)
    for quantity in ("rate", "mean_sample_norm", "weight_norm"):
        np.testing.assert_allclose(arrays[f"log {quantity}"][0], wanted[f"log {quantity}"][0], rtol=2e-2)
        np.testing.assert_allclose(arrays[f"log {quantity}"][-1], wanted[f"log {quantity}"][-1], rtol=1e-1)


@pytest.mark.parametrize("accumulation", [4, 16])
@pytest.mark.parametrize("model", MODELS)
def test_accumulation_gives_the_numbers_of_whole_batches(single, model, accumulation):
    assert_same(single(model, "clars", accumulation), single(model, "clars"))


@pytest.mark.parametrize("launched", ["ddp", *SHARDED], indirect=True)
@pytest.mark.parametrize("name", CHECKPOINTING)
def test_with_gradient_checkpointing(launched, single, name):
    _, out = launched
    assert_same(outcome(out / name.replace(" ", "_")), single("vit", "clars"))


@pytest.mark.parametrize("launched", ["ddp"], indirect=True)
@pytest.mark.parametrize("name", [name for name in AROUND if name not in CHECKPOINTING])
def test_a_compiled_model_and_whatever_way_a_loader_shares_the_batch_out(launched, single, name):
    _, out = launched
    assert_same(outcome(out / name.replace(" ", "_")), single("group norm", "clars"))


@pytest.mark.parametrize("launched", ["ddp"], indirect=True)
@pytest.mark.parametrize("name", CHANGED)
def test_with_settings_that_change_the_numbers_of_one_process_too(launched, single, name):
    """Among them an epoch's last update of fewer samples, in fewer passes."""
    _, out = launched
    assert_same(outcome(out / name.replace(" ", "_")), single("group norm", "clars", **CHANGED[name]))


@pytest.mark.parametrize("launched", ["ddp", *SHARDED], indirect=True)
@pytest.mark.parametrize("name", OWN_LOSSES)
def test_a_loss_of_the_user_s_own_with_weights_of_classes(launched, single, name):
    """A subclass that overrides `compute_loss`, in four passes of two processes, and in one pass of one."""
    _, out = launched
    own = type("Own", (OWN_LOSSES[name], ClarsTrainer), {})
    found, plain = outcome(out / name.replace(" ", "_")), single("group norm", "clars")
    assert_same(found, single("group norm", "clars", trainer_class=own))
    assert not np.allclose(found[0]["log rate"], plain[0]["log rate"], rtol=1e-2)


@pytest.mark.parametrize("launched", ["ddp"], indirect=True)
def test_an_average_of_the_weights_is_that_of_one_process(launched, single, tmp_path):
    _, out = launched
    assert_same(outcome(out / "averaged"), single("group norm", "clars"))
    averaging = Averaging()
    trainer = run(PLAIN, tmp_path, 1, callbacks=[averaging])
    expected, trained = average_of(averaging), trainer.model.state_dict()
    for rank in range(2):
        found = load_file(weights_file(out / f"average.{rank}"))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
            assert not torch.equal(value, trained[name])
