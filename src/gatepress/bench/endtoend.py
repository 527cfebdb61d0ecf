"""How long whole models take, compared with each other: the paper's figure 3(b) (arXiv 2412.12951).

All targets answer the same inputs in turns. Either a grid of batch sizes and lengths is filled
with tokens or, with `data`, one call is a whole pass over a task's validation rows. Times run from
inputs that are already on the device to the result.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gatepress.batches import fitting, make_loader, tokenize
from gatepress.bench import timing
from gatepress.bench.record import Record, latencies, now, relative_to
from gatepress.config import DEFAULT_RUNTIME, Arithmetic, DataSettings, Runtime, check_timing, refuse, refuse_single
from gatepress.errors import GatepressError, ModelError, UsageError, reason_of
from gatepress.machine import device_name
from gatepress.models import open_tokenizer
from gatepress.progress import NoProgress, Progress
from gatepress.runners import INPUTS, Runner
from gatepress.runtime import open_runner, torch_device
from gatepress.tasks.sources import Rows, load_rows
from gatepress.versions import versions

REPETITIONS = 20  # timed calls of a batch
EPOCH_REPETITIONS = 10  # timed passes over the validation rows, as in the paper
WARMUP = 3
EPOCH_WARMUP = 1
SEQ_LENS = (32, 128)  # tokens
BLOCK = 5  # batches in a row
SETTLE_MS = 20.0  # untimed batches before them, see timing.py
# Any ids will do: the time of a model does not depend on them. These are in every vocabulary, and none
# of them is padding.
TOKEN_IDS = (5, 30)

Batch = dict[str, NDArray[np.int64]]  # input_ids, attention_mask, ... each [batch, length]
Tokenizers = dict[Path | None, PreTrainedTokenizerBase]  # by the directory that holds them


Targets = Sequence[str | Path] | Mapping[str, str | Path]  # with or without the names that tables give them


def _as_read(rows: Rows, runners: Collection[Runner]) -> Rows:
    """Return the rows as these models read them (embedders one text at a time); `ModelError` if they disagree."""
    embedders = [one.name for one in runners if one.embeds]
    if not embedders:
        return rows
    if len(embedders) < len(runners):
        raise ModelError(
            f"{', '.join(embedders)}: read texts one at a time, the others as pairs, so one pass is not as much as "
            "another; leave out the rows, or time models of one kind"
        )
    return replace(rows, validation={name: _one_by_one(split) for name, split in rows.validation.items()})


def _one_by_one(split: datasets.Dataset) -> datasets.Dataset:
    """Return all texts of a split as rows of their own; what their labels are does not matter to time."""
    texts = [text for key in ("text", "text_pair") if key in split.column_names for text in split[key]]
    return datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)})


@dataclass(frozen=True)
class _Cell:
    """One comparison: what all targets are given, and how the records describe it."""

    batch_size: int
    seq_len: int | None
    batches: Callable[[Runner], list[Batch]]
    facts: dict[str, Any]

    def __str__(self) -> str:
        """Return the cell as the progress line and errors name it."""
        if self.seq_len is None:
            return f"{self.facts['task']}, batch {self.batch_size}"
        return f"batch {self.batch_size} x length {self.seq_len}"


@dataclass(frozen=True)
class _Timed:
    """One target in one cell."""

    runner: Runner
    call: Callable[[], None]
    macs: int | None  # of one call


def run(  # noqa: PLR0913 - every knob of a measurement is named
    targets: Targets,
    *,
    device: str = "cpu",
    batch_sizes: Sequence[int] = (1, 8),
    seq_lens: Sequence[int] = SEQ_LENS,
    repetitions: int | None = None,
    warmup: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    data: DataSettings | None = None,
    max_length: int = 128,
    precisions: Sequence[Arithmetic] = ("fp32",),
    runtimes: Sequence[Runtime] = (DEFAULT_RUNTIME,),
    trust_remote_code: bool = False,
    seed: int = 0,
) -> list[Record]:
    """Time every target (whatever `open_runner` opens) in each cell; the first one is the baseline.

    Without `data`, the cells are `batch_sizes` x `seq_lens`, full rows without padding. With it, they
    are `batch_sizes`, each a pass over the validation rows, sorted by length, truncated to `max_length`
    tokens (or what the shortest of the targets takes) and padded to the longest of a batch.
    ONNX files are timed once in each of `runtimes`. Torch models, and float32 files in OpenVINO, are timed once in
    each of `precisions`, other files in what they were exported in.
    `None` for repetitions and warm-up: 20 and 3 batches, or 10 and 1 passes; for threads: torch's
    own number, for every runtime.
    Raises `UsageError`, `DeviceError`, and `ModelError` if a target cannot run a cell.
    """
    refuse_single(targets=targets, batch_sizes=batch_sizes, seq_lens=seq_lens)
    refuse([] if targets else ["nothing to time: give a directory, an .onnx file or a model"])
    place = check(
        device=device,
        batch_sizes=batch_sizes,
        seq_lens=seq_lens,
        repetitions=repetitions,
        warmup=warmup,
        threads=threads,
        max_length=max_length,
        seed=seed,
    )
    rows = None if data is None else load_rows(data.absolute(), splits="validation")
    records: list[Record] = []
    with timing.undisturbed(threads) as active:
        opening = partial(open_runner, device=str(place), trust_remote_code=trust_remote_code)
        runners = _open(targets, runtimes, precisions, opening)
        if rows is None:
            cells = _grid(batch_sizes, seq_lens, seed)
        else:
            rows = _as_read(rows, runners.values())
            tokenizers = _tokenizers(runners.values(), trust_remote_code=trust_remote_code)
            cut = min(fitting(max_length, one.max_tokens, tokenizers[one.tokenizer_dir]) for one in runners.values())
            cells = _passes(batch_sizes, rows, cut, tokenizers)
        for cell in cells:
            timed = {name: _timed(name, runner, cell) for name, runner in runners.items()}
            rounds = repetitions or (REPETITIONS if data is None else EPOCH_REPETITIONS)
            untimed = warmup if warmup is not None else (WARMUP if data is None else EPOCH_WARMUP)
            samples = timing.interleave(
                {name: one.call for name, one in timed.items()},
                timing.wall_clock,
                repetitions=rounds,
                warmup=untimed,
                block=BLOCK if data is None else 1,
                settle_ms=SETTLE_MS,
                progress=progress or NoProgress(),
                description=str(cell),
            )
            batch = [
                Record(
                    what="endtoend",
                    name=name,
                    kind=one.runner.kind,
                    runtime=one.runner.runtime,
                    device=place.type,
                    device_name=device_name(place),
                    threads=active if place.type == "cpu" else None,
                    dtype=one.runner.dtype,
                    batch_size=cell.batch_size,
                    seq_len=cell.seq_len,
                    warmup=untimed,
                    macs=one.macs,
                    size_bytes=one.runner.size_bytes,
                    parameters=one.runner.parameters,
                    versions=versions("torch", "transformers", *dict.fromkeys([DEFAULT_RUNTIME, *runtimes])),
                    timestamp=now(),
                    **cell.facts,
                    **latencies(samples[name]),
                )
                for name, one in timed.items()
            ]
            records += [relative_to(record, batch[0]) for record in batch]
    return records


def check(*, device: str = "cpu", **asked: Any) -> torch.device:
    """Raise what `run` raises on wrong arguments, before anything is opened; return the device to compute on."""
    check_timing(**asked)
    return torch.device(torch_device(device))


def _open(
    targets: Targets, runtimes: Sequence[Runtime], precisions: Sequence[Arithmetic], opening: Callable[..., Runner]
) -> dict[str, Runner]:
    """Open all targets at once (they take turns later), under their names or others that tell them apart."""
    pairs = list(targets.items()) if isinstance(targets, Mapping) else [(None, target) for target in targets]
    opened: list[tuple[str | None, str | Path, dict[Runtime, Runner]]] = []
    for given, target in pairs:
        first = opening(target, precision=precisions[0], runtime=runtimes[0])
        others = runtimes[1:] if first.kind == "onnx" else ()
        more = {runtime: opening(target, precision=precisions[0], runtime=runtime) for runtime in others}
        opened.append((given, target, {runtimes[0]: first, **more}))
    every = [runner for *_, forms in opened for runner in forms.values()]
    if set(runtimes) != {DEFAULT_RUNTIME} and all(runner.kind != "onnx" for runner in every):
        raise UsageError("--runtime chooses what computes ONNX files; name a directory that gatepress export wrote")
    if set(precisions) != {"fp32"} and not any(runner.takes_precision for runner in every):
        raise UsageError("--precision means nothing to ONNX files, which compute in what they were exported in")
    shared = Counter(forms[runtimes[0]].name for *_, forms in opened)
    runners: dict[str, Runner] = {}
    for given, target, forms in opened:
        own = forms[runtimes[0]].name
        base = given or (own if shared[own] == 1 else str(target))
        for runtime, form in forms.items():
            asked = precisions if form.takes_precision else precisions[:1]
            for precision in asked:
                what: list[str] = [runtime] if len(forms) > 1 and runtime != DEFAULT_RUNTIME else []
                what += [precision] if len(asked) > 1 and precision != "fp32" else []
                again = precision != precisions[0]
                runner = opening(target, precision=precision, runtime=runtime) if again else form
                runners[_free(" ".join([base, *what]), runners)] = runner
    return runners


def _free(name: str, taken: Mapping[str, Runner]) -> str:
    """Return the name, numbered if it is taken: the same target twice shows how much of a difference is noise."""
    numbered = (f"{name} ({again})" for again in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)


def refuse_longer(name: str, max_tokens: int | None, seq_len: int) -> None:
    """Raise `ModelError` on rows longer than a model takes: on a GPU they would not just fail."""
    if max_tokens and seq_len > max_tokens:
        raise ModelError(f"{name}: takes at most {max_tokens} tokens, the asked sequence length is {seq_len}")


def _timed(name: str, runner: Runner, cell: _Cell) -> _Timed:
    """Return what is timed: all batches of the cell through one runner, already on the device."""
    refuse_longer(name, runner.max_tokens, cell.seq_len or 0)
    batches = cell.batches(runner)
    prepared = [runner.prepare(batch) for batch in batches]
    forward, synchronize = runner.run, runner.synchronize

    def call() -> None:
        for batch in prepared:
            forward(batch)
        synchronize()

    try:
        call()
    except (GatepressError, MemoryError):
        raise
    except Exception as error:  # every runtime has its own classes for "this shape does not fit"
        shape = f"try a smaller --batch-size or {'--seq-len' if cell.seq_len else '--max-length'}"
        raise ModelError(f"{name}: cannot run {cell} ({reason_of(error)}); {shape}") from error
    macs = [runner.macs(*batch["input_ids"].shape) for batch in batches]
    known = [number for number in macs if number is not None]
    return _Timed(runner, call, sum(known) if len(known) == len(macs) else None)


def _grid(batch_sizes: Sequence[int], seq_lens: Sequence[int], seed: int) -> Iterator[_Cell]:
    """Yield one cell per batch size and length, its rows full of the same random tokens."""
    random = np.random.default_rng(seed)
    for batch_size in dict.fromkeys(batch_sizes):
        for seq_len in dict.fromkeys(seq_lens):
            ids = random.integers(*TOKEN_IDS, (batch_size, seq_len), dtype=np.int64)
            batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            yield _Cell(batch_size, seq_len, partial(_same, [batch]), {"seed": seed})


def _same(batches: list[Batch], _runner: Runner) -> list[Batch]:
    return batches


def _tokenizers(runners: Iterable[Runner], *, trust_remote_code: bool) -> Tokenizers:
    """Return the tokenizers of all targets by their directories; `ModelError` if one has none."""
    tokenizers: Tokenizers = {}
    for runner in runners:
        if runner.tokenizer_dir is None:
            raise ModelError(
                f"{runner.name}: no tokenizer beside it, which the rows of a task (--task, --validation-file) need; "
                "give the directory that `gatepress export` wrote, or time without rows"
            )
        tokenizers[runner.tokenizer_dir] = open_tokenizer(runner.tokenizer_dir, trust_remote_code=trust_remote_code)
    return tokenizers


def _passes(batch_sizes: Sequence[int], rows: Rows, max_length: int, tokenizers: Tokenizers) -> Iterator[_Cell]:
    """Yield one cell per batch size: all validation rows, each target with its own tokenizer."""
    facts = {
        "task": rows.spec.name,
        "examples": sum(map(len, rows.validation.values())),
        "max_length": max_length,
    }
    for batch_size in dict.fromkeys(batch_sizes):
        batches = partial(_batches, rows, batch_size, max_length, tokenizers)
        yield _Cell(batch_size, None, batches, facts)


def _batches(
    rows: Rows,
    batch_size: int,
    max_length: int,
    tokenizers: Tokenizers,
    runner: Runner,
) -> list[Batch]:
    """Return the validation rows as batches, the longest rows first, each padded to its longest."""
    tokenizer = tokenizers[runner.tokenizer_dir]
    return [
        {name: values.numpy() for name, values in batch.items() if name in INPUTS}
        for split in rows.validation.values()
        for batch in make_loader(tokenize(split, tokenizer, max_length), tokenizer, batch_size, shuffle=False, seed=0)
    ]
