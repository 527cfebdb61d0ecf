"""What an ONNX file says about itself. No weights beside it are read, and no session is opened."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from gatepress.errors import ArtifactError, reason_of, unreadable
from gatepress.manifests import file_in

LARGE = 1024  # a size that any graph may ask for
FEW = 64  # numbers in a constant that sizes are made of, and negative ones that count from the end
# Operators whose output is as large as some inputs say, and the first of these inputs.
SIZED = {"Expand": 1, "Pad": 1, "Tile": 1, "Reshape": 1, "Resize": 1, "OneHot": 1, "Range": 0, "ConstantOfShape": 0}
# Operators that pass such numbers on, and how many inputs hold them.
CARRYING = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat", "Where"), FEW),
    **dict.fromkeys(("Cast", "Identity", "Slice", "Gather", "Squeeze", "Unsqueeze", "Reshape"), 1),
}
INTEGER_PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul")
DOMAINS = ("", "ai.onnx", "com.microsoft")  # ONNX itself, and ONNX Runtime's own operators
_KIND = onnx.AttributeProto
_NESTED = (_KIND.GRAPH, _KIND.GRAPHS, _KIND.SPARSE_TENSOR, _KIND.SPARSE_TENSORS)
_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_T = onnx.TensorProto
_WHOLE = (_T.INT32, _T.INT64)
_BITS: dict[int, int] = {
    **dict.fromkeys((_T.BOOL, _T.INT8, _T.UINT8), 8),
    **dict.fromkeys((_T.FLOAT16, _T.BFLOAT16, _T.INT16, _T.UINT16), 16),
    **dict.fromkeys((_T.FLOAT, _T.INT32, _T.UINT32), 32),
    **dict.fromkeys((_T.DOUBLE, _T.INT64, _T.UINT64), 64),
    **dict.fromkeys((_T.INT4, _T.UINT4), 4),
}


def read_graph(file: Path) -> onnx.ModelProto:
    """Read an ONNX file; `ArtifactError` if it is not one, or has names that no terminal can show."""
    try:
        model = onnx.load(file, load_external_data=False)
    except PermissionError as error:
        raise ArtifactError(unreadable(file, error)) from None
    except Exception as error:  # protobuf has errors of its own
        raise ArtifactError(f"{file}: not readable as ONNX ({reason_of(error)}); export again") from error
    if not model.graph.node:
        raise ArtifactError(f"{file}: holds no graph; export again")
    for name in _names(model):
        if not isinstance(name, str) or not name.isprintable():
            raise ArtifactError(f"{file}: has the name {repr(name)[:80]}, which cannot be shown; export again")
    return model


def computes_in(model: onnx.ModelProto) -> str:
    """Return the type of a graph's matrix products: int8 if some are of integers, otherwise float32."""
    return "int8" if any(node.op_type in INTEGER_PRODUCTS for node in model.graph.node) else "float32"


def describe(model: onnx.ModelProto) -> dict[str, Any]:
    """Return inputs, outputs, operator set, how many of each operator, and the stored tensors with their shapes."""
    graph = model.graph
    stored = {one.name for one in graph.initializer}
    return {
        "inputs": _ends([one for one in graph.input if one.name not in stored]),
        "outputs": _ends(graph.output),
        "opset": opset_of(model),
        "nodes": dict(sorted(Counter(node.op_type for node in graph.node).items())),
        "initializers": [
            {"name": one.name, "dtype": _dtype(one.data_type), "shape": list(one.dims)} for one in graph.initializer
        ],
    }


def names_beside(model: onnx.ModelProto) -> set[str]:
    """Return the names of the files beside the graph that are said to hold its weights."""
    said = (one for tensor in model.graph.initializer for one in tensor.external_data if one.key == "location")
    return {one.value for one in said if Path(one.value).name == one.value}


def opset_of(model: onnx.ModelProto) -> int | None:
    """Return the version of ONNX's own operators; None: it uses none."""
    return next((int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx")), None)


def check_graph(model: onnx.ModelProto, directory: Path) -> set[str]:
    """Refuse what must not be given to ONNX Runtime; return the names of the files that hold weights beside the graph.

    Raises `ArtifactError` if nodes hold graphs of their own or are of another domain, or if tensors do not have the
    size that their shape says, or lie elsewhere, in no file, or beyond its end.
    """
    graph = model.graph
    if model.functions or graph.sparse_initializer:
        raise ArtifactError(
            f"{directory}: the graph has functions or sparse tensors, expected plain nodes; export again"
        )
    for node in graph.node:
        inner = [one.name for one in node.attribute if one.type in _NESTED or one.HasField("g") or one.graphs]
        if inner or node.domain not in DOMAINS:
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise ArtifactError(f"{directory}: the graph has a node {kind}, expected no loops and no own operators")
    for tensor in _constants(graph.node):
        if uses_external_data(tensor):
            raise ArtifactError(f"{directory}: a constant {tensor.name!r} lies outside the graph; export again")
        _check_held(tensor, directory, len(tensor.raw_data))
    names = set()
    for tensor in graph.initializer:
        if uses_external_data(tensor):
            names.add(_check_external(tensor, directory))
        else:
            _check_held(tensor, directory, len(tensor.raw_data))
    _refuse_large(graph, directory)
    return names


def _refuse_large(graph: onnx.GraphProto, directory: Path) -> None:
    """Raise `ArtifactError` if a constant that a size is made of is larger than any size that is stored."""
    most = max([LARGE, *(size for one in graph.initializer for size in one.dims)])
    sizes: set[str] = set()
    for node in reversed(graph.node):  # readers of a value come after it
        if node.op_type in SIZED:
            sizes |= set(node.input[SIZED[node.op_type] :])
        if node.op_type in CARRYING and sizes & set(node.output):
            sizes |= set(node.input[: CARRYING[node.op_type]])
    stored = [(one.name, one) for one in graph.initializer]
    stored += [(name, one) for node in graph.node for one in _constants([node]) for name in node.output]
    numbers = [
        (name, int(number))
        for name, one in stored
        if name in sizes and one.data_type in _WHOLE and math.prod(one.dims) <= FEW and not uses_external_data(one)
        for number in numpy_helper.to_array(one).flat
    ]
    numbers += [
        (name, number)
        for node in graph.node
        if node.op_type in ("Constant", "ConstantOfShape") and sizes & set(node.output)
        for one in node.attribute
        for number in (one.i, *one.ints)
        for name in node.output
    ]
    for name, number in numbers:
        if not -FEW <= number <= most:
            raise ArtifactError(f"{directory}: the graph makes a size of {name}, {number}, expected at most {most}")


def _check_external(tensor: onnx.TensorProto, directory: Path) -> str:
    """Return the name of the file that holds a tensor; `ArtifactError` if it is elsewhere or too short."""
    said = {one.key: one.value for one in tensor.external_data}
    name = file_in(directory, said.get("location"), "export again").name
    try:
        offset, length = (int(said.get(key) or 0) for key in ("offset", "length"))
    except ValueError:
        raise ArtifactError(f"{directory}: {tensor.name} lies at no number; export again") from None
    held = (directory / name).stat().st_size - offset
    length = length if "length" in said else held
    if offset < 0 or not 0 <= length <= held:
        raise ArtifactError(
            f"{directory / name}: is shorter than the {length} bytes of {tensor.name} at {offset}; export again"
        )
    _check_held(tensor, directory, length)
    return name


def _check_held(tensor: onnx.TensorProto, directory: Path, raw: int) -> None:
    """Raise `ArtifactError` if the bytes of a tensor, or its numbers, do not match its shape."""
    count = math.prod(tensor.dims)
    typed = max(len(getattr(tensor, name)) for name in _TYPED)
    bits = _BITS.get(tensor.data_type)
    fits = bits is not None and (typed == count if typed else raw == (count * bits + 7) // 8)
    if not fits or any(size < 0 for size in tensor.dims):
        raise ArtifactError(
            f"{directory}: the graph holds {raw or typed} {'bytes' if raw else 'numbers'} of {tensor.name}, which make "
            f"no tensor {list(tensor.dims)}; export again"
        )


def _names(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield all names of a graph; one that is not text comes as bytes."""
    graph = model.graph
    yield from (one.domain for one in model.opset_import)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (one.name for one in node.attribute)
    yield from (one.name for one in graph.initializer)
    for end in (*graph.input, *graph.output):
        yield from (end.name, *(axis.dim_param for axis in end.type.tensor_type.shape.dim))


def _constants(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for one in node.attribute:
            yield from ([one.t] if one.HasField("t") else [])
            yield from one.tensors


def _ends(values: Sequence[onnx.ValueInfoProto]) -> list[dict[str, Any]]:
    """Return inputs or outputs, with a free axis given by its name."""
    return [
        {
            "name": one.name,
            "dtype": _dtype(one.type.tensor_type.elem_type),
            "shape": [axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim],
        }
        for one in values
    ]


def _dtype(number: int) -> str:
    return str(onnx.TensorProto.DataType.Name(number)).lower()
