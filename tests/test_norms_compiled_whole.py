"""Promise: norms are a part of a model compiled as a whole, and right there; what cannot be is refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms, UncoveredParameterError
from hf_clars.optim import CLARS

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Images(nn.Module):
    """Convolution, train-mode BatchNorm with an in-place activation, tokens, LayerNorm."""

    def __init__(self):
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.linear, self.layer_norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu_(self.normalization(self.convolution(x)))
        return self.head(self.layer_norm(self.linear(x.flatten(2).mT)).mean(1))


def in_sequence():
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(2), nn.Linear(36, 8))
    return nn.Sequential(*layers, nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(32, 5))


def small():
    """Enough of a network where a promise is not about layers: compilers take their time."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(64, 5))


def images(batch):
    return (torch.randn(batch, 3, 6, 6),)


def bert():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=6, patch_size=3, **sizes))


def llama():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(vocab_size=50, use_cache=False, pad_token_id=0, **sizes)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def tokens(batch):
    return (torch.randint(1, 50, (batch, 7)),)


def loss_of(model, inputs):
    output = model(*inputs)
    scores = output if isinstance(output, torch.Tensor) else output.logits
    return (scores.flatten(1).square().sum(1) * torch.arange(1, len(scores) + 1)).sum()


def whole(model, **kwargs):
    return torch.compile(model, fullgraph=True, backend="aot_eager", **kwargs)


def traced(model):
    """What is traced runs as it is: half the compiling, where a promise is about what a trace shows."""
    return torch.compile(model, fullgraph=True, backend="eager")


def in_place(model):
    model.compile(fullgraph=True, backend="aot_eager")
    return model


def compare(model, compiled, inputs_of, batches, dtype=torch.float64):
    """Compiled norms and gradients against the uncompiled ones, which other tests compare with autograd."""
    model.to(dtype)
    plain = copy.deepcopy(model)
    with (
        PerSampleGradNorms(model, loss_reduction="sum") as norms,
        PerSampleGradNorms(plain, loss_reduction="sum") as expected,
    ):
        call = compiled(model)
        for batch in batches:
            inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs_of(batch))
            model.zero_grad()
            plain.zero_grad()
            loss_of(call, inputs).backward()
            loss_of(plain, inputs).backward()
            found, right = norms.per_sample, expected.per_sample
            assert found.keys() == right.keys()
            for name, values in right.items():
                torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-9)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)
        # With sums that were compared in compiled code, which after three passes is compiled again, without them.
        assert norms._checked == min(3, len(batches))
        return norms


@pytest.mark.parametrize(
    ("make", "compiled", "batches"), [(Images, whole, (6, 6, 6, 6, 4)), (in_sequence, in_place, (6, 4))]
)
def test_images(make, compiled, batches):
    """Both models and both ways, for another size of batches, and one in code with and without the comparison."""
    torch.manual_seed(0)
    norms = compare(make(), compiled, images, batches)
    assert "in the compiled graph" in str(norms.explain())


@pytest.mark.parametrize("make", [bert, vit, llama, gpt2])
def test_transformers(make):
    """Two passes of the code that is compiled first: that it is compiled again is the same for all models."""
    torch.manual_seed(0)
    compare(make(), whole if make is gpt2 else traced, images if make is vit else tokens, (4, 4))


def test_blocks_compiled_one_by_one_inside_a_model_that_is_not():
    def blocks(model):
        model.block.compile(fullgraph=True, backend="aot_eager")
        return model

    torch.manual_seed(0)
    norms = compare(Tokens(checkpointed=False), blocks, lambda batch: (torch.randint(30, (batch, 7)),), (4, 4))
    assert "in the compiled graph" in str(norms.explain())


def test_clars_with_accumulation_and_evaluation_between_steps():
    torch.manual_seed(0)
    model = small()
    plain = copy.deepcopy(model)
    optimizers = [CLARS(m, 1.0, eta=0.02, weight_decay=1e-4) for m in (model, plain)]
    call = whole(model)
    for _ in range(5):
        (x,) = images(8)
        for m, optimizer in zip((call, plain), optimizers, strict=True):
            optimizer.zero_grad()
            for part in x.split(4):
                loss_of(m, (part,)).backward()
            optimizer.step()
        with torch.no_grad():
            call(x)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_what_a_compiler_cannot_follow_is_named():
    model = Recurrent()
    with PerSampleGradNorms(model) as norms:
        assert norms.why_not_compiled().startswith("steps.weight_ih_l0, steps.weight_hh_l0")
        with pytest.raises(UncoveredParameterError, match=r"steps\.bias_hh_l0: no layer rule"):
            whole(model)(torch.randn(3, 2, 4))


def test_a_second_backward_pass_is_seen():
    model = nn.Sequential(nn.Linear(4, 4))
    with PerSampleGradNorms(model) as norms:
        output = whole(model)(torch.randn(3, 4)).sum()
        output.backward(retain_graph=True)
        with pytest.raises(Exception, match="second backward"):
            output.backward()
        del norms


def test_paused_norms_measure_nothing_in_compiled_code():
    torch.manual_seed(0)
    model = small()
    with PerSampleGradNorms(model) as norms:
        call = whole(model)
        norms.paused = True
        loss_of(call, images(3)).backward()
        assert norms.totals() is None
        norms.paused = False
        model.zero_grad()
        loss_of(call, images(3)).backward()
        assert all(len(values) == 3 for values in norms.per_sample.values())


class Recurrent(nn.Module):
    """Its steps are in one operation, which no compiler takes apart."""

    def __init__(self):
        super().__init__()
        self.steps, self.linear = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.steps(x)[0])


class Scaled(nn.Module):
    """A parameter that no rule measures."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.linear(x) * self.scale


def test_a_model_that_cannot_be_measured_in_compiled_code_is_refused_also_where_the_compiler_may_leave_its_code():
    model = Recurrent()
    with PerSampleGradNorms(model), pytest.raises(UncoveredParameterError, match=r"steps\.bias_hh_l0: no layer rule"):
        torch.compile(model, backend="aot_eager")(torch.randn(3, 2, 4))


def test_a_part_that_is_compiled_but_cannot_be_measured_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), Scaled())
    model[1].compile(backend="aot_eager")
    with PerSampleGradNorms(model), pytest.raises(UncoveredParameterError, match=r"1.scale: no layer rule"):
        model(torch.randn(3, 4))


def test_errors_go_to_the_one_who_asked_for_them():
    errors = []
    norms = PerSampleGradNorms(model := Recurrent(), on_error=errors.append)
    call = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        call(torch.randn(3, 2, 4)).sum().backward()
    assert len(errors) == 1
    norms.remove()


class Tokens(nn.Module):
    """A block that may be checkpointed, and a loss over tokens."""

    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 5)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, tokens, labels=None):
        x = self.table(tokens)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("settings", "checkpointed", "batches"),
    [
        ({}, True, (4, 4)),
        ({"samples": 3}, True, (4, 6)),
        ({"loss_reduction": "mean_tokens"}, False, (4, 6)),
    ],
    ids=str,
)
def test_samples_and_means_over_tokens(settings, checkpointed, batches):
    """A checkpointed block with all samples and with some; what a mean is over does not reach the block."""
    torch.manual_seed(0)
    model = Tokens(checkpointed)
    plain = copy.deepcopy(model)
    plain.checkpointed = False
    norms, expected = PerSampleGradNorms(model, **settings), PerSampleGradNorms(plain, **settings)
    call = whole(model)
    for batch in batches:
        ids, labels = torch.randint(0, 30, (batch, 7)), torch.randint(0, 5, (batch, 7))
        labels[0, 3:] = -100
        for m, run in ((model, call), (plain, plain)):
            m.zero_grad()
            nn.functional.cross_entropy(run(ids, labels=labels).flatten(0, 1), labels.flatten()).backward()
        right = expected.per_sample
        assert norms.per_sample.keys() == right.keys()
        for name, values in norms.per_sample.items():
            torch.testing.assert_close(values, right[name], rtol=1e-4, atol=1e-6)
    norms.remove()
    expected.remove()


@pytest.mark.parametrize("first", [nn.Linear(6, 6), nn.Embedding(9, 6)], ids=["linear", "embedding"])
def test_what_the_model_is_called_with_is_no_table_though_it_is_as_wide_as_the_batch(first):
    def inputs(batch):
        return (torch.randint(9, (batch, 6)) if isinstance(first, nn.Embedding) else torch.randn(batch, 6),)

    torch.manual_seed(0)
    compare(nn.Sequential(first, nn.Linear(6, 6)), whole, inputs, (6, 6, 3))
