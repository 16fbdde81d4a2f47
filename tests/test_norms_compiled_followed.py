"""Promise: in compiled code the samples' axis is followed through each function, or their place is not known at all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_clars.grad_norms import PerSampleGradNorms, UncoveredParameterError
from tests.test_norms_compiled_uses import compare, fresh_compiler  # noqa: F401  (a fixture)
from tests.test_norms_compiled_whole import traced


class Net(nn.Module):
    """A layer, what a test does with its result, which may change its axes, and a head."""

    def __init__(self, between):
        super().__init__()
        self.first, self.head, self.gain = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(4))
        self.between = between

    def forward(self, x):
        return self.between(self, x, self.first(x))


def steps(length):
    return lambda batch: (torch.randn(batch, length, 4),)


def time_first(net, x, y):
    """By einsum, which nobody may take for an operation number by number."""
    return net.head(net.first(torch.einsum("b t d -> t b d", y)) * net.gain).transpose(0, 1)


def steps_attend(net, x, y):
    return net.head(torch.einsum("bts,...bsd->t...bd", x @ y.mT, y) * net.gain).transpose(0, 1)


def windows(net, x, y):
    """Another axis comes to the end, and as many windows are left as there are samples."""
    return net.head(y.unfold(1, 1, 1).squeeze(-1).unfold(1, 2, 1).mT[:, :, 0] * net.gain)


def classes(net, x, y):
    return net.head(net.first(F.one_hot((x[..., 0] > 0).long(), 4).to(x.dtype)) * net.gain + y)


def two_views(net, x, y):
    views = net.head(net.first(torch.cat([y, x.flip(1)])) * net.gain)
    first, second = views.chunk(2)
    return first + second.sin()


def each_twice(net, x, y):
    return net.head(net.first(y.repeat_interleave(2, 0)) * net.gain).view(-1, 2, 4, 3).sin().sum(1)


def in_a_weights_place(net, x, y):
    """The samples come last, after as many rows."""
    rows = torch.eye(4, dtype=x.dtype)
    return net.head(((F.linear(rows, y[:, 0]) + torch.cdist(rows, y[:, 1])) * net.gain[:, None]).t())


def frequencies(net, x, y):
    """Complex numbers, made of a parameter too."""
    spectrum = torch.fft.rfft(y, dim=1) * torch.complex(net.gain, net.gain.sin())
    return net.head(torch.fft.irfft(spectrum, n=4, dim=1))


def last_steps(net, x, y):
    return net.head(y[torch.arange(len(x)), x[..., 0].argmax(1)] * net.gain)


def turned(net, x, y):
    return net.head((y[:, 0].T * net.gain[:, None]).T)


def written_in_parts(net, x, y):
    """Every sample's numbers stay its own: at other steps, by a mask, with a number."""
    blank = torch.zeros_like(y)
    blank[:, 1:], blank[:, 0] = y[:, :-1], y[:, -1]
    blank[x[..., 0] > 0] = 2.0
    return net.head(blank.add_(x[:, :1]) * net.gain)


def as_complex_numbers(net, x, y):
    turned = torch.view_as_complex(y.unflatten(2, (2, 2))) * torch.polar(torch.ones(2), torch.arange(2.0))
    return net.head(torch.view_as_real(turned).flatten(2) * net.gain)


@pytest.mark.parametrize(
    "between",
    [
        written_in_parts,
        as_complex_numbers,
        time_first,
        steps_attend,
        classes,
        two_views,
        each_twice,
        in_a_weights_place,
        frequencies,
        last_steps,
        turned,
    ],
    ids=lambda between: between.__name__,
)
def test_samples_are_followed_where_there_are_as_many_steps(between):
    """Taken for the batch, the first axis gave wrong norms whose sum was right."""
    compare(Net(between), steps(4), (4, 4, 4))


def test_one_sample_needs_not_be_followed():
    compare(Net(lambda net, x, y: net.head(y.transpose(0, 1) * net.gain).transpose(0, 1)), steps(4), (1, 1, 1, 3))


def test_code_for_any_number_of_samples_is_as_right():
    with torch._dynamo.config.patch(force_nn_module_property_static_shapes=False):
        compare(Net(time_first), steps(4), (2, 3, 5, 4))


class Centred(nn.Module):
    """A buffer follows the mean of what comes; a norm of its own has no bias."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.gain = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        x = self.first(x)
        self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return self.head(F.layer_norm(x, (4,), self.gain) + 0 * self.mean)


def test_one_code_serves_batches_of_more_sizes_than_torch_makes_code_for_also_where_a_buffer_follows_the_data():
    sizes = (3, 5, 6, 7, 9, 10, 11, 13, 14, 15)
    compare(Centred(), steps(2), sizes, call=lambda m: torch.compile(m, fullgraph=True, backend="eager"))


def test_one_code_serves_equal_blocks():
    """There are more than torch makes code for."""
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(9)]

    def each(model):
        for block in blocks:
            block.compile(fullgraph=True, backend="eager")
        return model

    compare(nn.Sequential(nn.Linear(4, 4), *blocks, nn.Linear(4, 3)), steps(2), (3, 3, 3, 5, 6), call=each)


def test_windows_may_be_as_many_as_samples():
    compare(Net(windows), steps(5), (4, 4, 4))


def rolled(net, x, y):
    return net.head(y.roll(1, 0) * net.gain)


def reversed_by_a_list(net, x, y):
    return net.head(y[[5, 4, 3, 2, 1, 0]] * net.gain)


def module_after_a_sort(net, x, y):
    return net.head(y.sort(0)[0])


def written_elsewhere(net, x, y):
    blank = torch.zeros_like(y)
    blank[:] = y[y.sum((1, 2)).argsort()]
    return net.head(blank * net.gain)


def copied_elsewhere(net, x, y):
    blank = torch.zeros_like(y)
    blank[:, 1:].copy_(y[:, 1:].roll(1, 0))
    return net.head(blank * net.gain)


def of_all_samples(net, x, y):
    return net.head(y + y.mean(0) * net.gain)


def rotated(net, x, y):
    return net.head(y.rot90(2, (0, 2)) * net.gain)


def looked_up(net, x, y):
    return net.head(F.embedding_bag(torch.arange(len(y))[:, None].flip(0), y.sum(1), mode="sum") * net.gain)


def padded_and_cut(net, x, y):
    return net.head(F.pad(y.sum(1), (0, 0, 1, -1)) * net.gain)


def by_a_function_that_is_not_known(net, x, y):
    return net.head(torch.fft.fftshift(y, 0) * net.gain)


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (rolled, "gain"),
        (rotated, "gain"),
        (looked_up, "gain"),
        (padded_and_cut, "gain"),
        (by_a_function_that_is_not_known, "gain"),
        (reversed_by_a_list, "gain"),
        (module_after_a_sort, "head.weight"),
        (of_all_samples, "gain"),
        (written_elsewhere, "gain"),
        (copied_elsewhere, "gain"),
    ],
    ids=lambda of: getattr(of, "__name__", ""),
)
def test_what_was_given_other_places_is_refused_by_name(between, named):
    with PerSampleGradNorms(Net(between), check=False) as norms:
        with pytest.raises(UncoveredParameterError, match=rf"{named}.*nobody knows which rows belong to which"):
            traced(norms.model)(*steps(4)(6))
        norms.reset()


def normalized(net, x, y):
    return net.head(F.batch_norm(y.sum(1), None, None, net.gain, None, True))


def test_a_normalization_over_the_batch_is_not_done_for_one_sample_alone():
    with PerSampleGradNorms(Net(normalized), check=False) as norms:
        with pytest.raises(UncoveredParameterError, match=r"gain \(in batch_norm\).*depend on each other"):
            traced(norms.model)(*steps(4)(3))
        norms.reset()
