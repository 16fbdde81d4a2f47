"""Promise: nothing is silently left out of the norms; what cannot be measured right is refused by name."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import (
    BatchAxisError,
    LayerRule,
    PerSampleGradNorms,
    SecondBackwardError,
    find_rule,
    register_rule,
    registered_rules,
)
from tests.oracle import layer_norms, per_sample_grads
from tests.twin import batch, loss_on, small_model

# ---- nothing is silently left out --------------------------------------------------------------------------------


def exact(model, x, names, passes=3):
    """Norms of each parameter, against one backward pass a sample, in several passes."""
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for _ in range(passes):
            model.zero_grad()
            model(x).square().flatten(1).sum(1).mean().backward()
            for name in names:
                for i in range(len(x)):
                    (grad,) = torch.autograd.grad(model(x[i : i + 1]).square().sum(), model.get_parameter(name))
                    torch.testing.assert_close(norms.per_sample[name][i], grad.norm())


def test_a_weight_used_functionally_beside_its_module_is_exact():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Bilinear(4, 4, 4, bias=False)

        def forward(self, x):
            return nn.functional.bilinear(self.encode(x, x), x, self.encode.weight)

    exact(Decoder().double(), torch.randn(3, 4).double(), ["encode.weight"])


def test_a_parameter_used_for_a_result_that_is_thrown_away_and_elsewhere_is_exact():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(())), nn.Linear(4, 4)

        def forward(self, x):
            x = self.fc(x)
            return x, x * self.scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Scaled()

        def forward(self, x):
            return self.pair(x)[0] * self.pair.scale.exp()

    exact(Model().double(), torch.randn(3, 4).double(), ["pair.scale", "pair.fc.weight"])


def test_a_random_module_without_a_rule_is_measured_on_the_numbers_it_drew():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            self.noise = torch.rand_like(x)
            return x * self.gain * self.noise

    model, x = nn.Sequential(Noisy()), torch.randn(3, 4)
    for _ in range(2):
        with PerSampleGradNorms(model) as norms:
            model(x).square().sum(1).mean().backward()
        expected = (2 * x * x * model[0].noise.square()).norm(dim=1)
        torch.testing.assert_close(norms.per_sample["0"], expected)


def test_a_forward_that_is_never_differentiated_leaks_no_graph():
    class Token:
        """Lives as long as the graph whose hook holds it."""

    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 3), nn.PReLU())
    norms = PerSampleGradNorms(model)
    alive = []
    for _ in range(5):
        token = Token()
        alive.append(weakref.ref(token))
        model(torch.randn(2, 2, 4)).register_hook(lambda g, t=token: None)
        del token
        model(torch.randn(2, 2, 4)).sum().backward()
        norms.reset()
    model(torch.randn(2, 2, 4)).sum().backward()
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0
    norms.remove()


def test_a_batch_axis_that_is_not_first_is_refused_with_the_shapes():
    class TimeMajor(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x.transpose(0, 1))

    model = TimeMajor()
    with PerSampleGradNorms(model), pytest.raises(BatchAxisError, match=r"fc.weight: used by MmBackward0.*3 samples"):
        model(torch.randn(3, 7, 4))


def test_a_loss_summed_inside_the_module_is_exact():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x * self.gain).sum(0)

    model, x = nn.Sequential(Summed()), torch.randn(3, 4)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for _ in range(3):
            model.zero_grad()
            model(x).sum().backward()
            torch.testing.assert_close(norms.per_sample["0"], x.norm(dim=1))


@pytest.mark.parametrize("use_state", [False, True])
def test_a_state_without_the_batch_first_may_be_returned_and_used(use_state):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x * self.gain, (x + self.gain).sum(1)[None]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = Cell()

        def forward(self, x):
            sequence, state = self.cell(x)
            return sequence.sum(1) + (state[0] if use_state else 0)

    exact(Model().double(), torch.randn(3, 7, 4).double(), ["cell.gain"])


def test_a_call_without_the_batch_first_in_a_reentrant_checkpoint_is_refused_with_the_way_out():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):  # [B, 4, 4]
            inner = lambda y: self.fc(y.reshape(-1, 2, 4)).view_as(y)  # noqa: E731
            return checkpoint(inner, self.embed(x), use_reentrant=True)

    model = Windows()
    with PerSampleGradNorms(model) as norms:
        model(torch.randn(3, 4, 4)).sum().backward()
        with pytest.raises(BatchAxisError, match=r"fc \(Linear\).*use_reentrant=False"):
            norms.per_sample  # noqa: B018


def test_a_second_backward_through_one_forward_is_refused():
    model = small_model()
    with PerSampleGradNorms(model):
        loss = loss_on(*batch(0))(model)
        loss.backward(retain_graph=True)
        with pytest.raises(SecondBackwardError, match="add the losses"):
            loss.backward()


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize("between", ["nothing", "read", "another pass"])
def test_a_part_whose_gradient_comes_after_the_norms_were_taken_is_refused(between):
    model = Towers()
    norms = PerSampleGradNorms(model)
    for _ in range(4):
        model.zero_grad()
        x = torch.randn(4, 3, dtype=torch.double)
        a, b = model(x)
        a.square().sum(1).mean().backward()
        if between == "nothing":
            b.square().sum(1).mean().backward()
            for name, out in (("a", a), ("b", b)):
                wanted = 2 * out.detach().norm(dim=1) * (1 + x.square().sum(1)).sqrt()
                torch.testing.assert_close(norms.per_sample[name], wanted)
            continue
        _ = norms.per_sample if between == "read" else model(x)
        with pytest.raises(SecondBackwardError, match="norms were read, or another pass begun"):
            b.square().sum(1).mean().backward()
    norms.remove()


def test_a_subclass_with_its_own_forward_does_not_inherit_a_rule():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        pass

    assert find_rule(Doubled(2, 2)) is None
    assert find_rule(Renamed(2, 2)) is registered_rules()["torch.nn.modules.linear.Linear"]
    model, x = nn.Sequential(Doubled(4, 3)), torch.randn(5, 4)
    with PerSampleGradNorms(model) as norms:
        model(x).square().sum(1).mean().backward()
    expected = layer_norms(per_sample_grads(model, lambda m: m(x.double()).square().sum(1).mean(), 5), norms.layers)
    torch.testing.assert_close(norms.per_sample["0"].double(), 5 * expected["0"], rtol=1e-4, atol=1e-6)


def old_weight_norm():
    return nn.utils.weight_norm(nn.Conv2d(2, 3, 3))


def new_weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))


def orthogonal():
    return nn.utils.parametrizations.orthogonal(nn.Linear(4, 3))


def masked():
    conv = nn.Conv2d(2, 3, 3)
    mask = (torch.rand(3, 2, 3, 3) > 0.5).double()
    conv.forward = lambda x: nn.functional.conv2d(x, conv.weight * mask, conv.bias)
    return conv


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("build", [old_weight_norm, new_weight_norm, orthogonal])
def test_weights_that_are_made_of_others_are_exact(build):
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.randn(4, 2, 4, 4).double() if isinstance(model[0], nn.Conv2d) else torch.randn(4, 4).double()
    model(x)
    wanted = []
    for i in range(4):
        grads = torch.autograd.grad(model(x[i : i + 1]).sin().sum(), list(model[0].parameters()))
        wanted.append(torch.cat([g.flatten() for g in grads]).norm())
    with PerSampleGradNorms(model) as norms:
        for _ in range(2):
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            parts = [v.square() for n, v in norms.per_sample.items() if n.startswith("0")]
            torch.testing.assert_close(sum(parts).sqrt(), torch.stack(wanted))


def test_a_replaced_forward_gets_no_rule():
    torch.manual_seed(0)
    model, x = nn.Sequential(masked(), nn.Flatten()).double(), torch.randn(4, 2, 4, 4).double()
    assert find_rule(model[0]) is None
    wanted = []
    for i in range(4):
        grads = torch.autograd.grad(model(x[i : i + 1]).sin().sum(), list(model.parameters()))
        wanted.append(torch.cat([g.flatten() for g in grads]).norm())
    with PerSampleGradNorms(model) as norms:
        model(x).sin().sum(1).mean().backward()
    torch.testing.assert_close(norms.per_sample["0"], torch.stack(wanted))


def test_registering_a_class_twice_is_refused():
    with pytest.raises(ValueError, match="Linear already has the rule LinearRule"):

        @register_rule(nn.Linear)
        class Another(LayerRule):
            def per_sample_grads(self, module, saved, g, wanted):
                return {}


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="loss_reduction='none'"):
        PerSampleGradNorms(small_model(), loss_reduction="none")
    with pytest.raises(ValueError, match="samples=0"):
        PerSampleGradNorms(small_model(), samples=0)
