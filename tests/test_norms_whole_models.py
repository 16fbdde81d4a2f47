"""Promise: whole networks in train mode agree with the oracle in every layer, at random weights and after steps."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.layers import param_layers
from hf_clars.models import build_model
from hf_clars.optim import CLARS
from tests.oracle import layer_norms, one_by_one, per_sample_grads

B, SIDE = 3, 32


def timm_model(kind, **settings):
    import timm

    return timm.create_model(kind, num_classes=3, **settings)


def densenet():
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_classes=3)


def efficientnet():
    from timm.models.efficientnet import EfficientNet, decode_arch_def

    blocks = decode_arch_def(
        [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e4_c12_se0.25"], ["ir_r1_k5_s2_e4_c16_se0.25"]]
    )
    return EfficientNet(blocks, num_classes=3, stem_size=8, num_features=24, act_layer=nn.SiLU)


def mobilenet_v3():
    from timm.models.mobilenetv3 import MobileNetV3, decode_arch_def

    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8_nre"], ["ir_r2_k3_s2_e4_c12_nre"], ["ir_r1_k5_s2_e3_c16_se0.25"]])
    return MobileNetV3(blocks, num_classes=3, stem_size=8, num_features=24, act_layer=nn.Hardswish)


def resnext():
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3, cardinality=2, base_width=64, channels=(8, 8, 16, 16))


def regnet():
    from timm.models.regnet import RegNet, RegNetCfg

    return RegNet(RegNetCfg(depth=8, w0=8, wa=12.0, wm=2.2, group_size=4, se_ratio=0.25), num_classes=3)


def vgg11_bn():
    from torchvision.models import vgg

    features = vgg.make_layers([4, "M", 8, "M", 8, 8, "M", 12, 12, "M", 12, 12, "M"], batch_norm=True)
    model = vgg.VGG(features, num_classes=3, dropout=0.0)
    model.classifier = nn.Sequential(nn.Linear(12 * 49, 16), nn.ReLU(True), nn.Linear(16, 3))
    return model


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=SIDE,
            patch_size=8,
            num_labels=3,
        )
    )


def swin():
    return SwinForImageClassification(
        SwinConfig(
            image_size=SIDE,
            patch_size=4,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=3,
        )
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


MODELS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    ),
    "mobilenet_v2": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.25, image_size=SIDE, num_labels=3, classifier_dropout_prob=0.0)
    ),
    "vit": vit,
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[4, 8, 8, 12], depths=[1, 1, 1, 1], num_labels=3)
    ),
    "swin": swin,
    "bert": bert,
    "timm densenet": densenet,
    "timm efficientnet": efficientnet,
    "timm resnext": resnext,
    "timm mobilenetv3": mobilenet_v3,
    "timm regnet": regnet,
    "torchvision vgg11_bn": vgg11_bn,
    "resnet8": lambda: build_model("resnet8", num_labels=3, image_size=SIDE, num_channels=3),
    "clars-cnn": lambda: build_model("clars-cnn", num_labels=3, image_size=SIDE, num_channels=3),
}


# Models that fold or drop the batch axis inside; without BatchNorm a sample's gradient is that of its own loss.
UNCOUPLED = ("swin", "bert", "vit")


def loss_on(x, y):
    def loss_of(model):
        out = model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)
        return nn.functional.cross_entropy(out if torch.is_tensor(out) else out.logits, y)

    return loss_of


def data(name):
    y = torch.arange(B) % 3
    if name == "bert":
        return torch.randint(1, 30, (B, 9)), y
    return torch.randn(B, 3, SIDE, SIDE), y


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_every_sample(name, after):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if name == "convnext":
        for p in model.parameters():  # layer scales of 1e-6 would leave nothing to compare
            p.data.add_(0.1 * torch.randn_like(p))
    x, y = data(name)
    if after:
        optimizer = CLARS(model, 1.0)
        for _ in range(after):
            optimizer.zero_grad()
            loss_on(x, y)(model).backward()
            optimizer.step()
        optimizer.remove_hooks()
    model = model.double()
    with PerSampleGradNorms(model) as norms:
        loss_on(x, y)(model).backward()
    if name in UNCOUPLED:
        expected = one_by_one(model, lambda m, i: loss_on(x[i : i + 1], y[i : i + 1])(m), B)
    else:
        expected = {n: B * g for n, g in per_sample_grads(model, loss_on(x, y), B).items()}
    expected = layer_norms(expected, param_layers(model))
    assert norms.per_sample.keys() == expected.keys()
    for layer, want in expected.items():
        torch.testing.assert_close(
            norms.per_sample[layer], want, rtol=1e-9, atol=1e-12, msg=lambda m, n=layer: f"{n}: {m}"
        )
