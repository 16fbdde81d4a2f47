"""A language model with AdamW: its noise scale while it learns, and the texts with the largest gradients.

A byte-level model of the Llama kind on the sources of Python's standard library. With --lora only adapters train (peft
must be installed), and only they are measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from small_data import Bytes
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_clars import PerSampleNormsCallback, rank_samples, with_index
from hf_clars.plots import plot_noise_scale


def main() -> None:
    """Train, measure, rank, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000, help="pieces of text")
    parser.add_argument("--length", type=int, default=64, help="bytes of a piece")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters only (needs peft)")
    parser.add_argument("--output", type=Path, default=Path("runs/language_model"))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    data = Bytes(chosen.samples, chosen.length)
    model: torch.nn.Module = byte_model(chosen.length)
    if chosen.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(chosen.output),
        per_device_train_batch_size=chosen.batch,
        max_steps=chosen.steps,
        learning_rate=3e-3,
        warmup_steps=chosen.steps // 20,
        logging_steps=max(1, chosen.steps // 10),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the index is a column
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    callback = PerSampleNormsCallback(every=chosen.every, top_k=10, strict=True)
    Trainer(model, arguments, train_dataset=with_index(data), callbacks=[callback]).train()
    plot_noise_scale(chosen.output, chosen.output / "noise_scale.png")
    ranked = rank_samples(model, data, indices=range(min(len(data), 500)), batch_size=chosen.batch)
    print("The texts with the largest gradient norms:")
    for row in sorted(ranked, key=lambda row: -row["norm"])[:5]:
        text = data.text(row["index"])
        print(f"norm {row['norm']:.2f}, loss {row['loss']:.2f}, {data.names[row['index']]}: {text[:60]!r}")
    print(chosen.output / "noise_scale.png")


def byte_model(length: int) -> LlamaForCausalLM:
    """Two layers of 64, a vocabulary of 256 bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
