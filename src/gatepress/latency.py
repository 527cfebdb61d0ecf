"""Measure what `costs` needs on this machine: products and index operations, as pruned models do them.

A few seconds, kept per machine: the answer changes with processor, threads and the runtime's version,
and with nothing else. What is timed is what a pruned model runs: a product with its bias in the
target's runtime, a gather or scatter in front of or behind it.
"""

import hashlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from gatepress import __version__, costs
from gatepress.config import Target
from gatepress.costs import Costs, Entry, Op
from gatepress.errors import ArtifactError, DeviceError, OutputError, UsageError
from gatepress.files import explained, temporary_directory
from gatepress.machine import device_name
from gatepress.modeling_gatepress import pick
from gatepress.progress import NoProgress, Progress
from gatepress.quantize import quantize_file

logger = logging.getLogger(__name__)

TOKENS = (32, 128, 256, 1024)  # batch times length of one call
PRODUCTS = ((384, 384), (768, 768), (1536, 384), (384, 1536), (1536, 768), (768, 1536))  # [out, in]
MOVED = ((384, 272), (768, 544), (768, 240), (1536, 768))  # [all, kept]
ROUNDS = 3  # over everything: a machine that is slow for a second must not decide how models are stored
REPEATS = 15
UNTIMED = 3

Call = Callable[[], Any]


def for_target(target: Target, table: str | Path | None = None, progress: Progress | None = None) -> Costs:
    """Return the costs to plan by.

    `table` is a file that `costs.save` wrote, "analytic", or None: this machine's own, measured at the
    first use. A target that does not run here falls back to the analytic costs. Raises `UsageError`
    where the table is of another target, `ArtifactError` where it is none.
    """
    if table == "analytic":
        return costs.analytic(target)
    if table is not None:
        found = costs.read(Path(table))
        if found.target != target:
            raise UsageError(f"--latency-table {table} is of {found.target}, but --for is {target}; give a table of it")
        return found
    if target == "cuda" and not torch.cuda.is_available():
        logger.info("no CUDA device here: planned by the analytic costs of cuda")
        return costs.analytic(target)
    kept = cache_file(target)
    if kept.is_file():
        try:
            return costs.read(kept)
        except ArtifactError:
            logger.info("%s is broken and will be measured again", kept)
    measured = measure(target, progress=progress)
    try:
        costs.save(measured, kept)
    except OutputError as error:
        logger.info("cannot keep the latency table (%s): it will be measured again", error)
    return measured


def cache_file(target: Target) -> Path:
    """Return where this machine's table is kept; `XDG_CACHE_HOME` moves it."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    name, about = _about(target)
    digest = hashlib.sha256(repr((name, about, costs.FORMAT, __version__)).encode()).hexdigest()[:12]
    return root / "gatepress" / "latency" / f"{target}-{digest}.json"


def _home() -> Path:
    """Return the user's directory; where nobody knows it, as in some containers, that of temporary files."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def measure(target: Target, *, progress: Progress | None = None, repeats: int = REPEATS) -> Costs:
    """Time products and index operations of a target on this machine; `DeviceError` where it is not here."""
    if target == "cuda" and not torch.cuda.is_available():
        raise DeviceError("cuda is measured on a CUDA device, and torch sees none; run it on the machine that has one")
    progress = progress or NoProgress()
    prepare = _torch_calls if target in ("torch-cpu", "cuda") else _onnx_calls
    name, about = _about(target)
    fastest: dict[tuple[Op, int, tuple[int, int]], float] = {}
    progress.start(ROUNDS * len(TOKENS) * (len(PRODUCTS) + 2 * len(MOVED)), f"measuring {target}")
    try:
        with torch.inference_mode():
            for _, tokens in itertools.product(range(ROUNDS), TOKENS):
                for op, shape, call in prepare(target, tokens):
                    ms = round(_fastest(call, repeats), 5)
                    fastest[op, tokens, shape] = min(ms, fastest.get((op, tokens, shape), ms))
                    progress.advance(1)
    finally:
        progress.finish()
    entries = [Entry(op, tokens, shape, ms) for (op, tokens, shape), ms in fastest.items()]
    return Costs(target, name, tuple(entries), about)


def _about(target: Target) -> tuple[str, dict[str, Any]]:
    """Return the machine's name and what else its times hang on."""
    runtime = "torch" if target in ("torch-cpu", "cuda") else "onnxruntime"
    version = torch.__version__ if runtime == "torch" else ort.__version__
    device = torch.device("cuda" if target == "cuda" else "cpu")
    return device_name(device), {"threads": torch.get_num_threads(), "versions": {runtime: str(version)}}


def _fastest(call: Call, repeats: int) -> float:
    """Return milliseconds of the fastest of some calls: a table is kept, so noise of the moment must stay out."""
    for _ in range(UNTIMED):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return min(times) / 1e6


def _torch_calls(target: Target, tokens: int) -> Iterator[tuple[Op, tuple[int, int], Call]]:
    """Yield what to time in torch, as `PrunedLinear.forward` computes it."""
    device = torch.device("cuda" if target == "cuda" else "cpu")

    def waited(call: Call) -> Call:
        def run() -> None:
            call()
            torch.cuda.synchronize()

        return call if device.type == "cpu" else run

    for rows, columns in PRODUCTS:
        linear, x = torch.nn.Linear(columns, rows, device=device), torch.randn(1, tokens, columns, device=device)
        yield "product", (rows, columns), waited(partial(linear, x))
    for width, kept in MOVED:
        picked = torch.linspace(0, width - 1, kept, device=device).long()
        yield "gather", (width, kept), waited(partial(pick, torch.randn(1, tokens, width, device=device), picked))
        spread = torch.arange(width, device=device).clamp_max(kept)
        yield "scatter", (kept, width), waited(partial(pick, torch.randn(1, tokens, kept, device=device), spread, 1))


def _onnx_calls(target: Target, tokens: int) -> Iterator[tuple[Op, tuple[int, int], Call]]:
    """Yield what to time in ONNX Runtime, in the form in which `PrunedLinear` is exported."""
    random = np.random.default_rng(0)
    for rows, columns in PRODUCTS:
        values = {
            "weight": random.standard_normal((columns, rows)).astype(np.float32),
            "bias": random.standard_normal(rows).astype(np.float32),
        }
        nodes = [helper.make_node("MatMul", ["x", "weight"], ["m"]), helper.make_node("Add", ["m", "bias"], ["y"])]
        yield "product", (rows, columns), _session(nodes, values, (columns, rows), target, tokens)
    for width, kept in MOVED:
        index = np.linspace(0, width - 1, kept).astype(np.int64)
        yield "gather", (width, kept), _session(*_rows_moved(width, index), (width, kept), target, tokens)
        index = np.minimum(np.arange(width), kept).astype(np.int64)  # the last row: zeros that the product computed
        yield "scatter", (kept, width), _session(*_rows_moved(kept + 1, index), (kept + 1, width), target, tokens)


def _rows_moved(width: int, index: npt.NDArray[np.int64]) -> tuple[list[onnx.NodeProto], dict[str, npt.NDArray[Any]]]:
    """Return nodes and constants that pick `index` from the last axis by moving rows of the transposed input."""
    values: dict[str, npt.NDArray[Any]] = {
        "index": index,
        "flat": np.array([-1, width]),
        "shape": np.array([1, -1, len(index)]),
    }
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Reshape", ["flat"], {}),
        ("Transpose", [], {"perm": [1, 0]}),
        ("Gather", ["index"], {"axis": 0}),
        ("Transpose", [], {"perm": [1, 0]}),
        ("Reshape", ["shape"], {}),
    ]
    names = ["x", *(f"step{number}" for number in range(1, len(steps))), "y"]
    nodes = [
        helper.make_node(op, [names[number], *inputs], [names[number + 1]], **attributes)
        for number, (op, inputs, attributes) in enumerate(steps)
    ]
    return nodes, values


def _session(
    nodes: list[onnx.NodeProto],
    values: dict[str, npt.NDArray[Any]],
    widths: tuple[int, int],
    target: Target,
    tokens: int,
) -> Call:
    """Return a call of a small graph from x [1, tokens, width] to y, quantized where the target is."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", width])
        for name, width in zip("xy", widths, strict=True)
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with temporary_directory() as place, explained(Path(place)):
        file = Path(place) / "one.onnx"
        onnx.save(model, file)
        if target == "ort-int8" and nodes[0].op_type == "MatMul":
            quantize_file(file, file)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # many sessions, one machine
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, tokens, widths[0])).astype(np.float32)
    return lambda: session.run(None, {"x": x})
