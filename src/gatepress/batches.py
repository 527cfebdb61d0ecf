"""From rows of text to batches: tokenise once, group rows of similar length, pad each batch to its longest.

Order depends on seed and epoch alone, so a run that was stopped can continue at any batch of any epoch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from gatepress.errors import ModelError, UsageError
from gatepress.processes import ALONE, Processes
from gatepress.runners import INPUTS

PROBE_ROWS = 32
_LABELS = {int: pa.int64(), float: pa.float32(), list: pa.list_(pa.float32())}  # ids, numbers, or 1 and 0 by class
_CHUNK_ROWS = 4096  # rows tokenised at a time: limits the memory that Python lists take
_GROUP_BATCHES = 50  # batches whose rows are sorted together: little padding, still well shuffled

Row = dict[str, npt.NDArray[np.generic]]
Batch = dict[str, torch.Tensor]


def fitting(asked: int, most: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the length to truncate texts to: `asked`, or what the model (None: not known) or tokenizer takes."""
    return min(asked, most or asked, int(tokenizer.model_max_length))


def tokenize(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Return `input_ids`, `attention_mask`, `token_type_ids` (if the tokenizer has them), `label` and `query`.

    Texts are truncated to `max_length` tokens, of a pair the longer text first; nothing is padded yet. Rows with the
    same first text have the same number as `query`. Raises `UsageError` if special tokens alone take as many: then
    tokenizers do not truncate at all.
    """
    pairs = "text_pair" in rows.column_names
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= special:
        raise UsageError(
            f"--max-length is {max_length}, of which {special} are special tokens; expected {special + 1} or more"
        )
    tables: list[pa.Table] = []
    numbers: dict[str, int] = {}
    for chunk in rows.iter(batch_size=_CHUNK_ROWS):
        texts = (chunk["text"], chunk["text_pair"]) if pairs else (chunk["text"],)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
        columns = {name: pa.array(encoded[name], pa.list_(pa.int32())) for name in INPUTS if name in encoded}
        queries = [numbers.setdefault(text, len(numbers)) for text in chunk["text"]]
        columns["query"] = pa.array(queries, pa.int64())
        tables.append(pa.table({**columns, "label": pa.array(chunk["label"], _LABELS[type(chunk["label"][0])])}))
    return datasets.Dataset(pa.concat_tables(tables))


class GroupedBatches(Sampler[list[int]]):
    """Lists of row numbers, one list per batch; the rows of a batch have similar lengths.

    With `shuffle`, rows are drawn at random, sorted by length within groups of 50 batches, and the
    batches shuffled; without it, all rows are sorted, longest first. Only the last batch may be short.
    If there are several processes, each gets its share of every batch; one whose share is empty still gets a row.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.processes = processes
        self.epoch = self.first = 0

    def skip_to(self, epoch: int, batch: int = 0) -> None:
        """Make the next pass `epoch`, starting from batch `batch`."""
        self.epoch, self.first = epoch, batch

    def share(self, batch: int) -> float:
        """Return the fraction of a batch's rows that belongs to this process."""
        whole = min(self.batch_size, len(self.lengths) - batch * self.batch_size)
        return self.processes.rows(whole) / whole

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Return all batches of an epoch: a function of seed and epoch."""
        size = self.batch_size
        if not self.shuffle:
            rows = np.argsort(-self.lengths, kind="stable")
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        random = np.random.default_rng([self.seed, epoch])
        rows = random.permutation(len(self.lengths))
        for i in range(0, len(rows), size * _GROUP_BATCHES):
            group = rows[i : i + size * _GROUP_BATCHES]
            rows[i : i + size * _GROUP_BATCHES] = group[np.argsort(-self.lengths[group], kind="stable")]
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        whole = len(batches) - (len(batches[-1]) < size)  # a short batch stays last
        return [*(batches[i] for i in random.permutation(whole)), *batches[whole:]]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this epoch, from where `skip_to` said."""
        for rows in self.batches(self.epoch)[self.first :]:
            own = rows[self.processes.index :: self.processes.count]
            yield (own if len(own) else rows[:1]).tolist()

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return math.ceil(len(self.lengths) / self.batch_size)


class TokenRows(Dataset[Row]):
    """Tokenised rows as flat arrays: a row costs a slice, not a walk through Arrow."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        table = dataset.with_format("arrow")[:]
        self._flat: dict[str, npt.NDArray[np.generic]] = {}
        for name in INPUTS:
            if name in table.column_names:
                column = table.column(name).combine_chunks()
                self._flat[name] = column.flatten().to_numpy(zero_copy_only=False)
                ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
        self._bounds = np.concatenate([np.zeros(1, np.int64), ends])
        labels = table.column("label").combine_chunks()
        sets = pa.types.is_list(labels.type)  # as many numbers for each row
        self._labels = labels.flatten().to_numpy().reshape(len(labels), -1) if sets else labels.to_numpy()
        self.queries = table.column("query").to_numpy()  # query of each row, a number below that of rows

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row."""
        return np.diff(self._bounds)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._labels)

    def __getitem__(self, index: int) -> Row:
        """Return the arrays of one row, and its label under `labels`."""
        part = slice(self._bounds[index], self._bounds[index + 1])
        return {**{k: flat[part] for k, flat in self._flat.items()}, "labels": self._labels[index]}


class PadToLongest:
    """Stack rows into one batch of int64 tensors `[batch, longest]`, padded on the right.

    The longest length of the batch is rounded up to `multiple_of`, but not above `most`, which the model still takes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int, most: int) -> None:
        if tokenizer.pad_token_id is None:
            raise ModelError("the tokenizer has no padding token, so rows cannot share a batch; set its pad_token")
        self._padding = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
        }
        self._multiple_of = multiple_of
        self._most = most

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the batch, with `labels` as int64 ids [batch], float32 numbers [batch] or sets [batch, classes]."""
        longest = max(len(row["input_ids"]) for row in rows)
        width = min(self._most, math.ceil(longest / self._multiple_of) * self._multiple_of)
        batch: Batch = {}
        for name in rows[0]:
            if name == "labels":
                batch[name] = torch.as_tensor(np.stack([row[name] for row in rows]))
                continue
            padded = np.full((len(rows), width), self._padding[name], dtype=np.int64)
            for i, row in enumerate(rows):
                padded[i, : len(row[name])] = row[name]
            batch[name] = torch.from_numpy(padded)
        return batch


def make_loader(  # noqa: PLR0913 - each is a dial of the batches
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    pad_to_multiple_of: int = 1,
    processes: Processes = ALONE,
) -> DataLoader[Any]:
    """Return a loader of padded batches over tokenised rows; its `batch_sampler` is a `GroupedBatches`.

    `loader.batch_sampler.skip_to(epoch, batch)` chooses the order and where it begins.
    """
    rows = TokenRows(dataset)
    batches = GroupedBatches(rows.lengths, batch_size, shuffle=shuffle, seed=seed, processes=processes)
    collate = PadToLongest(tokenizer, pad_to_multiple_of, most=int(rows.lengths.max()))
    return DataLoader(rows, batch_sampler=batches, collate_fn=collate)


def rows_in_order(loader: DataLoader[Any]) -> npt.NDArray[np.int64]:
    """Return the number of each row that an unshuffled loader of `make_loader` yields, in its order."""
    return np.concatenate(cast("GroupedBatches", loader.batch_sampler).batches(0))


def queries_of(loader: DataLoader[Any]) -> npt.NDArray[np.int64]:
    """Return the query of each row of a loader of `make_loader`, in the order of the rows."""
    queries: npt.NDArray[np.int64] = cast("TokenRows", loader.dataset).queries
    return queries


def left_of_epoch(loader: DataLoader[Any], epoch: int, done: int) -> Iterator[Batch]:
    """Yield the batches of an epoch after the first `done`; `loader` comes from `make_loader`."""
    cast("GroupedBatches", loader.batch_sampler).skip_to(epoch, done)
    yield from loader


def probe_batch(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Return the first tokenised rows as one padded batch: every form of a model must agree on it."""
    few = dataset.select(range(min(PROBE_ROWS, len(dataset))))
    batch: Batch = next(iter(make_loader(few, tokenizer, PROBE_ROWS, shuffle=False, seed=0)))
    return {name: value for name, value in batch.items() if name != "labels"}
