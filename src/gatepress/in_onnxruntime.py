"""Exported graphs in ONNX Runtime, on the CPU and on CUDA devices."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from gatepress.config import Arithmetic
from gatepress.errors import DeviceError
from gatepress.exported import ExportedRunner, Opened, loading
from gatepress.runners import Batch, fitted

CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class OnnxRunner(ExportedRunner):
    """A session of ONNX Runtime."""

    session: ort.InferenceSession = field(kw_only=True)
    runtime = "onnxruntime"
    label = "ONNX Runtime"
    takes_precision = False

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the graph."""
        return tuple(one.name for one in self.session.get_inputs())

    @property
    def outputs(self) -> dict[str, Sequence[Any]]:
        """The outputs of the graph."""
        return {one.name: one.shape for one in self.session.get_outputs()}

    def prepare(self, batch: Batch) -> Any:
        """Return the feed on the CPU, or inputs and output bound on the GPU."""
        types = {one.name: np.int32 if one.type == "tensor(int32)" else np.int64 for one in self.session.get_inputs()}
        feed = {name: values.astype(types[name]) for name, values in fitted(batch, self.input_names).items()}
        if self.device == "cpu":
            return feed
        kind, _, index = self.device.partition(":")
        binding = self.session.io_binding()
        for name, values in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values, kind, int(index or 0)))
        binding.bind_output(self.output_name, kind, int(index or 0))
        return binding

    def compute(self, prepared: Any) -> Any:
        """Return the output, or the binding that holds it on the GPU."""
        if self.device == "cpu":
            return self.session.run([self.output_name], prepared)[0]
        self.session.run_with_iobinding(prepared)
        return prepared

    def fetched(self, result: Any) -> npt.NDArray[Any]:
        """Return the output as an array on the CPU."""
        return np.asarray(result if self.device == "cpu" else result.copy_outputs_to_cpu()[0])


def session_options() -> ort.SessionOptions:
    """Return the options for sessions of ONNX Runtime: as many threads as torch has, and no messages."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, and its warnings are not about anything the user did
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads go on spinning for a while after a run, on cores that whatever comes next needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def has_gpu() -> bool:
    """Return whether it can compute on a CUDA device, if the machine has one."""
    return CUDA in ort.get_available_providers()


def open_graph(file: Path, device: str, _precision: Arithmetic) -> Opened:
    """Open a graph on cpu or cuda[:n], in what it was exported in; raises `DeviceError` and `ArtifactError`."""
    if device != "cpu" and not has_gpu():
        raise DeviceError(
            "this onnxruntime has no CUDA provider; pip install onnxruntime-gpu instead, or use --device cpu"
        )
    index = int(device.partition(":")[2] or 0)
    providers: list[Any] = ["CPUExecutionProvider"] if device == "cpu" else [(CUDA, {"device_id": index})]
    with loading(OnnxRunner.label, file):
        session = ort.InferenceSession(str(file), session_options(), providers=providers)
    if device != "cpu" and CUDA not in session.get_providers():  # it falls back to the CPU silently
        raise DeviceError("onnxruntime could not start its CUDA provider; use --device cpu")
    return partial(OnnxRunner, session=session)
