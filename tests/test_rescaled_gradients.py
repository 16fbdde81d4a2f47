"""Promise: what rescales all gradients after `backward()` cancels in the rates; beside it stands weight decay alone."""

import pytest
import torch
from torch import nn

from hf_clars.optim import CLARS
from tests.twin import batch, loss_on, small_model


def by_hand(model, optimizer, loss):
    (loss * 1024).backward()
    for p in model.parameters():
        p.grad.div_(1024)
    optimizer.step()


def by_clipping(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def by_scaler(model, optimizer, loss):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize("estimator", ["samples", "microbatch"])
@pytest.mark.parametrize("rescaled", [by_hand, by_clipping, by_scaler])
def test_rescaling_the_gradients_after_backward_changes_no_step(rescaled, estimator):
    """The norms follow p.grad: a loss scale that is removed, or clipping by the global norm, cancels in the rate."""
    model, other = small_model().double(), small_model().double()
    plain, optimizer = CLARS(model, estimator=estimator), CLARS(other, estimator=estimator)
    for step in range(3):
        plain.zero_grad(), optimizer.zero_grad()
        loss_on(*batch(step))(model).backward()
        plain.step()
        rescaled(other, optimizer, loss_on(*batch(step))(other))
        torch.testing.assert_close(optimizer.last_step.ratio, plain.last_step.ratio, rtol=1e-9, atol=0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [slice(-2, None), slice(0, 2)])
def test_clipping_cancels_although_parts_of_the_model_have_no_gradient(frozen):
    """Whatever tells the scale must not be a parameter that was frozen since."""
    model, other = small_model().double(), small_model().double()
    plain, clipped = CLARS(model), CLARS(other)
    for step in range(3):
        for net, optimizer, clip in ((model, plain, None), (other, clipped, 1e-3)):
            for p in list(net.parameters())[frozen]:
                p.requires_grad_(step == 0)
            optimizer.zero_grad()
            loss_on(*batch(step))(net).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
        torch.testing.assert_close(clipped.last_step.ratio, plain.last_step.ratio, rtol=1e-9, atol=0)


def test_with_weight_decay_a_clipped_gradient_is_what_the_decay_is_added_to():
    """As the docstring says: gamma (c g + decay w), gamma with c n_k, c being what clipping multiplied with."""
    model = small_model().double()
    optimizer = CLARS(model, 0.5, weight_decay=0.1, momentum=0.0)
    for step in range(3):
        optimizer.zero_grad()
        loss_on(*batch(step))(model).backward()
        clean = optimizer.layer_measures()
        total = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2))
        before, grad = model[6].weight.detach().clone(), model[6].weight.grad.clone()
        optimizer.step()
        row, c = optimizer.layer_names.index("6"), 1e-2 / total
        n, w = clean.mean_sample_norm[row] * c, clean.weight_norm[row]
        torch.testing.assert_close(optimizer.last_step.mean_sample_norm[row], n, rtol=1e-4, atol=0)
        expected = before - 0.5 * 1e-2 * w / (n + 0.1 * w) * (grad + 0.1 * before)
        torch.testing.assert_close(model[6].weight.detach(), expected, rtol=1e-4, atol=1e-9)


class Table(nn.Module):
    """Trains a large table, of which a batch uses rows near each other; what they get adds up to 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20_000, 16), nn.Linear(16, 3).requires_grad_(False)

    def forward(self, ids):
        return self.head(nn.functional.layer_norm(self.table(ids).sum(1), (16,)))


def test_clipping_cancels_also_where_a_large_table_trains_alone():
    model, other = Table().double(), Table().double()
    plain, clipped = CLARS(model), CLARS(other)
    for step in range(3):
        ids = torch.randint(0, 50, (8, 5), generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((model, plain), (other, clipped)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(ids), ids[:, 0] % 3).backward()
            if net is other:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            optimizer.step()
        torch.testing.assert_close(clipped.last_step.ratio, plain.last_step.ratio, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.table.weight, model.table.weight, rtol=1e-9, atol=1e-12)
    assert not torch.equal(model.table.weight, Table().double().table.weight)
