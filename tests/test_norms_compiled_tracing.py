"""Promise: what stands behind a module is run and not traced where a whole model is compiled, and is always its own."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import LayerRule, PerSampleGradNorms, UncoveredParameterError, register_rule
from hf_clars.grad_norms.compiled import uses
from hf_clars.grad_norms.registry import unregister_rule
from hf_clars.grad_norms.rules.normalization import LayerNormRule
from hf_clars.per_sample import NormMonitor
from tests.test_norms_compiled_uses import compare, fresh_compiler  # noqa: F401  (a fixture)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.weight


class OwnRule(LayerRule):
    """A rule of a user's that reads the module's numbers for the backward pass."""

    def save(self, module, args, kwargs, output, wanted):
        return (output,)

    def per_sample_grads(self, module, saved, g, wanted):
        return {"weight": (saved[0] / module.weight.detach() * g).sum(1)}


@pytest.fixture
def own_rule():
    register_rule(Scale)(OwnRule)
    yield
    unregister_rule(Scale)


class Tied(nn.Module):
    """A language model: its head's weight is the table of tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.norm(self.table(tokens).cumsum(1)))


def names_in(graphs):
    """The operations of traced graphs, and of the functions inside them."""
    inside = [m for g in graphs for m in g.modules() if isinstance(m, torch.fx.GraphModule)]
    return [str(getattr(n.target, "__name__", n.target)) for m in inside for n in m.graph.nodes]


def traces_of(model, compiling, x):
    """What torch.compile traces of a model with norms, in one step."""
    graphs = []

    def keep(traced, inputs):
        graphs.append(traced)
        return traced.forward

    with PerSampleGradNorms(model):
        compiling(model, keep)(x).square().sum().backward()
    return names_in(graphs)


def whole(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_blocks(model, backend):
    for block in model:
        block.compile(backend=backend, fullgraph=True)
    return model


def test_a_whole_model_has_an_operation_behind_each_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    names = traces_of(model, whole, torch.randn(3, 5, 4))
    assert names.count("behind.default") == 3
    assert "autograd_function_apply" not in names


def test_blocks_that_share_their_code_have_functions_there():
    """One for what is called on data, and one for all others."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(4)])
    names = traces_of(model, in_blocks, torch.randn(3, 5, 4))
    assert names.count("autograd_function_apply") == 2
    assert "behind.default" not in names


def test_a_rule_of_a_users_is_traced_and_may_read_the_modules_numbers(own_rule):
    names = traces_of(nn.Sequential(Scale(), nn.Linear(4, 2)), whole, torch.randn(3, 5, 4))
    assert (names.count("autograd_function_apply"), names.count("behind.default")) == (1, 1)
    compare(nn.Sequential(Scale(), nn.Linear(4, 2)), lambda batch: (torch.randn(batch, 5, 4),), (3, 3, 3))


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 divides by a wrong length there")
def test_a_rule_of_a_users_serves_batches_of_any_size(own_rule):
    compare(nn.Sequential(Scale(), nn.Linear(4, 2)), lambda batch: (torch.randn(batch, 5, 4),), (3, 3, 4, 5))


def test_a_tied_language_model_is_traced_once(monkeypatch):
    def again(why):
        raise AssertionError(why)

    monkeypatch.setattr(uses, "trace_anew", again)
    compare(Tied(), lambda batch: (torch.randint(7, (batch, 5)),), (3, 3, 3))


def test_a_table_with_a_tied_head_may_be_used_alone():
    class Inside(Tied):
        def forward(self, tokens):
            return self.norm(self.table(tokens).cumsum(1))

    compare(Inside(), lambda batch: (torch.randint(7, (batch, 5)),), (3, 3, 3))


def test_a_rule_that_cannot_be_compiled_is_said_when_the_code_runs(monkeypatch):
    monkeypatch.setattr(LayerNormRule, "per_sample_grads", lambda *args: 1 / 0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(3, 4)
    with PerSampleGradNorms(model):
        called = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            with pytest.raises(UncoveredParameterError, match=r"1 \(LayerNorm\).*ZeroDivisionError"):
                called(x).square().sum().backward()


def test_nor_does_it_end_a_training_that_is_only_watched(monkeypatch):
    monkeypatch.setattr(LayerNormRule, "per_sample_grads", lambda *args: 1 / 0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(3, 4)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    with NormMonitor(model, every=1, noise_scale=False) as monitor:
        monitor.begin()
        called = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            model.zero_grad()
            with monitor.batch():
                called(x).square().sum().backward()
            for p, g in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, g)
    assert monitor.ended is not None


SCRIPT = """
import sys, torch
from torch import nn
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.rules.normalization import LayerNormRule

if sys.argv[1] == "other rule":
    right = LayerNormRule.per_sample_grads
    LayerNormRule.per_sample_grads = lambda *args: {n: 2 * t for n, t in right(*args).items()}
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
with PerSampleGradNorms(model) as norms:
    norms.check_every = 0
    called = torch.compile(model)
    for _ in range(4):
        called(torch.ones(3, 2, 4)).square().sum().backward()
        print(norms.per_sample["1"][0].item())
"""


@pytest.mark.slow
def test_code_on_disk_of_another_process_is_not_taken_for_its_own(tmp_path):
    """As after an update of this package: torch keeps compiled code by the names in what it has traced."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def norm(rule):
        command = [sys.executable, "-c", SCRIPT, rule]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    first = norm("this rule")
    assert norm("this rule") == pytest.approx(first)
    assert norm("other rule") == pytest.approx(2 * first)
