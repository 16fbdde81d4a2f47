"""Promise: the cost model of CUDA is a fit to what was measured on an H100, and picks what was fastest there."""

import pytest

from hf_clars.grad_norms.rules.costs import SHIPPED, WeightUse, amounts, fastest, predicted
from scripts.fit_forms import model_of, shipped

USE = WeightUse(3, 20, 16, 24, element_size=2)
FEW_CHANNELS = 16


def rows():
    for kind, by_use in SHIPPED["times"].items():
        for name, times in by_use.items():
            use = WeightUse.named(name)
            guess = {form: ms for form, ms in predicted(kind, use).items() if form in times}
            if len(guess) > 1 and (kind.startswith("torch") or use.width_in >= FEW_CHANNELS):
                yield kind, use, times, guess


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
    half, full = (predicted("linear", WeightUse(64, 197, 768, 768, element_size=size)) for size in (2, 4))
    assert all(full[form] > half[form] for form in half)
