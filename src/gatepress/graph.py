"""What an ONNX file says of itself. Weights that lie beside it are not read, and no session is opened."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from gatepress.errors import ArtifactError


def read_graph(file: Path) -> onnx.ModelProto:
    """Read an ONNX file; `ArtifactError` where it is none."""
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's errors are its own,
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{file}: not readable as ONNX ({reason}); export again") from error
    if not model.graph.node:
        raise ArtifactError(f"{file}: holds no graph; export again")
    return model


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


def opset_of(model: onnx.ModelProto) -> int | None:
    """Return the version of ONNX's own operators; None: it uses none."""
    return next((int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx")), None)


def check_external(model: onnx.ModelProto, directory: Path) -> set[str]:
    """Return the names of the files that hold weights beside the graph.

    Raises `ArtifactError` where one lies elsewhere, is missing or is shorter than the graph says.
    """
    names = set()
    for tensor in model.graph.initializer:
        if not uses_external_data(tensor):
            continue
        info = ExternalDataInfo(tensor)
        file = directory / info.location
        if Path(info.location).name != info.location:
            raise ArtifactError(f"{directory}: the graph looks for weights in {info.location!r}, outside; export again")
        end = (info.offset or 0) + (info.length or 0)
        if not file.is_file() or file.stat().st_size < end:
            raise ArtifactError(f"{file}: is missing or shorter than the {end} bytes of {tensor.name}; export again")
        names.add(info.location)
    return names


def _ends(values: Sequence[onnx.ValueInfoProto]) -> list[dict[str, Any]]:
    """Return inputs or outputs: a free axis by its name."""
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
