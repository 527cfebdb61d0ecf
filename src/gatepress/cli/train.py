"""`gatepress train`: from a pretrained encoder and a task to a run directory with fixed gates."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from gatepress.cli import _options as opt
from gatepress.cli._asked import refuse_beside, refuse_unused, train_settings
from gatepress.cli._console import Screen, Titled, count, facts, percent, pick, session
from gatepress.config import METHODS, TrainSettings, default_run_name
from gatepress.errors import ArtifactError, ProcessError
from gatepress.files import RUN_FILE, check_output, read_json
from gatepress.hub import refuse_misspelt

EXAMPLES = opt.examples(
    "gatepress train --task demo --model demo -o runs/demo",
    "gatepress train --task sst2 --sparsity 0.5 --max-train-samples 10000",
    "gatepress train --task sst2 --method full -o runs/full",
    "gatepress train --task sst2 --model runs/full --sparsity 0.75",
    "gatepress train --resume runs/sst2-roberta-base-s0.5",
    "gatepress train --task stsb --data-dir glue --model ./my-encoder",
    "gatepress train --embed --task stsb --model sentence-transformers/all-MiniLM-L6-v2 --sparsity 0.5",
    "gatepress train --train-file train.csv --validation-file dev.csv --label-column topic",
)

PRESSED = 0.5  # the sparsity that is proposed for a model without gates
KINDS = ("gates", "biases", "layer_norms", "low_rank", "base", "head", "total")


def train(  # noqa: PLR0913 - every option is a parameter
    *,
    context: opt.Context,
    rows: opt.TrainingRows,
    base: opt.Base,
    method: opt.MethodOption = TrainSettings.method,
    sparsity: opt.Sparsity = TrainSettings.sparsity,
    gating: opt.Gating,
    start: opt.Start = TrainSettings.start,
    schedule: opt.Schedule,
    save_every: opt.SaveEvery = TrainSettings.save_every,
    machine: opt.Machine,
    output: Annotated[
        Path | None,
        opt.output_option(
            "DIR",
            "Directory of the run. Default: runs/TASK-MODEL-sFRACTION, or runs/TASK-MODEL-METHOD if no gates close.",
        ),
    ] = None,
    force: opt.TrainForce = False,
    resume: opt.Resume = None,
    shown: opt.Shown,
) -> None:
    """Train a model on a task while its gates close.

    Gates are put over an encoder whose own weights stay frozen. Gates, biases, layer norms, a low-rank
    update and the task's head are trained. Gates close until exactly the requested fraction is closed;
    then the rest recovers. The run directory holds what was trained (a few megabytes) and a reference to
    the encoder. A run can be stopped at any moment and continued with --resume. Next step: gatepress prune.

    The other values of --method close no gates: full finetuning and adapters, to compare with or to press
    afterwards. With --embed, an embedder learns from itself, without labels.
    """
    with session(**vars(shown), launched=True) as screen:
        if resume is not None:
            refuse_beside("--resume", context)

            from gatepress.manifests import run_file

            run_file(resume)  # before the slow imports

            from gatepress import training

            _work(screen, resume, partial(training.resume, resume))
            return
        settings = train_settings(
            rows,
            base,
            gating,
            schedule,
            machine,
            method=method,
            sparsity=sparsity,
            start=start,
            save_every=save_every,
        )
        refuse_unused(settings, context)
        target = output or Path("runs") / default_run_name(settings)
        check_output(target, force=force)  # before the slow imports
        refuse_misspelt(settings.model, settings.revision)

        from gatepress import training

        _work(screen, target, partial(training.train, settings, target, force=force))


def _work(screen: Screen, target: Path, training: Callable[..., dict[str, Any]]) -> None:
    """Train, show the result, and say what to do next."""
    before = _stamp(target)
    try:
        result = training(progress=screen.progress)
    except KeyboardInterrupt:
        if before is not None and _stamp(target) == before:
            screen.interrupt_note = f"nothing was written, {target} is as it was{_hint(target)}"
        elif target.exists():
            screen.interrupt_note = f"the last complete checkpoint is in {target}{_hint(target)}"
        raise
    except ProcessError as error:
        raise ProcessError(f"{error}{_hint(target)}") from error
    screen.result(result, tables)
    shown = shlex.quote(str(target))
    method = METHODS.get(result.get("method", TrainSettings.method))  # None: a report that somebody changed
    if method is None or method.gated:
        screen.note(f"next: gatepress prune {shown}")
    elif (target / RUN_FILE).is_file():  # other machines of a training have none
        from gatepress.commands import pressing

        press = pressing(read_json(target / RUN_FILE)["settings"], str(target), PRESSED)
        screen.note(f"next: gatepress export {shown}, or press it: {press}")


def _stamp(target: Path) -> tuple[int, int] | None:
    """Return what tells one version of a run's manifest from the next; None if there is no manifest."""
    try:
        found = (target / RUN_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _hint(target: Path) -> str:
    """Return how to continue a run that was stopped; empty if there is no run to continue or it is finished."""
    manifest = target / RUN_FILE
    try:
        stopped = manifest.is_file() and "resume" in read_json(manifest)
    except ArtifactError:
        stopped = False
    return f"; go on with: gatepress train --resume {shlex.quote(str(target))}" if stopped else ""


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return what was asked beside what was counted, and what was trained."""
    rows = metric_rows(result)
    if result.get("total_gates") and "closed_gates" in result:
        rows += pick(result, [("asked_sparsity", "sparsity asked", percent)])
        closed, total = result["closed_gates"], result["total_gates"]
        rows.append(("gates closed", f"{count(closed)} of {count(total)} ({percent(closed / max(total, 1))})"))
    rows += pick(
        result,
        [
            ("encoder_weights_removed", "encoder weights to go", percent),
            ("encoder_macs_removed", "encoder multiplications to go", percent),
            ("total_params", "parameters", count),
        ],
    )
    if offsets := result.get("class_offsets"):
        rows.append(("logits moved, by class", " ".join(f"{one:+.2f}" for one in offsets)))
    trained = result.get("trainable_params", {})
    rows += [(f"trained: {kind.replace('_', ' ')}", count(trained[kind])) for kind in KINDS if kind in trained]
    rows += pick(result, [("output_dir", "output", str)])
    return [facts("Trained", rows)]


def metric_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the metric with the number of examples it is computed on, then that of each split."""
    if result.get("metric_value") is None:
        return []
    on = f"  (on {count(result['examples'])} examples)" if result.get("examples") is not None else ""
    name = str(result.get("metric_name", "metric"))
    splits = result.get("metrics_by_split", {})
    rows = [(name, f"{result['metric_value']:.4f}{on}")]
    return rows + ([(f"  {split}", f"{value:.4f}") for split, value in splits.items()] if len(splits) > 1 else [])
