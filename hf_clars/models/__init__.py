"""The paper's small networks, known to transformers' Auto classes once this package is imported."""

from transformers import AutoConfig, AutoModelForImageClassification

from hf_clars.models.build import build_model, model_names, pretrained_classes
from hf_clars.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from hf_clars.models.densenet import DenseNetBCConfig, DenseNetBCForImageClassification
from hf_clars.models.fully_connected import FullyConnectedConfig, FullyConnectedForImageClassification
from hf_clars.models.mobilenet_v2 import MobileNetV2SmallConfig, MobileNetV2SmallForImageClassification
from hf_clars.models.sigmoid_cnn import SigmoidCnnConfig, SigmoidCnnForImageClassification
from hf_clars.models.small_cnn import SmallCnnConfig, SmallCnnForImageClassification
from hf_clars.models.vgg import Vgg11Config, Vgg11ForImageClassification

for _config, _model in (
    (CifarResNetConfig, CifarResNetForImageClassification),
    (DenseNetBCConfig, DenseNetBCForImageClassification),
    (FullyConnectedConfig, FullyConnectedForImageClassification),
    (MobileNetV2SmallConfig, MobileNetV2SmallForImageClassification),
    (SigmoidCnnConfig, SigmoidCnnForImageClassification),
    (SmallCnnConfig, SmallCnnForImageClassification),
    (Vgg11Config, Vgg11ForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)

__all__ = [
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "DenseNetBCConfig",
    "DenseNetBCForImageClassification",
    "FullyConnectedConfig",
    "FullyConnectedForImageClassification",
    "MobileNetV2SmallConfig",
    "MobileNetV2SmallForImageClassification",
    "SigmoidCnnConfig",
    "SigmoidCnnForImageClassification",
    "SmallCnnConfig",
    "SmallCnnForImageClassification",
    "Vgg11Config",
    "Vgg11ForImageClassification",
    "build_model",
    "model_names",
    "pretrained_classes",
]
