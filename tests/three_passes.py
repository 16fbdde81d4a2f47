"""Three passes of a small model against one backward pass for every sample, in float64."""

import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one

B, SIDE = 3, 32


def on_one_thread():
    """Models this small lose more to a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(model, x, samples=None, rtol=1e-9):
    """Three passes: what the first one learns is used in the others."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model, x = model.double(), x.double() if x.is_floating_point() else x

    def loss_of(m, rows):
        out = m(x[rows])
        out = out if torch.is_tensor(out) else out.logits
        return (out.flatten(1) * torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype)).sin().sum(1).mean()

    expected = one_by_one(model, lambda m, i: loss_of(m, slice(i, i + 1)), B)
    with PerSampleGradNorms(model, samples=samples) as norms:
        for _ in range(3):
            model.zero_grad()
            loss_of(model, slice(None)).backward()
            for name, want in layer_norms(expected, norms.layers).items():
                got = norms.per_sample[name]
                torch.testing.assert_close(
                    got, want[:samples], rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )


def assert_exact(norms, plain, x, loss_of=lambda m, x: m(x).sin().sum(1)):
    """What was measured by tensor (`layers="tensor"`), against one backward pass of a copy for each sample."""
    found = norms.per_sample
    for i in range(len(x)):
        plain.zero_grad()
        loss_of(plain, x[i : i + 1]).sum().backward()
        for name, p in plain.named_parameters():
            assert found[name].shape == (len(x),)
            torch.testing.assert_close(found[name][i], p.grad.norm(), rtol=1e-9, atol=1e-12, msg=name)
