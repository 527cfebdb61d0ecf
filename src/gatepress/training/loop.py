"""The training loop, read from top to bottom: set up, step, evaluate, save."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from gatepress.budget import Budget, gate_vectors
from gatepress.checkpoint import RunManifest, RunWriter, model_files, open_base, open_tokenizer, versions
from gatepress.collapse import parameters_of, plan_model
from gatepress.config import TrainSettings
from gatepress.errors import DeviceError, ModelError
from gatepress.files import check_output
from gatepress.hub import locate_model
from gatepress.inject import attach_gates_, mark_trainable_, trainable
from gatepress.progress import NoProgress, Progress
from gatepress.tasks import TaskSpec
from gatepress.tasks.sources import load_rows
from gatepress.training.data import make_loader, tokenize
from gatepress.training.metrics import compute_metric

logger = logging.getLogger(__name__)

PROBE_ROWS = 64
MIN_STEPS, MIN_EPOCHS, MAX_EPOCHS = 1_500, 3, 20  # what `--epochs` left out aims at
MAX_GRADIENT_NORM = 1.0


def train(
    settings: TrainSettings, output: Path, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train gates, biases, layer norms, low rank and head on a frozen base; write a run directory.

    The asked sparsity is delivered exactly, about 60 % of the way, and the rest of the steps recover.
    After every epoch the metric is measured and a checkpoint written; Ctrl-C writes one more.
    Returns the report, whose keys docs/json-contract.md lists. Raises `GatepressError` leaves.
    """
    progress = progress or NoProgress()
    check_output(output, force=force)
    accelerator = _accelerator(settings)
    set_seed(settings.seed)

    base = locate_model(settings.model, settings.revision)
    rows = load_rows(settings.data)
    tokenizer = open_tokenizer(base, trust_remote_code=settings.trust_remote_code)
    model = open_base(base, rows.spec, trust_remote_code=settings.trust_remote_code)
    dense_params = parameters_of(model)
    layers = attach_gates_(
        model, granularity=settings.granularity, controller=settings.controller, lora_rank=settings.lora_rank
    )
    kinds = trainable(model, biases=settings.train_biases, layer_norms=settings.train_layer_norms)
    mark_trainable_(kinds)

    max_length = min(settings.max_length, _longest(model, tokenizer))
    train_rows = tokenize(_present(rows.train), tokenizer, max_length)
    loader: Any = make_loader(train_rows, tokenizer, settings.batch_size, shuffle=True, seed=settings.seed)
    validation = {
        name: make_loader(tokenize(split, tokenizer, max_length), tokenizer, 64, shuffle=False, seed=0)
        for name, split in rows.validation.items()
    }
    probe = _probe(next(iter(rows.validation.values())), tokenizer, max_length)

    per_epoch = math.ceil(len(loader) / accelerator.num_processes)
    epochs = settings.epochs or min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(MIN_STEPS / per_epoch)))
    steps = epochs * per_epoch
    optimizer: Any = torch.optim.AdamW(_groups(kinds, settings))
    schedule: Any = get_linear_schedule_with_warmup(optimizer, int(settings.warmup_ratio * steps), steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    # Without accelerate's wrapper: training is under its autocast below, measuring is in float32.
    gated: PreTrainedModel = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    budget = Budget(
        gate_vectors(gated, layers, settings.granularity),
        sparsity=settings.sparsity,
        controller=settings.controller,
        steps=steps,
        penalty_weight=settings.penalty_weight,
    )
    manifest = RunManifest(
        settings=settings,
        task=rows.spec,
        status="training",
        step=0,
        base_sha256=model_files(base),
        data_fingerprint=rows.fingerprint,
        tensors={},
        report={
            "task": rows.spec.name,
            "metric_name": rows.spec.metric,
            "asked_sparsity": settings.sparsity,
            "granularity": settings.granularity,
            "controller": settings.controller,
            "total_gates": budget.total_gates,
            "dense_params": dense_params,
            "trainable_params": _count(kinds),
            "train_examples": len(train_rows),
            "epochs": epochs,
            "steps": steps,
            "device": str(accelerator.device),
            "curve": [],
        },
        versions=versions(),
    )

    step, started = 0, time.perf_counter()
    with RunWriter(output, tokenizer=tokenizer, probe=probe) as writer:

        def checkpoint(status: str) -> dict[str, Any]:
            report = {**manifest.report, **_measured(gated, dense_params, budget, validation, rows.spec)}
            seconds = time.perf_counter() - started
            report["train_seconds"] = round(seconds, 1)
            manifest.report["curve"].append(
                {"step": step, "metric_value": report["metric_value"], "closed_fraction": report["closed_fraction"]}
            )
            if accelerator.is_main_process:
                writer.save(gated, _at(manifest, status, step, report))
            return report

        progress.start(steps, "training")
        try:
            report: dict[str, Any] = {}
            for epoch in range(epochs):
                _set_epoch(loader, epoch)
                model.train()
                for batch in loader:
                    with accelerator.autocast():
                        loss = _loss(model, batch, rows.spec)
                    penalty = budget.penalty(step)
                    accelerator.backward(loss if penalty is None else loss + penalty)
                    step += 1
                    budget.after_backward(step)
                    accelerator.clip_grad_norm_(
                        [p for group in kinds.values() for p in group.values()], MAX_GRADIENT_NORM
                    )
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    _report_step(progress, step, loss, budget)
                report = checkpoint("finished" if epoch + 1 == epochs else "training")
                logger.info("epoch %d: %s %.4f", epoch + 1, report["metric_name"], report["metric_value"])
        except KeyboardInterrupt:
            if step:
                checkpoint("interrupted")
            raise
        finally:
            progress.finish()
    return {**report, "output_dir": str(output)}


def _accelerator(settings: TrainSettings) -> Accelerator:
    """Return an accelerator on the asked device."""
    if settings.device not in ("auto", "cpu") and not settings.device.startswith("cuda"):
        raise DeviceError(f"--device is {settings.device!r}, expected auto, cpu or cuda")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError("no CUDA device on this machine; use --device cpu")
    return Accelerator(
        cpu=settings.device == "cpu", mixed_precision="bf16" if settings.precision == "bf16" else "no"
    )


def _groups(kinds: dict[str, dict[str, nn.Parameter]], settings: TrainSettings) -> list[dict[str, Any]]:
    """Return the optimizer's groups: gates with their own rate, weight decay on the head alone."""
    small = [p for kind in ("biases", "layer_norms", "low_rank") for p in kinds[kind].values()]
    return [
        {"params": list(kinds["gates"].values()), "lr": settings.gate_learning_rate, "weight_decay": 0.0},
        {"params": small, "lr": settings.learning_rate, "weight_decay": 0.0},
        {"params": list(kinds["head"].values()), "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
    ]


def _loss(model: Any, batch: dict[str, Tensor], spec: TaskSpec) -> Tensor:
    """Return the task loss: mean squared error for regression, cross entropy else."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float()
    if spec.label_names is None:
        return functional.mse_loss(logits[:, 0], batch["labels"].float())
    return functional.cross_entropy(logits, batch["labels"])


def _measured(
    model: PreTrainedModel,
    dense_params: int,
    budget: Budget,
    validation: dict[str, DataLoader[Any]],
    spec: TaskSpec,
) -> dict[str, Any]:
    """Return what is counted and measured at this moment, on the gated model."""
    plan = plan_model(model, "inner")
    outputs = {name: predict(model, loader) for name, loader in validation.items()}
    logits, labels = (np.concatenate(parts) for parts in zip(*outputs.values(), strict=True))
    return {
        "metric_value": compute_metric(spec.metric, logits, labels),
        "metrics_by_split": {name: compute_metric(spec.metric, *pair) for name, pair in outputs.items()},
        "examples": len(labels),
        "closed_gates": budget.closed_gates,
        "closed_fraction": budget.closed_gates / budget.total_gates,
        "encoder_weights_removed": plan.removed_fraction,
        "encoder_macs_removed": plan.removed_fraction,
        "total_params": dense_params - plan.removed_parameters,
    }


@torch.no_grad()
def predict(
    model: PreTrainedModel, loader: DataLoader[Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.generic]]:
    """Return logits [rows, labels] and labels [rows] over a loader, in evaluation mode."""
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for batch in loader:
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        logits.append(model(**inputs).logits.float().cpu().numpy())
        labels.append(batch["labels"].numpy())
    model.train(was_training)
    return np.concatenate(logits), np.concatenate(labels)


def _probe(rows: Any, tokenizer: Any, max_length: int) -> dict[str, Tensor]:
    """Return the first validation rows as one padded batch: what every later form must agree on."""
    few = tokenize(rows.select(range(min(PROBE_ROWS, len(rows)))), tokenizer, max_length)
    batch: dict[str, Tensor] = next(iter(make_loader(few, tokenizer, PROBE_ROWS, shuffle=False, seed=0)))
    return {name: value for name, value in batch.items() if name != "labels"}


def _longest(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the longest input, in tokens, that model and tokenizer take."""
    positions = int(getattr(model.config, "max_position_embeddings", 512))
    if getattr(model.config, "model_type", "") in ("roberta", "xlm-roberta", "mpnet"):
        positions -= int(model.config.pad_token_id or 0) + 1  # these count positions from the padding id on
    return min(positions, int(tokenizer.model_max_length))


def _count(kinds: dict[str, dict[str, nn.Parameter]]) -> dict[str, int]:
    """Return trained numbers by kind, with their total."""
    counted = {kind: sum(p.numel() for p in group.values()) for kind, group in kinds.items()}
    return {**counted, "total": sum(counted.values())}


def _report_step(progress: Progress, step: int, loss: Tensor, budget: Budget) -> None:
    if step % 5 == 0:  # reading the loss waits for the device: not at every step
        value = loss.item()
        if not math.isfinite(value):
            raise ModelError(f"the loss is {value} at step {step}; try a smaller --learning-rate")
        progress.advance(5, loss=value, closed=budget.closed_gates / budget.total_gates)


def _at(manifest: RunManifest, status: str, step: int, report: dict[str, Any]) -> RunManifest:
    values = {**manifest.__dict__, "status": status, "step": step, "report": report}
    return RunManifest(**values)


def _set_epoch(loader: Any, epoch: int) -> None:
    if hasattr(loader, "set_epoch"):  # accelerate's wrapper
        loader.set_epoch(epoch)
    else:
        loader.batch_sampler.set_epoch(epoch)


def _present(rows: Any) -> Any:
    if rows is None:
        raise TypeError("load_rows returned no training rows")
    return rows
