"""Promise: every module that PyTorch's own tests know is measured exactly, or refused by name, wherever it stands."""

import re
import warnings

import pytest
import torch

pytest.importorskip("expecttest", reason="torch.testing's list of modules needs the package expecttest")

from benchmarks.coverage import torch_layers
from benchmarks.coverage.judge import expected, judge
from benchmarks.coverage.subject import NotRunnable

# What may be refused: (module, place) -> what the refusal says. Everything else must be exact.
MAY_BE_REFUSED = {
    # Chunked, with a mean or a sum: its weight is used by one operation, which returns one number for the whole batch.
    ("nn.LinearCrossEntropyLoss", "last"): r"inner\.linear\.weight: used by GeneratedBackwardFor\w*_chunked_",
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def verdict_on(name, case, place):
    """What three passes in float64 give, or None where the module cannot stand there."""
    try:
        subject = case.subject(place)
        right = expected(subject, ["float64"])
    except NotRunnable:
        return None
    return judge(subject, "float64", right["float64"], enough=0)


def check(name, case, place, training):
    """Whether it was judged; it is exact, or refused in the words that are expected."""
    row = verdict_on(name, case, place)
    if row is None:
        return False
    where = f"{name}, {place}, training={training}, {case.what}: {row}"
    if row["verdict"] == "refused":
        assert (name, place) in MAY_BE_REFUSED, where
        assert re.search(MAY_BE_REFUSED[name, place], row["why"]), where
    else:
        assert row["verdict"] == "exact", where
    return True


@pytest.mark.parametrize("name", torch_layers.names())
def test_in_the_middle(name):
    """The first test input that has a batch; modules that cannot stand in the middle stand first, losses last."""
    for case in torch_layers.cases(name):
        for place in ("middle", "first", "last"):
            if check(name, case, place, training=True):
                return
    pytest.skip(f"no test input of {name} has a batch that can be judged")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", torch_layers.names())
def test_everywhere(name):
    """Every test input, as first, middle and last layer, in training and where that differs in evaluation."""
    judged = 0
    for training in torch_layers.modes(name):
        for case in torch_layers.cases(name, training):
            judged += sum(check(name, case, place, training) for place in torch_layers.PLACES)
    if not judged:
        pytest.skip(f"no test input of {name} has a batch that can be judged")


def test_nearly_all_modules_are_judged():
    """The list above must not pass because nothing in it was looked at."""
    names = torch_layers.names()
    with_a_batch = [n for n in names if next(torch_layers.cases(n), None) is not None]
    assert len(names) > 100
    assert len(with_a_batch) > 0.95 * len(names)


def test_a_wrong_norm_is_seen(monkeypatch):
    """The judge itself can fail: norms that are off by a thousandth are called wrong."""
    from hf_clars.grad_norms import PerSampleGradNorms

    right = PerSampleGradNorms.per_sample.fget
    monkeypatch.setattr(
        PerSampleGradNorms, "per_sample", property(lambda self: {k: v * 1.001 for k, v in right(self).items()})
    )
    row = verdict_on("nn.Conv2d", next(torch_layers.cases("nn.Conv2d")), "middle")
    assert row["verdict"] == "wrong"
