"""`hf-clars explain MODEL`: how every parameter's per-sample norms are measured, and why so."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.cli.commands import reporting
from hf_clars.errors import ConfigError
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.choice import layer_forms
from hf_clars.models import build_model, model_names

DESCRIPTION = """\
Run a few forward and backward passes of a model on random input, and print for each parameter its share of the norms'
time, and how they are measured: by a rule, at an operation of the graph, or by one backward pass a sample of a module
around it. Where a rule makes the weight gradient and the norms from one product, its time is that of both.
The last line says whether the model can be compiled as a whole.

MODEL is a short name (`hf-clars train --help` lists them), a folder, or a name on the Hub: an image classifier, or with
--tokens a causal language model or a text classifier. Only the configuration is read; the weights are random.
"""


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a short name, a folder, or a name on the Hub")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images (default: 32)")
    parser.add_argument("--channels", type=int, default=3, help="channels of the images (default: 3)")
    parser.add_argument("--tokens", type=int, metavar="T", help="for language models: the length of the input")
    parser.add_argument("--batch", type=int, default=4, help="samples (default: 4)")
    parser.add_argument(
        "--forms", action="store_true", help="also which of the equal forms each weight's norms take, and why"
    )
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.tokens:
        model = _language_model(args.model)
        given: Tensor = torch.randint(1, model.config.vocab_size, (args.batch, args.tokens))
    else:
        model = build_model(
            args.model,
            num_labels=10,
            image_size=args.image_size,
            num_channels=args.channels,
            from_scratch=args.model not in model_names(),
        )
        given = torch.randn(args.batch, args.channels, args.image_size, args.image_size)
    print(explain(model, given))
    if args.forms:
        print(f"\n{layer_forms(model, given)}")
    return 0


def explain(model: nn.Module, given: Tensor) -> str:
    """The table of passes on `given`, and whether the model can be compiled as a whole.

    The first three passes are checked, which costs more; the time is that of three that follow.
    """
    with PerSampleGradNorms(model.train()) as norms:
        for step in range(6):
            if step == 3:
                norms.time_passes()
            model.zero_grad()
            model(given).logits.float().square().mean().backward()
            _ = norms.per_sample
        missing = norms.why_not_compiled()
        whole = "can be compiled as a whole" if not missing else f"cannot be compiled as a whole: {missing}"
        return f"{norms.explain()}\n\nThe sums of all samples' gradients were compared with p.grad.\nThe model {whole}"


def _language_model(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name}: no model's configuration can be read there. {' '.join(str(error).split())}"
        ) from None
    config.pad_token_id = 0
    classifies = any("SequenceClassification" in kind for kind in config.architectures or ())
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    try:
        return kind.from_config(config)
    except ValueError as error:
        raise ConfigError(f"{name}: this is no language model. {' '.join(str(error).split())}") from None
