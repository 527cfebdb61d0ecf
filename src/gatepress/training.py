"""The training loop, to be read from top to bottom: step, measure, save. preparing.py sets it up."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatepress.batches import left_of_epoch
from gatepress.checkpoint import read_run
from gatepress.collapse import plan_model
from gatepress.config import TrainSettings
from gatepress.distill import Teacher, learn_from_teacher_
from gatepress.errors import ModelError, ProcessError
from gatepress.evaluation import evaluate_model, outputs_of
from gatepress.files import check_output, explained, lock, release, try_writing
from gatepress.guest import as_guest
from gatepress.losses import batch_loss
from gatepress.modeling_gatepress import first_token_alone
from gatepress.narrowing import narrow_
from gatepress.ondisk import stands_on
from gatepress.precision import computing
from gatepress.preparing import Job, prepared
from gatepress.processes import seed_of
from gatepress.progress import NoProgress, Progress
from gatepress.resume import read_state, refuse_other, uninterrupted
from gatepress.runtime import device_here
from gatepress.runwriter import RunWriter, clear_
from gatepress.shares import last_bias, match_

logger = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 1.0
LOSS_EVERY = 5  # steps; reading the loss waits for the device


@as_guest()
def train(
    settings: TrainSettings, output: str | Path, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train gates, biases, layer norms, low rank and head on a frozen base; write a run directory.

    The requested sparsity is reached exactly, after a part of the steps (`settings.closing`); in the rest, what is left
    recovers. After every epoch the metric is measured and a checkpoint written; Ctrl-C writes one more. Returns the
    report, whose keys docs/json-contract.md lists. Raises leaves of `GatepressError`.
    """
    settings, output = settings.absolute(), Path(output)
    check_output(output, force=force, reads=(*settings.reads, *stands_on(settings)))
    return _run(prepared(settings), output, progress or NoProgress(), force=force)


@as_guest()
def resume(output: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Continue a run that was stopped, from its last checkpoint to the end it would have reached; return the report.

    On a CPU in float32, every number is the same as without the stop. A finished run is left as it is.
    Raises `ArtifactError` if there is nothing to continue from, or if rows or base model have changed.
    """
    output = Path(output)
    manifest = read_run(output)
    if manifest.status != "finished":
        release(lock(output))  # whoever still trains there writes over what is read next
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
    job = prepared(began, resumed=True)
    refuse_other(output, manifest, job.manifest)
    job.restore_(output, manifest, state)
    return _run(job, output, progress or NoProgress(), force=False)


def _run(job: Job, output: Path, progress: Progress, *, force: bool) -> dict[str, Any]:
    """Train the epochs that are left and keep the result; return the report."""
    with _writer(job, output, force=force) as writer:
        progress.start(job.steps - job.step, "training")
        try:
            if _unmeasured(job):  # stopped while the last epoch was measured
                _end_epoch(job, writer)
            for epoch in range(job.step // job.steps_per_epoch, job.steps // job.steps_per_epoch):
                _one_epoch(job, epoch, writer, progress)
                _end_epoch(job, writer)
        except (KeyboardInterrupt, ProcessError):  # whatever ended another process, this one can still save
            if job.step > job.manifest.step:
                _checkpoint(job, writer, "interrupted", job.manifest.report)
            raise
        finally:
            progress.finish()
    return {**job.manifest.report, "output_dir": str(output)}


def _writer(job: Job, output: Path, *, force: bool) -> contextlib.AbstractContextManager[RunWriter | None]:
    """Return the writer of the run; None in all processes but the first."""
    if not job.processes.main:
        return contextlib.nullcontext()
    return RunWriter(output, tokenizer=job.tokenizer, probe=job.probe, force=force, resumed=job.step > 0)


def _one_epoch(job: Job, epoch: int, writer: RunWriter | None, progress: Progress) -> None:
    """Take all remaining steps of one pass over the training rows."""
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


def _unmeasured(job: Job) -> bool:
    """Return whether a pass is complete but not yet measured."""
    measured = [point["step"] for point in job.manifest.report["curve"]]
    return job.step > 0 and job.step % job.steps_per_epoch == 0 and job.step not in measured


def _end_epoch(job: Job, writer: RunWriter | None) -> None:
    """Measure and count the model after a pass over the rows, and write it."""
    with uninterrupted():
        _narrow_(job)  # a resumed run measures the same computation, to the last digit
    with _matched(job) as offsets:
        report = _measured(job) | offsets
        _checkpoint(job, writer, "finished" if job.step == job.steps else "training", report)
    if writer:
        epoch, metric = job.step // job.steps_per_epoch, report["metric_name"]
        logger.info("epoch %d: %s %.4f", epoch, metric, report["metric_value"])


@contextlib.contextmanager
def _matched(job: Job) -> Iterator[dict[str, Any]]:
    """Move the head after the last step, if asked for, and yield by how much.

    If what follows fails, the head is moved back: whoever continues the run moves it again.
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
def _step(job: Job, batch: dict[str, Tensor]) -> Tensor:
    """Take one optimizer step and return its loss."""
    _narrow_(job)
    _seed_step(job)
    # Not accelerate's autocast: it wraps the model itself, and measuring must be in float32.
    with computing(job.settings.precision, job.device.type), first_token_alone():
        loss = batch_loss(job.gated, batch, job.manifest.task, job.teacher, job.lesson)
    closing = job.budget if job.step >= job.open_steps else None
    penalty = closing.penalty(job.step - job.open_steps) if closing else None
    batches: Any = job.loader.batch_sampler
    part = loss * batches.share(job.step % job.steps_per_epoch)  # summed over processes: a mean over all rows
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


def _narrow_(job: Job) -> None:
    """Leave what has closed since the last step out of what is computed."""
    if job.budget and job.budget.moved:
        job.budget.moved = False
        if job.budget.closed_gates:
            narrow_(job.gated, job.layers, job.budget.vectors)


def _seed_step(job: Job) -> None:
    """Seed the random numbers of one step, so that a resumed run draws what it would have drawn.

    The noise of gates is the same in all processes, as gates are; each process has its own dropout.
    """
    job.noise.manual_seed(seed_of(job.settings.seed, job.step))
    torch.manual_seed(seed_of(job.settings.seed, job.step, job.processes.index))


def _figures(job: Job, loss: Tensor) -> dict[str, float]:
    """Return what the bar shows; `ModelError` if the loss is no longer a number."""
    value = loss.item()
    if not math.isfinite(value):
        raise ModelError(f"the loss is {value} at step {job.step}; try a smaller --learning-rate")
    return {"loss": value, **({"closed": job.budget.closed_gates / job.budget.total_gates} if job.budget else {})}


@uninterrupted()
def _checkpoint(job: Job, writer: RunWriter | None, status: str, report: dict[str, Any]) -> None:
    """Write the run as it is, with the latest measurements."""
    job.manifest = job.manifest_at(status, report)
    if writer:
        writer.save(job.gated, job.manifest, job.state() if job.manifest.resume else None)


def _measured(job: Job) -> dict[str, Any]:
    """Measure and count the model as it is; return the report with one more point on the curve."""
    report: dict[str, Any] = {
        **job.manifest.report,
        **evaluate_model(job.gated, job.validation, job.manifest.task, processes=job.processes),
        **_counts(job),
        "train_seconds": job.seconds,
        "peak_memory_bytes": job.peak_memory,
    }
    point = {key: report[key] for key in ("metric_value", "closed_fraction", "train_seconds")}
    return {**report, "curve": [*report["curve"], {"step": job.step, **point}]}


def _counts(job: Job) -> dict[str, Any]:
    """Return how many gates are closed and how much of the encoder their closure removes."""
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
