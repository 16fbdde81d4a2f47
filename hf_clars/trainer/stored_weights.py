"""A checkpoint's weights, as `from_pretrained` would make them of its files, and put into the model that trains.

transformers saves many models (ViT, DeiT, BEiT, DINOv2, Swin ...) under the names that their first releases had, and
translates when `from_pretrained` reads. Its Trainer does not: it fills what happens to have the same name, and warns.
No public call translates for a model that exists already. So this file, and no other, uses the three names that
`from_pretrained` itself is made of; `tests/test_resume_every_family.py` fails when they change. A Trainer that resumes
such models exactly would end it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from hf_clars.records import RecordError
from hf_clars.records.differences import described_file, named_differences, tensor_differences, wanted_tensors

ADAPTER = "adapter_model.safetensors"


def holds_whole_model(folder: Path) -> bool:
    """Whether a checkpoint's weights are safetensors files of a whole model, which this file loads."""
    return bool(weight_files(folder))


def differences(folder: Path, model: nn.Module) -> list[str]:
    """What a model and a checkpoint's weights do not have in common; no value is read.

    Args:
        folder: The checkpoint.
        model: To be filled.

    Returns:
        One entry a difference; empty when the checkpoint fills the model, also if by the model's own loading or by
        adapters. Weights that are stored in a way that Trainer checks itself have none.

    Raises:
        RecordError: A file is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= described_file(path)
    if not found:
        return _adapter_differences(folder, model)
    first = tensor_differences(found, model)
    if not first:
        return []
    try:
        twin = _on_meta(model)
    except Exception:  # what a user's model raises when it is copied is not known
        return first
    renamed = in_own_names(found, twin)
    return _differences_after_loading(renamed, _on_meta(model), model)


def _differences_after_loading(tensors: Mapping[str, Tensor], twin: nn.Module, model: nn.Module) -> list[str]:
    """What is different still, after the model's own loading has made room for its buffers, or renamed them."""
    rest = tensor_differences(tensors, model)
    if not rest:
        return rest
    try:
        result: Any = twin.load_state_dict(dict(tensors), False)  # positional, as Trainer calls it
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError):
        return rest
    wanted = wanted_tensors(tensors, model)
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        # A method of the model's own may fill buffers in ways that torch does not see.
        wanted = {name: p for name, p in model.named_parameters() if name in wanted}
    missing = [] if result is None else [name for name in result.missing_keys if name in wanted]
    unknown = [] if result is None else [name for name in result.unexpected_keys if name in tensors]
    retyped = [name for name in wanted if name in tensors and tensors[name].dtype != wanted[name].dtype]
    return [
        *(f"{name!r} is only in the model" for name in missing),
        *(f"{name!r} is only in the checkpoint" for name in unknown),
        *(
            f"{name!r} is {tensors[name].dtype} in the checkpoint, {wanted[name].dtype} in the model"
            for name in retyped
        ),
    ]


def load(folder: Path, model: nn.Module) -> Any:
    """Fill a model from a checkpoint that `holds_whole_model`.

    Args:
        folder: The checkpoint.
        model: Filled in place: its parameters stay the ones that they are.

    Returns:
        What the model's `load_state_dict` returned.

    Raises:
        RecordError: A file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= _read(path)
    if tensor_differences(tensors, model) and isinstance(model, PreTrainedModel):
        tensors = in_own_names(tensors, _on_meta(model))
    return model.load_state_dict(tensors, False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{path} is not a readable safetensors file ({error}): it is damaged.") from error


def in_own_names(tensors: Mapping[str, Tensor], twin: nn.Module) -> dict[str, Tensor]:
    """Tensors under the names, and in the parts, that a model's own state dict has.

    Args:
        tensors: As a file has them; on the meta device, if they only are to be compared.
        twin: The model on the meta device; it is filled, and so spent.

    Returns:
        Tensors by the model's names, of the types that they had; those that it does not know as they are.
    """
    if not isinstance(twin, PreTrainedModel):
        return dict(tensors)
    device = next((tensor.device.type for tensor in tensors.values()), "cpu")
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype_plan={"*": None},  # for every name: leave the type as it is
        weight_mapping=get_model_conversion_mapping(twin),
    )
    info, _ = convert_and_load_state_dict_in_model(model=twin, state_dict=dict(tensors), load_config=config)
    unfit = {name: torch.empty(shape, device="meta") for name, shape, _ in info.mismatched_keys}
    loaded = {name: t for name, t in twin.state_dict().items() if name not in info.missing_keys}
    unknown = {name: tensors.get(name, torch.empty(0, device="meta")) for name in info.unexpected_keys}
    return loaded | unfit | unknown


def _on_meta(model: nn.Module) -> Any:
    """A copy of a model without values, and so without memory."""
    places: dict[int, Any] = {}
    for p in model.parameters():
        places[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        places[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, places)


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files; none where it is stored in another way, which Trainer then checks itself."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RecordError(f"{index} is damaged ({error!r}).") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise RecordError(f"{index} names {outside[0]!r}, which is no file of this checkpoint: it was tampered with.")
    return [folder / name for name in sorted(names)]


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapter_of(model: nn.Module) -> str | None:
    """The name of the adapter that is trained, for a model of PEFT's or one that transformers put adapters on."""
    names = getattr(model, "active_adapters", None)
    if not hasattr(model, "peft_config") or names is None:
        return None
    try:
        listed = names() if callable(names) else names
    except ValueError:  # transformers' word for "no adapter was added"
        return None
    return str(listed[0]) if listed else None


def _adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter's weights under the names that a checkpoint has them."""
    from peft import get_peft_model_state_dict  # an extra: whoever has adapters has it

    prefix = "base_model.model." if isinstance(model, PreTrainedModel) else ""
    return {prefix + name: t for name, t in get_peft_model_state_dict(model, adapter_name=adapter).items()}


def _adapter_differences(folder: Path, model: nn.Module) -> list[str]:
    path, adapter = folder / ADAPTER, adapter_of(model)
    if not path.exists():
        return []
    found = described_file(path)
    if adapter is None:
        return ["it holds an adapter's weights only, and the model has no adapter"]
    return named_differences(found, _adapter_tensors(model, adapter))


def holds_adapter_for(folder: Path, model: nn.Module) -> bool:
    """Whether a checkpoint is of adapters that transformers itself put on the model, which its Trainer cannot load."""
    return isinstance(model, PreTrainedModel) and adapter_of(model) is not None and (folder / ADAPTER).exists()


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Fill the adapter of a model that `holds_adapter_for`.

    Args:
        folder: The checkpoint.
        model: Filled in place.

    Raises:
        RecordError: The file is damaged.
    """
    from peft import set_peft_model_state_dict

    tensors = {name.removeprefix("base_model.model."): t for name, t in _read(folder / ADAPTER).items()}
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_of(model) or "default")
