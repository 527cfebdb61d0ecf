"""From a model in torch to an ONNX directory; where ONNX Runtime disagrees with torch, nothing is kept.

The graph takes any batch and length. Why it is written by torch's graph exporter, with attention as
plain products and without intermediate shapes: `benchmarks/notes/onnx-exporters.md`.
"""

import contextlib
import importlib.metadata
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from transformers import PreTrainedModel

from gatepress import __version__
from gatepress.checkpoint import PROBE_FILE, model_errors, open_tokenizer, read_tensors
from gatepress.errors import ModelError, ParityError, UsageError
from gatepress.files import check_output, json_text, new_directory, sha256_of
from gatepress.runtime import (
    INPUTS,
    ONNX_FILE,
    ONNX_FORMAT,
    ONNX_MODEL,
    Runner,
    TorchRunner,
    input_names,
    open_runner,
)

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

Batch = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class _Checked:
    """What was compared, and the largest difference of a logit."""

    shapes: list[dict[str, Any]]
    difference: float


def export(
    source: str | Path,
    output: Path,
    *,
    force: bool = False,
    opset: int | None = None,
    max_diff: float = MAX_DIFF,
) -> dict[str, Any]:
    """Write `source` (anything torch runs: a run, a pruned directory, any model) as an ONNX directory.

    `opset` None: the exporter's own choice. ONNX Runtime must agree with torch within `max_diff` on
    random rows of several shapes, and on the run's probe rows where there are some; else
    `ParityError`. Also raises `UsageError`, `ModelError` where the model cannot be exported, and
    what `open_runner` raises. Nothing is written unless all went well.
    """
    _check(opset, max_diff)
    check_output(output, force=force)
    runner = open_runner(source)
    if not isinstance(runner, TorchRunner):
        raise UsageError(f"{source}: is ONNX already; give the directory that it was exported from")
    probe = Path(source) / PROBE_FILE
    with new_directory(output, force=force) as staged:
        model_file = staged / ONNX_MODEL
        write_onnx(runner.model, model_file, opset=opset)
        batches = [*random_batches(runner), *([_probe_rows(probe)] if probe.is_file() else [])]
        checked = _compare(runner, open_runner(model_file), batches, max_diff)
        if runner.tokenizer_dir is not None:
            open_tokenizer(runner.tokenizer_dir).save_pretrained(staged)
        (staged / "config.json").write_text(json_text(_config(runner.model)), encoding="utf-8")
        report = {
            "source_kind": runner.kind,
            "opset": _opset(model_file),
            "exporter": "torch.onnx.export(dynamo=True)",
            "inputs": list(runner.input_names),
            "shapes": checked.shapes,
            "max_abs_logit_diff": checked.difference,
            "total_params": runner.parameters,
            "size_bytes": sum(file.stat().st_size for file in staged.glob(f"{ONNX_MODEL}*")),
        }
        manifest = {
            **ONNX_FORMAT,
            "source": str(source),
            **{key: (runner.manifest or {}).get(key) for key in ("task", "data", "max_length")},
            "head_is_random": runner.head_is_random,
            "sha256": {file.name: sha256_of(file) for file in sorted(staged.glob(f"{ONNX_MODEL}*"))},
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
        with _plain_attention(model), _silence(), torch.no_grad():
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


def _check(opset: int | None, max_diff: float) -> None:
    problems = []
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not MIN_OPSET <= opset <= newest:
        problems.append(f"--opset is {opset}, expected {MIN_OPSET} to {newest}")
    if not (max_diff > 0 and math.isfinite(max_diff)):
        problems.append(f"--max-diff is {max_diff}, expected a positive number")
    if problems:
        raise UsageError("; ".join(problems))


@contextlib.contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Write attention as two products and a softmax: the fused call is taken apart into more nodes."""
    before = model.config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    try:
        model.set_attn_implementation("eager")
    except (ValueError, NotImplementedError, AttributeError):
        logger.debug("%s keeps its own attention", type(model).__name__)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:  # noqa: SLF001
            model.set_attn_implementation(before)


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


def _probe_rows(file: Path) -> Batch:
    return {name: value.numpy() for name, value in read_tensors(file).items() if name in INPUTS}


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
