"""Prepare a run for its first step: load rows, model and tokenizer, add the gates, count what will be trained."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gatepress.agreement import agree
from gatepress.batches import fitting, make_loader, probe_batch, tokenize
from gatepress.budget import budget_of
from gatepress.checkpoint import RunManifest, load_start_, located, open_base, read_run, refuse_unlike
from gatepress.collapse import parameters_of, refuse_activation
from gatepress.config import TrainSettings
from gatepress.distill import Lesson, Teacher
from gatepress.embedding import reads_all
from gatepress.errors import UsageError
from gatepress.files import RUN_FILE
from gatepress.gates import gates_of
from gatepress.heads import is_finetuned, tell_of_head
from gatepress.hub import commit_of
from gatepress.inject import mark_trainable_
from gatepress.manifests import read_manifest
from gatepress.methods import Kinds, prepare_, refuse_rank, trained
from gatepress.models import model_files, open_tokenizer
from gatepress.narrowing import quicken_
from gatepress.ondisk import base_of
from gatepress.processes import Processes
from gatepress.resolve import Layer
from gatepress.resume import Resumable, make_optimizer
from gatepress.rotation import bases_of, turn_, turns
from gatepress.runners import input_names, max_tokens
from gatepress.runtime import torch_device
from gatepress.schema import refuse_unsound
from gatepress.shares import drawn, last_bias, move_
from gatepress.tasks import TaskSpec
from gatepress.tasks.sources import Rows, load_rows
from gatepress.versions import MADE_WITH, versions

VALIDATION_BATCH = 64
MIN_STEPS, MIN_EPOCHS, MAX_EPOCHS = 1_500, 3, 20  # what --epochs aims at if it is not given
OPEN_SHARE = 3  # a third of the epochs turns a model that does not know the task yet into a teacher
ROTATION_ROWS = 1_024  # rows whose second moments choose the bases of heads; takes as long as some ten steps
BF16_LENGTHS = 8  # in bf16, lengths are multiples of it: CPUs compile each shape, GPUs have units of that size


@dataclass(kw_only=True)
class Job(Resumable):
    """Everything that a run holds, loaded and wrapped."""

    settings: TrainSettings
    processes: Processes
    tokenizer: PreTrainedTokenizerBase
    loader: DataLoader[Any]
    noise: torch.Generator
    validation: dict[str, DataLoader[Any]]
    matching: DataLoader[Any] | None  # rows to match the shares of classes on; None: not asked for
    probe: dict[str, Tensor]
    steps: int
    open_steps: int
    steps_per_epoch: int
    layers: list[Layer]
    lesson: Lesson


def prepared(settings: TrainSettings, *, resumed: bool = False) -> Job:
    """Load rows, model and tokenizer, add the gates, and count what will be trained.

    With `resumed`, what another run trained (`settings.start`) is not loaded: the checkpoint contains it.
    """
    began = time.perf_counter()
    processes = _processes(settings)
    set_seed(settings.seed)
    start = Path(settings.start) if settings.start and not resumed else None
    if start:
        settings = _as_start(settings, start)
    rows = _rows(settings)  # before the model: errors in rows are found without a download
    base = located(settings)
    settings = replace(settings, commit=commit_of(settings.model, base))
    finetuned = is_finetuned(base, rows.spec)
    asked_to_turn = settings.rotate_heads and not (resumed or start)
    settings = settings.resolved(rows.spec.metric, finetuned=finetuned)
    model, base_sha256, layers, kinds, dense_params, before = _wrapped(settings, rows.spec, base, start)
    if asked_to_turn and not turns(model):
        raise UsageError(
            f"--rotate-heads is without effect: with --granularity {settings.granularity}, --gate-axes "
            f"{settings.gate_axes} and --matrices {','.join(settings.matrices)}, no gate of {settings.model} stands on "
            "a dimension of a head that may be turned; leave it out"
        )
    if processes.main and not resumed:
        tell_of_head(base, rows.spec)
    tokenizer = _tokenizer_of(base, model)
    tokens = fitting(settings.max_length, max_tokens(model.config.to_dict()), tokenizer)
    labelled = _present(rows.train)
    every = labelled if rows.unlabelled is None else concatenate_datasets([labelled, rows.unlabelled])
    train_rows = tokenize(every, tokenizer, tokens)
    validation_rows = {name: tokenize(split, tokenizer, tokens) for name, split in rows.validation.items()}
    loader = make_loader(
        train_rows,
        tokenizer,
        settings.batch_size,
        shuffle=True,
        seed=settings.seed,
        pad_to_multiple_of=BF16_LENGTHS if settings.precision == "bf16" else 1,
        processes=processes,
    )
    steps_per_epoch = len(loader)
    epochs = settings.epochs or min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch)))
    steps = epochs * steps_per_epoch
    open_steps = _open_epochs(settings, epochs, finetuned=finetuned) * steps_per_epoch
    model.to(processes.device)
    optimizer, schedule = make_optimizer(kinds, settings, stages=[open_steps, steps - open_steps])
    budget = budget_of(model, layers, settings, steps=steps - open_steps, tokens=tokens) if settings.gated else None
    parameters = {name: parameter for group in kinds.values() for name, parameter in group.items()}
    if settings.rotate_heads and not (resumed or start):
        _rotate_heads_(model, train_rows, tokenizer, processes)
    processes.copy_first_(parameters.values())
    noise = torch.Generator(processes.device)
    for _, gate in gates_of(model):
        gate.random = noise
    if budget and start:
        budget.close_anew(settings.sparsity, run=start)
        budget.fixed = True
    report = {
        "task": rows.spec.name,
        "model": settings.model,
        "metric_name": rows.spec.metric,
        "method": settings.method,
        "asked_sparsity": settings.sparsity if budget else 0.0,
        "budget": settings.unit if budget else None,
        "granularity": settings.granularity if budget else None,
        "controller": settings.controller if budget else None,
        "total_gates": budget.total_gates if budget else 0,
        "dense_params": dense_params,
        "trainable_params": _count(kinds),
        "train_examples": len(labelled),
        "unlabelled_examples": len(every) - len(labelled),
        "tokens": tokens,
        "epochs": epochs,
        "steps": steps,
        "device": str(processes.device),
        "processes": processes.count,
        "curve": [],
    }
    return Job(
        started=began,
        settings=settings,
        processes=processes,
        tokenizer=tokenizer,
        gated=model,
        device=processes.device,
        parameters=parameters,
        optimizer=optimizer,
        schedule=schedule,
        loader=loader,
        noise=noise,
        validation={name: _in_order(split, tokenizer) for name, split in validation_rows.items()},
        matching=_in_order(drawn(train_rows, len(labelled)), tokenizer) if settings.match_shares else None,
        probe=probe_batch(next(iter(validation_rows.values())), tokenizer),
        budget=budget,
        # A start's gates may be closed; opened again, they make a model that was never trained. The finetuned one was.
        teacher=Teacher(model, before) if start and finetuned and settings.distill else None,
        steps=steps,
        open_steps=open_steps,
        steps_per_epoch=steps_per_epoch,
        layers=layers,
        lesson=Lesson.of(
            labelled["label"][:],
            rows.spec,
            tokenizer,
            hidden_weight=settings.hidden_weight or 0.0,  # None: there is no teacher
            all_tokens=reads_all(model),
            processes=processes,
        ),
        manifest=RunManifest(
            settings=replace(settings, epochs=epochs),  # as `resolved`: rows chose it, and it must not be chosen again
            task=rows.spec,
            status="training",
            step=0,
            base_sha256=base_sha256,
            data_fingerprint=rows.fingerprint,
            tensors={},
            report=report,
            versions=versions(*MADE_WITH),
        ),
    )


class _Wrapped(NamedTuple):
    """A model with everything that its method adds, and what is known about it."""

    model: Any
    base_sha256: dict[str, str]  # of each file of its weights
    layers: list[Layer]
    kinds: Kinds  # what is trained
    dense_params: int
    before: dict[str, Tensor]  # the numbers that a start replaced, by name


def _wrapped(settings: TrainSettings, spec: TaskSpec, base: Path, start: Path | None) -> _Wrapped:
    """Open the base model and add what is trained, with the values of the run `start` if there is one."""
    model: Any = open_base(base, spec)
    _refuse_unfit(model, settings)
    if settings.match_shares:
        _as_trained_(model, base)
    dense_params = parameters_of(model)
    layers = prepare_(model, settings)
    if settings.gated:
        quicken_(model, layers, first_token=not reads_all(model))
    base_sha256 = model_files(base, embeds=settings.embed)  # after all that may be refused: it reads every weight
    before = load_start_(model, settings, spec, base, base_sha256) if start else {}
    if start and settings.match_shares:
        _as_trained_(model, start)
    kinds = trained(model, settings)
    mark_trainable_(kinds)
    return _Wrapped(model, base_sha256, layers, kinds, dense_params, before)


def _rows(settings: TrainSettings) -> Rows:
    """Return the rows of a run; `UsageError` if --match-shares is given but no row has one class."""
    rows = load_rows(settings.data, embeds=settings.embed)
    if settings.match_shares and not rows.spec.names_classes:
        got = "any number of them in a row" if rows.spec.multi_label else "none"
        raise UsageError(f"--match-shares is about classes, and {rows.spec.name} has {got}; leave it out")
    refuse_unsound({"settings": settings.to_json(), "task": rows.spec.to_json()})
    return rows


def _as_start(settings: TrainSettings, start: Path) -> TrainSettings:
    """Return settings with the commit, heads and low rank of the run that they start from, unless others are asked for.

    `UsageError` if that run was trained otherwise, or on a model of another name, which would have to be fetched.
    """
    run = read_run(start).settings
    elsewhere = ("model",) if run.model != settings.model and base_of(settings) is None else ()
    refuse_unlike(start, run, settings, *elsewhere, "method", "granularity", "controller", "gate_axes", "matrices")
    run = replace(run, lora_rank=run.rank or None)  # an older run names none and has its method's
    alike = (run.model, run.revision) == (settings.model, settings.revision)
    own = ("rotate_heads", "lora_matrices", "lora_rank", *(("commit",) if alike else ()))
    left_open = [name for name in own if getattr(settings, name) is None]
    return replace(settings, **{name: getattr(run, name) for name in left_open})


def _processes(settings: TrainSettings) -> Processes:
    """Return the processes that train together; `UsageError` if a batch has no row for each of them."""
    processes = Processes.here(torch_device(settings.device))
    if settings.batch_size < processes.count:
        raise UsageError(
            f"--batch-size is {settings.batch_size}, expected at least 1 row for each of {processes.count} processes"
        )
    return processes


def _tokenizer_of(base: Path, model: Any) -> Any:
    """Return the tokenizer beside a model, made to emit what the model takes, whatever its class emits."""
    tokenizer = open_tokenizer(base)
    taken = input_names(model)
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    return tokenizer


def _in_order(rows: Any, tokenizer: PreTrainedTokenizerBase) -> DataLoader[Any]:
    """Return batches of tokenized rows that are measured, not learnt from."""
    return make_loader(rows, tokenizer, VALIDATION_BATCH, shuffle=False, seed=0)


def _refuse_unfit(model: Any, settings: TrainSettings) -> None:
    """Refuse, before rows are tokenized, a model that could later not be pruned, wrapped or matched."""
    if settings.gated:
        refuse_activation(model)
    refuse_rank(model, settings)
    if settings.match_shares:
        last_bias(model)


def _as_trained_(model: Any, directory: Path) -> None:
    """Undo, in place, the move of the head by the run in a directory: whoever continues from it moves the head anew.

    So a model starts, and teaches, with the probabilities that it was trained for.
    """
    if not (directory / RUN_FILE).is_file():
        return
    manifest = read_manifest(directory / RUN_FILE)  # not `read_run`: the tensors were compared when they were loaded
    if moved := manifest["report"].get("class_offsets"):
        move_(model, -np.array(moved, dtype=np.float64))


def _rotate_heads_(model: Any, rows: Any, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> None:
    """Turn heads into the bases that the first training rows choose, in place; `ParityError` if logits change."""
    few = rows.select(range(min(ROTATION_ROWS, len(rows))))
    loader = _in_order(few, tokenizer)
    batches = [
        {name: value.to(processes.device) for name, value in batch.items() if name != "labels"} for batch in loader
    ]
    bases = bases_of(model.eval(), batches)
    processes.copy_first_(bases.values())
    with torch.no_grad():
        before = model(**batches[0]).logits
        turn_(model, bases)
        after = model(**batches[0]).logits
    agree(before, after, "logits before and after turning heads", "train with --no-rotate-heads, and please report it")


def _open_epochs(settings: TrainSettings, epochs: int, *, finetuned: bool) -> int:
    """Return the number of epochs in which all gates stay open before closing begins."""
    if not settings.gated or settings.start:  # a start closes its gates at once
        return 0
    least = int(bool(settings.distill and not finetuned))  # a teacher must have learned the task
    asked = settings.open_epochs
    if asked is None:
        asked = max(least, epochs // OPEN_SHARE) if least else 0
    if asked < least:
        raise UsageError(
            "--open-epochs is 0, expected 1 or more: with --distill a model that was not finetuned learns the task "
            "before it teaches"
        )
    if asked >= epochs:
        raise UsageError(
            f"--epochs is {epochs}, expected more than the {asked} in which all gates stay open (--open-epochs): they "
            "close in the others"
        )
    return asked


def _count(kinds: Kinds) -> dict[str, int]:
    """Return how many numbers are trained, by kind and in total."""
    counted = {kind: sum(parameter.numel() for parameter in group.values()) for kind, group in kinds.items()}
    return {**counted, "total": sum(counted.values())}


def _present(rows: Any) -> Any:
    if rows is None:
        raise TypeError("load_rows returned no training rows")
    return rows
