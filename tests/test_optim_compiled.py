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
    # What is traced is the promise; that a compiler takes it as well is shown on one.
    step = torch.compile(other.step, backend="aot_eager" if name == "CLARS" else "eager")
    for number in range(3):
        for model, optimizer, take in ((ordinary, plain, plain.step), (compiled, other, step)):
            optimizer.zero_grad()
            loss_on(*batch(number))(model).backward()
            take()
    for p, q in zip(ordinary.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
