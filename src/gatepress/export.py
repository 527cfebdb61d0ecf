"""From a model in torch to an ONNX directory; where ONNX Runtime disagrees with torch, nothing is kept.

The graph takes any batch and length. Why it is written by torch's graph exporter, with attention as
plain products and without intermediate shapes: `benchmarks/notes/onnx-exporters.md`. On request it is
quantized once it agrees.
"""

import contextlib
import errno
import importlib.metadata
import json
import logging
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from gatepress import __version__
from gatepress.checkpoint import PROBE_FILE, read_probe
from gatepress.errors import GatepressError, MetricDropError, ModelError, ParityError, UsageError
from gatepress.evaluation import Basis, basis_of, evaluate_runner, probe_rows
from gatepress.files import check_output, json_text, new_directory, sha256_of
from gatepress.manifests import ONNX_FILE, ONNX_FORMAT, ONNX_MODEL
from gatepress.modeling_gatepress import PrunedLinear
from gatepress.models import model_errors, open_tokenizer, save_tokenizer
from gatepress.progress import Progress
from gatepress.quantize import quantize_file
from gatepress.runners import Runner, TorchRunner, input_names, plain_attention
from gatepress.runtime import open_runner

logger = logging.getLogger(__name__)

MAX_DIFF = 1e-4  # between float32 logits
MIN_OPSET = 17  # LayerNormalization as one operator
EXTERNAL_DATA_BYTES = 1_500_000_000  # a protobuf file ends at 2 GiB: above this, weights get their own file
LONGEST_TRIED = 512  # tokens
SEED = 0

EXAMPLE = (2, 7)  # the shape that torch exports with; none of those that are checked afterwards
# (batch, length, padded): what a graph with a frozen axis or a wrong mask fails on.
SHAPES = (
    (1, 1, False),
    (1, 3, False),
    (4, 2, False),
    (3, 16, True),
    (5, 33, True),
    (1, LONGEST_TRIED, False),
)
# What ONNX Runtime makes of several operators, and whole operators that exporters may take apart.
FUSED = (
    *("Attention", "MultiHeadAttention", "BiasSoftmax"),
    *("BiasGelu", "FastGelu", "Gelu", "QuickGelu"),
    *("FusedGemm", "FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"),
)

Batch = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class _Checked:
    """What was compared, and the largest difference of a logit."""

    shapes: list[dict[str, Any]]
    difference: float


def export(  # noqa: PLR0913 - every option of the command is one
    source: str | Path,
    output: Path,
    *,
    force: bool = False,
    opset: int | None = None,
    max_diff: float = MAX_DIFF,
    quantize: Literal["int8"] | None = None,
    max_metric_drop: float | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `source` (anything torch runs: a run, a pruned directory, any model) as an ONNX directory.

    `opset` None: the exporter's own choice. ONNX Runtime must agree with torch within `max_diff` on
    random rows of several shapes, and on the run's probe rows where there are some; else
    `ParityError`. With `quantize` that float32 graph is then quantized, and measured against itself on
    the rows that the source names unless `measure` is off; `MetricDropError` where the metric drops by more
    than `max_metric_drop`. Also raises `UsageError`, `ModelError` where the model cannot be exported or
    quantized, and what `open_runner` raises. Nothing is written unless all went well.
    """
    _check(opset, max_diff, quantize, max_metric_drop)
    check_output(output, force=force)
    runner = open_runner(source)
    if not isinstance(runner, TorchRunner):
        raise UsageError(f"{source}: is ONNX already; give the directory that it was exported from")
    basis = _basis(runner, source, required=max_metric_drop is not None) if quantize and measure else None
    kept = runner.kind == "run" and (Path(source) / PROBE_FILE).is_file()
    random = random_batches(runner)
    real = [_kept_rows(runner, Path(source))] if kept else [probe_rows(basis, runner)] if basis else []
    with new_directory(output, force=force) as staged:
        model_file = staged / ONNX_MODEL
        write_onnx(runner.model, model_file, opset=opset)
        bound: dict[str, str] = {}
        if runner.tokenizer_dir is not None:
            bound = save_tokenizer(open_tokenizer(runner.tokenizer_dir), staged)
        (staged / "config.json").write_text(json_text(_config(runner.model)), encoding="utf-8")
        exact = open_runner(model_file)
        checked = _compare(runner, exact, [*random, *real], max_diff)
        smaller: dict[str, Any] = {}
        if quantize:
            size = _size(staged)
            quantized = quantize_file(model_file, model_file)
            _slim(model_file)
            after = open_runner(model_file)  # `exact` stays open, though its file is gone
            quantized["logit_diff"] = {
                kind: _difference(exact, after, batches) if batches else None
                for kind, batches in (("random", random), ("probe", real))
            }
            smaller = {"quantize": "int8", "quantized": quantized, "size_bytes_fp32": size}
            smaller |= _metric(exact, after, basis, max_metric_drop, progress)
        made = operators(model_file, random[0])
        report = {
            "source_kind": runner.kind,
            "opset": _opset(model_file),
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
            },
            **{key: (runner.manifest or {}).get(key) for key in ("task", "data", "max_length")},
            "head_is_random": runner.head_is_random,
            "sha256": {
                file.name: sha256_of(file) for file in sorted([staged / "config.json", *staged.glob(f"{ONNX_MODEL}*")])
            }
            | bound,
            **report,
            "versions": _versions(),
        }
        (staged / ONNX_FILE).write_text(json_text(manifest), encoding="utf-8")
    return {**report, "head_is_random": runner.head_is_random, "output_dir": str(output)}


def write_onnx(model: PreTrainedModel, file: Path, *, opset: int | None = None) -> None:
    """Write a model's logits as a graph with free batch and length; `ModelError` where torch cannot."""
    names = input_names(model)
    example = _rows(model, *EXAMPLE, padded=True)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    try:
        # Plain attention: the fused call is taken apart into more nodes.
        with plain_attention(model), _rows_of_zeros(model), _silence(), torch.no_grad():
            torch.onnx.export(
                _Logits(model, names).eval(),
                tuple(torch.from_numpy(example[name]).to(model.device) for name in names),
                file,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(tuple({0: batch, 1: length} for _ in names),),
                external_data=size > EXTERNAL_DATA_BYTES,
                opset_version=opset,
            )
    except (OSError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the exporter's stages raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelError(
            f"{type(model).__name__}: torch cannot export it to ONNX ({reason}); --debug shows all of it"
        ) from error
    _slim(file)


@contextlib.contextmanager
def _rows_of_zeros(model: PreTrainedModel) -> Iterator[None]:
    """Let matrices compute the zeros that closed outputs are: ONNX Runtime takes longer to put some behind a result."""
    scattered = (part for part in model.modules() if isinstance(part, PrunedLinear) and part.out_index is not None)
    before = [(part, part.weight, part.bias) for part in scattered]
    try:
        for part, weight, bias in before:
            part.weight = torch.nn.Parameter(functional.pad(weight.detach(), (0, 0, 0, 1)))
            part.bias = None if bias is None else torch.nn.Parameter(functional.pad(bias.detach(), (0, 1)))
        yield
    finally:
        for part, weight, bias in before:
            part.weight, part.bias = weight, bias


def random_batches(runner: Runner, *, seed: int = SEED) -> list[Batch]:
    """Return the batches that a form of this model is compared on: `SHAPES`, cut to what the model takes."""
    if not isinstance(runner, TorchRunner):
        raise TypeError("only a torch model knows its vocabulary")
    longest = min(runner.max_tokens or LONGEST_TRIED, LONGEST_TRIED)
    shapes = dict.fromkeys((rows, min(length, longest), padded) for rows, length, padded in SHAPES)
    return [
        _rows(runner.model, rows, length, padded=padded, seed=seed + number)
        for number, (rows, length, padded) in enumerate(shapes)
    ]


def operators(file: Path, batch: Batch) -> dict[str, int]:
    """Return what ONNX Runtime makes of a graph: how many of each operator it runs, its own ones among them.

    Read from its profile of one run: saving the optimized graph would write all weights once more.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as directory:
        options.profile_file_prefix = str(Path(directory) / "profile")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        session.run(None, {one.name: batch[one.name] for one in session.get_inputs()})
        profile = Path(session.end_profiling())
        try:
            events = json.loads(profile.read_text(encoding="utf-8"))
        except ValueError:  # it was cut short, which ONNX Runtime does not tell
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(profile)) from None
    ran = Counter(one["args"]["op_name"] for one in events if one["name"].endswith("_kernel_time"))
    return dict(sorted(ran.items()))


class _Logits(torch.nn.Module):
    """The model as a function from its inputs, in order, to its logits."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs [batch, length] to logits [batch, labels]."""
        logits: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def _difference(before: Runner, after: Runner, batches: list[Batch]) -> dict[str, Any]:
    """Return how far the logits of two forms lie apart; `ParityError` where they are no numbers."""
    apart = np.concatenate([np.abs(after.logits(batch) - before.logits(batch)).ravel() for batch in batches])
    if not np.isfinite(apart).all():
        raise ParityError("logits in int8 are not finite numbers; nothing was written; export without --quantize")
    rows = sum(len(batch["input_ids"]) for batch in batches)
    return {"rows": rows, "max": float(apart.max()), "mean": float(apart.mean())}


def _basis(runner: Runner, source: str | Path, *, required: bool) -> Basis | None:
    """Return the rows that the manifest names; None, and a note why, where they cannot be had.

    With `required` that is an error instead.
    """
    if not (runner.manifest or {}).get("data"):
        if required:
            raise UsageError(
                f"{source}: names no rows that a metric could be measured on; export a run directory, "
                "or what was pruned from one, or leave out --max-metric-drop"
            )
        logger.warning("%s names no rows, so what int8 costs in the metric is not measured", source)
        return None
    try:
        return basis_of(runner, source)
    except GatepressError as error:
        if required:
            raise
        logger.warning("what int8 costs in the metric is not measured: %s", error)
        return None


def _metric(
    before: Runner, after: Runner, basis: Basis | None, limit: float | None, progress: Progress | None
) -> dict[str, Any]:
    """Return the metric of both forms and their difference, positive where int8 is worse; None: no rows.

    Raises `MetricDropError` above `limit`.
    """
    if basis is None:
        return dict.fromkeys(("metric_name", "metric_value", "metric_value_fp32", "metric_drop", "examples"))
    was, now = (
        evaluate_runner(one, basis.rows, basis.tokenizer, max_length=basis.max_length, progress=progress)
        for one in (before, after)
    )
    name, drop = now["metric_name"], was["metric_value"] - now["metric_value"]
    if limit is not None and drop > limit:
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


def _check(opset: int | None, max_diff: float, quantize: str | None, max_metric_drop: float | None) -> None:
    problems = []
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not MIN_OPSET <= opset <= newest:
        problems.append(f"--opset is {opset}, expected {MIN_OPSET} to {newest}")
    if not (max_diff > 0 and math.isfinite(max_diff)):
        problems.append(f"--max-diff is {max_diff}, expected a positive number")
    if quantize not in (None, "int8"):
        problems.append(f"--quantize is {quantize!r}, expected int8")
    if max_metric_drop is not None and not 0 <= max_metric_drop < math.inf:
        problems.append(f"--max-metric-drop is {max_metric_drop}, expected 0 or a positive number")
    if max_metric_drop is not None and quantize is None:
        problems.append("--max-metric-drop limits what --quantize costs; give --quantize int8 with it")
    if problems:
        raise UsageError("; ".join(problems))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep back what the exporter warns of: its own deprecations, packages that nobody asked for."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for one in loggers:
                one.setLevel(logging.ERROR)
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _slim(file: Path) -> None:
    """Drop what the exporter notes beside the graph.

    Its notes hold source paths of the machine that exported. Its intermediate shapes let ONNX Runtime
    see that a residual sum can be fused with the layer norm behind it, and on a CPU that fused
    operator is slower than the two it replaces.
    """
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    del graph.value_info[:]
    for part in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.initializer,
        *model.functions,
    ):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(model, file)


def _rows(model: PreTrainedModel, rows: int, length: int, *, padded: bool, seed: int = SEED) -> Batch:
    """Return random token ids [rows, length], on the right of all rows but the first padded if asked."""
    random = np.random.default_rng(seed)
    pad = model.config.pad_token_id or 0
    ids = random.integers(0, model.config.vocab_size - 1, (rows, length), dtype=np.int64)
    ids += ids >= pad  # any token but the padding
    lengths = np.maximum(1, length - np.arange(rows) * length // rows) if padded else np.full(rows, length)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    second = (np.arange(length) >= lengths[:, None] // 2).astype(np.int64) * mask
    batch = {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask, "token_type_ids": second}
    return {name: batch[name] for name in input_names(model)}


def _kept_rows(runner: TorchRunner, run: Path) -> Batch:
    return {name: value.numpy() for name, value in read_probe(run, runner.model).items()}


def _compare(torch_runner: Runner, onnx_runner: Runner, batches: list[Batch], max_diff: float) -> _Checked:
    """Run both on every batch; `ParityError` above `max_diff`, or where a number or a shape is off."""
    shapes, worst = [], 0.0
    for batch in batches:
        rows, length = batch["input_ids"].shape
        wanted = torch_runner.logits(batch)
        try:
            got = onnx_runner.logits(batch)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            reason = " ".join(str(error).split())[:200]
            raise ParityError(
                f"ONNX Runtime cannot run {rows} x {length} tokens ({reason}); nothing was written"
            ) from error
        if got.shape != wanted.shape:
            raise ParityError(
                f"logits of {rows} x {length} tokens are {got.shape} in ONNX Runtime "
                f"and {wanted.shape} in torch; nothing was written"
            )
        difference = float(np.abs(got - wanted).max())
        if not difference <= max_diff:
            raise ParityError(
                f"logits of {rows} x {length} tokens differ by {difference:.2e} between ONNX Runtime and "
                f"torch, expected at most --max-diff {max_diff:g}; nothing was written"
            )
        padding = int((batch["attention_mask"] == 0).sum()) if "attention_mask" in batch else 0
        shapes.append({"rows": rows, "length": length, "padding": padding, "max_abs_logit_diff": difference})
        worst = max(worst, difference)
    return _Checked(shapes, worst)


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """Return a configuration for tools that read one beside an ONNX file: the family's own type.

    The graph holds the real widths, so what describes the pruned torch class stays behind.
    """
    with model_errors(type(model).__name__):
        values: dict[str, Any] = model.config.to_diff_dict()
    for name in ("auto_map", "gatepress", "_name_or_path"):
        values.pop(name, None)
    values["model_type"] = model.config.model_type.removeprefix("gatepress_").replace("_", "-")
    values["architectures"] = [type(model).__name__.removeprefix("Gatepress")]
    return values


def _opset(file: Path) -> int:
    imports = onnx.load(file, load_external_data=False).opset_import
    return next(int(one.version) for one in imports if one.domain in ("", "ai.onnx"))


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {"gatepress": __version__, **{name: importlib.metadata.version(name) for name in names}}
