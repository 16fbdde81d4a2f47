"""Batches that a class of transformers may take, by the names of its forward's arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.subject import B
from benchmarks.coverage.tiny_config import IMAGE, SPECIAL, VOCAB

TOKENS, CHOICES, FRAMES = 11, 4, 2
_MARKS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")
_MORE_TEXT = ("qformer_input_ids", "protein_input_ids", "tasks_input_ids", "question_input_ids")


def find(config: Any, name: str, default: Any) -> Any:
    """A setting of the configuration, or of one inside."""
    inner = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config")
    for c in (config, *(getattr(config, n, None) for n in inner)):
        value = getattr(c, name, None)
        if value is not None:
            return value
    return default


def side_of(config: Any) -> int:
    """The side of the images that a model is made for."""
    size = find(config, "image_size", IMAGE)
    size = size[0] if isinstance(size, (list, tuple)) else size
    return int(size.get("height", IMAGE)) if isinstance(size, dict) else int(size)


class Batches:
    """What may be put together for one model.

    Args:
        model: The model.
        name: Its class's name.
        config: Its configuration.
    """

    def __init__(self, model: nn.Module, name: str, config: Any) -> None:
        self.takes = inspect.signature(model.forward).parameters
        self.main = str(getattr(model, "main_input_name", "input_ids"))
        self.name, self.config = name, config
        self._generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The likeliest first: everything at once that there is a name for, then less and less."""
        others = [found for found in map(list, (self._pictures(), self._sounds(), self._series())) if found]
        texts = list(self._texts()) if {"input_ids", "inputs"} & set(self.takes) else []
        for other in others:
            for own in other:
                if texts:
                    yield texts[0] | own
        for own in (o for other in others for o in other):
            yield own | self._decoder()
        for text in texts:
            yield text | self._decoder()
        for text in texts[1:]:
            for other in others:
                yield text | other[0]

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(B, *shape, generator=self._generator)

    def tokens(self, *shape: int) -> Tensor:
        """Words that mean nothing, and the end."""
        words = min(find(self.config, "vocab_size", VOCAB), VOCAB) - SPECIAL
        found = torch.randint(3, words, (B, *shape), generator=self._generator)
        end = find(self.config, "eos_token_id", 2)
        found[..., -1] = end if isinstance(end, int) and end < words else 2
        if self.name.startswith("Longformer"):  # the question's end, and those of two texts
            found[..., [3, 4]] = 2
        return found

    def _decoder(self) -> dict[str, Any]:
        found: dict[str, Any] = {"use_cache": False} if "use_cache" in self.takes else {}
        if "decoder_input_ids" in self.takes:
            found["decoder_input_ids"] = self.tokens(7)
        if "decoder_input_values" in self.takes:
            found["decoder_input_values"] = self.random(8, find(self.config, "num_mel_bins", 80))
        return found

    def _texts(self) -> Iterator[dict[str, Any]]:
        key = "input_ids" if "input_ids" in self.takes else "inputs"
        more = {k: self.tokens(5) for k in _MORE_TEXT if k in self.takes} | self._decoder()
        shape = (CHOICES,) if self.name.endswith("ForMultipleChoice") else ()
        for length in (TOKENS, 16, 64):
            yield {key: self.tokens(*shape, length)} | more
        ids = self.tokens(*shape, 16)
        yield {key: ids, "attention_mask": torch.ones_like(ids)} | more
        boxes = torch.randint(0, 30, (B, *shape, TOKENS, 4), generator=self._generator).sort(-1)[0]
        if "bbox" in self.takes:
            yield {key: self.tokens(*shape, TOKENS), "bbox": boxes} | more
            for image in {"image", "pixel_values"} & set(self.takes):
                own = {"bbox": boxes, image: self._image(side_of(self.config))}
                yield {key: self.tokens(*shape, TOKENS)} | own | more
            yield {key: self.tokens(*shape, TOKENS), "bbox": boxes.float() / 30} | more
        if "visual_feats" in self.takes:
            width = find(self.config, "visual_feat_dim", 32)
            yield {key: self.tokens(TOKENS), "visual_feats": self.random(6, width), "visual_pos": self.random(6, 4)}

    def _image(self, side: int, *many: int) -> Tensor:
        return self.random(*many, find(self.config, "num_channels", 3), side, side)

    def _pictures(self) -> Iterator[dict[str, Any]]:
        sides = dict.fromkeys((side_of(self.config), IMAGE, 64, 224))
        packed = next((k for k in ("image_grid_thw", "grid_thw") if k in self.takes), None)
        key = next((k for k in ("pixel_values", "pixel_values_videos", self.main) if k in self.takes), "pixel_values")
        if packed or key == "hidden_states":
            yield from self._packed(key if key in self.takes else "hidden_states", packed)
        if self.main not in ("pixel_values", "pixel_values_videos") and not key.startswith("pixel"):
            return
        more: dict[str, Any] = {"task_inputs": self.tokens(TOKENS)} if "task_inputs" in self.takes else {}
        if "bool_masked_pos" in self.takes and self.name.endswith(("ForPreTraining", "MaskedImageModeling")):
            more["bool_masked_pos"] = (torch.arange(self._patches()) % 2).bool().repeat(B, 1)
        for side in sides:
            yield {key: self._image(side)} | more
            yield {key: self._image(side, find(self.config, "num_frames", FRAMES))} | more
            sizes = torch.tensor([[side, side]] * B)
            yield {key: self._image(side), "image_sizes": sizes}
            yield {key: self._image(side, 2), "image_sizes": sizes}
            yield {key: self._image(side, 1), "image_sizes": sizes}
        patch = find(self.config, "patch_size", 8)
        yield {
            key: self.random(16, 3 * patch * patch if isinstance(patch, int) else 192),
            "pixel_attention_mask": torch.ones(B, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * B),
        }

    def _patches(self) -> int:
        one = side_of(self.config) // find(self.config, "patch_size", 8)
        return int(one**2 * (find(self.config, "num_frames", 1) // find(self.config, "tubelet_size", 1)))

    def _packed(self, key: str, grid: str | None) -> Iterator[dict[str, Any]]:
        """The images' patches one after the other: the samples are no axis."""
        patch = find(self.config, "patch_size", 8)
        channels = find(self.config, "in_channels", None) or find(self.config, "in_chans", 3)
        width = channels * find(self.config, "temporal_patch_size", 1) * patch * patch
        for flat in (width, 3 * patch * patch):
            yield {
                key: self.random(16, flat).flatten(0, 1),
                grid or "grid_thw": torch.tensor([[1, 4, 4]] * B),
            }

    def _sounds(self) -> Iterator[dict[str, Any]]:
        if "input_values" in self.takes:
            spectrum = (find(self.config, "max_length", 64), find(self.config, "num_mel_bins", 16))
            waves: list[tuple[int, ...]] = [(2000,), (8000,), (1, 2000), (1, 8000), spectrum]
            for shape in waves:
                yield {"input_values": self.random(*shape)}
        if "input_features" in self.takes:
            mels = find(self.config, "num_mel_bins", None) or find(self.config, "feature_projection_input_dim", 80)
            mask = next((k for k in ("input_features_mask", "feature_attention_mask") if k in self.takes), None)
            for length in (2 * find(self.config, "max_source_positions", 32), 64, 3000):
                spectra = [shape for m in (mels, 80, 128) for shape in ((m, length), (length, m))]
                for shape in (*spectra, (1, length, mels)):
                    more = {mask: torch.ones(B, length, dtype=torch.long)} if mask else {}
                    yield {"input_features": self.random(*shape)} | more
                    yield {"input_features": self.random(*shape)}

    def _series(self) -> Iterator[dict[str, Any]]:
        if "past_values" not in self.takes:
            return
        length = find(self.config, "context_length", 32)
        channels = find(self.config, "num_input_channels", 1)
        yield {"past_values": self.random(length, channels)}
        yield {"past_values": self.random(length)}
        lags = max(find(self.config, "lags_sequence", [0]))
        features = find(self.config, "num_time_features", 0)
        future = find(self.config, "prediction_length", None) or 4
        yield {
            "past_values": self.random(length + lags),
            "past_time_features": self.random(length + lags, features),
            "past_observed_mask": torch.ones(B, length + lags),
            "future_values": self.random(future),
            "future_time_features": self.random(future, features),
        }


def run(model: nn.Module, batch: dict[str, Any], config: Any) -> Any:
    """One forward pass; as many words as there are features of images or sounds become their marks.

    Args:
        model: The model.
        batch: The batch; words are added where the model says how many marks it wants.
        config: The model's configuration.

    Returns:
        What the model returns.
    """
    for divisor in (B, B * find(config, "hidden_size", 1), 0):
        try:
            return model(**batch)
        except ValueError as error:
            wanted = re.search(r"features\D*(\d+)\D*$", str(error))
            sound = "audio" in str(error).lower()
            ids = [getattr(config, n, None) for n in _MARKS if ("audio" in n) == sound]
            marks = [i for i in ids if isinstance(i, int)]
            if wanted is None or "input_ids" not in batch or not marks or not divisor:
                raise
            words, many = batch["input_ids"], int(wanted[1]) // divisor
            parts = (words[:, :1], words.new_full((B, many), marks[0]), words[:, 1 - TOKENS :])
            batch["input_ids"] = torch.cat(parts, 1)
            if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
                batch["mm_token_type_ids"] = (batch["input_ids"] == marks[0]).long()
    raise AssertionError("the last try returns or raises")
