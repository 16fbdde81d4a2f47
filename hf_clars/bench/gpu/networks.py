"""The networks of the kit: each gives a model, and a function that makes a loss of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class GpuNetwork:
    """One network.

    Attributes:
        name: As in tables.
        batch: Samples a step.
        build: Makes the model; `tiny` makes one of the same kind for a test on a CPU.
        inputs: Makes the inputs for a number of samples: (arguments of the model, labels).
        images: Whether it takes images, in channels_last.
    """

    name: str
    batch: int
    build: Callable[[bool], nn.Module]
    inputs: Callable[[bool, int], tuple[dict[str, Any], Tensor]]
    images: bool = True

    def prepare(self, device: torch.device, *, tiny: bool, batch: int | None = None) -> tuple[nn.Module, Loss]:
        """The model on the device, and its loss on fixed random inputs, under bf16 autocast on a GPU.

        Args:
            device: Where to.
            tiny: Small sizes, to show that everything runs.
            batch: Samples; None: the network's.
        """
        torch.manual_seed(0)
        samples = min(4, self.batch) if tiny else (batch or self.batch)
        with torch.device(device):  # a model of a billion weights is made there much sooner
            model = self.build(tiny)
        model = model.train().to(device)
        inputs, labels = self.inputs(tiny, samples)
        inputs = {name: t.to(device) for name, t in inputs.items()}
        if self.images:
            model = model.to(memory_format=torch.channels_last)
            inputs = {n: t.contiguous(memory_format=torch.channels_last) for n, t in inputs.items()}
        labels = labels.to(device)

        def loss(model: nn.Module) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                output = model(**inputs)
            logits = output if isinstance(output, Tensor) else output.logits
            if logits.dim() == 3:
                return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            return cross_entropy(logits.float(), labels)

        return model, loss


def _images(side: int, tiny_side: int, name: str) -> Callable[[bool, int], tuple[dict[str, Any], Tensor]]:
    def make(tiny: bool, batch: int) -> tuple[dict[str, Any], Tensor]:
        size = tiny_side if tiny else side
        return {name: torch.randn(batch, 3, size, size)}, torch.randint(0, 10, (batch,))

    return make


def _tokens(length: int, words: int) -> Callable[[bool, int], tuple[dict[str, Any], Tensor]]:
    def make(tiny: bool, batch: int) -> tuple[dict[str, Any], Tensor]:
        ids = torch.randint(0, 100 if tiny else words, (batch, 12 if tiny else length))
        return {"input_ids": ids}, ids

    return make


def _resnet50(tiny: bool) -> nn.Module:
    from torchvision.models import ResNet, resnet50
    from torchvision.models.resnet import Bottleneck

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=8) if tiny else resnet50(num_classes=1000)


def _resnet8(tiny: bool) -> nn.Module:
    from hf_clars.models import build_model

    width = 4 if tiny else 16
    return build_model("resnet8", num_labels=10, image_size=32, num_channels=3, model_kwargs={"width": width})


def _vit(tiny: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    labels: dict[str, Any] = {"num_labels": 10}
    small: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return ViTForImageClassification(ViTConfig(**(small if tiny else {}), **labels))


def _gpt2(tiny: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    small: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(use_cache=False, **(small if tiny else {})))


def _llama(tiny: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 32000,
    }  # fmt: skip
    small: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 100,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(use_cache=False, **(small if tiny else sizes)))


NETWORKS = {
    network.name: network
    for network in (
        GpuNetwork("resnet50 B256", 256, _resnet50, _images(224, 64, "x")),
        GpuNetwork("vit-b B128", 128, _vit, _images(224, 32, "pixel_values")),
        GpuNetwork("llama1b B4 T1024", 4, _llama, _tokens(1024, 32000), images=False),
        GpuNetwork("resnet8 B2048", 2048, _resnet8, _images(32, 32, "pixel_values")),
        GpuNetwork("gpt2 B8 T1024", 8, _gpt2, _tokens(1024, 50257), images=False),
        GpuNetwork("resnet50 B64", 64, _resnet50, _images(224, 64, "x")),
    )
}
