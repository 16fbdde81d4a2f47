"""Promise: what the norms need of torch.compile's tracer, and torch does not document, is as it was."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import torch_traces as traces


def test_a_trace_of_the_compiler_is_told_from_others_and_can_begin_anew():
    seen = []

    @torch.compiler.assume_constant_result
    def note():
        seen.append(traces.current_trace())
        if len(seen) < 3:
            traces.trace_anew("something was learned")
        return True

    @torch.compile(backend="eager", fullgraph=True)
    def double(x):
        note()
        return 2 * x

    torch.compiler.reset()
    assert double(torch.ones(1)) == double(torch.ones(1)) == 2
    assert len({str(trace) for trace in seen}) == len(seen) == 3
    assert traces.current_trace() is None


def test_a_trace_shows_what_it_makes_of_tensors_from_outside():
    found = []

    @torch.compiler.assume_constant_result
    def watch():
        traces.when_traced(lambda traced: found.extend(traces.uses_in_trace(traced.graph, traced.nn_modules)))
        return True

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            watch()
            x = checkpoint(lambda t: t @ self.linear.weight, x, use_reentrant=False)
            return self.linear(x) + self.linear.weight.detach()

    torch.compiler.reset()
    model = Model()
    torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 2))
    assert all(tensor is model.linear.weight for tensor, _, _ in found)
    assert {(operation, caller) for _, operation, caller in found} == {("matmul", None), ("linear", nn.Linear)}


def test_what_was_traced_can_be_changed_before_it_is_compiled_and_traced_anew():
    looks = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.table = nn.MultiheadAttention(4, 2), torch.ones(3)

        def forward(self, x):
            watch()
            return self.attention(x, x, x)[0] * self.table[0]

    def change(traced):
        named = {n.name: n for n in traced.graph.nodes}
        inputs = [n for n in named.values() if n.op == "placeholder"]
        weight = next(n for n in inputs if traces.held_by(n) is model.attention.in_proj_weight)
        assert traces.value_of(weight).shape == (12, 4)
        assert {traces.is_from_model(n, [weight]) for n in inputs if traces.held_by(n) is x} == {False}
        assert {traces.is_from_model(n, [weight]) for n in inputs if traces.held_by(n) is model.table} == {True}
        with traces.fake_values(traces.value_of(weight)):
            assert traces.attention(*3 * [traces.value_of(weight)[None, None]]).shape == (1, 1, 12, 4)
        whole = next(n for n in named.values() if "multi_head_attention" in str(n.target))
        operations, taken = traces.opened(whole)
        assert weight in taken
        linear = [n for n in operations.nodes if "linear" in str(n.target)]
        assert [traces.value_of(n).shape for n in linear] == [(5, 3, 12), (15, 4)]
        looks.append(traced)
        if len(looks) == 1:
            traces.compile_anew("once more")

    @torch.compiler.assume_constant_result
    def watch():
        assert traces.at_root_of_trace()
        traces.before_compiling(change)
        return True

    torch.compiler.reset()
    model, x = Model(), torch.randn(5, 3, 4)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model.attention(x, x, x)[0])
    assert len(looks) == 2


def test_what_runs_while_code_is_compiled_knows_it():
    told = []

    def look(x):
        told.append(traces.is_compiling())
        return x * 2

    library = torch.library.Library("hf_clars_tests", "FRAGMENT")
    library.define("look(Tensor x) -> Tensor")
    library.impl("look", look)
    torch.compile(torch.ops.hf_clars_tests.look.default, backend="aot_eager", fullgraph=True)(torch.ones(2))
    assert told
    assert all(told)
    assert not traces.is_compiling()


def test_the_module_inside_of_what_torch_compile_returns_is_found():
    model = torch.nn.Linear(2, 2)
    assert traces.uncompiled(torch.compile(model)) is model
    assert traces.uncompiled(model) is model
