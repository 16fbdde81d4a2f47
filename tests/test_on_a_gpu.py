"""Promise: what holds on the CPU holds on a CUDA device: exact norms, the same steps, no waiting, fp16 and bf16.

Skipped by name without such a device. `HF_CLARS_GPU_TESTS_ON=cpu pytest tests/test_on_a_gpu.py -m gpu` runs them on the
CPU, which only shows that the tests themselves are sound.
"""

import copy
import os

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_clars import ClarsTrainer
from hf_clars.bench.gpu.stages import capture
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.layers import param_layers
from hf_clars.models import build_model
from hf_clars.optim import CLARS, LARS, NAG
from tests.oracle import layer_norms, per_sample_grads
from tests.trainer_kit import Images, Plain, clars_args
from tests.twin import Twin, batch, loss_on, small_model

DEVICE = os.environ.get("HF_CLARS_GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
B = 6


@pytest.fixture(autouse=True)
def full_float32():
    """No TensorFloat-32 in the comparisons: it has 10 bits of mantissa."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = kept


def network(name, side=32):
    settings = {"resnet8": {"width": 8}, "vit": {}, "clars-cnn": {}}[name]
    torch.manual_seed(0)
    if name == "vit":
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=side,
            patch_size=8,
            num_labels=5,
        )
        return ViTForImageClassification(config)
    return build_model(name, num_labels=5, image_size=side, num_channels=3, model_kwargs=settings)


def data(side=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, side, side, generator=generator), torch.arange(B) % 5


def brute_force(model, x, y):
    """{layer: [B]}, the norms of the samples' own gradients: the mean loss has 1 / B of each."""
    grads = {n: B * g for n, g in per_sample_grads(model, loss_of(x.double(), y), B).items()}
    return layer_norms(grads, param_layers(model))


def loss_of(x, y):
    return lambda model: cross_entropy(model(x).logits, y)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ["resnet8", "clars-cnn", "vit"])
def test_norms_are_exact_and_the_gradient_is_the_plain_one(name, dtype, tolerance, memory):
    (x, y), model = data(), network(name)
    expected = brute_force(model, x, y)
    model = model.to(DEVICE, dtype, memory_format=memory)
    x, y = x.to(DEVICE, dtype, memory_format=memory), y.to(DEVICE)
    loss_of(x, y)(plain := copy.deepcopy(model)).backward()
    with PerSampleGradNorms(model) as norms:
        loss_of(x, y)(model).backward()
    for layer, wanted in expected.items():
        found = norms.per_sample[layer]
        assert found.device.type == DEVICE
        torch.testing.assert_close(
            found.cpu().double(), wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=layer: f"{n}: {m}"
        )
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_norms_to_its_own_precision(dtype):
    (x, y), model = data(), network("clars-cnn")
    expected = brute_force(model, x, y)
    model, x, y = model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)
    with PerSampleGradNorms(model) as norms:
        with torch.autocast(DEVICE, dtype):
            loss = loss_of(x, y)(model)
        loss.backward()
    for layer, wanted in expected.items():
        torch.testing.assert_close(norms.per_sample[layer].cpu().double(), wanted, rtol=5e-2, atol=1e-3)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(("kind", "cls"), [("nag", NAG), ("lars", LARS), ("clars", CLARS)])
def test_steps_are_those_of_the_literal_twin(kind, cls, foreach):
    settings = {} if cls is NAG else {"eta": 0.03}
    model = small_model().double()
    twin = Twin(model, method=kind, **settings)
    model = model.to(DEVICE)
    optimizer = cls(model, 0.5, foreach=foreach, **settings)
    for step in range(20):
        x, y = batch(step)
        optimizer.zero_grad()
        loss_on(x.double().to(DEVICE), y.to(DEVICE))(model).backward()
        optimizer.step()
        twin.step(loss_on(x.double(), y), len(x), 0.5)
    for (name, p), q in zip(model.named_parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("samples", [None, 3])
def test_a_step_never_waits_for_the_device(samples):
    model, (x, y) = network("resnet8").to(DEVICE), (t.to(DEVICE) for t in data())
    optimizer = CLARS(model, 0.5, samples=samples)

    def train_once():
        optimizer.zero_grad()
        loss_of(x, y)(model).backward()
        optimizer.step()

    for _ in range(5):  # what is set up once may wait, and so may batches in which sums are checked
        train_once()
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        train_once()
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(optimizer.last_step.rate).all()


def test_a_captured_step_is_the_eager_one():
    """Forward and backward pass, norms, rates and update as one CUDA graph: `docs/compiled-models.md` shows it."""
    (x, y), models = (t.to(DEVICE) for t in data()), [network("resnet8").to(DEVICE) for _ in range(2)]
    optimizers = [CLARS(model, 0.5) for model in models]
    for optimizer in optimizers:
        optimizer.norms.check_every = 0

    def step(i):
        optimizers[i].zero_grad(set_to_none=True)
        loss_of(x, y)(models[i]).backward()
        optimizers[i].step()

    graph = _captured(lambda: step(0))
    for _ in range(5 if graph is None else 6):
        step(1)
    for scale in (1.0, 0.5, 2.0):  # replayed with other images in the same memory
        x.copy_(data()[0].to(DEVICE) * scale)
        step(0) if graph is None else graph.replay()
        step(1)
        rates = [optimizer.last_step.rate for optimizer in optimizers]
        torch.testing.assert_close(rates[0], rates[1], rtol=1e-4, atol=1e-6)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def _captured(step):
    """Five steps, and a graph of one more, which is not run while it is captured; None on a CPU."""
    if DEVICE != "cuda":
        for _ in range(5):
            step()
        return None
    graph = capture(step)
    graph.replay()
    return graph


def test_a_loss_scale_is_taken_out_and_an_overflow_leaves_everything_as_it_was():
    rates, (x, y) = [], (t.to(DEVICE) for t in data())
    for scale in (1.0, 2.0**12):
        model = network("clars-cnn").to(DEVICE)
        optimizer = CLARS(model, 0.5)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        scaler.scale(loss_of(x, y)(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        rates.append(optimizer.last_step.rate.clone())
        kept = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(loss_of(x * float("inf"), y)(model)).backward()
        scaler.step(optimizer)
        assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))
    torch.testing.assert_close(rates[0], rates[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["", "bf16", "fp16"])
def test_the_trainer_trains_and_resumes_there(tmp_path, precision):
    changes = {precision: True} if precision and DEVICE == "cuda" else {}
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 8, **changes}
    if DEVICE == "cuda":
        args["use_cpu"] = False
    whole = ClarsTrainer(Plain(), clars_args(tmp_path / "a", **args), train_dataset=Images())
    whole.train()
    assert whole.args.device.type == DEVICE
    again = ClarsTrainer(Plain(), clars_args(tmp_path / "a", **args), train_dataset=Images())
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
