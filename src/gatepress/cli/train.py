"""`gatepress train`: from a pretrained encoder and a task to a run directory with fixed gates."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gatepress.cli import _options as opt
from gatepress.cli._console import Screen, count, facts, percent, pick, session
from gatepress.config import METHODS, RUN_FILE, TrainSettings, default_run_name
from gatepress.errors import ArtifactError
from gatepress.files import check_output, read_json

if TYPE_CHECKING:
    from gatepress.cli._console import Titled

EXAMPLES = opt.examples(
    "gatepress train --task demo --model demo -o runs/demo",
    "gatepress train --task sst2 --sparsity 0.5 --max-train-samples 10000",
    "gatepress train --task sst2 --method full -o runs/full",
    "gatepress train --task sst2 --model runs/full --sparsity 0.75",
    "gatepress train --resume runs/sst2-roberta-base-s0.5",
    "gatepress train --task stsb --data-dir glue --model ./my-encoder",
    "gatepress train --train-file train.csv --validation-file dev.csv --label-column topic",
)

KINDS = ("gates", "biases", "layer_norms", "low_rank", "base", "head", "total")


def train(  # noqa: PLR0913 - every option is a parameter
    *,
    context: opt.Context,
    task: opt.Task = None,
    data_dir: opt.DataDir = None,
    train_file: opt.TrainFile = None,
    validation_file: opt.ValidationFile = None,
    text_column: opt.TextColumn = None,
    text_pair_column: opt.TextPairColumn = None,
    label_column: opt.LabelColumn = None,
    max_train_samples: opt.MaxTrainSamples = None,
    max_validation_samples: opt.MaxValidationSamples = None,
    model: opt.Model = TrainSettings.model,
    revision: opt.Revision = TrainSettings.revision,
    method: opt.MethodOption = TrainSettings.method,
    sparsity: opt.Sparsity = TrainSettings.sparsity,
    budget: opt.BudgetOption = TrainSettings.budget,
    granularity: opt.GranularityOption = TrainSettings.granularity,
    gate_axes: opt.GateAxesOption = TrainSettings.gate_axes,
    matrices: opt.Matrices = opt.ALL_MATRICES,
    controller: opt.ControllerOption = TrainSettings.controller,
    lora_rank: opt.LoraRank = TrainSettings.lora_rank,
    train_biases: opt.TrainBiases = TrainSettings.train_biases,
    train_layer_norms: opt.TrainLayerNorms = TrainSettings.train_layer_norms,
    penalty_weight: opt.PenaltyWeight = TrainSettings.penalty_weight,
    start: opt.Start = TrainSettings.start,
    distill: opt.Distill = TrainSettings.distill,
    open_epochs: opt.OpenEpochs = TrainSettings.open_epochs,
    closing: opt.Closing = TrainSettings.closing,
    epochs: opt.Epochs = TrainSettings.epochs,
    batch_size: opt.BatchSize = TrainSettings.batch_size,
    max_length: opt.MaxLength = TrainSettings.max_length,
    learning_rate: opt.LearningRate = TrainSettings.learning_rate,
    gate_learning_rate: opt.GateLearningRate = TrainSettings.gate_learning_rate,
    weight_decay: opt.WeightDecay = TrainSettings.weight_decay,
    warmup_ratio: opt.WarmupRatio = TrainSettings.warmup_ratio,
    save_every: opt.SaveEvery = TrainSettings.save_every,
    seed: opt.Seed = TrainSettings.seed,
    device: opt.DeviceOption = "auto",
    precision: opt.PrecisionOption = TrainSettings.precision,
    output: Annotated[
        Path | None,
        opt.output_option(
            "DIR", "Directory of the run; runs/TASK-MODEL-sFRACTION unless given, and -METHOD where no gates close."
        ),
    ] = None,
    force: opt.TrainForce = False,
    resume: opt.Resume = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Learn a task while gates close.

    Gates are put over a pretrained encoder. Its weights stay as they are; gates, biases, layer norms, a
    low-rank update and the task's head learn. Gates close until exactly the asked fraction is shut, then the
    rest recovers. The run directory holds what was learnt (a few megabytes) and a note of the encoder it
    belongs to. Stopped at any moment, a run goes on with --resume. Next step: gatepress prune. Other
    --method close no gates: full finetuning and adapters, to compare with, or to press afterwards.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug, launched=True) as screen:
        if resume is not None:
            opt.refuse_beside("--resume", context)

            from gatepress import training

            _work(screen, resume, partial(training.resume, resume))
            return
        settings = TrainSettings(
            data=opt.data_settings(
                task=task,
                data_dir=data_dir,
                train_file=train_file,
                validation_file=validation_file,
                text_column=text_column,
                text_pair_column=text_pair_column,
                label_column=label_column,
                max_train_samples=max_train_samples,
                max_validation_samples=max_validation_samples,
            ),
            model=model,
            revision=revision,
            method=method,
            sparsity=sparsity,
            budget=budget,
            granularity=granularity,
            gate_axes=gate_axes,
            matrices=opt.words(matrices),
            controller=controller,
            lora_rank=lora_rank,
            train_biases=train_biases,
            train_layer_norms=train_layer_norms,
            start=start,
            distill=distill,
            open_epochs=open_epochs,
            closing=closing,
            epochs=epochs,
            batch_size=batch_size,
            max_length=max_length,
            learning_rate=learning_rate,
            gate_learning_rate=gate_learning_rate,
            penalty_weight=penalty_weight,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            save_every=save_every,
            seed=seed,
            device=device,
            precision=precision,
        )
        target = output or Path("runs") / default_run_name(settings)
        check_output(target, force=force)  # at once: what follows takes seconds to import

        from gatepress import training

        _work(screen, target, partial(training.train, settings, target, force=force))


def _work(screen: Screen, target: Path, training: Callable[..., dict[str, Any]]) -> None:
    """Train, show what came out, and say how to go on."""
    try:
        result = training(progress=screen.progress)
    except KeyboardInterrupt:
        if target.exists():
            screen.interrupt_note = f"the last complete checkpoint is in {target}{_hint(target)}"
        raise
    screen.result({"output_dir": str(target), **result}, tables)
    shown = shlex.quote(str(target))
    if METHODS[result.get("method", TrainSettings.method)].gated:
        screen.note(f"next: gatepress prune {shown}")
    else:
        screen.note(f"next: gatepress export {shown}, or press it: gatepress train --model {shown} --sparsity 0.5")


def _hint(target: Path) -> str:
    """Return how a run that was stopped goes on; an earlier result that is finished, or no run, has no such end."""
    manifest = target / RUN_FILE
    try:
        stopped = manifest.is_file() and "resume" in read_json(manifest)
    except ArtifactError:
        stopped = False
    return f"; go on with: gatepress train --resume {shlex.quote(str(target))}" if stopped else ""


def tables(result: dict[str, Any]) -> "list[Titled]":
    """Return what was asked beside what was counted, and what was trained."""
    rows = metric_rows(result)
    if result.get("total_gates"):
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
    trained = result.get("trainable_params", {})
    rows += [(f"trained: {kind.replace('_', ' ')}", count(trained[kind])) for kind in KINDS if kind in trained]
    rows += pick(result, [("output_dir", "output", str)])
    return [facts("Trained", rows)]


def metric_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the metric with the number of examples it stands on, then that of each split."""
    if result.get("metric_value") is None:
        return []
    on = f"  (on {count(result['examples'])} examples)" if result.get("examples") is not None else ""
    name = str(result.get("metric_name", "metric"))
    splits = result.get("metrics_by_split", {})
    rows = [(name, f"{result['metric_value']:.4f}{on}")]
    return rows + ([(f"  {split}", f"{value:.4f}") for split, value in splits.items()] if len(splits) > 1 else [])
