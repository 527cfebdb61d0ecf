"""Benchmark records as text: one table per comparison, with what was measured where."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gatepress.bench.record import Record

LONGEST_NAME = 44  # characters that fit beside a number, in a plot and on a phone


class Table(NamedTuple):
    """Records as text, for Markdown and for the terminal; the first `left` columns are names."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: int


def tables(records: Sequence[Record]) -> list[Table]:
    """Return one table for each weight, or for each batch size and length, as text."""
    return [(_matmul_table if group[0].what == "matmul" else _endtoend_table)(group) for group in groups(records)]


def conditions(records: Sequence[Record]) -> str:
    """Return the conditions under which the figures were measured, as one line of text."""
    one = records[0]
    threads = f", {one.threads} thread{'s' if one.threads != 1 else ''}" if one.threads else ""
    numbers = sorted({record.repetitions for record in records})
    calls = " to ".join(f"{number:,}" for number in dict.fromkeys([numbers[0], numbers[-1]]))
    dtypes = " and ".join(dict.fromkeys(record.dtype for record in records))
    built = [f"{key} {one.versions[key]}" for key in ("torch", "onnxruntime", "openvino") if key in one.versions]
    return f"{one.device_name}{threads}, {dtypes}, median of {calls} repetitions, {', '.join(built)}"


def _matmul_table(records: Sequence[Record]) -> Table:
    one = records[0]
    return Table(
        f"{cell(one)} on {conditions(records)}",
        ["product", "sparsity", "median", "p10 to p90", "MACs", "reduction", "time factor"],
        [
            [
                record.kind,
                f"{100 * (record.sparsity or 0):g}%",
                f"{three_digits(record.latency_ms_median)} ms",
                f"{three_digits(record.latency_ms_p10)} to {three_digits(record.latency_ms_p90)}",
                f"{(record.macs or 0) / 1e6:,.1f} M",
                *_factors(record),
            ]
            for record in records
        ],
        1,
    )


def _endtoend_table(records: Sequence[Record]) -> Table:
    columns: dict[str, Callable[[Record], str]] = {
        "target": lambda record: record.name,
        "kind": lambda record: record.kind,
        "runtime": lambda record: record.runtime,
        "dtype": lambda record: record.dtype,
        "median": lambda record: f"{three_digits(record.latency_ms_median)} ms",
        "p10 to p90": lambda record: f"{three_digits(record.latency_ms_p10)} to {three_digits(record.latency_ms_p90)}",
        "GMACs": lambda record: "" if record.macs is None else three_digits(record.macs / 1e9),
        "params": lambda record: "" if record.parameters is None else f"{record.parameters / 1e6:,.1f} M",
        "size": lambda record: "" if record.size_bytes is None else f"{record.size_bytes / 1e6:,.1f} MB",
        "factor": lambda record: _factors(record)[1],
    }
    if len({record.dtype for record in records}) == 1:
        del columns["dtype"]  # it is in the title
    if all(record.macs is None for record in records):
        del columns["GMACs"]
    return Table(
        f"{cell(records[0])} on {conditions(records)}",
        list(columns),
        [[show(record) for show in columns.values()] for record in records],
        list(columns).index("median"),
    )


def _factors(record: Record) -> list[str]:
    if record.relative_reduction_percent is None or record.relative_time_factor is None:
        return ["", ""]
    return [f"{record.relative_reduction_percent:.1f} %", f"{record.relative_time_factor:.2f}x"]


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """Return the records grouped by common baseline, in their order."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = (record.what, record.shape, record.task, record.device_name, record.batch_size, record.seq_len)
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def too_slow(records: Sequence[Record], factor: float) -> list[Record]:
    """Return the last record of each group that is not `factor` times as fast as the first."""
    last = [group[-1] for group in groups(records)]
    return [record for record in last if (record.relative_time_factor or 0.0) < factor]


def cell(record: Record) -> str:
    """Return what all records of a group have in common, as a title."""
    if record.shape is not None:
        return f"weight {record.shape[0]} x {record.shape[1]}, {record.seq_len} tokens"
    if record.task is not None:
        rows = f"{record.examples:,} rows" if record.examples is not None else "all rows"
        return f"one pass over {record.task} ({rows}), batch {record.batch_size}"
    return f"batch {record.batch_size} x {record.seq_len} tokens"


def shortened(text: str) -> str:
    """Return a text without its middle if it is too long: names differ at their ends."""
    half = (LONGEST_NAME - 1) // 2
    return text if len(text) <= LONGEST_NAME else f"{text[:half]}…{text[-half:]}"


def three_digits(value: float) -> str:
    """Return a number with three significant digits, larger ones in full."""
    return f"{value:#.3g}" if round(value, 1) < 100 else f"{value:,.0f}"  # noqa: PLR2004 - three digits
