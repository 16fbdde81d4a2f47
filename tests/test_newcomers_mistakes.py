"""Promise: what newcomers get wrong at first is named at once, and in words that say what to do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_clars import PerSampleGradNorms, param_layers
from hf_clars.grad_norms import LayerRule, register_rule, unregister_rule
from hf_clars.grad_norms.errors import LayerRuleError
from hf_clars.image_classification.summary import after_training


def test_names_of_layers_in_the_place_of_layers_are_refused_and_the_advice_works():
    model, names = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), ["1"]
    with pytest.raises(ValueError, match=r"layers=\['1'\]: give 'module', .* for layer in hf_clars.param_layers"):
        PerSampleGradNorms(model, layers=names)
    some = [layer for layer in param_layers(model) if layer.name in names]
    with PerSampleGradNorms(model, layers=some) as norms:
        for batch in (5, 3, 5):
            model.zero_grad()
            model(torch.randn(batch, 4)).square().mean().backward()
            assert {name: len(found) for name, found in norms.per_sample.items()} == {"1": batch}


def test_gradients_of_a_rule_that_are_turned_are_named_by_their_shape():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x @ self.weight

    class Turned(LayerRule):
        def per_sample_grads(self, module, saved, g, wanted):
            return {"weight": torch.einsum("bi,bo->boi", saved[0], g)}

    register_rule(Product)(Turned)
    model = nn.Sequential(nn.Linear(2, 4), Product())
    try:
        with PerSampleGradNorms(model) as norms:
            said = pytest.raises(LayerRuleError, match=r"returned shape \(5, 3, 4\) .*of shape \(5, 4, 3\)")
            with said:
                _ = model(torch.randn(5, 2)).square().mean().backward(), norms.per_sample
    finally:
        unregister_rule(Product)


@pytest.mark.parametrize("checkpoints", [0, 1, 12])
def test_the_closing_list_of_files_counts_checkpoints_and_names_the_newest(tmp_path, capsys, checkpoints):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    for number in range(checkpoints):
        folder = tmp_path / f"checkpoint-{5 * (number + 1)}"
        folder.mkdir()
        for name in ("trainer_state.json", "model.safetensors"):
            (folder / name).write_text("{}")
    after_training(SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path))), {})
    text = capsys.readouterr().out
    assert "config.json, model.safetensors" in text
    assert text.count("checkpoint-") == (2 if checkpoints else 0)
    assert (f"{checkpoints} x checkpoint-*/ (newest checkpoint-{5 * checkpoints})" in text) == bool(checkpoints)
