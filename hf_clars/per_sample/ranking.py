"""`rank_samples`: every sample's loss and gradient norm in one pass over a data set."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_clars.errors import DataError
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.hooks import others_paused
from hf_clars.grad_norms.pytree import map_tensors
from hf_clars.grad_norms.undisturbed import undisturbed
from hf_clars.layers import LayerMode, ParamLayer
from hf_clars.per_sample.indexing import INDEX_COLUMN, checked_length, named_columns, takes, without_column
from hf_clars.per_sample.losses import LossesOf, sample_losses
from hf_clars.per_sample.ranking_head import ranking_head
from hf_clars.per_sample.setup import partition_of
from hf_clars.records.files import write_complete

if TYPE_CHECKING:
    from datasets import Dataset

HEAD = "ranking.json"
ROWS_A_FILE = 4096
SECONDS_A_FILE = 60  # what a call that is killed has lost


def rank_samples(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 32,
    losses: LossesOf = sample_losses,
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    indices: Sequence[int] | None = None,
    layers: LayerMode | Sequence[ParamLayer] = "module",
    per_layer: bool = False,
    output: str | Path | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> Dataset:
    """Loss and gradient norm of each sample, in evaluation mode: the hardest examples have the largest norms.

    A sample's norm is that of its own loss's gradient, whatever it is batched with. The model's gradients, training
    mode and weights are as before afterwards, also in the middle of a training step.

    Args:
        model: The model, on the device to use.
        dataset: Any map-style data set; its items are what `collate` takes. A column that `with_index` has added is
            left out of them, unless the model's forward names it.
        batch_size: Samples a pass. Default 32.
        losses: Function of model and batch that returns each sample's loss, [B]. Default: cross-entropy of `logits`
            and `labels`, by token for language models, checked against the model's own loss.
        collate: Makes a batch (a mapping of tensors) of a list of items. Default: transformers' default collator,
            which takes mappings, of the columns that the model's forward names (all, if it takes `**kwargs`).
        indices: Rank only these. Default: all.
        layers: What the norm of a layer is taken over, see `hf_clars.param_layers`.
        per_layer: Also a column for each layer, `norm/<layer>`. Default False.
        output: Folder for parquet files, written once a minute. A call that was stopped goes on where it was, if all
            that its numbers depend on is as before. Default: in memory.
        num_workers: Processes that load samples. Default 0.
        progress: Show a bar. Default True.

    Returns:
        A `datasets.Dataset` with the columns `index` (int64), `loss` and `norm` (float64), in the order of the indices.

    Raises:
        DataError: For a data set without a length, indices outside of it, items that make no batch or do not fit the
            model, a model without trainable parameters, or an `output` that holds another ranking.
        UnknownLossError: If each sample's loss cannot be told from what the model returns.
        HfClarsError: As `PerSampleGradNorms` raises, for a model that it cannot measure.
    """
    from datasets import Dataset, concatenate_datasets

    if not isinstance(model, nn.Module):
        raise DataError(f"The model is a {type(model).__name__}, and no torch module.")
    length = checked_length(dataset)
    wanted = _wanted(length, indices)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size={batch_size!r}: give a positive number of samples.")
    partition = partition_of(model, layers)
    if not partition:
        raise DataError(f"{type(model).__name__} has no trainable parameter whose gradients could be ranked by.")
    columns = [f"norm/{layer.name}" for layer in partition] if per_layer else []
    told = functools.partial(ranking_head, per_layer=per_layer, functions=(losses, collate))
    store = _Store(output, {} if output is None else told(model, dataset, wanted, partition))
    todo = wanted[store.rows :]
    loader = DataLoader(
        _Chosen(dataset, todo),
        batch_size=batch_size,
        collate_fn=_Collate(collate, model),
        num_workers=num_workers,
        generator=torch.Generator(),  # else it draws from the one that training draws from
    )
    bar = tqdm(total=len(wanted), initial=store.rows, unit="sample", desc="Ranking", disable=not progress)
    measuring = functools.partial(PerSampleGradNorms, model, layers=partition, loss_reduction="sum")
    with torch.inference_mode(False), bar, _evaluated(model), measuring() as norms:
        try:
            for index, batch in loader:
                store.add(_measured(model, norms, losses, index, batch, per_layer))
                bar.update(len(index))
        finally:
            store.flush()
    nothing = {"index": np.empty(0, np.int64)} | {name: np.empty(0) for name in ("loss", "norm", *columns)}
    return concatenate_datasets([Dataset(table) for table in store.tables() or [pa.table(nothing)]])


def _wanted(length: int, indices: Any) -> list[int]:
    """The indices to rank; whole numbers, and no mask, whose True and False would be taken for 1 and 0."""
    given = range(length) if indices is None else indices.tolist() if hasattr(indices, "tolist") else indices
    found: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if any(np.ndim(i) or np.asarray(i).dtype.kind not in "iu" for i in found):
        raise DataError("indices must be whole numbers, one for each sample to rank.")
    wanted = [int(i) for i in found]
    if any(not 0 <= i < length for i in wanted):
        raise DataError(f"indices must be between 0 and {length - 1}, the data set's last.")
    return wanted


def _measured(
    model: nn.Module,
    norms: PerSampleGradNorms,
    losses: LossesOf,
    index: Tensor,
    batch: Mapping[str, Any],
    per_layer: bool,
) -> dict[str, np.ndarray]:
    """The columns of one batch."""
    device = next(model.parameters()).device
    moved = map_tensors(lambda t: t.to(device), batch)
    with torch.enable_grad():
        found = losses(model, moved)
        if found.shape != (len(index),):
            raise DataError(f"losses= returned {tuple(found.shape)} for {len(index)} samples: return one loss each.")
        found.sum().backward()
    of_layers = norms.per_sample
    norms.reset()
    for param in filter(lambda p: p.requires_grad, model.parameters()):
        param.grad = None
    if not of_layers:
        raise DataError("The losses have no gradient: compute them from the model's output, with its graph.")
    stacked = torch.stack(list(of_layers.values())).double().cpu()
    columns = {"index": index.numpy(), "loss": found.detach().double().cpu().numpy()}
    columns["norm"] = stacked.square().sum(0).sqrt().numpy()
    if per_layer:
        columns |= {f"norm/{name}": row.numpy() for name, row in zip(of_layers, stacked, strict=True)}
    return columns


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with room for gradients; afterwards everything is as it was."""
    modes = {module: module.training for module in model.modules()}
    with undisturbed(model, runs_again=False), others_paused(model):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


class _Chosen(torch.utils.data.Dataset[Any]):
    """Some items of a data set, each with its index."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        index = self.indices[place]
        return index, self.dataset[index]


class _Collate:
    """Keeps the indices apart from what the user's collator sees."""

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]] | None, model: nn.Module) -> None:
        self._collate, self._index_wanted = collate, takes(model, INDEX_COLUMN)
        self._known = None if collate is not None else named_columns(model)

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[Tensor, Mapping[str, Any]]:
        index = torch.tensor([number for number, _ in items])
        bare = [item if self._index_wanted else without_column(item, INDEX_COLUMN) for _, item in items]
        return index, self._default(index, bare) if self._collate is None else self._collate(bare)

    def _default(self, index: Tensor, items: list[Any]) -> Mapping[str, Any]:
        if not isinstance(items[0], Mapping):
            raise DataError(
                f"Item {int(index[0])} of the data set is a {type(items[0]).__name__}, and no mapping: give collate=, "
                "a function that makes a batch (a mapping of tensors) of a list of items."
            )
        from transformers import default_data_collator

        known = self._known
        kept = [{name: x for name, x in item.items() if known is None or name in known} for item in items]
        try:
            return default_data_collator(kept)
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(
                f"Items {int(index[0])} to {int(index[-1])} of the data set make no batch ({error}): they differ in "
                "shape or in their columns. Give collate=, as transformers' DataCollatorWithPadding(tokenizer) or "
                "DataCollatorForSeq2Seq(tokenizer), which pads labels too."
            ) from error


class _Store:
    """Rows in memory, and as parquet files in a folder, each complete or absent."""

    def __init__(self, folder: str | Path | None, head: dict[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._waiting: list[dict[str, np.ndarray]] = []
        self._tables: list[pa.Table] = []
        self._written = time.monotonic()
        if self._folder is not None:
            self._open(self._folder, head)
        self.rows = sum(len(table) for table in self._tables)

    def _open(self, folder: Path, head: dict[str, Any]) -> None:
        place = folder / HEAD
        if place.exists():
            try:
                before = json.loads(place.read_text(encoding="utf-8"))
                self._tables = [parquet.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
            except (OSError, ValueError, pa.ArrowException) as error:
                raise DataError(f"The ranking in {folder} cannot be read ({error}): delete that folder.") from error
            other = sorted(name for name in head if before.get(name) != head[name])
            if other:
                raise DataError(
                    f"{folder} holds a ranking with other {', '.join(other)}: give another output=, or delete it."
                )
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"The folder {folder} cannot be made: {error}. Choose another output=.") from error

        def write(temporary: Path) -> None:
            temporary.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")

        write_complete(place, write)

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Add a batch's rows."""
        self._waiting.append(columns)
        rows, seconds = sum(len(part["index"]) for part in self._waiting), time.monotonic() - self._written
        if rows >= ROWS_A_FILE or (self._folder is not None and seconds >= SECONDS_A_FILE):
            self.flush()

    def flush(self) -> None:
        """Make a table, and a file, of what waits."""
        if not self._waiting:
            return
        joined = {name: np.concatenate([part[name] for part in self._waiting]) for name in self._waiting[0]}
        table = pa.table(joined)
        if self._folder is not None:
            path = self._folder / f"part-{len(self._tables) + 1:05d}.parquet"
            write_complete(path, lambda temporary: parquet.write_table(table, temporary))
        self._tables.append(table)
        self._waiting.clear()
        self._written = time.monotonic()

    def tables(self) -> list[pa.Table]:
        """All rows."""
        return self._tables
