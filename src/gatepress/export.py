"""From a model in torch to an ONNX directory; if ONNX Runtime disagrees with torch, nothing is kept.

On request, the graph is quantized once it agrees.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import onnx
from transformers import PreTrainedModel

from gatepress.agreement import compare, quantized_difference, random_batches
from gatepress.checkpoint import PROBE_FILE, read_probe, read_run
from gatepress.config import MAX_LOGIT_DIFF, DataSettings, check_export, dropped
from gatepress.embedding import as_saved, write_modules_of
from gatepress.errors import ArtifactError, GatepressError, MetricDropError, ModelError, UsageError
from gatepress.evaluation import Basis, basis_of, evaluate_runner, probe_rows
from gatepress.expected import write_expected
from gatepress.families import dense_type, row_of
from gatepress.files import ONNX_FILE, check_output, expanded, json_text, new_directory, sha256_of
from gatepress.graph import opset_of
from gatepress.guest import as_guest
from gatepress.hub import now_at
from gatepress.manifests import ONNX_FORMAT, ONNX_MODEL, form_of, refuse_onnx
from gatepress.models import model_errors, open_tokenizer, save_tokenizer
from gatepress.ondisk import stands_on
from gatepress.progress import Progress
from gatepress.quantize import quantize_file_
from gatepress.runners import Batch, Runner, TorchRunner
from gatepress.runtime import open_runner
from gatepress.schema import refuse_unsound
from gatepress.tasks.labels import in_order, named
from gatepress.tracing import FUSED, operators, slim, write_onnx
from gatepress.versions import versions

logger = logging.getLogger(__name__)

MIN_OPSET = 17  # LayerNormalization as one operator


@as_guest()
def export(  # noqa: PLR0913 - every option of the command is one
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    opset: int | None = None,
    max_diff: float = MAX_LOGIT_DIFF,
    quantize: Literal["int8"] | None = None,
    max_metric_drop: float | None = None,
    measure: bool = True,
    data: DataSettings | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write `source` (anything that torch runs: a run, a pruned directory, any model) as an ONNX directory.

    `opset` None: the exporter's own choice. ONNX Runtime must agree with torch within `max_diff` on random rows of
    several shapes, and on the run's probe rows if there are any; otherwise `ParityError`. With `quantize`, that float32
    graph is then quantized and, unless `measure` is off, both are measured on the rows of `data`, which means what it
    does to `evaluation.evaluate`. `MetricDropError` if the metric drops by more than `max_metric_drop`. Also raises
    `UsageError`, `ModelError` if the model cannot be exported or quantized, and what `open_runner` raises. Nothing is
    written unless all of this succeeds.
    """
    output = Path(output)
    said = asdict(data) if isinstance(data, DataSettings) else data or {}
    rows = {name: value for name, value in said.items() if value is not None}
    check_export(max_diff=max_diff, quantize=quantize, max_metric_drop=max_metric_drop, rows=bool(rows))
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not MIN_OPSET <= opset <= newest:
        raise UsageError(f"--opset is {opset}, expected {MIN_OPSET} to {newest}")
    refuse_onnx(source)
    path = now_at(expanded(str(source)))
    below = stands_on(read_run(path).settings) if form_of(path) == "run" else []
    check_output(output, force=force, reads=(path, *below))
    runner = cast("TorchRunner", open_runner(source, trust_remote_code=trust_remote_code))
    family = row_of(runner.model.config.model_type)
    if family and family.causal and not runner.embeds and runner.model.config.pad_token_id is None:
        raise ModelError(
            f"{source}: has no padding token, so texts cannot share a batch; set pad_token in its tokenizer, or "
            "pad_token_id in its config.json"
        )
    if runner.head_is_random:
        logger.warning("%s: has no task head, so its logits mean nothing; train one first: gatepress train", source)
    needed = bool(rows) or max_metric_drop is not None
    asked: dict[str, Any] = {"data": data, "trust_remote_code": trust_remote_code}
    basis = _basis(runner, source, needed=needed, **asked) if quantize and measure else None
    kept = runner.kind == "run" and (path / PROBE_FILE).is_file()
    random = random_batches(runner)
    real: list[Batch] = [_kept_rows(runner, path)] if kept else [probe_rows(basis, runner)] if basis else []
    with new_directory(output, force=force) as staged:
        model_file = staged / ONNX_MODEL
        write_onnx(runner.model, model_file, opset=opset)
        bound = _write_tokenizer(runner, source, staged, trust_remote_code=trust_remote_code)
        (staged / "config.json").write_text(json_text(_config(runner.model)), encoding="utf-8")
        bound |= {name: sha256_of(staged / name) for name in write_modules_of(runner.model, staged)}
        exact = _opened(model_file, opset)
        checked = compare(runner, exact, [*random, *real], max_diff)
        smaller: dict[str, Any] = {}
        deployed = exact
        if quantize:
            size = _size(staged)
            quantized = quantize_file_(model_file)
            slim(model_file)
            deployed = open_runner(model_file)  # `exact` stays open although its file is gone
            quantized["logit_diff"] = {
                kind: quantized_difference(exact, deployed, batches) if batches else None
                for kind, batches in (("random", random), ("probe", real))
            }
            smaller = {"quantize": "int8", "quantized": quantized, "size_bytes_fp32": size}
            smaller |= _metric(exact, deployed, basis, max_metric_drop, progress)
        bound |= write_expected(staged, runner.model, deployed.logits)
        made = operators(model_file, random[0])
        report = {
            "source_kind": runner.kind,
            "opset": opset_of(onnx.load(model_file, load_external_data=False)),
            "exporter": "torch.onnx.export(dynamo=True)",
            "inputs": list(runner.input_names),
            "shapes": checked.shapes,
            "max_abs_logit_diff": checked.difference,
            "total_params": runner.parameters,
            "macs": runner.mac_terms,
            "size_bytes": _size(staged),
            "dtype": quantize or "float32",
            "operators": made,
            "fused_operators": {name: count for name, count in made.items() if name in FUSED},
            **smaller,
        }
        manifest = {
            **ONNX_FORMAT,
            "source": str(source),
            "source_manifest": runner.manifest,
            "asked": {
                "opset": opset,
                "max_diff": max_diff,
                "quantize": quantize,
                "max_metric_drop": max_metric_drop,
                "trust_remote_code": trust_remote_code,
                **rows,
            },
            **_measured_on(runner, basis),
            "head_is_random": runner.head_is_random,
            "sha256": {
                file.name: sha256_of(file) for file in sorted([staged / "config.json", *staged.glob(f"{ONNX_MODEL}*")])
            }
            | bound,
            **report,
            "versions": versions("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy"),
        }
        refuse_unsound(manifest)
        (staged / ONNX_FILE).write_text(json_text(manifest), encoding="utf-8")
    return {**report, "head_is_random": runner.head_is_random, "output_dir": str(output)}


def _write_tokenizer(runner: Runner, source: str | Path, directory: Path, *, trust_remote_code: bool) -> dict[str, str]:
    """Write the tokenizer, if there is one that needs no code; return file name -> sha256."""
    if runner.tokenizer_dir is None:
        return {}
    tokenizer = open_tokenizer(runner.tokenizer_dir, trust_remote_code=trust_remote_code)
    if tokenizer.init_kwargs.get("auto_map"):  # what gatepress writes must not ask anyone to run code
        logger.warning("%s: its tokenizer has code of its own, so none is written beside the graph", source)
        return {}
    return save_tokenizer(tokenizer, directory)


def _opened(file: Path, opset: int | None) -> Runner:
    """Open the exported graph; `UsageError` if it does not have the operator set that was asked for."""
    try:
        runner = open_runner(file)
    except ArtifactError as error:
        if opset is None:
            raise
        raise UsageError(
            f"--opset is {opset}, of which torch makes no graph that ONNX Runtime loads in these versions; "
            "give a smaller one, or leave it out"
        ) from error
    if opset is not None and (made := opset_of(onnx.load(file, load_external_data=False))) != opset:
        # the exporter leaves what it cannot convert as it is
        raise UsageError(f"--opset is {opset}, of which torch makes a graph of {made}; give {made}, or leave it out")
    return runner


def _basis(runner: Runner, source: str | Path, *, needed: bool, **asked: Any) -> Basis | None:
    """Return the rows that were asked for, or those that the manifest names.

    None, and a note that says why, if they cannot be had; an error if an option `needed` them.
    """
    try:
        return basis_of(runner, source, **asked)
    except GatepressError as error:
        if needed:
            raise
        logger.warning("what int8 costs in the metric is not measured: %s", error)
        return None


def _measured_on(runner: Runner, basis: Basis | None) -> dict[str, Any]:
    """Return `task`, `data` and `max_length` of the source, or else of the rows that it was measured on."""
    known = {key: (runner.manifest or {}).get(key) for key in ("task", "data", "max_length")}
    if known["task"] is None and basis is not None:
        known = {"task": basis.rows.spec.to_json(), "data": asdict(basis.data), "max_length": basis.max_length}
    return known


def _metric(
    before: Runner, after: Runner, basis: Basis | None, limit: float | None, progress: Progress | None
) -> dict[str, Any]:
    """Return the metric of both forms and their difference, positive if int8 is worse; None without rows.

    Raises `MetricDropError` above `limit`.
    """
    if basis is None:
        return dict.fromkeys(("metric_name", "metric_value", "metric_value_fp32", "metric_drop", "examples"))
    was, now = (
        evaluate_runner(one, basis.rows, basis.tokenizer, max_length=basis.max_length, progress=progress)
        for one in (before, after)
    )
    name, drop = now["metric_name"], was["metric_value"] - now["metric_value"]
    if limit is not None and dropped(drop, limit):
        raise MetricDropError(
            f"{name} is {now['metric_value']:.4f} in int8 and {was['metric_value']:.4f} in float32, a drop of "
            f"{drop:.4f}, expected at most --max-metric-drop {limit:g}; nothing was written; "
            "allow more, or export without --quantize"
        )
    return {
        "metric_name": name,
        "metric_value": now["metric_value"],
        "metric_value_fp32": was["metric_value"],
        "metric_drop": drop,
        "examples": now["examples"],
    }


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob(f"{ONNX_MODEL}*"))


def _kept_rows(runner: TorchRunner, run: Path) -> Batch:
    return {name: value.numpy() for name, value in read_probe(run, runner.model).items()}


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """Return a configuration for tools that read one beside an ONNX file: of the family's own type.

    The graph holds the real widths, so what describes the pruned torch class is left out.
    """
    with model_errors(type(model).__name__):
        values: dict[str, Any] = model.config.to_diff_dict()
    for name in ("auto_map", "gatepress", "_name_or_path"):
        values.pop(name, None)
    if values.get("id2label"):  # whatever type they have, tools read texts and counts
        values["id2label"], values["label2id"] = named(in_order(values["id2label"]))
    values["model_type"] = dense_type(model.config.model_type)
    values["architectures"] = [type(as_saved(model)).__name__.removeprefix("Gatepress")]
    return values
