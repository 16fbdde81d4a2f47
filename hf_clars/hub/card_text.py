"""The body of a model card, section by section."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from hf_clars.hub.batch_advice import batch_advice
from hf_clars.hub.markdown import plain, shown, table
from hf_clars.hub.summary import RunSummary
from hf_clars.optim.methods import METHODS

RESULT_NAMES = {
    "eval_accuracy": "Top-1 accuracy",
    "eval_top5_accuracy": "Top-5 accuracy",
    "eval_loss": "Evaluation loss",
    "train_loss": "Training loss (mean over the run)",
    "train_samples_per_second": "Training images per second",
    "train_runtime": "Training time (s)",
}
BOOKKEEPING = ("epoch", "total_flos", "_runtime", "_per_second")
"""How the names of numbers end that Trainer adds to results, and nobody chooses a model by."""
RECIPE_NAMES = {
    "method": "Optimizer",
    "global_batch": "Global batch size",
    "micro_batch": "Micro-batch (per process)",
    "accumulation": "Accumulation steps",
    "processes": "Processes",
    "gamma_scale": "gamma_scale (global learning rate)",
    "eta": "eta (layer-wise scale)",
    "signal_n": "n (a step of pure signal is n times shorter)",
    "momentum": "Momentum",
    "schedule": "Schedule",
    "warmup_epochs": "Warmup epochs",
    "epochs": "Epochs",
    "weight_decay": "Weight decay",
    "norm_samples": "Samples per step for the norms",
    "precision": "Precision",
    "seed": "Seed",
}
CAPTIONS = {  # by the picture's name without its ending
    "layer_rates": "The rate of each layer over the steps of the run and, where the method measures it, "
    "`R_k = ||g_k|| / n_k`: how far the samples of a batch agree (1: fully; near 0: their gradients cancel out); for "
    "SignalLARS `s_k`, the share of signal in the layer's squared batch gradient, and the factor `f_k` that it makes."
}
REPO_PLACEHOLDER = '"path/or/repository/of/this/model"'
"""What stands for the repository in the code of a card that does not know it; a push puts the id in its place."""
CITATION = """```bibtex
@inproceedings{huo2021large,
  title     = {Large Batch Optimization for Deep Learning Using New Complete Layer-Wise Adaptive Rate Scaling},
  author    = {Huo, Zhouyuan and Gu, Bin and Huang, Heng},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2021}
}
```"""


def card_body(summary: RunSummary, pictures: Sequence[str], pages: Sequence[str] = ()) -> str:
    """Return the markdown below the metadata; `pictures` and `pages` are links relative to the card."""
    sections = [
        f"# {plain(summary.model_name)}",
        _introduction(summary),
        "## Results",
        _results(summary),
        *_history(summary),
        "## Training recipe",
        _recipe(summary),
        *_pictures(pictures, pages),
        *batch_advice(summary.batch_advice),
        "## How to load it",
        _loading(summary),
        "## Limits",
        _limits(summary),
        "## Citation",
        "The optimizer is described in:",
        CITATION,
        "## Environment",
        _environment(summary),
    ]
    return "\n\n".join(sections) + "\n"


def _introduction(summary: RunSummary) -> str:
    known = {"scratch": " from scratch", "checkpoint": " from the weights of a checkpoint that is not on the Hub"}
    origin = f" from {plain(summary.base_model)}" if summary.base_model else known.get(summary.origin or "", "")
    size = summary.recipe.get("global_batch")
    batch = "" if size is None else f" in batches of {shown(size)}"
    optimizer = METHODS.get(summary.method.lower())
    method = f"{plain(summary.method)}." if optimizer is None else optimizer.words
    licence = "" if summary.license else "\n\nNo licence was chosen for these weights: ask their author before use."
    return (
        f"{_kind(summary)} ({plain(summary.architecture)}, {shown(summary.parameters)} parameters), trained"
        f"{origin} on {plain(summary.dataset)} with `hf_clars`{batch}. The optimizer is {method}{licence}"
    )


def _kind(summary: RunSummary) -> str:
    return "An image classifier" if summary.task == "image-classification" else "A network"


def _results(summary: RunSummary) -> str:
    found = summary.results
    rows = [[title, _result(key, found[key])] for key, title in RESULT_NAMES.items() if key in found]
    others = [key for key in found if key not in RESULT_NAMES and not key.endswith(BOOKKEEPING)]
    rows += [[plain(key), _result(key, found[key])] for key in others]
    split = f" ({plain(summary.eval_split)} split)" if summary.eval_split else ""
    return f"On {plain(summary.dataset)}{split}:\n\n{table(('Measure', 'Value'), rows)}" if rows else "None recorded."


def _result(key: str, value: Any) -> str:
    if "accuracy" in key and isinstance(value, Real) and math.isfinite(value):
        return f"{100 * value:.2f}%"
    return shown(value)


def _history(summary: RunSummary) -> list[str]:
    """Return a table of the epochs; of a long run about 20, the last one always among them."""
    if not summary.history:
        return []
    every = math.ceil(len(summary.history) / 20)
    chosen = [entry for index, entry in enumerate(summary.history, 1) if index % every == 0]
    if chosen[-1:] != [summary.history[-1]]:
        chosen.append(summary.history[-1])
    keys = list(dict.fromkeys(["epoch", *(key for entry in chosen for key in entry)]))
    rows = [[_result(key, entry[key]) if key in entry else "" for key in keys] for entry in chosen]
    names = {**RESULT_NAMES, "train_loss": "Training loss"}  # of the epoch, not of the whole run
    return ["## By epoch", table([plain(names.get(key, key.capitalize())) for key in keys], rows)]


def _recipe(summary: RunSummary) -> str:
    recipe: Mapping[str, Any] = {"method": summary.method.upper(), **summary.recipe}
    names = [key for key in RECIPE_NAMES if key in recipe] + [key for key in recipe if key not in RECIPE_NAMES]
    rows = [[plain(RECIPE_NAMES.get(key, key)), _setting(key, recipe[key])] for key in names]
    sizes = ", ".join(f"{plain(split)} {shown(size)}" for split, size in summary.splits.items())
    data = f"{plain(summary.dataset)}{f' (images: {sizes})' if sizes else ''}"
    return table(("Setting", "Value"), [["Data", data], *rows])


def _setting(key: str, value: Any) -> str:
    if key == "norm_samples" and not value:
        return "every sample"  # 0 and None are how the settings spell it
    return plain(value) if key == "seed" else shown(value)  # a seed is a name, not an amount


def _pictures(links: Sequence[str], pages: Sequence[str]) -> list[str]:
    if not links and not pages:
        return []
    sections = ["## What each layer did"]
    for link in links:
        stem = PurePosixPath(link).stem
        sections.append(f"![{plain(stem.replace('_', ' '))}]({quote(link)})")
        sections += [CAPTIONS[stem]] if stem in CAPTIONS else []
    names = [f"[{plain(PurePosixPath(page).name)}]({quote(page)})" for page in pages]
    return [*sections, f"To explore in a browser (download first): {', '.join(names)}."] if names else sections


def _loading(summary: RunSummary) -> str:
    if summary.library is None:
        return (
            f"The weights are those of a plain PyTorch module. Build it (`{plain(summary.architecture)}`), and read "
            '`model.safetensors` into it: `safetensors.torch.load_model(model, "model.safetensors")`.'
        )
    # A checked id holds no quotes: it can stand in code as it is.
    place = f'"{summary.repo_id}"' if summary.repo_id else REPO_PLACEHOLDER
    first = ["import hf_clars  # registers the architecture"] if summary.needs_import else []
    lines = [
        *first,
        "from transformers import AutoImageProcessor, AutoModelForImageClassification",
        f"processor = AutoImageProcessor.from_pretrained({place})",
        f"model = AutoModelForImageClassification.from_pretrained({place})",
    ]
    if summary.task != "image-classification":
        lines = [*first, "from transformers import AutoModel", f"model = AutoModel.from_pretrained({place})"]
    note = "\n\nThe architecture is one of hf_clars' own: install `hf_clars` first." if summary.needs_import else ""
    return "```python\n" + "\n".join(lines) + f"\n```{note}"


def _limits(summary: RunSummary) -> str:
    classes = f"It knows the classes of {plain(summary.dataset)} and no others; it answers for any image all the same."
    limits = [classes] if summary.task == "image-classification" else []
    limits += [
        "The results are of one run with one seed, on the split named above; a few tenths of a percent are noise.",
        "Bias, robustness and calibration were not examined: do not use it for decisions about people.",
    ]
    return "\n".join(f"- {limit}" for limit in limits)


def _environment(summary: RunSummary) -> str:
    rows = [["Hardware", plain(summary.hardware)]]
    rows += [[plain(name), plain(version)] for name, version in summary.versions.items()]
    return table(("Part", "Version"), rows)
