"""A sweep as a figure: the metric over latency, a line for each method with gates, a mark for each other."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from gatepress.bench.figures import BLUE, FAINT, INK, ORANGE, PATCH, caption, drawn
from gatepress.bench.record import Record
from gatepress.bench.summary import absent, seeds
from gatepress.config import METHODS

SIZE_INCHES = (6.8, 5.0)
LOGARITHMIC_FROM = 4.0  # slowest over fastest
# In the order of Okabe and Ito, distinguishable with every kind of colour vision; markers say the same again.
LOOKS = ((BLUE, "o"), (ORANGE, "s"), ("#009e73", "D"), ("#cc79a7", "^"), ("#e69f00", "v"), ("#56b4e9", "P"), (INK, "X"))


def draw(sweep: dict[str, Any], suffix: str) -> bytes:
    """Return the figure of a `sweep.json`, latency included, as the bytes of a `png` or `svg` file."""
    return drawn(suffix, partial(_picture, sweep))


def _picture(sweep: dict[str, Any], figure: Figure) -> None:
    rows = sweep["summary"]
    figure.set_size_inches(*SIZE_INCHES)
    axes = figure.subplots()
    methods = dict.fromkeys([*METHODS, *(row["method"] for row in rows)])
    looks = dict(zip(methods, LOOKS, strict=False))
    for method, (color, marker) in looks.items():
        if points := [row for row in rows if row["method"] == method]:
            _method(axes, points, color, marker)
    _frame(axes, rows)
    axes.legend(frameon=False, fontsize=8.5)
    legend = "labels: sparsity; ring: knee"
    if any(row["seeds"] > 1 for row in rows):
        legend = f"points: median of {seeds(rows)}; whiskers: the least and the most; {legend}"
    if lost := absent(sweep["cells"]):
        legend += f"; without {lost}"
    caption(figure, [Record.from_json(value) for value in sweep["latency"]], legend)


def _method(axes: Axes, points: Sequence[dict[str, Any]], color: str, marker: str) -> None:
    """Draw the points of one method with their whiskers, joined and labelled if they form a curve."""
    points = sorted(points, key=lambda row: row["latency_ms_median"])
    gated = METHODS[points[0]["method"]].gated
    at, values = ([row[key] for row in points] for key in ("latency_ms_median", "metric_median"))
    below = [row["metric_median"] - row["metric_min"] for row in points]
    over = [row["metric_max"] - row["metric_median"] for row in points]
    axes.errorbar(
        at,
        values,
        yerr=[below, over],
        color=color,
        marker=marker,
        markersize=5,
        linestyle="-" if gated else "none",
        linewidth=1.6,
        elinewidth=1,
        capsize=2.5,
        label=points[0]["method"],
    )
    there: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for row in points if gated else ():
        there.setdefault((row["latency_ms_median"], row["metric_median"]), []).append(row)
    for place, rows in there.items():
        axes.annotate(
            ", ".join(f"{row['sparsity']:g}" for row in rows),
            place,
            (6, -6),
            textcoords="offset points",
            va="top",
            color=color,
            fontsize=8,
            bbox=PATCH,
        )
        if any(row["knee"] for row in rows):
            axes.plot(*place, marker="o", markersize=13, markerfacecolor="none", markeredgecolor=INK, linestyle="none")


def _frame(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Name the axes; latency is logarithmic if it spans a wide range."""
    times = [row["latency_ms_median"] for row in rows]
    one = rows[0]
    axes.set(
        xlabel=f"latency of one batch of {one['latency_batch_size']} x {one['latency_seq_len']} tokens (ms)",
        ylabel=f"validation {one['metric_name']} on {one['task']}",
    )
    if max(times) > LOGARITHMIC_FROM * min(times):
        axes.set_xscale("log")
        ticks = [base * 10.0**power for power in range(-3, 6) for base in (1, 1.5, 2, 3, 5, 7)]
        axes.set_xticks([tick for tick in ticks if min(times) / 2 <= tick <= max(times) * 2])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(times) / 1.25, max(times) * 1.25)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(color=FAINT, linewidth=0.8)
