"""A run that is stopped and goes on, and small image models of each family to try it with."""

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageClassification,
    DeiTForImageClassification,
    LevitForImageClassification,
)

from hf_clars.trainer import ClarsTrainer
from tests.trainer_kit import clars_args

TRANSFORMER = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 16,
}
STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32, "patch_size": 4}
CONVNEXT = {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
IMAGES = {
    "vit": TRANSFORMER,
    "deit": TRANSFORMER,
    "beit": TRANSFORMER | {"use_relative_position_bias": True},
    "data2vec-vision": TRANSFORMER,
    "dinov2": TRANSFORMER | {"mlp_ratio": 2},
    "dinov2_with_registers": TRANSFORMER | {"mlp_ratio": 2},
    "vit_msn": TRANSFORMER,
    "ijepa": TRANSFORMER,
    "swin": STAGES,
    "swinv2": STAGES,
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
    "regnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "groups_width": 4},
    "mobilenet_v1": {"depth_multiplier": 0.125, "image_size": 32},
    "mobilenet_v2": {"depth_multiplier": 0.125, "image_size": 32},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 128},
    "segformer": {
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "num_attention_heads": [1, 2],
        "sr_ratios": [2, 1],
        "patch_sizes": [3, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8,
    },
    "poolformer": {
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
        "mlp_ratio": 2.0,
    },
    "pvt": {
        "hidden_sizes": [4, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 1, 1],
        "image_size": 32,
    },
    "bit": {"embedding_size": 32, "hidden_sizes": [128, 128], "depths": [1, 1]},
    "focalnet": {
        "embed_dim": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
        "image_size": 32,
    },
    "levit": {
        "hidden_sizes": [16, 16, 16],
        "num_attention_heads": [1, 1, 1],
        "depths": [1, 1, 1],
        "key_dim": [4, 4, 4],
        "image_size": 64,
        "mlp_ratio": [2, 2, 2],
        "attention_ratio": [2, 2, 2],
    },
    "hiera": {
        "embed_dim": 8,
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "patch_stride": [4, 4],
        "patch_padding": [3, 3],
        "masked_unit_size": [4, 4],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "query_stride": [2, 2],
        "num_query_pool": 1,
    },
}


def make_images(name):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](num_labels=3, **IMAGES[name])
    of_two = {
        "deit": DeiTForImageClassification,
        "levit": LevitForImageClassification,
    }  # whose Auto class cannot choose
    return of_two[name](config) if name in of_two else AutoModelForImageClassification.from_config(config)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert first.keys() == second.keys()
    assert different == []


SETTINGS = {
    "method": "lars",  # checkpoints are the same for all methods, and this one costs no norms of samples
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0},
}


class Worse(ClarsTrainer):
    """Finds the model best after its second step."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": abs(self.state.global_step - 2.0)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def check_resume_and_best(tmp_path, make, data):
    states = {}

    class Watched(Worse):
        def _save_checkpoint(self, model, trial):
            states[self.state.global_step] = state(self.model)
            super()._save_checkpoint(model, trial)

    args = clars_args(
        tmp_path / "whole",
        **SETTINGS,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    whole = Watched(make(), args, train_dataset=data, eval_dataset=data)
    whole.train()
    assert not all(torch.equal(states[2][name], states[4][name]) for name in states[2])
    same(state(whole.model), states[2])

    resumed = ClarsTrainer(make(), clars_args(tmp_path / "resumed", **SETTINGS), train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    same(state(resumed.model), states[4])
