"""Promise: a shipped rule whose backward methods read numbers of the module's tensors says so (`reads_tensors`).

In compiled code the others are operations, which are not given these tensors.
"""

import copy

import pytest
import torch
from torch import nn

from hf_clars.grad_norms.compiled.uses import looks_up
from hf_clars.grad_norms.registry import LayerRule, find_rule, is_shipped, registered_rules

B = 3


def of(path, *args, **settings):
    """An instance of a class of another library."""
    module, _, name = path.rpartition(".")
    return getattr(pytest.importorskip(module), name)(*args, **settings)


def vision(kind, name, **settings):
    path = f"transformers.models.{kind}"
    sizes = {"hidden_size": 8, "image_size": 8, "patch_size": 4, "num_attention_heads": 2}
    return of(f"{path}.modeling_{kind}.{name}", of(f"transformers.{settings['config']}", **sizes))


def series(*shape):
    return lambda: (torch.randn(B, *shape),)


def tokens():
    return (torch.randint(7, (B, 5)),)


LAYERS = "transformers.models"
EXAMPLES = {
    "LinearRule": (lambda: nn.Linear(4, 3), series(5, 4)),
    "BilinearRule": (lambda: nn.Bilinear(4, 4, 3), lambda: (torch.randn(B, 4), torch.randn(B, 4))),
    "ConvolutionRule": (lambda: nn.Conv2d(4, 6, 3), series(4, 7, 7)),
    "TransposedConvolutionRule": (lambda: nn.ConvTranspose2d(4, 6, 3), series(4, 5, 5)),
    "EmbeddingRule": (lambda: nn.Embedding(7, 4, padding_idx=1), tokens),
    "BatchNormRule": (lambda: nn.BatchNorm2d(4), series(4, 5, 5)),
    "SyncBatchNormRule": (lambda: nn.SyncBatchNorm(4).eval(), series(4, 5, 5)),
    "GroupNormRule": (lambda: nn.GroupNorm(2, 4), series(4, 5, 5)),
    "InstanceNormRule": (lambda: nn.InstanceNorm2d(4, affine=True), series(4, 5, 5)),
    "LayerNormRule": (lambda: nn.LayerNorm(4), series(5, 4)),
    "ChannelLayerNormRule": (lambda: of("timm.layers.LayerNorm2d", 4), series(4, 5, 5)),
    "ScaleRule": (lambda: of("timm.layers.LayerScale", 4), series(5, 4)),
    "ChannelScaleRule": (lambda: of("timm.layers.LayerScale2d", 4), series(4, 5, 5)),
    "SlopeRule": (lambda: nn.PReLU(4), series(4, 5)),
    "BatchNormActRule": (lambda: of("timm.layers.BatchNormAct2d", 4, act_layer=nn.SiLU), series(4, 5, 5)),
    "ScaledEmbeddingRule": (
        lambda: of(f"{LAYERS}.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding", 7, 4, 0, embed_scale=3.0),
        tokens,
    ),
    "CountedPositionRule": (
        lambda: of(f"{LAYERS}.opt.modeling_opt.OPTLearnedPositionalEmbedding", 9, 4),
        lambda: (torch.ones(B, 5, dtype=torch.long),),
    ),
    "StartingPositionRule": (
        lambda: of(f"{LAYERS}.bart.modeling_bart.BartLearnedPositionalEmbedding", 9, 4),
        tokens,
    ),
    "FirstTokenRule": (
        lambda: vision("clip", "CLIPVisionEmbeddings", config="CLIPVisionConfig"),
        series(3, 8, 8),
    ),
    "TokenAndPositionRule": (lambda: vision("vit", "ViTEmbeddings", config="ViTConfig"), series(3, 8, 8)),
    "TransposedLinearRule": (lambda: of("transformers.pytorch_utils.Conv1D", 3, 4), series(5, 4)),
    "RootMeanSquareRule": (lambda: of(f"{LAYERS}.llama.modeling_llama.LlamaRMSNorm", 4), series(5, 4)),
    "CentredRule": (lambda: of(f"{LAYERS}.cohere.modeling_cohere.CohereLayerNorm", 4), series(5, 4)),
    "ShiftedLayerNormRule": (
        lambda: of(f"{LAYERS}.nemotron.modeling_nemotron.NemotronLayerNorm1P", 4),
        series(5, 4),
    ),
}


def without_numbers(module):
    """A copy whose tensors have shapes and types alone."""
    module = copy.deepcopy(module).to("meta")
    for m in module.modules():
        for name, value in list(vars(m).items()):
            if isinstance(value, torch.Tensor):
                setattr(m, name, value.to("meta"))
    return module


def results(rule, module, saved, g, sizes, given):
    """All that a rule's methods for the backward pass make."""
    wanted = set(sizes)
    found = [*rule.per_sample_grads(module, saved, g, wanted).values()]
    found += rule.squared_norms(module, saved, g, wanted).values()
    found += [rule.summed_grad(module, saved, g, n, elements=count) for n, count in sizes.items()]
    if looks_up(rule):
        found.append(rule.row_grads(module, saved, g))
    if rule.gives_input_grad:
        found.append(rule.input_grad(module, *given, g))
    return found


def reads_numbers(rule, module, args):
    """Whether these methods make other results, or none, of a module whose tensors have no numbers."""
    params = dict(module.named_parameters(recurse=False))
    sizes = {n: p.numel() for n, p in params.items()}
    with torch.no_grad():
        output = module(*args)
        saved = rule.save(module, args, {}, output, tuple(sizes))
        given, g = (args[0], params.get("weight")), torch.randn_like(output)
        right = results(rule, module, saved, g, sizes, given)
        try:
            found = results(rule, without_numbers(module), saved, g, sizes, given)
        except (RuntimeError, NotImplementedError):
            return True
    return not all(a.device == b.device and torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_there_is_an_example_of_each_rule_that_compiled_code_can_ask():
    rules = {type(r) for r in registered_rules().values() if is_shipped(r)}
    asked = {r.__name__ for r in rules if not r.several_results and r.batch_axes is LayerRule.batch_axes}
    assert asked == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_rule_says_whether_it_reads_the_modules_tensors(name):
    torch.manual_seed(0)
    build, data = EXAMPLES[name]
    module = build()
    rule = find_rule(module)
    assert type(rule).__name__ == name
    assert reads_numbers(rule, module, data()) == rule.reads_tensors
