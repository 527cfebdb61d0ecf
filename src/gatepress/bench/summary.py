"""The outcome of a sweep: a row for each method and sparsity, the knee, and the table that people read."""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gatepress.bench.record import Record
from gatepress.bench.tables import Table, conditions, three_digits
from gatepress.config import METHODS, Method

KNEE_POINTS = 3  # a chord and something above it
LEVEL = 1e-9  # of the unit square: a straight line has no knee, whatever rounding makes of it
_NAME = re.compile(rf"({'|'.join(map(re.escape, METHODS))})-s\d[\d.e-]*-seed\d+")


@dataclass(frozen=True)
class Cell:
    """One training of a sweep."""

    method: Method
    sparsity: float
    seed: int

    @property
    def gated(self) -> bool:
        """Whether there is something to prune."""
        return METHODS[self.method].gated

    @property
    def point(self) -> str:
        """What all seeds share: a method, and its sparsity if it has one."""
        return f"{self.method} {self.sparsity:g}" if self.gated else self.method

    @property
    def name(self) -> str:
        """Name of its run directory."""
        return f"{self.method}-s{self.sparsity:g}-seed{self.seed}"

    @staticmethod
    def named(directory: str) -> bool:
        """Whether a run directory has the name of one."""
        return bool(_NAME.fullmatch(directory))


def density(cell: Cell) -> tuple[bool, bool, str, float]:
    """Return a key that sorts as people compare: methods without gates, the best known first, then each curve."""
    return cell.method != "full", cell.gated, cell.method, cell.sparsity


def summarize(reports: dict[Cell, dict[str, Any]], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return one row for each method and sparsity, medians over its seeds, with the knee of each curve marked.

    Latency is that of the largest batch and length that was timed.
    """
    largest = max(((record.batch_size, record.seq_len or 0) for record in records), default=None)
    timed = {record.name: record for record in records if (record.batch_size, record.seq_len) == largest}
    points: dict[str, list[Cell]] = {}
    for cell in reports:
        points.setdefault(cell.point, []).append(cell)
    rows = [
        _point(cells[0], [reports[cell] for cell in cells], timed.get(name))
        for name, cells in sorted(points.items(), key=lambda item: density(item[1][0]))
    ]
    for method in {row["method"] for row in rows if METHODS[row["method"]].gated}:
        curve = [row for row in rows if row["method"] == method]
        timed_all = all(row["latency_ms_median"] for row in curve)
        costs = [row["latency_ms_median"] if timed_all else -row["encoder_macs_removed"] for row in curve]
        front = unbeaten(costs, [row["metric_median"] for row in curve])
        place = knee([costs[index] for index in front], [curve[index]["metric_median"] for index in front])
        if place is not None:
            curve[front[place]]["knee"] = True
    return rows


def unbeaten(costs: Sequence[float], metrics: Sequence[float]) -> list[int]:
    """Return the indices of the points than which none costs less for as high a metric, or is higher for the same."""
    points = list(zip(costs, metrics, strict=True))

    def beaten(cost: float, metric: float) -> bool:
        return any(other != (cost, metric) and other[0] <= cost and other[1] >= metric for other in points)

    return [index for index, point in enumerate(points) if not beaten(*point)]


def knee(x: Sequence[float], y: Sequence[float]) -> int | None:
    """Return the index of the point farthest above the chord between the ends of a curve.

    The idea is from Satopaa et al. 2011, "Finding a 'Kneedle' in a Haystack": with both axes scaled to 0..1,
    the knee is where the curve is farthest from the straight line. Points may be in any order; `y` may
    rise or fall with `x`. None with fewer than three points, on a flat curve, and if none is above.
    """
    if len(x) < KNEE_POINTS or min(x) == max(x) or min(y) == max(y):
        return None
    across, up = _scaled(x), _scaled(y)
    first, *_, last = sorted(range(len(x)), key=across.__getitem__)
    slope = up[last] - up[first]
    above = [up[index] - up[first] - slope * across[index] for index in range(len(x))]
    best = max(range(len(x)), key=above.__getitem__)
    return best if above[best] > LEVEL else None


def _scaled(values: Sequence[float]) -> list[float]:
    least, most = min(values), max(values)
    return [(value - least) / (most - least) for value in values]


def _point(cell: Cell, reports: Sequence[dict[str, Any]], record: Record | None) -> dict[str, Any]:
    """Return the row of one point."""
    metrics = [report["metric_value"] for report in reports]

    def median(key: str) -> float | None:
        return _median(report.get(key) for report in reports)

    return {
        "method": cell.method,
        "sparsity": cell.sparsity,
        "seeds": len(reports),
        "task": reports[0].get("task"),
        "metric_name": reports[0].get("metric_name"),
        "metric_median": statistics.median(metrics),
        "metric_min": min(metrics),
        "metric_max": max(metrics),
        "encoder_macs_removed": median("encoder_macs_removed") or 0.0,
        "total_params": median("total_params"),
        "trainable_total": _median((report.get("trainable_params") or {}).get("total") for report in reports),
        "train_seconds": median("train_seconds"),
        "peak_memory_bytes": median("peak_memory_bytes"),
        "latency_ms_median": record and record.latency_ms_median,
        "latency_batch_size": record and record.batch_size,
        "latency_seq_len": record and record.seq_len,
        "relative_time_factor": record and record.relative_time_factor,
        "baseline": record and record.baseline,
        "knee": False,
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def table(result: dict[str, Any]) -> Table:
    """Return the summary of a sweep as text, for Markdown and for the terminal."""
    rows = result["summary"]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: Cell(row["method"], row["sparsity"], 0).point,
        rows[0]["metric_name"]: lambda row: f"{row['metric_median']:.4f}",
        "min to max": lambda row: f"{row['metric_min']:.3f} to {row['metric_max']:.3f}",
        "removed": lambda row: f"{row['encoder_macs_removed']:.1%}",
        "params": lambda row: _shown(row["total_params"], 1e6, "M"),
        "trained": lambda row: _shown(row["trainable_total"], 1e6, "M"),
        "time": lambda row: _shown(row["train_seconds"], 1, "s"),
        "memory": lambda row: _shown(row["peak_memory_bytes"], 1e9, "GB"),
        "latency": lambda row: _shown(row["latency_ms_median"], 1, "ms"),
        "factor": lambda row: "" if row["latency_ms_median"] is None else f"{row['relative_time_factor']:.2f}x",
        "": lambda row: "knee" if row["knee"] else "",
    }
    if all(row["seeds"] == 1 for row in rows):
        del columns["min to max"]
    return Table(caption(result), list(columns), [[show(row) for show in columns.values()] for row in rows], 1)


def caption(result: dict[str, Any]) -> str:
    """Return what the figures of a sweep are, how they were measured and what is not there, as one line of text."""
    row = result["summary"][0]
    text = f"{row['task']}: median of {seeds(result['summary'])}; removed of the encoder's MACs"
    if result["latency"]:
        records = [Record.from_json(value) for value in result["latency"]]
        size = f"{row['latency_batch_size']} x {row['latency_seq_len']} tokens"
        text += f"; latency of one batch of {size} against {row['baseline']} on {conditions(records)}"
    lost = absent(result["cells"])
    return f"{text}; without {lost}" if lost else text


def seeds(rows: Sequence[dict[str, Any]]) -> str:
    """Return how many seeds the points of a sweep are medians of, e.g. `1 to 3 seeds`."""
    counts = sorted({row["seeds"] for row in rows})
    return f"{' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} seed{'' if counts == [1] else 's'}"


def absent(cells: Iterable[dict[str, Any]]) -> str:
    """Return which trainings of a sweep failed or have not run, by point and seed; nothing if all are there."""
    lost: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell["status"] != "finished":
            point = Cell(cell["method"], cell["sparsity"], cell["seed"]).point
            lost.setdefault((point, cell["status"]), []).append(str(cell["seed"]))
    return ", ".join(f"{point} seed {' '.join(numbers)} ({status})" for (point, status), numbers in lost.items())


def _shown(value: float | None, unit: float, name: str) -> str:
    return "" if value is None else f"{three_digits(value / unit)} {name}"
