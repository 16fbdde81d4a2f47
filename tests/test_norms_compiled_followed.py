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


def last_steps(net, x, y):
    return net.head(y[torch.arange(len(x)), x[..., 0].argmax(1)] * net.gain)


def turned(net, x, y):
    return net.head((y[:, 0].T * net.gain[:, None]).T)


@pytest.mark.parametrize(
    "between",
    [time_first, steps_attend, classes, two_views, each_twice, last_steps, turned],
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


def test_windows_may_be_as_many_as_samples():
    compare(Net(windows), steps(5), (4, 4, 4))


def rolled(net, x, y):
    return net.head(y.roll(1, 0) * net.gain)


def reversed_by_a_list(net, x, y):
    return net.head(y[[3, 2, 1, 0]] * net.gain)


def module_after_a_sort(net, x, y):
    return net.head(y.sort(0)[0])


def of_all_samples(net, x, y):
    return net.head(y + y.mean(0) * net.gain)


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (rolled, "gain"),
        (reversed_by_a_list, "gain"),
        (module_after_a_sort, "head.weight"),
        (of_all_samples, "gain"),
    ],
    ids=lambda of: getattr(of, "__name__", ""),
)
def test_what_was_given_other_places_is_refused_by_name(between, named):
    with PerSampleGradNorms(Net(between), check=False) as norms:
        with pytest.raises(UncoveredParameterError, match=rf"{named}.*nobody knows which rows belong to which"):
            traced(norms.model)(*steps(4)(4))
        norms.reset()


def normalized(net, x, y):
    return net.head(F.batch_norm(y.sum(1), None, None, net.gain, None, True))


def test_a_normalization_over_the_batch_is_not_done_for_one_sample_alone():
    with PerSampleGradNorms(Net(normalized), check=False) as norms:
        with pytest.raises(UncoveredParameterError, match=r"gain \(in batch_norm\).*depend on each other"):
            traced(norms.model)(*steps(4)(3))
        norms.reset()
