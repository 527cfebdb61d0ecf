"""From a model in torch to a graph in an ONNX file, with free batch and length.

For why torch's graph exporter writes it, with attention as plain products and without intermediate shapes, see
`benchmarks/notes/onnx-exporters.md`.
"""

import contextlib
import errno
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from transformers import PreTrainedModel

from gatepress import shortcuts
from gatepress.agreement import random_rows
from gatepress.embedding import embeds
from gatepress.errors import ModelError, reason_of
from gatepress.files import explained, temporary_directory
from gatepress.runners import LOGITS, TOKENS, VECTORS, Batch, input_names

logger = logging.getLogger(__name__)

EXTERNAL_DATA_BYTES = 1_500_000_000  # a protobuf file ends at 2 GiB: above this, weights get a file of their own
# Operators that ONNX Runtime fuses several into, and whole operators that exporters may split.
FUSED = (
    *("Attention", "MultiHeadAttention", "BiasSoftmax"),
    *("BiasGelu", "FastGelu", "Gelu", "QuickGelu"),
    *("FusedGemm", "FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization", "SimplifiedLayerNormalization"),
)
EXAMPLE = (2, 7)  # the shape that torch exports with; it is none of those that are checked afterwards


def write_onnx(model: PreTrainedModel, file: Path, *, opset: int | None = None) -> None:
    """Write what a model computes as a graph with free batch and length; `ModelError` if torch cannot.

    Its output is `logits` [batch, labels]; of an embedder `sentence_embedding` [batch, hidden] and, for programs that
    pool by themselves, the tokens that it is pooled from, `last_hidden_state` [batch, length, hidden].
    """
    names = input_names(model)
    outputs = {VECTORS: "logits", TOKENS: TOKENS} if embeds(model) else {LOGITS: "logits"}
    example = random_rows(model, *EXAMPLE, padded=True)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    try:
        # Plain attention: the fused call is split into more nodes.
        with plain_attention(model), shortcuts.all_of_them(model), _silence(), torch.no_grad():
            torch.onnx.export(
                _Outputs(model, names, tuple(outputs.values())).eval(),
                tuple(torch.from_numpy(example[name]).to(model.device) for name in names),
                file,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=list(outputs),
                dynamic_shapes=(tuple({0: batch, 1: length} for _ in names),),
                external_data=size > EXTERNAL_DATA_BYTES,
                opset_version=opset,
            )
    except (OSError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the exporter's stages raise what they like
        reason = reason_of(_root_of(error), lines=1)  # the rest is about its stages and how to report bugs
        raise ModelError(
            f"{type(model).__name__}: torch cannot export it to ONNX ({reason}); --debug shows all of it"
        ) from error
    slim(file)


def _root_of(error: BaseException) -> BaseException:
    """Return the error that others were raised from."""
    while error.__cause__:
        error = error.__cause__
    return error


@contextlib.contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute attention as two products and a softmax while the block runs."""
    before = model.config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    try:
        model.set_attn_implementation("eager")
    except (ValueError, NotImplementedError, AttributeError):
        logger.debug("%s keeps its own attention", type(model).__name__)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:  # noqa: SLF001 - as above
            model.set_attn_implementation(before)


def operators(file: Path, batch: Batch) -> dict[str, int]:
    """Return what ONNX Runtime makes of a graph: how many of each operator it runs, including its own ones.

    Read from its profile of one run, because saving the optimized graph would write all weights once more.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    with temporary_directory() as directory, explained(Path(directory)):
        options.profile_file_prefix = str(Path(directory) / "profile")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        session.run(None, {one.name: batch[one.name] for one in session.get_inputs()})
        profile = Path(session.end_profiling())
        try:
            events = json.loads(profile.read_text(encoding="utf-8"))
        except ValueError:  # it was cut short, which ONNX Runtime does not report
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(profile)) from None
    ran = Counter(one["args"]["op_name"] for one in events if one["name"].endswith("_kernel_time"))
    return dict(sorted(ran.items()))


class _Outputs(torch.nn.Module):
    """The model as a function from its inputs, in order, to some of its outputs."""

    def __init__(self, model: PreTrainedModel, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map inputs [batch, length] to the outputs, in order."""
        out = self.model(**dict(zip(self.inputs, inputs, strict=True)))
        return tuple(out[name] for name in self.outputs)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hold back the exporter's warnings: about its own deprecations, and packages that nobody asked for."""
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


def slim(file: Path) -> None:
    """Drop what the exporter notes beside the graph.

    Its notes hold source paths of the machine that exported. Its intermediate shapes let ONNX Runtime
    see that a residual sum can be fused with the layer norm after it, and on a CPU that fused
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
