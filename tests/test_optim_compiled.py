"""Promise: a step that torch.compile has compiled is the step."""

import pytest
import torch

from tests.twin import OPTIMIZERS, batch, loss_on, small_model


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_step_equals_an_ordinary_one(name):
    torch.compiler.reset()
    ordinary, compiled = small_model(), small_model()
    plain, other = OPTIMIZERS[name](ordinary, 0.3), OPTIMIZERS[name](compiled, 0.3)
    step = torch.compile(other.step, backend="eager")
    for number in range(3):
        for model, optimizer, take in ((ordinary, plain, plain.step), (compiled, other, step)):
            optimizer.zero_grad()
            loss_on(*batch(number))(model).backward()
            take()
    for p, q in zip(ordinary.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_as_one_graph_it_is_refused_in_a_sentence():
    torch.compiler.reset()
    model = small_model()
    optimizer = OPTIMIZERS["CLARS"](model, 0.3)
    loss_on(*batch(0))(model).backward()
    with pytest.raises(RuntimeError, match=r"hf_clars: a step reads numbers.*without fullgraph=True"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_torch_compile_returned_may_be_given_for_the_model(name):
    """Layers have the model's names, so that a state goes on in a run that is not compiled."""
    torch.compiler.reset()
    ordinary, inside = small_model(), small_model()
    compiled = torch.compile(inside, backend="eager")
    plain, other = OPTIMIZERS[name](ordinary, 0.3), OPTIMIZERS[name](compiled, 0.3)
    for number in range(3):
        for model, optimizer in ((ordinary, plain), (compiled, other)):
            optimizer.zero_grad()
            loss_on(*batch(number))(model).backward()
            optimizer.step()
    for p, q in zip(ordinary.parameters(), inside.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert plain.layer_names == other.layer_names
    plain.load_state_dict(other.state_dict())
