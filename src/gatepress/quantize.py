"""A float32 ONNX file with its weights in int8: what is quantized, and why this is fixed.

Each choice is measured in `benchmarks/notes/int8.md`:

- one scale per output: one scale for a whole matrix loses several points of accuracy on some models
  and is not faster;
- inputs of the products are quantized while the model runs, so nothing has to be calibrated;
- word embeddings with one scale: half of a small model's file, at no visible cost;
- weights of products use 7 of the 8 bits: sums of two full ones do not fit into the 16 bits in which processors
  without VNNI add them up, and what is cut off there is many times what the bit is worth;
- attention's products of two activations, the pooler, the head and small tables stay float32.
"""

import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from gatepress.errors import ModelError, reason_of

WORDS = "input_ids"  # the input that word embeddings are looked up by
_SHOWN = ("MatMul", "Gemm", "Gather")


def quantize_file_(file: Path) -> dict[str, Any]:
    """Give a graph int8 weights, in place; return what was quantized.

    Weights that are in a file of their own (`<name>.data`) stay in one. Raises `ModelError`
    if ONNX Runtime cannot quantize the graph, which is then left unchanged.
    """
    graph = onnx.load(file, load_external_data=False).graph
    chosen = _chosen(graph)
    if not chosen["MatMul"]:
        raise ModelError(f"{file}: has no matrix product with a float32 weight; export without --quantize")
    try:
        # Moved into place, never written over: a session that is open on the file reads its weights from it.
        with tempfile.TemporaryDirectory(dir=file.parent) as place, _silence():
            external, made = file.with_name(f"{file.name}.data").is_file(), file
            for operator in (name for name, nodes in chosen.items() if nodes):
                before, made = made, Path(place) / operator / file.name
                made.parent.mkdir()
                quantize_dynamic(
                    before,
                    made,
                    op_types_to_quantize=[operator],
                    nodes_to_quantize=chosen[operator],
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    reduce_range=operator == "MatMul",
                    use_external_data_format=external,
                )
            _check(made, len(chosen["MatMul"]))
            for part in made.parent.iterdir():
                part.replace(file.with_name(part.name))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the many parts of the quantizer raise errors without a common base
        raise ModelError(
            f"ONNX Runtime cannot quantize the graph ({reason_of(error)}); export without --quantize"
        ) from error
    total = Counter(node.op_type for node in graph.node)
    return {
        "operators": {name: {"quantized": len(chosen.get(name, ())), "of": total[name]} for name in _SHOWN},
        "weight_type": "int8",
        "per_channel": True,
        "embeddings": bool(chosen["Gather"]),
    }


def _chosen(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Return the names of the nodes to quantize: products with a constant weight, look-ups of word embeddings."""
    weights = {one.name for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
    products = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    words = [
        node.name
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in weights and node.input[1] == WORDS
    ]
    return {"MatMul": products, "Gather": words}


def _check(file: Path, expected: int) -> None:
    """Raise an error if the quantizer left products unchanged, which it does silently."""
    made = Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)["MatMulInteger"]
    if made != expected:
        raise ValueError(f"{made} of {expected} products came out in int8")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hold back the hints that the quantizer logs on the root logger, and the handler that this installs."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "onnxruntime" not in record.pathname

    root, nowhere = logging.getLogger(), logging.NullHandler()
    root.addHandler(nowhere)
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
        root.removeHandler(nowhere)
