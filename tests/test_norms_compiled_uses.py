"""Promise: a compiled model may use each parameter as often as it likes; what code cannot see of that is refused."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms, UncoveredParameterError
from hf_clars.grad_norms.pytree import tensors_in
from tests.oracle import layer_norms, one_by_one
from tests.test_norms_compiled_whole import traced, whole


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def loss_of(model, inputs):
    scores = model(*inputs).flatten(1)
    return (scores.sin() * torch.arange(1, scores.shape[1] + 1)).sum()


def compare(model, inputs_of, batches=(4, 4, 4), dtype=torch.float64, call=traced):
    """Each pass on other data, against one backward pass for each sample."""
    model.to(dtype)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        assert norms.why_not_compiled() == ""
        called = call(model)
        for batch in batches:
            inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs_of(batch)]
            model.zero_grad()
            loss_of(called, inputs).backward()
            wide = [t.double() if t.is_floating_point() else t for t in inputs]
            grads = one_by_one(model, lambda m, i, w=wide: loss_of(m, [t[i : i + 1] for t in w]), batch)
            rtol = 1e-9 if dtype is torch.float64 else 1e-4
            for name, right in layer_norms(grads, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name].double(), right, rtol=rtol, atol=rtol)
        return norms


class Universal(nn.Module):
    """One block again and again, as in ALBERT; checkpointed too."""

    def __init__(self, times, checkpointed=False):
        super().__init__()
        self.times, self.checkpointed = times, checkpointed
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh())

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(x)


class Siamese(nn.Module):
    """One encoder for two texts, then both in one score."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 4), nn.Tanh())
        self.score = nn.Bilinear(4, 4, 2)

    def forward(self, a, b):
        return self.score(self.encoder(a).mean(1), self.encoder(b).mean(1))


class Translator(nn.Module):
    """A table that two modules look up, and that is the head's weight too, as in BART; the head may be called again."""

    def __init__(self, heads=1):
        super().__init__()
        self.heads = heads
        self.shared, self.encoder, self.decoder = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.mixed, self.head = nn.Linear(4, 4), nn.Linear(4, 9)
        self.encoder.weight = self.decoder.weight = self.head.weight = self.shared.weight

    def forward(self, source, target):
        x = self.mixed(self.encoder(source).mean(1, keepdim=True)) + self.decoder(target).tanh()
        for _ in range(self.heads - 1):
            x = x + self.head(x)[..., :4]
        return self.head(x)


class HeadFirst(Translator):
    def forward(self, source, target):
        return self.head(self.mixed(self.encoder(source))).sum(1) * self.decoder(target).sum((1, 2)).unsqueeze(1)


class Shifted(Translator):
    """What is written is what comes before, and a gain: as in T5, without a rule's module."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, source, target):
        before = target.new_zeros(target.shape)
        before[..., 1:], before[..., 0] = target[..., :-1].clone(), 1
        return self.head(self.mixed(self.encoder(source)).mean(1, True) + self.decoder(before) * self.gain)


def series(batch):
    return (torch.randn(batch, 5, 4),)


def texts(batch):
    return torch.randint(9, (batch, 5)), torch.randint(9, (batch, 3))


def as_long(batch):
    return texts(batch)[0], texts(batch)[0]


@pytest.mark.parametrize(
    ("make", "inputs", "batches", "call"),
    [
        (lambda: Universal(3), series, (4, 6, 4), traced),
        (lambda: Universal(2, checkpointed=True), series, (4, 4, 4), whole),
        (Siamese, texts, (4, 4, 4), traced),
        (Translator, texts, (4, 4, 4, 4), whole),
        (lambda: Translator(heads=2), texts, (4, 4, 4), traced),
        (HeadFirst, texts, (4, 4, 4), traced),
        (Shifted, as_long, (4, 4, 4, 3), traced),
    ],
    ids=["universal", "checkpointed", "siamese", "translator", "two heads", "head first", "shifted"],
)
def test_the_gradients_of_all_uses_add_up(make, inputs, batches, call):
    compare(make(), inputs, batches, call=call)


def test_also_in_float32():
    compare(Translator(), texts, dtype=torch.float32)


def test_a_second_use_that_comes_in_some_passes_only_is_seen_when_it_comes():
    model, times = Universal(1), iter((1, 2, 1))

    def inputs(batch):
        model.times = next(times)
        return series(batch)

    compare(model, inputs)


def test_a_table_of_many_uses_makes_no_whole_table_for_each_sample():
    """Of [B, rows, width], which no language model has room for."""
    model, largest = Translator(), 0
    model.shared = nn.Embedding(1000, 4)
    for module in (model.encoder, model.decoder, model.head):
        module.weight = model.shared.weight
    model.head.bias = None

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, *(t.untyped_storage().nbytes() for t in tensors_in(result)), 0)
            return result

    with PerSampleGradNorms(model, check=False) as norms:
        loss = loss_of(whole(model), texts(8))
        with Largest():
            loss.backward()
        assert len(norms.per_sample["shared"]) == 8
    assert 8 * 1000 * 4 < largest < 8 * 1000 * 4 * 4  # the scores' gradient, and no table


@pytest.mark.parametrize("part", ["head", "encoder", "mixed"])
def test_a_compiled_part_that_shares_a_parameter_with_the_rest_is_refused(part):
    """Sums were right, and norms those of two gradients that do not meet."""
    model = Translator()
    getattr(model, part).compile(fullgraph=True, backend="eager")
    norms = PerSampleGradNorms(model)
    if part == "mixed":
        loss_of(model, texts(4)).backward()
        assert norms.per_sample["mixed"].shape == (4,)
    else:
        with pytest.raises(UncoveredParameterError, match=rf"{part} \(.*shares parameters with what is"):
            loss_of(model, texts(4)).backward()
    norms.remove()


def test_a_compiled_part_that_is_called_twice_is_refused():
    model = Universal(2)
    model.block.compile(fullgraph=True, backend="eager")
    norms = PerSampleGradNorms(model)
    with pytest.raises(UncoveredParameterError, match="more than once"):
        model(*series(4)).sum().backward()
    norms.remove()


class Bare(nn.Module):
    """Uses a weight without its module; what `bare` does with it may be differentiated or not."""

    def __init__(self, bare, checkpointed=False):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.bare, self.checkpointed = bare, checkpointed

    def between(self, x):
        return self.bare(self.norm(self.first(x)), self.first.weight)

    def forward(self, x):
        return self.head(checkpoint(self.between, x, use_reentrant=False) if self.checkpointed else self.between(x))


def multiplied(x, weight):
    return nn.functional.linear(x, weight.t())


def penalised(x, weight):
    return x * (1 + 1e-6 * weight.square().sum())


def looked_at(x, weight):
    with torch.no_grad():
        size = weight.norm()
    return x.to(weight.dtype) * (1 + 0 * size) + nn.functional.linear(x, weight.detach())


@pytest.mark.parametrize("bare", [multiplied, penalised])
def test_a_weight_may_be_used_without_its_module_too(bare):
    compare(Bare(bare), series)


def refused_in_every_pass(model, call, words):
    """Without the sum check too, which sees no small use."""
    with PerSampleGradNorms(model, check=False) as norms:
        called = call(model)
        for _ in range(4):
            with pytest.raises(UncoveredParameterError, match=words):
                called(*series(4)).sum().backward()
        norms.reset()


@pytest.mark.parametrize("bare", [multiplied, penalised])
def test_inside_a_checkpoint_it_is_refused_by_name_in_every_pass(bare):
    words = r"first\.weight.*: cannot be measured in compiled code"
    refused_in_every_pass(Bare(bare, checkpointed=True), traced, words)


def test_what_is_not_differentiated_may_be_done_with_a_weight():
    compare(Bare(looked_at, checkpointed=True), series)


def test_a_weight_of_a_compiled_part_that_is_used_outside_of_it_is_refused():
    model = Bare(penalised)
    model.first.compile(fullgraph=True, backend="aot_eager")
    refused_in_every_pass(model, lambda m: m, r"first \(Linear\).*shares parameters with what is")


class Broken(Universal):
    """Its code cannot be one graph."""

    def forward(self, x):
        x = self.block(self.first(x))
        torch._dynamo.graph_break()
        return self.head(self.block(x) if self.times > 1 else x)


def test_a_second_use_behind_a_graph_break_is_refused():
    def in_pieces(model):
        return torch.compile(model, backend="aot_eager")

    compare(Broken(1), series, call=in_pieces)
    refused_in_every_pass(Broken(2).float(), in_pieces, r"block\.0 \(Linear\).*more than once")
