"""One model of every family of torchvision that takes a batch of images or clips."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.coverage.subject import B, NotRunnable, Subject, stir

# The smallest of each family; `hf_clars` sees no difference between the members.
MODELS: dict[str, tuple[int, ...]] = {
    "alexnet": (64, 64),
    "convnext_tiny": (32, 32),
    "densenet121": (32, 32),
    "efficientnet_b0": (32, 32),
    "efficientnet_v2_s": (32, 32),
    "googlenet": (96, 96),
    "inception_v3": (107, 107),
    "maxvit_t": (224, 224),
    "mnasnet0_5": (32, 32),
    "mobilenet_v2": (32, 32),
    "mobilenet_v3_small": (32, 32),
    "regnet_x_400mf": (32, 32),
    "regnet_y_400mf": (32, 32),
    "resnet18": (32, 32),
    "resnet50": (32, 32),
    "resnext50_32x4d": (32, 32),
    "shufflenet_v2_x0_5": (32, 32),
    "squeezenet1_0": (64, 64),
    "squeezenet1_1": (64, 64),
    "swin_t": (64, 64),
    "swin_v2_t": (64, 64),
    "vgg11": (32, 32),
    "vgg11_bn": (32, 32),
    "vit_b_32": (64, 64),
    "wide_resnet50_2": (32, 32),
    "deeplabv3_mobilenet_v3_large": (64, 64),
    "deeplabv3_resnet50": (32, 32),
    "fcn_resnet50": (32, 32),
    "lraspp_mobilenet_v3_large": (64, 64),
    "mc3_18": (4, 32, 32),
    "mvit_v1_b": (4, 64, 64),
    "mvit_v2_s": (4, 64, 64),
    "r2plus1d_18": (4, 32, 32),
    "r3d_18": (4, 32, 32),
    "s3d": (16, 64, 64),
    "swin3d_t": (4, 64, 64),
    "fasterrcnn_mobilenet_v3_large_fpn": (64, 64),
    "retinanet_resnet50_fpn": (64, 64),
    "ssd300_vgg16": (300, 300),
    "fcos_resnet50_fpn": (64, 64),
    "maskrcnn_resnet50_fpn": (64, 64),
    "keypointrcnn_resnet50_fpn": (64, 64),
    "raft_small": (128, 128),
}
_DETECTION = ("rcnn", "retinanet", "ssd", "fcos")


def names() -> list[str]:
    """The models' names."""
    return list(MODELS)


def build(name: str) -> Subject:
    """The model and a batch for it.

    Raises:
        NotRunnable: For models that take no batch.
    """
    import torchvision

    if any(part in name for part in _DETECTION):
        raise NotRunnable("takes a list of images and no batch, and returns boxes")
    size = MODELS[name]
    settings: dict[str, Any] = {} if name == "raft_small" else {"num_classes": 5}
    if name in ("vit_b_32", "maxvit_t"):
        settings["image_size" if name.startswith("vit") else "input_size"] = size[0] if name.startswith("vit") else size
    if name.startswith(("googlenet", "inception")):
        settings |= {"init_weights": False}
    if name == "inception_v3":
        settings |= {"aux_logits": False}  # that head takes images of 299 pixels
    if "deeplab" in name or "fcn" in name or "lraspp" in name:
        settings |= {"weights_backbone": None}
    torch.manual_seed(0)
    small = name.startswith("mvit")
    model = _small_mvit(name, size) if small else torchvision.models.get_model(name, weights=None, **settings)
    model.train()
    stir(model)
    x = torch.randn(B, 3, *size, generator=torch.Generator().manual_seed(3))
    batch = {"": (x, x.flip(-1)) if name == "raft_small" else (x,)}
    return Subject(model, batch, note=f"{size[-1]} pixels")


def _small_mvit(name: str, size: tuple[int, ...]) -> torch.nn.Module:
    """Two blocks with the operations of a version; the library's own builder is for 16 frames of 224 pixels alone."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    second = name == "mvit_v2_s"
    widths = ((16, 16), (16, 32)) if second else ((16, 32), (32, 32))
    blocks = [
        MSBlockConfig(
            num_heads=2,
            input_channels=before,
            output_channels=after,
            kernel_q=[3, 3, 3] if i or second else [],
            kernel_kv=[3, 3, 3],
            stride_q=[1, 2, 2] if i else [1, 1, 1] if second else [],
            stride_kv=[1, 2, 2],
        )
        for i, (before, after) in enumerate(widths)
    ]
    parts = {"residual_pool": second, "rel_pos_embed": second, "proj_after_attn": second}
    return MViT(size[1:], size[0], blocks, residual_with_cls_embed=False, num_classes=5, **parts)
