"""The training loop, read from top to bottom: prepare, step, measure, save."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gatepress.agreement import agree
from gatepress.batches import fitting, left_of_epoch, make_loader, probe_batch, tokenize
from gatepress.budget import budget_of
from gatepress.checkpoint import (
    RunManifest,
    RunWriter,
    clear_,
    is_finetuned,
    load_start_,
    open_base,
    read_run,
    refuse_unlike,
    tell_of_head,
)
from gatepress.collapse import parameters_of, plan_model, refuse_activation
from gatepress.config import TrainSettings
from gatepress.distill import Lesson, Teacher, learn_from_teacher_
from gatepress.embedding import reads_all
from gatepress.errors import ModelError, ProcessError, UsageError
from gatepress.evaluation import evaluate_model, outputs_of
from gatepress.files import check_output, explained, try_writing
from gatepress.gates import gates_of
from gatepress.hub import locate_model
from gatepress.inject import mark_trainable_
from gatepress.losses import batch_loss
from gatepress.methods import Kinds, prepare_, refuse_rank, trained
from gatepress.modeling_gatepress import first_token_alone
from gatepress.models import model_files, open_tokenizer
from gatepress.narrowing import narrow_, quicken_
from gatepress.ondisk import base_of, stands_on
from gatepress.precision import computing
from gatepress.processes import Processes, seed_of
from gatepress.progress import NoProgress, Progress
from gatepress.resolve import Layer
from gatepress.resume import Resumable, make_optimizer, read_state, refuse_other, uninterrupted
from gatepress.rotation import bases_of, turn_
from gatepress.runners import input_names, max_tokens
from gatepress.runtime import device_here, torch_device
from gatepress.schema import refuse_unsound
from gatepress.shares import drawn, last_bias, match_
from gatepress.tasks.sources import Rows, load_rows
from gatepress.versions import MADE_WITH, versions

logger = logging.getLogger(__name__)

VALIDATION_BATCH = 64
MIN_STEPS, MIN_EPOCHS, MAX_EPOCHS = 1_500, 3, 20  # what an absent --epochs aims at
OPEN_SHARE = 3  # a third of the epochs makes a teacher of a model that does not know the task yet
MAX_GRADIENT_NORM = 1.0
LOSS_EVERY = 5  # steps: reading the loss waits for the device
ROTATION_ROWS = 1_024  # whose second moments choose the bases of heads: the time of some ten steps
BF16_LENGTHS = 8  # lengths are multiples of it in bf16: CPUs compile each shape, GPUs have units of that size


def train(
    settings: TrainSettings, output: Path, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train gates, biases, layer norms, low rank and head on a frozen base; write a run directory.

    The asked sparsity is delivered exactly, part of the way (`settings.closing`), and in the rest of the steps what is
    left recovers. After every epoch the metric is measured and a checkpoint written; Ctrl-C writes one more. Returns
    the report, whose keys docs/json-contract.md lists. Raises leaves of `GatepressError`.
    """
    settings = settings.absolute()
    check_output(output, force=force, reads=(*settings.reads, *stands_on(settings)))
    return _run(_prepare(settings), output, progress or NoProgress(), force=force)


def resume(output: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Go on with a run that was stopped, from its last checkpoint to the end it would have come to; return the report.

    On a CPU in float32 every number is the same as without the stop. A run that is finished is left as it is.
    Raises `ArtifactError` where there is nothing to go on from, or where rows or base model have changed.
    """
    manifest = read_run(output)
    if manifest.status == "finished":
        clear_(output, manifest)
        logger.info("%s is finished: nothing is left to train, this is its report", output)
        return {**manifest.report, "output_dir": str(output)}
    with explained(output, way="and copy the run there"):
        try_writing(output)
    state = read_state(output, manifest)
    epochs = manifest.settings.epochs or manifest.report.get("epochs")
    began = replace(manifest.settings, epochs=epochs, device=device_here(manifest.settings.device))
    job = _prepare(began, resumed=True)
    refuse_other(output, manifest, job.manifest)
    job.restore_(output, manifest, state)
    return _run(job, output, progress or NoProgress(), force=False)


def _run(job: "_Job", output: Path, progress: Progress, *, force: bool) -> dict[str, Any]:
    """Take the epochs that are left and keep what comes out; return the report."""
    with _writer(job, output, force=force) as writer:
        progress.start(job.steps - job.step, "training")
        try:
            if _unmeasured(job):  # stopped while the pass before was measured
                _end_epoch(job, writer)
            for epoch in range(job.step // job.steps_per_epoch, job.steps // job.steps_per_epoch):
                _one_epoch(job, epoch, writer, progress)
                _end_epoch(job, writer)
        except (KeyboardInterrupt, ProcessError):  # what another process died of, this one has not
            if job.step > job.manifest.step:
                _checkpoint(job, writer, "interrupted", job.manifest.report)
            raise
        finally:
            progress.finish()
    return {**job.manifest.report, "output_dir": str(output)}


def _writer(job: "_Job", output: Path, *, force: bool) -> contextlib.AbstractContextManager[RunWriter | None]:
    """Return what writes the run; None in all processes but the first."""
    if not job.processes.main:
        return contextlib.nullcontext()
    return RunWriter(output, tokenizer=job.tokenizer, probe=job.probe, force=force, resumed=job.step > 0)


@dataclass(kw_only=True)
class _Job(Resumable):
    """Everything a run holds, loaded and wrapped."""

    settings: TrainSettings
    processes: Processes
    tokenizer: PreTrainedTokenizerBase
    loader: DataLoader[Any]
    noise: torch.Generator
    validation: dict[str, DataLoader[Any]]
    matching: DataLoader[Any] | None  # rows by which classes are named as often as they occur; None: not asked for
    probe: dict[str, Tensor]
    steps: int
    open_steps: int
    steps_per_epoch: int
    layers: list[Layer]
    lesson: Lesson


def _prepare(settings: TrainSettings, *, resumed: bool = False) -> _Job:
    """Load rows, model and tokenizer, put the gates in, and count what will be trained.

    With `resumed` what another run trained (`settings.start`) is not looked for: it is in the checkpoint.
    """
    began = time.perf_counter()
    processes = _processes(settings)
    set_seed(settings.seed)
    if settings.start and not resumed:
        settings = _as_start(settings, Path(settings.start))
    rows = _rows(settings)  # before the model: what is wrong with them is found without a download
    base = locate_model(settings.model, settings.revision)
    finetuned = is_finetuned(base, rows.spec)
    settings = settings.resolved(rows.spec.metric, finetuned=finetuned)
    model: Any = open_base(base, rows.spec)
    if processes.main and not resumed:
        tell_of_head(base, rows.spec)
    _refuse_unfit(model, settings)
    tokenizer = _tokenizer_of(base, model)
    dense_params = parameters_of(model)
    layers = prepare_(model, settings)
    if settings.gated:
        quicken_(model, layers, first_token=not reads_all(model))
    start = None if resumed else settings.start
    base_sha256 = model_files(base)
    before = load_start_(model, settings, rows.spec, base, base_sha256) if start else {}
    kinds = trained(model, settings)
    mark_trainable_(kinds)

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
        budget.close_anew(settings.sparsity, run=Path(start))
        budget.fixed = True
    report = {
        "task": rows.spec.name,
        "model": settings.model,
        "metric_name": rows.spec.metric,
        "method": settings.method,
        "asked_sparsity": settings.sparsity if budget else 0.0,
        "budget": settings.unit,
        "granularity": settings.granularity,
        "controller": settings.controller,
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
    return _Job(
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
        # Gates of a start may be closed: opened again, they make no model that ever was. The finetuned one was.
        teacher=Teacher(model, before) if start and finetuned and settings.distill else None,
        steps=steps,
        open_steps=open_steps,
        steps_per_epoch=steps_per_epoch,
        layers=layers,
        lesson=Lesson.of(
            labelled["label"][:],
            rows.spec,
            tokenizer,
            hidden_weight=settings.hidden_weight or 0.0,  # none: nobody teaches
            all_tokens=reads_all(model),
            processes=processes,
        ),
        manifest=RunManifest(
            settings=replace(settings, epochs=epochs),  # as `resolved`: chosen by rows, it must not be chosen anew
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


def _rows(settings: TrainSettings) -> Rows:
    """Return the rows of a run; `UsageError` where what is asked of their classes finds none."""
    rows = load_rows(settings.data, embeds=settings.embed)
    if settings.match_shares and not rows.spec.names_classes:
        raise UsageError(f"--match-shares is about classes, and {rows.spec.name} has none; leave it out")
    refuse_unsound({"settings": settings.to_json(), "task": rows.spec.to_json()})
    return rows


def _as_start(settings: TrainSettings, start: Path) -> TrainSettings:
    """Return settings with the heads and the low rank of the run that they start from, unless others are asked for.

    `UsageError` where that run was trained otherwise, or on a model that another name would have to be fetched for.
    """
    run = read_run(start).settings
    elsewhere = ("model",) if run.model != settings.model and base_of(settings) is None else ()
    refuse_unlike(start, run, settings, *elsewhere, "method", "granularity", "controller", "gate_axes", "matrices")
    run = replace(run, lora_rank=run.rank or None)  # of a run that named none, its method's
    left_open = [name for name in ("rotate_heads", "lora_matrices", "lora_rank") if getattr(settings, name) is None]
    return replace(settings, **{name: getattr(run, name) for name in left_open})


def _processes(settings: TrainSettings) -> Processes:
    """Return those that train together; `UsageError` where a batch has no row for each of them."""
    processes = Processes.here(torch_device(settings.device))
    if settings.batch_size < processes.count:
        raise UsageError(
            f"--batch-size is {settings.batch_size}, expected at least 1 row for each of {processes.count} processes"
        )
    return processes


def _tokenizer_of(base: Path, model: Any) -> Any:
    """Return the tokenizer beside a model; it emits what the model takes, whatever its class is made for."""
    tokenizer = open_tokenizer(base)
    taken = input_names(model)
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    return tokenizer


def _in_order(rows: Any, tokenizer: PreTrainedTokenizerBase) -> DataLoader[Any]:
    """Return batches of tokenized rows that are measured, not learnt from."""
    return make_loader(rows, tokenizer, VALIDATION_BATCH, shuffle=False, seed=0)


def _refuse_unfit(model: Any, settings: TrainSettings) -> None:
    """Raise, before rows are tokenized, what a model would be refused for when it is pruned, wrapped or matched."""
    if settings.gated:
        refuse_activation(model)
    refuse_rank(model, settings)
    if settings.match_shares:
        last_bias(model)


def _rotate_heads_(model: Any, rows: Any, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> None:
    """Turn heads into the bases that the first training rows choose, in place; `ParityError` where logits change."""
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
    agree(before, after, "logits before and behind turning heads", "train with --no-rotate-heads, and please report it")


def _open_epochs(settings: TrainSettings, epochs: int, *, finetuned: bool) -> int:
    """Return for how many epochs all gates stay open before the closing begins."""
    if not settings.gated or settings.start:  # what is gone on from closes at once
        return 0
    least = int(bool(settings.distill and not finetuned))  # what teaches must have learned the task
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


def _one_epoch(job: _Job, epoch: int, writer: RunWriter | None, progress: Progress) -> None:
    """Take every step that is left of one pass over the training rows."""
    if job.step == job.open_steps and job.settings.distill and job.teacher is None:
        job.teacher = Teacher(job.gated)
    if job.teacher:
        learn_from_teacher_(job.gated)
    else:
        job.gated.train()
    for batch in left_of_epoch(job.loader, epoch, job.step % job.steps_per_epoch):
        loss = _step(job, {name: value.to(job.device) for name, value in batch.items()})
        progress.advance(1, **(_figures(job, loss) if job.step % LOSS_EVERY == 0 else {}))
        every = job.settings.save_every
        if every and job.step % every == 0 and job.step % job.steps_per_epoch:
            _checkpoint(job, writer, "training", job.manifest.report)


def _unmeasured(job: _Job) -> bool:
    """Say whether a pass is through whose end was not measured."""
    measured = [point["step"] for point in job.manifest.report["curve"]]
    return job.step > 0 and job.step % job.steps_per_epoch == 0 and job.step not in measured


def _end_epoch(job: _Job, writer: RunWriter | None) -> None:
    """Measure and count the model behind a pass over the rows, and write it."""
    with _matched(job) as offsets:
        report = _measured(job) | offsets
        _checkpoint(job, writer, "finished" if job.step == job.steps else "training", report)
    if writer:
        epoch, metric = job.step // job.steps_per_epoch, report["metric_name"]
        logger.info("epoch %d: %s %.4f", epoch, metric, report["metric_value"])


@contextlib.contextmanager
def _matched(job: _Job) -> Iterator[dict[str, Any]]:
    """Move the head behind the last step, where that was asked for, and yield by how much.

    Where what follows does not come to its end it is moved back: who goes on does it anew.
    """
    if job.matching is None or job.step < job.steps:
        yield {}
        return
    bias = last_bias(job.gated)
    before = bias.detach().clone()
    try:
        yield {"class_offsets": match_(job.gated, *outputs_of(job.gated, job.matching, job.processes))}
    except BaseException:
        with torch.no_grad():
            bias.copy_(before)
        raise


@uninterrupted()
def _step(job: _Job, batch: dict[str, Tensor]) -> Tensor:
    """Take one optimizer step and return its loss."""
    if job.budget and job.budget.moved:
        job.budget.moved = False
        if job.budget.closed_gates:
            narrow_(job.gated, job.layers, job.budget.vectors)
    _seed_step(job)
    # Not accelerate's autocast: it wraps the model itself, and measuring must be in float32.
    with computing(job.settings.precision, job.device.type), first_token_alone():
        loss = batch_loss(job.gated, batch, job.manifest.task, job.teacher, job.lesson)
    closing = job.budget if job.step >= job.open_steps else None
    penalty = closing.penalty(job.step - job.open_steps) if closing else None
    batches: Any = job.loader.batch_sampler
    part = loss * batches.share(job.step % job.steps_per_epoch)  # a mean over the rows of all processes
    (part if penalty is None else part + penalty / job.processes.count).backward()
    job.processes.sum_(parameter.grad for parameter in job.parameters.values())
    job.step += 1
    if closing:
        closing.after_backward(job.step - job.open_steps)
    nn.utils.clip_grad_norm_(job.parameters.values(), MAX_GRADIENT_NORM)
    job.optimizer.step()
    job.schedule.step()
    job.optimizer.zero_grad()
    return loss


def _seed_step(job: _Job) -> None:
    """Seed the random numbers of one step: a run that goes on draws what it would have drawn.

    The noise of gates is the same in all processes, as gates are; dropout is each one's own.
    """
    job.noise.manual_seed(seed_of(job.settings.seed, job.step))
    torch.manual_seed(seed_of(job.settings.seed, job.step, job.processes.index))


def _figures(job: _Job, loss: Tensor) -> dict[str, float]:
    """Return what the bar shows; `ModelError` where the loss is no number any more."""
    value = loss.item()
    if not math.isfinite(value):
        raise ModelError(f"the loss is {value} at step {job.step}; try a smaller --learning-rate")
    return {"loss": value, **({"closed": job.budget.closed_gates / job.budget.total_gates} if job.budget else {})}


@uninterrupted()
def _checkpoint(job: _Job, writer: RunWriter | None, status: str, report: dict[str, Any]) -> None:
    """Write the run as it is, with what was measured last."""
    job.manifest = job.manifest_at(status, report)
    if writer:
        writer.save(job.gated, job.manifest, job.state() if job.manifest.resume else None)


def _measured(job: _Job) -> dict[str, Any]:
    """Measure and count the model as it is; return the report with one point more of the curve."""
    report: dict[str, Any] = {
        **job.manifest.report,
        **evaluate_model(job.gated, job.validation, job.manifest.task, processes=job.processes),
        **_counts(job),
        "train_seconds": job.seconds,
        "peak_memory_bytes": job.peak_memory,
    }
    point = {key: report[key] for key in ("metric_value", "closed_fraction", "train_seconds")}
    return {**report, "curve": [*report["curve"], {"step": job.step, **point}]}


def _counts(job: _Job) -> dict[str, Any]:
    """Return what is closed, and what of the encoder closure removes with it."""
    if job.budget is None:
        nothing = ("closed_fraction", "removed_of_budget", "encoder_weights_removed", "encoder_macs_removed")
        return {"closed_gates": 0, **dict.fromkeys(nothing, 0.0), "total_params": job.manifest.report["dense_params"]}
    plan = plan_model(job.gated, "inner")
    return {
        "closed_gates": job.budget.closed_gates,
        "closed_fraction": job.budget.closed_gates / job.budget.total_gates,
        "removed_of_budget": job.budget.removed,
        "encoder_weights_removed": plan.removed_fraction,
        "encoder_macs_removed": plan.removed_fraction,
        "total_params": job.manifest.report["dense_params"] - plan.removed_parameters,
    }


def _count(kinds: Kinds) -> dict[str, int]:
    """Return trained numbers by kind, with their total."""
    counted = {kind: sum(parameter.numel() for parameter in group.values()) for kind, group in kinds.items()}
    return {**counted, "total": sum(counted.values())}


def _present(rows: Any) -> Any:
    if rows is None:
        raise TypeError("load_rows returned no training rows")
    return rows
