"""One measurement as a record: a single schema for every benchmark, its statistics and its JSON.

All latencies are wall-clock milliseconds of one call (one product, one batch, or one pass over a
validation split). `None` always means "does not apply" or "not known", never zero.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from gatepress.errors import ArtifactError
from gatepress.schema import check_fields, schema_of

FORMAT_VERSION = 1
MAX_SAMPLES = 1_000  # kept in a record; the statistics always cover all of them
What = Literal["matmul", "endtoend"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing that was timed, with every setting that affects the figure."""

    what: What
    name: str  # unique within one benchmark
    kind: str  # matmul: dense, index, closure; endtoend: run, pruned, onnx, model
    runtime: str  # torch, onnxruntime or openvino
    device: str  # cpu or cuda
    device_name: str  # what the machine calls its processor
    threads: int | None  # None: not the CPU's work
    dtype: str  # of the products: float32, bfloat16, float16, or int8
    batch_size: int
    seq_len: int | None  # tokens; None: as long as each batch of the task needs
    repetitions: int
    warmup: int  # untimed calls before the first timed one
    latency_ms_median: float
    latency_ms_p10: float
    latency_ms_p90: float
    latency_ms_min: float
    samples_ms: tuple[float, ...] = ()  # in order of time, evenly thinned to `MAX_SAMPLES`
    baseline: str | None = None  # name of the record that the two factors refer to
    relative_time_factor: float | None = None  # baseline / this: above 1 is faster
    relative_reduction_percent: float | None = None  # 100 (1 - this / baseline)
    sparsity: float | None = None  # fraction of the columns (matmul) that is removed
    shape: tuple[int, int] | None = None  # [out, in] of the dense weight
    macs: int | None = None  # multiply-accumulates of one call
    size_bytes: int | None = None  # of the weights or of the model's files
    parameters: int | None = None
    task: str | None = None  # set if a call is one pass over a validation split
    examples: int | None = None  # rows in that pass
    max_length: int | None = None  # tokens that this pass truncates a row to
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    timestamp: str = ""  # UTC, ISO 8601, when the measurement ended
    format_version: int = FORMAT_VERSION

    def to_json(self, *, samples: bool = True) -> dict[str, Any]:
        """Return plain JSON values; without `samples` the raw samples are left out."""
        value = asdict(self)
        value["shape"] = list(self.shape) if self.shape else None
        value["samples_ms"] = list(self.samples_ms)
        if not samples:
            del value["samples_ms"]
        return value

    @classmethod
    def from_json(cls, value: Any) -> "Record":
        """Read a record back; `ArtifactError` if it is malformed or of a newer version."""
        if not isinstance(value, dict):
            raise ArtifactError(f"benchmark record: expected a JSON object, got {type(value).__name__}")
        found = value.get("format_version")
        if found != FORMAT_VERSION:
            raise ArtifactError(f"benchmark record: version {found!r}, this gatepress reads version {FORMAT_VERSION}")
        schema = schema_of(cls)
        if unknown := sorted(value.keys() - schema.keys()):
            raise ArtifactError(f"benchmark record: unknown field {unknown[0]!r}")
        check_fields(Path("benchmark record"), value, schema)
        tuples = {name: tuple(value[name]) for name in ("shape", "samples_ms") if value.get(name) is not None}
        try:
            return cls(**{**value, **tuples})
        except TypeError as error:
            raise ArtifactError(f"benchmark record: not understood ({error})") from None


def latencies(samples_ms: Sequence[float]) -> dict[str, Any]:
    """Return the latency fields of a record for at least one sample in milliseconds."""
    deciles = statistics.quantiles(samples_ms, n=10, method="inclusive") if len(samples_ms) > 1 else [samples_ms[0]] * 9
    step = max(1, -(-len(samples_ms) // MAX_SAMPLES))
    return {
        "latency_ms_median": _nanoseconds(statistics.median(samples_ms)),
        "latency_ms_p10": _nanoseconds(deciles[0]),
        "latency_ms_p90": _nanoseconds(deciles[-1]),
        "latency_ms_min": _nanoseconds(min(samples_ms)),
        "samples_ms": tuple(_nanoseconds(sample) for sample in samples_ms[::step]),
        "repetitions": len(samples_ms),
    }


def relative_to(record: Record, baseline: Record) -> Record:
    """Return `record` with its factor and reduction relative to the median of `baseline`."""
    share = record.latency_ms_median / baseline.latency_ms_median
    return replace(
        record,
        baseline=baseline.name,
        relative_time_factor=round(1 / share, 4),
        relative_reduction_percent=round(100 * (1 - share), 2),
    )


def now() -> str:
    """Return the time as UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _nanoseconds(milliseconds: float) -> float:
    return round(milliseconds, 6)  # the clock is no more precise
