"""The metric of a task on its validation rows, the same for every form of a model."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatepress.batches import PROBE_ROWS, fitting, make_loader, probe_batch, queries_of, rows_in_order, tokenize
from gatepress.config import DEFAULT_RUNTIME, Arithmetic, DataSettings, Runtime, refuse_below, refuse_runtime
from gatepress.errors import ArtifactError, ModelError, UsageError
from gatepress.heads import MULTI, OTHER_CLASSES, problem_of
from gatepress.metrics import compute_metric, cosines
from gatepress.models import open_tokenizer
from gatepress.processes import ALONE, Processes
from gatepress.progress import NoProgress, Progress
from gatepress.runners import INPUTS, Runner
from gatepress.runtime import open_runner
from gatepress.tasks import TaskSpec
from gatepress.tasks.labels import are_numbered, folded, some
from gatepress.tasks.sources import Rows, load_rows

logger = logging.getLogger(__name__)

MAX_LENGTH = 128  # tokens, if neither the user nor a manifest says

Loaders = Mapping[str, DataLoader[Any]]  # split name -> padded batches of tensors, "labels" among them
Predict = Callable[[dict[str, torch.Tensor]], npt.NDArray[np.float32]]  # inputs -> logits [batch, labels]


def evaluate(  # noqa: PLR0913 - every option of the command is one
    target: str | Path,
    *,
    data: DataSettings | Mapping[str, Any] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    device: str = "auto",
    precision: Arithmetic = "fp32",
    runtime: Runtime = DEFAULT_RUNTIME,
    against: str | Path | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure what `runtime.open_runner` opens on the validation rows.

    A torch model computes in `precision`, as does a float32 file in OpenVINO. `against` is measured on the same rows,
    in float32, with its own tokenizer and by the default runtime, and the difference is reported.

    `data` as a mapping holds changes to what the directory's manifest says of its rows, such as
    `{"max_validation_samples": 100}`; None: no changes. `max_length` None: the directory's own, or else 128 tokens.
    Raises `UsageError` if neither names rows, `ModelError` if the model has no head for the task, `ArtifactError` on a
    malformed manifest, and what opening and loading raise.
    """
    refuse_below(1, batch_size=batch_size, max_length=max_length)
    runner = open_runner(
        target, device=device, precision=precision, runtime=runtime, trust_remote_code=trust_remote_code
    )
    refuse_runtime(runtime, target, runner.kind)
    if precision != "fp32" and not runner.takes_precision:
        raise UsageError(f"--precision is {precision}, but {target} computes in what it was exported in; leave it out")
    dials: dict[str, Any] = {"max_length": max_length, "trust_remote_code": trust_remote_code}
    basis = basis_of(runner, target, data=data, **dials)
    rival: tuple[Runner, PreTrainedTokenizerBase] | None = None
    if against is not None:  # opened before anything is measured, so that errors show at once
        other = open_runner(against, device=device, trust_remote_code=trust_remote_code)
        rival = other, _tokenizer_of(other, against, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": basis.max_length, "progress": progress}
    measured = evaluate_runner(runner, basis.rows, basis.tokenizer, **options)
    compared: dict[str, Any] = {}
    if rival:
        other, tokenizer = rival
        value = evaluate_runner(other, basis.rows, tokenizer, **options)["metric_value"]
        drop = value - measured["metric_value"]
        compared = {"against": str(against), "metric_value_against": value, "metric_drop": drop}
    return {
        "task": basis.rows.spec.name,
        **measured,
        **compared,
        "kind": runner.kind,
        "runtime": runner.runtime,
        "dtype": runner.dtype,
        "device": runner.device,
        "total_params": runner.parameters,
        "data_fingerprint": basis.rows.fingerprint,
    }


@dataclass(frozen=True)
class Basis:
    """The rows, tokenizer and length that a model is measured with."""

    data: DataSettings
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens


def basis_of(
    runner: Runner,
    target: str | Path,
    *,
    data: DataSettings | Mapping[str, Any] | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Basis:
    """Return the validation rows, tokenizer and length that fit an open model; raises what `evaluate` raises."""
    manifest = runner.manifest or {}
    spec = TaskSpec.from_json(manifest["task"]) if manifest.get("task") else None
    settings = (data if isinstance(data, DataSettings) else _said(manifest.get("data"), data or {}, target)).absolute()
    tokenizer = _tokenizer_of(runner, target, trust_remote_code=trust_remote_code)
    rows = load_rows(settings, splits="validation", spec=spec, classes=runner.label_names, embeds=runner.embeds)
    return Basis(settings, rows, tokenizer, max_length or manifest.get("max_length") or MAX_LENGTH)


def _tokenizer_of(runner: Runner, target: str | Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an open model; `ModelError` if that cannot be measured on texts."""
    if runner.head_is_random:
        raise ModelError(
            f"{target}: has no task head of its own, so there is nothing to measure; train one first, or, of an "
            "embedder, keep the modules.json of sentence-transformers beside it"
        )
    if runner.tokenizer_dir is None:
        raise ModelError(f"{target}: no tokenizer beside it; give the directory that `gatepress export` wrote")
    opened: PreTrainedTokenizerBase = open_tokenizer(runner.tokenizer_dir, trust_remote_code=trust_remote_code)
    return opened


def probe_rows(basis: Basis, runner: Runner) -> dict[str, npt.NDArray[np.int64]]:
    """Return the first validation rows as one batch."""
    rows = next(iter(basis.rows.validation.values()))
    tokens = fitting(basis.max_length, runner.max_tokens, basis.tokenizer)
    few = tokenize(rows.select(range(min(PROBE_ROWS, len(rows)))), basis.tokenizer, tokens)
    return {name: value.numpy() for name, value in probe_batch(few, basis.tokenizer).items()}


def evaluate_runner(  # noqa: PLR0913 - each is a dial of the measurement
    runner: Runner,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    max_length: int = MAX_LENGTH,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the metric of an open model on rows, each text truncated to `max_length` tokens."""
    spec = rows.spec
    if runner.embeds != spec.embeds:
        kinds = [f"{'an embedder' if one else 'a model with a head'}" for one in (runner.embeds, spec.embeds)]
        raise ModelError(f"{runner.name}: is {kinds[0]}, but the rows are those of {kinds[1]}; compare two of a kind")
    if runner.num_labels is not None:  # known before the first batch
        _refuse_other_width(runner, spec, runner.num_labels)
    problem = None if spec.embeds else runner.problem_type
    if problem and (problem == MULTI) != spec.multi_label:
        logger.warning("%s: its configuration says %s, and the rows are of %s", runner.name, problem, problem_of(spec))
    tokens = fitting(max_length, runner.max_tokens, tokenizer)
    loaders = {
        name: make_loader(tokenize(split, tokenizer, tokens), tokenizer, batch_size, shuffle=False, seed=0)
        for name, split in rows.validation.items()
    }
    columns = [] if spec.embeds else _columns(runner, spec)

    def predict(inputs: dict[str, torch.Tensor]) -> npt.NDArray[np.float32]:
        logits = runner.logits({name: value.numpy() for name, value in inputs.items()})
        _refuse_other_width(runner, spec, logits.shape[1])
        return logits[:, columns] if len(columns) == logits.shape[1] else logits

    return {**score(predict, loaders, spec, progress), "batch_size": batch_size, "max_length": tokens}


def _refuse_other_width(runner: Runner, spec: TaskSpec, outputs: int) -> None:
    if outputs not in spec.widths and not spec.embeds:
        names = runner.label_names or ()
        lacks = spec.num_labels < outputs == len(names) and spec.label_names is not None
        way = f"; if its rows merely lack a class, label them by name: {some(names)}" if lacks else ""
        raise ModelError(
            f"{runner.name}: has {outputs} outputs, but {spec.name} needs {spec.num_labels}; "
            f"give the data it was trained for, or a model for this task{way}"
        )


def evaluate_model(
    model: PreTrainedModel,
    loaders: Loaders,
    spec: TaskSpec,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Return the metric of a torch model on its own device.

    Afterwards all parts are in the mode of the model as a whole: callers that set some of them apart, as
    `distill.learn_from_teacher_` does with gates, must do so again.
    """
    with _predicting(model) as predict:
        return score(predict, loaders, spec, processes=processes)


def outputs_of(
    model: PreTrainedModel, loader: DataLoader[Any], processes: Processes = ALONE
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Return logits [rows, labels] of a torch model and labels [rows], in the order of the rows; modes as above."""
    with _predicting(model) as predict:
        return _outputs(predict, loader, processes)


@contextmanager
def _predicting(model: PreTrainedModel) -> Iterator[Predict]:
    """Yield a function that computes the logits of a torch model on its own device, without dropout."""

    def predict(inputs: dict[str, torch.Tensor]) -> npt.NDArray[np.float32]:
        on_device = {name: value.to(model.device) for name, value in inputs.items()}
        logits: npt.NDArray[np.float32] = model(**on_device).logits.float().cpu().numpy()
        return logits

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield predict
    finally:
        model.train(was_training)


def _outputs(
    predict: Predict, loader: DataLoader[Any], processes: Processes, progress: Progress | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Return logits and labels of all rows in their order; several processes share the batches."""
    progress = progress or NoProgress()
    parts = []
    for number, batch in enumerate(loader):
        if number % processes.count == processes.index:
            logits = predict({key: batch[key] for key in INPUTS if key in batch})
            parts.append((number, logits, batch["labels"].numpy()))
        progress.advance(1)
    ordered = sorted(processes.gathered(parts), key=itemgetter(0))
    order = np.argsort(rows_in_order(loader))
    logits, labels = (np.concatenate([part[which] for part in ordered])[order] for which in (1, 2))
    return logits, labels


def score(
    predict: Predict,
    loaders: Loaders,
    spec: TaskSpec,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Return `metric_name`, `metric_value` over all splits together, `metrics_by_split`, `examples`.

    Several processes share the batches, and each returns the same result.
    """
    progress = progress or NoProgress()
    outputs: dict[str, tuple[npt.NDArray[Any], ...]] = {}
    examples = seen = 0
    progress.start(sum(len(loader) for loader in loaders.values()), f"evaluating validation rows of {spec.name}")
    try:
        for name, loader in loaders.items():
            logits, labels = _outputs(predict, loader, processes, progress)
            queries = queries_of(loader) + seen  # no two splits share a query
            seen += len(labels)
            if spec.embeds:  # rows are texts, the first ones of all pairs before the second ones
                logits, labels, queries = cosines(logits), labels[: len(labels) // 2], queries[: len(labels) // 2]
            outputs[name] = logits, labels, queries
            examples += len(labels)
    finally:
        progress.finish()
    every = tuple(np.concatenate(parts) for parts in zip(*outputs.values(), strict=True))
    return {
        "metric_name": spec.metric,
        "metric_value": compute_metric(spec.metric, *every),
        "metrics_by_split": {name: compute_metric(spec.metric, *own) for name, own in outputs.items()},
        "examples": examples,
    }


def _said(data: Any, changes: Mapping[str, Any], target: str | Path) -> DataSettings:
    """Return the data settings of the manifest with `changes`; `UsageError` if there is no manifest to name rows."""
    if unknown := changes.keys() - {one.name for one in fields(DataSettings)}:
        raise UsageError(f"data names {', '.join(sorted(unknown))}, expected fields of DataSettings")
    if data is None:
        raise UsageError(f"{target}: does not say what to measure on; give --task NAME or --validation-file FILE")
    try:
        said = DataSettings(**data)
    except (TypeError, UsageError) as error:
        raise ArtifactError(f"{target}: data in the manifest is malformed ({error}); give --task NAME") from None
    return replace(said, **changes)


def _columns(runner: Runner, spec: TaskSpec) -> list[int]:
    """Return which output stands for each label of the task: models from elsewhere order them differently.

    If they have other names, their order is trusted, with a warning.
    """
    names, own = spec.label_names or (), runner.label_names or ()
    for wanted, given in ((names, own), (folded(names), folded(own))):
        if given and len(set(given)) == len(given) and sorted(given) == sorted(wanted):
            return [given.index(name) for name in wanted]
    if len(own) > 1 and names and not are_numbered(own):
        logger.warning(OTHER_CLASSES, runner.name, ", ".join(own), ", ".join(names))
    return list(range(spec.num_labels))
