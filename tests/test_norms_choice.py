"""Promise: on a GPU what was measured decides the form of a layer's norms, all processes and resumed runs take the same."""

import json
import logging
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_clars.errors import ConfigError
from hf_clars.grad_norms import PerSampleGradNorms, norm_math
from hf_clars.grad_norms.choice import FormChoices, cheapest_form, form_choices, forms, layer_forms, tables, timing
from hf_clars.grad_norms.kernels import reference
from hf_clars.grad_norms.rules import convolution, kernel_forms
from hf_clars.grad_norms.rules.costs import SHIPPED, WeightUse, amounts, fastest, predicted
from hf_clars.trainer.callbacks import SharedFormsCallback
from scripts.fit_forms import model_of, shipped
from tests.processes import GROUP, leave, results_of_two

USE = WeightUse(3, 20, 16, 24, element_size=2)
H100 = {"torch": "2.11.0+cu130", "triton": "3.6.0", "driver": "580.1", "card": SHIPPED["machine"]["card"]}
FEW_CHANNELS = 16


@pytest.fixture(autouse=True)
def own_place(monkeypatch, tmp_path):
    """No file of the user's, and a process that has chosen nothing."""
    monkeypatch.setenv(tables.PLACE, str(tmp_path / "forms.json"))
    monkeypatch.delenv(tables.SECONDS, raising=False)
    monkeypatch.setattr(tables, "machine", lambda: H100)
    fresh = FormChoices()
    for module in (forms, kernel_forms, convolution):
        monkeypatch.setattr(module, "form_choices", fresh)
    return fresh


def rows():
    for kind, by_use in SHIPPED["times"].items():
        for name, times in by_use.items():
            use = WeightUse.named(name)
            guess = {form: ms for form, ms in predicted(kind, use).items() if form in times}
            if len(guess) > 1 and (kind.startswith("torch") or use.width_in >= FEW_CHANNELS):
                yield kind, use, times, guess


def choice_of(choices, kind="linear", use=USE, runs=None):
    choices.take(kind, use, runs)
    return choices.look_up(kind, use)


def clock_of(**times):
    """Forms that take this long; None: there is no memory for it."""

    def run(ms):
        if ms is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ms

    return {form: partial(run, ms) for form, ms in times.items()}


# ---- the model and the shipped file ------------------------------------------------------------------------------


def test_the_model_takes_the_winner_or_one_within_a_fifth_of_it_for_every_shape_that_was_measured():
    found = list(rows())
    assert len(found) > 100
    slow = {
        (kind, str(use)): times
        for kind, use, times, guess in found
        if times[fastest(guess)] > 1.2 * min(times.values())
    }
    assert slow == {}


def test_no_single_form_would_do():
    for kind in SHIPPED["model"]:
        taken = [(times, guess) for k, _, times, guess in rows() if k == kind]
        assert len({fastest(guess) for _, guess in taken}) > 1, kind
        for form in SHIPPED["model"][kind]:
            assert any(times.get(form, 9e9) > 1.2 * min(times.values()) for times, _ in taken), (kind, form)


def test_the_constants_are_the_fit_to_the_shipped_times():
    assert model_of(SHIPPED["times"], SHIPPED["speeds"]) == SHIPPED["model"]


def test_no_constant_is_faster_than_the_card():
    for kind, by_form in SHIPPED["model"].items():
        for form, constants in by_form.items():
            assert all(value >= 0 for value in constants.values()), (kind, form)
            assert constants.get("product", 1) >= 0.999 / SHIPPED["speeds"]["bf16 TFLOP/s"], (kind, form)


def test_the_script_makes_the_file_from_a_study_and_a_kit():
    name = "(4, 100, 32, 64)"
    torch_rows = {f"linear {name}": {"wgrad": 0.1, "gram": 0.2, "gram f32": 1.5, "product": 0.3}}
    torch_rows["conv (16, 32, 3, 2, 9)"] = {
        "wgrad": 0.1,
        "gram": 0.5,
        "gram f32": 2.0,
        "product": 0.9,
        "grouped x": 3.0,
    }
    kernels = {f"triton linear {name}": {"wgrad": 0.4, "ptr0": 0.2, "ptr0 err": 0.0, "tma1": 0.15, "gram0": 0.05}}
    networks = {"('conv', (64, 32, 7, 7), 16, 1, 1)": {"ms": {"fused64x64": 0.3, "tma64x128": 0.1, "gram64": 0.2}}}
    study = {
        "card": "X", "torch": "1", "triton": "2", "bf16 TFLOP/s": 100.0, "copy TB/s": 1.0,
        "forms in torch (batch of 128 for convolutions)": torch_rows, "kernels, first timing": kernels,
        "kernels, choice in whole networks (weight gradient and norms together)": networks,
    }  # fmt: skip
    found = shipped(study)["times"]
    assert found["linear"] == {"B 4 T 100 32>64 bytes 2": {"gram": 0.15, "product": 0.15}}
    assert found["pointwise"] == {"B 64 T 49 32>16 kernel 1x1 of 0 bytes 2": {"gram": 0.2, "product": 0.3, "rows": 0.1}}
    strided = "B 128 T 25 16>32 kernel 3x3 of 81 bytes 2"
    assert found["torch"][strided] == {"gram": 2.1, "product": 0.9, "grouped": 3.0}
    assert found["torch beside"][strided] == {"gram": 2.0, "product": 0.9}
    of_kit = {"linear": {"B 4 T 100 32>64 bytes 2": {"gram": 7.0, "product": 8.0}}}
    kit = {"machine": {"card": "X"}, "stages": {"forms": {"times": of_kit}}}
    assert shipped(study, kit)["times"]["linear"] == of_kit["linear"]
    with pytest.raises(ValueError, match="'Y'"):
        shipped(study, {"machine": {"card": "Y"}})


def test_a_use_is_known_by_its_name():
    for use in (USE, WeightUse(2, 4, 3, 5, 6, 81, (3, 2), 8)):
        assert WeightUse.named(str(use)) == use
    with pytest.raises(ValueError, match="'B 3'"):
        WeightUse.named("B 3")


def test_a_kernel_pays_for_whole_tiles():
    short, long = (amounts("linear", "product", WeightUse(1, t, 8, 8, element_size=2)) for t in (49, 64))
    assert short["product"] == long["product"]
    assert (
        predicted("linear", WeightUse(64, 197, 768, 768))["gram"]
        > predicted("linear", WeightUse(64, 197, 768, 768, element_size=2))["gram"]
    )


# ---- in which order ----------------------------------------------------------------------------------------------


def test_memory_then_disk_then_shipped_then_a_measurement_then_the_model(monkeypatch):
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    name, times = next((n, t) for n, t in SHIPPED["times"]["linear"].items() if t["gram"] < 0.8 * t["product"])
    use = WeightUse.named(name)
    unknown = choice_of(FormChoices(), use=USE)
    assert (unknown.why, unknown.form) == ("model", fastest(predicted("linear", USE)))
    other = "gram" if unknown.form == "product" else "product"
    measured = choice_of(FormChoices(60), runs=clock_of(**{other: 1.0, unknown.form: 2.0}))
    assert (measured.why, measured.form) == ("measured", other)
    assert measured.measured == {other: 1.0, unknown.form: 2.0}
    assert choice_of(FormChoices(), use=USE).why == "disk"
    ships = choice_of(FormChoices(60), use=use, runs=clock_of(gram=9.0, product=1.0))
    assert (ships.why, ships.form, ships.measured) == ("shipped", "gram", times)
    tables.write({"linear": {name: {"gram": 5.0, "product": 4.0}}})
    on_disk = choice_of(FormChoices(), use=use)
    assert (on_disk.why, on_disk.form) == ("disk", "product")
    resumed = FormChoices()
    resumed.restore({"linear": {name: "gram"}})
    assert (choice_of(resumed, use=use).why, choice_of(resumed, use=use).form) == ("memory", "gram")


def test_a_shape_is_decided_once(monkeypatch):
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    choices = FormChoices(60)
    assert choices.take("linear", USE, clock_of(gram=1.0, product=2.0)) == "gram"
    assert choices.take("linear", USE, clock_of(gram=2.0, product=1.0)) == "gram"


def test_nothing_is_measured_unless_it_is_allowed_and_no_longer_than_that(monkeypatch):
    def forbidden():
        raise AssertionError("measured")

    runs = {"gram": forbidden, "product": forbidden}
    assert choice_of(FormChoices(), runs=runs).why == "model"
    monkeypatch.setenv(tables.SECONDS, "0.05")
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    monkeypatch.setattr(forms, "milliseconds", lambda runs: (timing.milliseconds(runs)[0], 0.06))
    choices = FormChoices()
    assert choice_of(choices, runs=clock_of(gram=1.0, product=2.0)).why == "measured"
    assert choice_of(choices, use=WeightUse(4, 20, 16, 24), runs=runs).why == "model"
    monkeypatch.setenv(tables.SECONDS, "yes")
    with pytest.raises(ConfigError, match=f"{tables.SECONDS}='yes'"):
        choice_of(FormChoices(), runs=runs)


def test_a_form_that_finds_no_memory_is_dropped_and_tried_again_another_day(monkeypatch):
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    best = fastest(predicted("linear", USE))
    other = "gram" if best == "product" else "product"
    assert choice_of(FormChoices(60), runs=clock_of(**{best: None, other: 3.0})).form == other
    nothing = choice_of(FormChoices(60), use=USE, runs=clock_of(gram=None, product=None))
    assert (nothing.why, nothing.form) == ("model", best)
    assert tables.read() == {}


def test_the_clock_tells_a_long_form_from_a_short_one():
    a = torch.ones(400, 400)
    times, seconds = timing.milliseconds({"gram": lambda: a @ a @ a @ a @ a, "product": lambda: None})
    assert times["gram"] > times["product"] > 0
    assert seconds > times["gram"] / 1e3


@pytest.mark.parametrize("changed", ["torch", "triton", "driver", "card"])
def test_times_of_another_version_are_ignored_and_it_is_said_once(monkeypatch, caplog, changed):
    tables.write({"linear": {str(USE): {"gram": 1.0, "product": 2.0}}})
    monkeypatch.setattr(tables, "machine", lambda: {**H100, changed: "other"})
    choices = FormChoices()
    with caplog.at_level(logging.WARNING):
        assert choice_of(choices).why == "model"
        choice_of(choices, use=WeightUse(4, 20, 16, 24))
    assert [changed in r.message and "ignored" in r.message for r in caplog.records] == [True]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"machine": {}}', json.dumps({"machine": H100, "times": {"linear": {str(USE): {"magic": 1.0}}}})],
)
def test_a_file_that_is_none_is_ignored_and_it_is_said(tmp_path, caplog, content):
    (tmp_path / "forms.json").write_text(content)
    assert choice_of(FormChoices()).why == "model"
    assert "no file of measured forms" in caplog.text


def test_a_place_that_cannot_be_written_does_not_end_a_run(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tables.PLACE, str(tmp_path / "file" / "forms.json"))
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    assert choice_of(FormChoices(60), runs=clock_of(gram=1.0, product=2.0)).form == "gram"
    assert tables.PLACE in caplog.text


def test_the_shipped_times_hold_for_their_card_only(monkeypatch):
    use = WeightUse.named(next(iter(SHIPPED["times"]["linear"])))
    assert choice_of(FormChoices(), use=use).why == "shipped"
    monkeypatch.setattr(tables, "machine", lambda: {**H100, "card": "NVIDIA A100"})
    assert choice_of(FormChoices(), use=use).why == "model"


# ---- without kernels ---------------------------------------------------------------------------------------------


def test_the_librarys_grouped_convolution_is_taken_on_cuda_only_where_it_was_measured_faster(own_place):
    use = WeightUse(8, 49, 32, 32, pixels=49, kernel=(3, 3))
    assert all("grouped" not in predicted(kind, use) for kind in ("torch", "torch beside"))
    assert all(cheapest_form(u, "cuda") != "grouped" for k, u, _, _ in rows() if k == "torch")
    tables.write({"torch": {str(use): {"gram": 3.0, "product": 2.0, "grouped": 1.0}}})
    own_place.measure_anew(0)
    assert cheapest_form(use, "cuda") != "grouped"
    own_place._known = None
    own_place.restore({})
    assert cheapest_form(use, "cuda") == "grouped"


def test_nothing_is_looked_up_on_a_cpu(own_place, monkeypatch):
    monkeypatch.setattr(FormChoices, "take", lambda *_: pytest.fail("looked up"))
    cheapest_form(USE, "cpu")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.Linear(36, 5))
    with PerSampleGradNorms(model) as norms:
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        assert norms.per_sample["0"].shape == (4,)
    assert own_place.export() == {}


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(
    ("axes", "groups", "kernel", "steps"),
    [
        (2, 1, (3, 3), ((1, 1), (1, 1), (1, 1))),
        (2, 2, (3, 2), ((2, 1), (1, 0), (1, 2))),
        (2, 4, (1, 1), ((2, 2), (0, 0), (1, 1))),
        (1, 1, (4,), ((3,), (2,), (2,))),
        (3, 2, (2, 1, 3), ((1, 2, 1), (0, 1, 1), (1, 1, 1))),
    ],
)
def test_products_of_patches_are_the_librarys(axes, groups, kernel, steps, sliced, monkeypatch):
    torch.manual_seed(0)
    stride, padding, dilation = steps
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](4, 8, kernel, stride, padding, dilation, groups).double()
    x = torch.randn(3, 4, *range(9, 9 + axes)).double()
    g = torch.randn_like(layer(x))
    shape = (8, 4 // groups, *kernel)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    want = norm_math.convolution_weight_grads(x, g, kernel_shape=shape, **settings)
    monkeypatch.setattr(norm_math, "MAX_ELEMENTS", 7 if sliced else norm_math.MAX_ELEMENTS)
    found = norm_math.patch_weight_grads(x, g, kernel_shape=shape, **settings)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    squares = norm_math.patch_gram_squared_norm(x, g, kernel=kernel, **settings)
    torch.testing.assert_close(squares, want.flatten(1).square().sum(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["gram", "product", "grouped"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3, groups=2), nn.Conv1d(4, 6, 3), nn.ConvTranspose2d(4, 3, 2)])
def test_each_form_of_a_gpu_without_kernels_gives_the_norms_of_a_cpu(monkeypatch, own_place, layer, form):
    torch.manual_seed(0)
    model = nn.Sequential(layer.double())
    x = torch.randn(5, 4, 9, 8).double() if "2d" in type(layer).__name__ else torch.randn(5, 4, 9).double()

    def norms_of():
        with PerSampleGradNorms(model) as norms:
            model(x).sin().mean().backward()
            return norms.per_sample["0"]

    want = norms_of()
    library, calls = norm_math.convolution_weight_grads, []
    monkeypatch.setattr(norm_math, "convolution_weight_grads", lambda *a, **k: calls.append(1) or library(*a, **k))
    monkeypatch.setattr(convolution, "on_cuda", lambda t: True)
    monkeypatch.setattr(convolution, "cheapest_form", lambda use, *_, **__: own_place.take("torch", use))
    monkeypatch.setattr(FormChoices, "take", lambda *_: form)
    torch.testing.assert_close(norms_of(), want, rtol=1e-10, atol=1e-12)
    assert bool(calls) == (form == "grouped" and isinstance(layer, nn.Conv1d | nn.Conv2d))


def test_a_slice_on_cuda_is_a_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(norm_math, "on_cuda", lambda t: True)
    for free, numbers in ((80 << 30, 1 << 28), (1 << 30, 1 << 22), (0, 1 << 10)):
        norm_math._room.cache_clear()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        x = torch.empty(100, 1)
        parts = list(norm_math.slices_of(x, x, elements_per_sample=numbers // 10))
        assert [len(part[0]) for part in parts] == [10] * 10
    norm_math._room.cache_clear()


def test_compiled_code_asks_the_model_and_keeps_nothing(own_place):
    @torch.compile(backend="eager", fullgraph=True)
    def ask(x):
        return x + (1 if cheapest_form(WeightUse(*x.shape, 8, 8), "cuda") == "gram" else 2)

    assert float(ask(torch.zeros(2, 3))[0, 0]) == (
        1 if fastest(predicted("torch", WeightUse(2, 3, 8, 8))) == "gram" else 2
    )
    assert own_place.export() == {}


# ---- with kernels, by their references ---------------------------------------------------------------------------


@pytest.fixture
def by_reference(monkeypatch):
    """The kernels' plain torch twins in their place."""
    import sys

    for name in ("linear", "convolution"):
        monkeypatch.setitem(sys.modules, f"hf_clars.grad_norms.kernels.{name}", reference)
        monkeypatch.setattr(f"hf_clars.grad_norms.kernels.{name}", reference, raising=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["gram", "product"])
def test_a_linear_layers_backward_pass_is_the_same_in_every_form(by_reference, own_place, form, bias):
    torch.manual_seed(0)
    x, g, weight = torch.randn(3, 5, 16), torch.randn(3, 5, 24), torch.randn(24, 16)
    use = WeightUse(3, 5, 16, 24)
    own_place.restore({"linear": {str(use): form}})
    done = kernel_forms.linear_backward(x, weight, g, bias=bias, input_wanted=True)
    assert own_place.look_up("linear", use).form == form
    torch.testing.assert_close(done.grads["weight"], torch.einsum("bto,bti->oi", g, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(done.squares["weight"], (g.mT @ x).square().sum((1, 2)), rtol=1e-5, atol=1e-5)
    assert set(done.grads) == set(done.squares) == ({"weight", "bias"} if bias else {"weight"})
    torch.testing.assert_close(done.input_grad, g @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "kernel", "channels"),
    [("gram", 3, 16), ("product", 3, 16), ("product", 3, 3), ("gram", 1, 16), ("product", 1, 16), ("rows", 1, 16)],
)
def test_a_convolutions_backward_pass_is_the_same_in_every_form(by_reference, own_place, form, kernel, channels):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 24, kernel, padding=kernel // 2)
    x = torch.randn(3, channels, 5, 6, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
    settings = {"stride": (1, 1), "padding": (kernel // 2,) * 2, "dilation": (1, 1)}
    x = x.detach().contiguous(memory_format=torch.channels_last)
    kind, use = kernel_forms.convolution_shapes(x, layer.weight, g, settings)
    own_place.restore({kind: {str(use): form}})
    with torch.no_grad():
        done = kernel_forms.convolution_backward(x, layer.weight, g, settings, bias=True, input_wanted=True)
    assert (kind, str(use)) in {(k, str(u)) for k, u, _ in own_place} or channels < FEW_CHANNELS
    for found, expected in zip((done.input_grad, done.grads["weight"], done.grads["bias"]), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    each = norm_math.convolution_weight_grads(x, g, kernel_shape=tuple(layer.weight.shape), groups=1, **settings)
    torch.testing.assert_close(done.squares["weight"], each.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(done.squares["bias"], g.sum((2, 3)).square().sum(1), rtol=1e-4, atol=1e-4)


def test_only_a_1x1_kernel_without_strides_and_padding_is_rows():
    x, g, weight = torch.empty(2, 16, 8, 8), torch.empty(2, 4, 4, 4), torch.empty(4, 16, 1, 1)
    plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    assert kernel_forms.convolution_shapes(x, weight, x[:, :4], plain)[0] == "pointwise"
    assert kernel_forms.convolution_shapes(x, weight, g, {**plain, "stride": (2, 2)})[0] == "convolution"
    assert kernel_forms.convolution_shapes(x, weight, g, {**plain, "padding": (1, 1)})[0] == "convolution"


# ---- for people, from run to run, from process to process --------------------------------------------------------


def test_one_call_lists_form_reason_and_times_of_every_layer_and_leaves_the_model_alone(own_place, monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(36, 7), nn.Flatten(), nn.Linear(56, 2)
    )
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    shown = str(layer_forms(model, x)).splitlines()
    assert [line.split()[0] for line in shown] == ["layer", "0", "3", "5"]
    assert "model" in shown[1]
    assert "outer" in shown[3]
    monkeypatch.setattr("hf_clars.grad_norms.rules.linear.on_cuda", lambda t: True)
    monkeypatch.setattr("hf_clars.grad_norms.rules.linear.form_choices", own_place)
    name = str(WeightUse(2, 8, 36, 7))
    tables.write({"torch": {name: {"gram": 0.25, "product": 0.125}}})
    row = layer_forms(model, x).rows[1]
    assert (row.layer, row.use, row.choice.form, row.choice.why) == ("3", name, "product", "disk")
    assert "gram 0.250 product 0.125" in str(layer_forms(model, x))
    assert row.choice.predicted == predicted("torch", WeightUse(2, 8, 36, 7))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert own_place.export() == {}


def test_a_resumed_run_takes_the_same_forms_through_plain_json(own_place):
    first, second = FormChoices(), FormChoices()
    first.restore({"linear": {str(USE): "gram"}})
    choice_of(first, "torch", WeightUse(2, 8, 36, 7))
    second.restore(json.loads(json.dumps(first.export())))
    assert choice_of(second).form == "gram"
    assert second.export() == first.export()
    assert choice_of(second, "torch", WeightUse(2, 8, 36, 7)).why == "memory"
    for stored in ({"linear": {"B": "magic"}}, {"magic": {}}):
        with pytest.raises(ConfigError, match="magic"):
            second.restore(stored)


def work(rank, world, port, folder):
    """Rank 0 has measured, and knows times on its disk that rank 1 does not."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    tables.place = lambda: None
    timing._clock = lambda run: run()
    choices = FormChoices(60)
    best = fastest(predicted("linear", USE))
    other = "gram" if best == "product" else "product"
    later, seen = WeightUse(4, 20, 16, 24), []
    choices._known = {"disk": {"linear": {str(later): {best: 2.0, other: 1.0}}} if rank == 0 else {}}
    seen.append(choices.take("linear", USE, clock_of(**{other: 1.0, best: 2.0})))
    choices.share()
    seen += [choices.take("linear", USE), choices.take("linear", later), choices.look_up("linear", USE).why]
    leave({"seen": seen, "best": best, "other": other}, folder, rank)


@GROUP
@pytest.mark.distributed
def test_only_rank_0_measures_and_all_take_its_forms(tmp_path):
    first, second = results_of_two(work, tmp_path)
    best, other = first["best"], first["other"]
    assert first["seen"] == [other, other, other, "measured"]
    assert second["seen"] == [best, other, other, "memory"]


def test_a_process_alone_shares_with_nobody(own_place):
    own_place.take("linear", USE)
    own_place.share()
    assert list(own_place)[0][2].why == "model"


def test_training_shares_at_its_begin_and_after_the_first_step_on_gpus_only(monkeypatch):
    shared = []
    monkeypatch.setattr(FormChoices, "share", lambda self: shared.append(self))
    for gpu, times in ((False, []), (True, [form_choices] * 2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        callback = SharedFormsCallback()
        callback.on_train_begin(None, None, None)
        for _ in range(3):
            callback.on_step_end(None, None, None)
        assert shared == times
