"""Measure what `costs` needs on this machine: products and index operations, as pruned models do them.

It takes some twenty seconds and is kept per machine: the answer changes with processor, threads and the
runtime's version, and with nothing else. What is timed is what a pruned model runs: a product with its bias in
the target's runtime, with a gather before it or a scatter after it. In a model, none of them finds its inputs in
the nearest cache, and all of them run in one call of the runtime. So here each call runs each operation a few
times, on inputs and weights of their own.
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
from gatepress.costs import TARGETS, Costs, Entry, Op
from gatepress.errors import ArtifactError, DeviceError, OutputError, UsageError, reason_of
from gatepress.files import explained, temporary_directory
from gatepress.in_onnxruntime import session_options
from gatepress.machine import device_name
from gatepress.modeling_gatepress import pick
from gatepress.progress import NoProgress, Progress
from gatepress.quantize import quantize_file_

logger = logging.getLogger(__name__)

TOKENS = (32, 128, 256, 1024)  # batch times length of one call
WIDE = ((384, 384), (768, 768), (1536, 384), (384, 1536), (1536, 768), (768, 1536))  # [out, in]
PRODUCTS = (*WIDE, (128, 384), (384, 128), (256, 768), (768, 256))  # and as narrow as what pruning leaves
MOVED = ((384, 272), (768, 544), (768, 240), (1536, 768))  # [all, kept]
ROUNDS = 5  # over everything: a machine that is slow for a second must not decide how models are stored
REPEATS = 6
UNTIMED = 2
STEADY = 256  # tokens of a call that is long enough to be timed only `REPEATS` times
COPIES = 2  # of an operation in one call
LEAST = 0.1  # smallest share of the second of two gathers from one input, whatever noise says

Call = Callable[[], Any]
Operation = tuple[Op, tuple[int, int], Callable[[int], Call]]  # with its shape, and its call on a number of tokens
Step = tuple[str, list[npt.NDArray[Any]], dict[str, Any]]  # operator, constants after its input, attributes
Chain = list[Step]


def for_target(target: Target, table: str | Path | None = None, progress: Progress | None = None) -> Costs:
    """Return the costs to plan by.

    `table` is a file written by `costs.save`, "analytic", or None: this machine's own, measured on first
    use. A target that does not run here falls back to the analytic costs. Raises `UsageError`
    if the table is of another target, `ArtifactError` if it is not a table.
    """
    if table == "analytic":
        return costs.analytic(target)
    if table is not None:
        found = costs.read(Path(table))
        if found.target != target:
            raise UsageError(f"--latency-table {table} is of {found.target}, but --for is {target}; give a table of it")
        return found
    if not _is_here(target):
        logger.info("no CUDA device here: planned by the analytic costs of %s", target)
        return costs.analytic(target)
    kept = cache_file(target)
    if os.path.isfile(kept):  # noqa: PTH113 - if access is denied, it gives False and no error
        try:
            return costs.read(kept)
        except ArtifactError:
            logger.info("%s is broken and will be measured again", kept)
    measured = measure(target, progress=progress)
    try:
        costs.save(measured, kept)
    except OutputError as error:
        reason = reason_of(error.__cause__ or error)
        logger.info(
            "cannot keep the latency table in %s (%s), so it will be measured again; XDG_CACHE_HOME can name "
            "another place for it",
            kept.parent,
            reason,
        )
    return measured


def cache_file(target: Target) -> Path:
    """Return where this machine's table is kept; `XDG_CACHE_HOME` moves it."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    name, about = _about(target)
    digest = hashlib.sha256(repr((name, about, costs.FORMAT, __version__)).encode()).hexdigest()[:12]
    return root / "gatepress" / "latency" / f"{target}-{digest}.json"


def _home() -> Path:
    """Return the user's home directory or, if that is not known, as in some containers, that of temporary files."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def measure(target: Target, *, progress: Progress | None = None) -> Costs:
    """Time products and index operations of a target on this machine; `DeviceError` if its device is not here."""
    if not _is_here(target):
        raise DeviceError(
            f"{target} is measured on a CUDA device, and torch sees none; run it on the machine that has one"
        )
    progress = progress or NoProgress()
    prepare = _torch_calls if TARGETS[target].runtime == "torch" else _onnx_calls
    name, about = _about(target)
    fastest: dict[tuple[Op, int, tuple[int, int]], float] = {}
    progress.start(ROUNDS * len(TOKENS) * (len(PRODUCTS) + 3 * len(MOVED)), f"measuring {target}")
    try:
        with torch.inference_mode():
            operations = list(prepare(target))
            for _, tokens, (op, shape, call_of) in itertools.product(range(ROUNDS), TOKENS, operations):
                often = REPEATS * max(1, STEADY // tokens)  # short calls are noisier
                ms = round(_fastest(call_of(tokens), often) / COPIES, 5)
                fastest[op, tokens, shape] = min(ms, fastest.get((op, tokens, shape), ms))
                progress.advance(1)
    finally:
        progress.finish()
    for (op, tokens, shape), ms in fastest.items():
        if op == "again":  # timed together with the gather whose input it reads
            fastest[op, tokens, shape] = round(max(ms - fastest["gather", tokens, shape], ms * LEAST), 5)
    entries = [Entry(op, tokens, shape, ms) for (op, tokens, shape), ms in fastest.items()]
    return Costs(target, name, tuple(entries), about)


def _is_here(target: Target) -> bool:
    """Return whether this machine has the device of a target."""
    return TARGETS[target].device == "cpu" or torch.cuda.is_available()


def _about(target: Target) -> tuple[str, dict[str, Any]]:
    """Return the machine's name and what else its times depend on."""
    facts = TARGETS[target]
    version = torch.__version__ if facts.runtime == "torch" else ort.__version__
    versions = {facts.runtime: str(version)}
    return device_name(torch.device(facts.device)), {"threads": torch.get_num_threads(), "versions": versions}


def _fastest(call: Call, repeats: int) -> float:
    """Return milliseconds of the fastest of some calls: a table is kept, so momentary noise must stay out."""
    for _ in range(UNTIMED):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return min(times) / 1e6


def _torch_calls(target: Target) -> Iterator[Operation]:
    """Yield what to time in torch, as `PrunedLinear.forward` computes it."""
    device = torch.device(TARGETS[target].device)

    def together(copies: list[list[Callable[[torch.Tensor], torch.Tensor]]], width: int) -> Callable[[int], Call]:
        def call_of(tokens: int) -> Call:
            work = [(torch.randn(1, tokens, width, device=device), calls) for calls in copies]

            def run() -> None:
                for x, calls in work:
                    for call in calls:
                        call(x)
                if device.type != "cpu":
                    torch.cuda.synchronize()

            return run

        return call_of

    for rows, columns in PRODUCTS:
        linears: list[Any] = [[torch.nn.Linear(columns, rows, device=device)] for _ in range(COPIES)]
        yield "product", (rows, columns), together(linears, columns)
    for width, kept in MOVED:
        first, other = (torch.from_numpy(index).to(device) for index in _picked(width, kept))
        spread = torch.from_numpy(_spread(kept, width)).to(device)
        gather, again = partial(pick, index=first), partial(pick, index=other)
        scatter = partial(pick, index=spread, zeros=1)
        yield "gather", (width, kept), together([[gather]] * COPIES, width)
        yield "again", (width, kept), together([[gather, again]] * COPIES, width)
        yield "scatter", (kept, width), together([[scatter]] * COPIES, kept)


def _onnx_calls(target: Target) -> Iterator[Operation]:
    """Yield what to time in ONNX Runtime, in the form in which `PrunedLinear` is exported."""
    for rows, columns in PRODUCTS:
        copies = [[_product(columns, rows)] for _ in range(COPIES)]
        yield "product", (rows, columns), _session(copies, columns, target)
    for width, kept in MOVED:
        gather, again = (_rows_moved(width, index) for index in _picked(width, kept))
        scatter = _rows_moved(kept + 1, _spread(kept, width))  # the last row: zeros that the product computed
        yield "gather", (width, kept), _session([[gather]] * COPIES, width, target)
        yield "again", (width, kept), _session([[gather, again]] * COPIES, width, target)
        yield "scatter", (kept, width), _session([[scatter]] * COPIES, kept + 1, target)


def _picked(width: int, kept: int) -> list[npt.NDArray[np.int64]]:
    """Return two choices of `kept` of `width` positions."""
    index = np.linspace(0, width - 1, kept).astype(np.int64)
    return [index, width - 1 - index]


def _spread(kept: int, width: int) -> npt.NDArray[np.int64]:
    """Return which of `kept` positions, or one of zeros after them, each of `width` positions reads."""
    return np.minimum(np.arange(width), kept).astype(np.int64)


def _product(columns: int, rows: int) -> Chain:
    """Return a product with weights and a bias of its own."""
    random = np.random.default_rng()
    weight, bias = (random.standard_normal(shape).astype(np.float32) for shape in ((columns, rows), rows))
    return [("MatMul", [weight], {}), ("Add", [bias], {})]


def _rows_moved(width: int, index: npt.NDArray[np.int64]) -> Chain:
    """Return the steps that pick `index` from the last axis of `width` by moving rows of the transposed input."""
    return [
        ("Reshape", [np.array([-1, width])], {}),
        ("Transpose", [], {"perm": [1, 0]}),
        ("Gather", [index], {"axis": 0}),
        ("Transpose", [], {"perm": [1, 0]}),
        ("Reshape", [np.array([1, -1, len(index)])], {}),
    ]


def _session(copies: list[list[Chain]], width: int, target: Target) -> Callable[[int], Call]:
    """Return the calls of a small graph, quantized if the target is. Chains of a copy read one x [1, tokens, width].

    Equal constants are stored once, so the runtime computes once what chains of a copy share, as in exported models.
    """
    constants: dict[bytes, onnx.TensorProto] = {}
    nodes, ends = [], []
    for number, chains in enumerate(copies):
        for name, steps in enumerate(chains):
            value = f"x{number}"
            for step, (op, arrays, attributes) in enumerate(steps):
                inputs = [value]
                for array in arrays:
                    kept = constants.setdefault(array.tobytes(), numpy_helper.from_array(array, f"c{len(constants)}"))
                    inputs.append(kept.name)
                value = f"y{number}.{name}.{step}"
                nodes.append(helper.make_node(op, inputs, [value], **attributes))
            ends.append(value)
    graph = helper.make_graph(
        nodes,
        "few",
        [_floats(f"x{number}", [1, "tokens", width]) for number in range(len(copies))],
        [_floats(end, [1, "tokens", None]) for end in ends],
        list(constants.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with temporary_directory() as place, explained(Path(place)):
        file = Path(place) / "few.onnx"
        onnx.save(model, file)
        if TARGETS[target].int8 and nodes[0].op_type == "MatMul":
            quantize_file_(file)
        session = ort.InferenceSession(str(file), session_options(), providers=["CPUExecutionProvider"])

    def call_of(tokens: int) -> Call:
        random = np.random.default_rng(0)
        names = [one.name for one in session.get_inputs()]
        return partial(
            session.run, None, {name: random.standard_normal((1, tokens, width)).astype(np.float32) for name in names}
        )

    return call_of


def _floats(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
