"""Exported graphs in OpenVINO, on the CPU. Importing this needs the package, an extra of gatepress."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch

from gatepress.config import Arithmetic
from gatepress.errors import DeviceError
from gatepress.exported import ExportedRunner, Opened, loading
from gatepress.runners import Batch, fitted

# What it calls an arithmetic, and the type that is.
HINTS: dict[Arithmetic, tuple[str, str]] = {
    "fp32": ("f32", "float32"),
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("f16", "float16"),
}


@dataclass(frozen=True)
class OpenVinoRunner(ExportedRunner):
    """A graph that OpenVINO compiled for the CPU, with one request, whose tensors are used again and again."""

    compiled: Any = field(kw_only=True)  # openvino.CompiledModel
    request: Any = field(kw_only=True)  # openvino.InferRequest
    precision: Arithmetic = "fp32"
    runtime = "openvino"
    label = "OpenVINO"

    @property
    def takes_precision(self) -> bool:
        """Whether its weights are in float32; int8 products stay what they are."""
        return self.stored == "float32"

    @property
    def dtype(self) -> str:
        """The type that was asked for; int8 if that is what the file holds."""
        return HINTS[self.precision][1] if self.takes_precision else self.stored

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the graph."""
        return tuple(one.any_name for one in self.compiled.inputs)

    @property
    def outputs(self) -> dict[str, Sequence[Any]]:
        """The outputs of the graph; a name that the graph has for it twice is one of them."""
        return {
            name: [side.get_length() if side.is_static else None for side in one.partial_shape]
            for one in self.compiled.outputs
            for name in one.names
        }

    def prepare(self, batch: Batch) -> Any:
        """Return its tensors, on the memory of the arrays."""
        types = {one.any_name: one.element_type.to_dtype() for one in self.compiled.inputs}
        return {
            name: openvino.Tensor(np.ascontiguousarray(values, types[name]), shared_memory=True)
            for name, values in fitted(batch, self.input_names).items()
        }

    def compute(self, prepared: Any) -> Any:
        """Return a copy of the output: the next call writes over it."""
        self.request.infer(prepared, share_outputs=True)
        return self.request.get_tensor(self.output_name).data.copy()


def has_gpu() -> bool:
    """Return False: its GPUs are others than torch's."""
    return False


def open_graph(file: Path, device: str, precision: Arithmetic) -> Opened:
    """Compile a graph for the CPU, in `precision` if it is a float32 one; raises `DeviceError` and `ArtifactError`."""
    if device != "cpu":
        raise DeviceError(f"OpenVINO computes on the CPU here, --device is {device}; use --device cpu")
    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision.upper() not in able:
        raise DeviceError(f"OpenVINO computes no {precision} on this CPU, only {', '.join(able)}; use --precision fp32")
    told = {"INFERENCE_PRECISION_HINT": HINTS[precision][0], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with loading(OpenVinoRunner.label, file):
        compiled = core.compile_model(str(file), "CPU", told)
    return partial(OpenVinoRunner, compiled=compiled, request=compiled.create_infer_request(), precision=precision)
