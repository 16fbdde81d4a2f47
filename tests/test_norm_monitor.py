"""Promise: in a loop of one's own the monitor measures what the callback does in Trainer's."""

import pytest
import torch

from hf_clars.errors import ConfigError
from hf_clars.per_sample import NormMonitor, PerSampleLog, with_index
from tests.callback_kit import accelerated_epoch, hooks_on
from tests.trainer_kit import Images, Plain


def test_a_plain_loop_and_an_accelerate_loop_measure_what_trainer_does(tmp_path):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    def logs_of(run):
        torch.manual_seed(0)
        model = Plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with NormMonitor(model, every=1, strict=True, folder=tmp_path / run.__name__) as monitor:
            run(model, optimizer, monitor, DataLoader(with_index(Images()), batch_size=8))
        assert hooks_on(model) == 0
        return PerSampleLog.open(tmp_path / run.__name__).read()

    def plain(model, optimizer, monitor, loader):
        for number, batch in enumerate(loader):
            last = number % 2 == 1
            with monitor.batch(batch.pop("sample_index"), last=last):
                (model(**batch)["loss"] / 2).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()

    def accelerated(model, optimizer, monitor, loader):
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        accelerated_epoch(accelerator, wrapped, optimizer, loader, monitor)

    a, b = logs_of(plain), logs_of(accelerated)
    assert a["steps"].tolist() == [1, 2, 3, 4]
    assert sorted(a["top_index"][0].tolist())[-1] == 15
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9, equal_nan=True)


def test_a_second_monitor_on_a_model_is_refused_until_the_first_is_closed():
    model = Plain()
    with NormMonitor(model), pytest.raises(ConfigError, match="Another monitor"):
        NormMonitor(model)
    NormMonitor(model).close()


def test_a_loss_scale_is_out_of_norms_and_an_overflow_leaves_the_noise_scale_alone():
    """As fp16 trains: the loss is scaled; a step whose gradients overflow is told as not finite."""

    def measured(scale, overflows):
        torch.manual_seed(0)
        model, data = Plain(), Images(16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        found = []
        with NormMonitor(model, every=1, strict=True) as monitor:
            for number in range(3):
                with monitor.batch(loss_scale=scaler.get_scale()):
                    loss = model(data.x, data.y)["loss"]
                    scaler.scale(loss * float("inf") if number == 1 and overflows else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                found.append(monitor.last)
        return found, monitor.noise.read().value

    plain, _ = measured(1, overflows=False)
    scaled, value = measured(1024.0, overflows=True)
    for one, other in ((plain[0], scaled[0]), (plain[1], scaled[2])):  # the overflow's step was skipped
        for name in ("sample_square", "batch_square", "top_norm", "quantiles"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-4, atol=0, equal_nan=True)
    assert not scaled[1].finite
    assert bool(value.isfinite().any())
