"""Promise: modules that scale each number have rules, uncompiled and compiled; others of their names have not."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms.registry import find_rule
from tests.test_norms_compiled_uses import compare
from tests.test_norms_compiled_whole import traced


class LayerScale(nn.Module):
    """As timm's and transformers'."""

    def __init__(self, width, shape=None, inplace=False):
        super().__init__()
        self.gamma, self.inplace = nn.Parameter(torch.randn(shape or width)), inplace

    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class TheirLayerScale2d(LayerScale):
    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1)


class MyLayerScale(LayerScale):
    """Another formula."""

    def forward(self, x):
        return x * self.gamma + self.gamma


class OtherLayerScale(LayerScale):
    """With one more parameter."""

    def __init__(self, width):
        super().__init__(width)
        self.shift = nn.Parameter(torch.zeros(width))


def images(batch):
    return (torch.randn(batch, 3, 5, 5),)


def network():
    layers = (nn.Conv2d(3, 4, 3), TheirLayerScale2d(4), nn.PReLU(4), nn.PReLU(), nn.Flatten(2), nn.Linear(9, 6))
    return nn.Sequential(*layers, LayerScale(6), nn.Linear(6, 2))


@pytest.mark.parametrize("call", [traced, lambda model: model], ids=["compiled", "uncompiled"])
def test_norms_are_exact(call):
    torch.compiler.reset()
    torch.manual_seed(0)
    ways = str(compare(network(), images, call=call).explain())
    assert all(name in ways for name in ("ChannelScaleRule of 1", "SlopeRule of 2", "SlopeRule of 3", "ScaleRule of 6"))


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (LayerScale(4), True),
        (TheirLayerScale2d(4), True),
        (TheirLayerScale2d(4, (4, 1, 1)), True),
        (LayerScale(1), True),
        (LayerScale(4, inplace=True), False),
        (MyLayerScale(4), False),
        (OtherLayerScale(4), False),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_trial_tells_them_from_others(module, known):
    assert (find_rule(module) is not None) == known


@pytest.mark.parametrize(
    ("library", "path", "settings"),
    [
        ("timm.layers", "LayerScale", (4,)),
        ("timm.layers", "LayerScale2d", (4,)),
        ("timm.layers", "GroupNorm1", (4,)),
        ("timm.layers.linear", "Linear", (4, 4)),
        ("transformers.models.bart.modeling_bart", "BartLearnedPositionalEmbedding", (8, 4)),
    ],
)
def test_classes_of_libraries_are_known(library, path, settings):
    module = getattr(pytest.importorskip(library), path)(*settings)
    assert find_rule(module) is not None


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("llama.modeling_llama.LlamaRMSNorm", (4,)),
        ("gemma.modeling_gemma.GemmaRMSNorm", (4,)),
        ("cohere.modeling_cohere.CohereLayerNorm", (4,)),
        ("gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding", (8, 4, 0, 2.0)),
    ],
)
def test_classes_are_known_whatever_torch_s_default_type_and_device_are(path, settings, default):
    module_path, _, name = path.rpartition(".")
    module = getattr(pytest.importorskip(f"transformers.models.{module_path}"), name)(*settings)
    before = torch.get_default_dtype()
    try:
        if default == "meta":
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        known = find_rule(module)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert known is not None
