"""Benchmark records as figures: lines over sparsity, or one bar per target. Needs matplotlib."""

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from gatepress.bench.record import Record
from gatepress.bench.tables import cell, conditions, groups, shortened, three_digits

CHARACTERS_PER_INCH = 15  # in a caption
LABEL_ROOM = 0.07  # fraction of the axis' height that a label below a point takes
INK, QUIET, FAINT = "#24292f", "#6e7781", "#d8dee4"  # text, secondary text, grid
BLUE, ORANGE = "#0072b2", "#d55e00"  # distinguishable with every kind of colour vision (Okabe and Ito)
RUNTIMES = {"torch": ("torch", BLUE), "onnxruntime": ("ONNX Runtime", ORANGE), "openvino": ("OpenVINO", "#009e73")}
HATCHES = {"int8": "////", "bfloat16": "\\\\\\\\", "float16": "xxxx"}  # dots make large files
# Behind labels, so that they stay readable where they cross a line.
PATCH = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "figure.facecolor": "white",
    "hatch.color": "white",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "gatepress",  # the same records give the same bytes
    "text.color": INK,
    "text.parse_math": False,  # names of directories may hold dollar signs
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
}


def draw(records: Sequence[Record], suffix: str) -> bytes:
    """Return the figure of records of one kind as the bytes of a `png` or `svg` file."""
    return drawn(suffix, lambda figure: (_lines if records[0].what == "matmul" else _bars)(figure, groups(records)))


def drawn(suffix: str, draw_on: Callable[[Figure], None]) -> bytes:
    """Return what `draw_on` draws on an empty figure as the bytes of a `png` or `svg` file."""
    file = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure()
        figure.set_layout_engine("constrained", h_pad=0.09, w_pad=0.09)
        draw_on(figure)
        # No date in the file, so that the same records give the same bytes.
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(file, format=suffix, dpi=160, metadata=metadata)
    return file.getvalue()


def _lines(figure: Figure, cells: list[list[Record]]) -> None:
    """Draw time over sparsity, one panel per weight, each point labelled with what it saves."""
    figure.set_size_inches(6.8 * len(cells), 5.2)
    panels = _panels(figure, 1, len(cells))
    for axes, group in zip(panels, cells, strict=True):
        dense = group[0]
        top = 1.25 * max(record.latency_ms_median for record in group)
        axes.axhspan(dense.latency_ms_p10, dense.latency_ms_p90, color=FAINT, alpha=0.5, linewidth=0)
        axes.axhline(dense.latency_ms_median, color=QUIET, linewidth=1.4, label="dense")
        for kind, color, name in (
            ("index", ORANGE, "select columns, then multiply"),
            ("closure", BLUE, "multiply only (columns are gone already)"),
        ):
            line = sorted((one for one in group if one.kind == kind), key=lambda one: one.sparsity or 0)
            at = [100 * (record.sparsity or 0) for record in line]
            low = [record.latency_ms_p10 for record in line]
            high = [record.latency_ms_p90 for record in line]
            times = [record.latency_ms_median for record in line]
            axes.fill_between(at, low, high, color=color, alpha=0.13, linewidth=0)
            axes.plot(at, times, color=color, marker="o", markersize=4, linewidth=1.6, label=name)
            for record in line:
                _label_point(axes, record, group, color, top)
        axes.set(
            xlabel="columns removed (%)",
            ylabel="time of one product (ms)",
            title=cell(dense),
            xlim=(-5, max(95, *(100 * (record.sparsity or 0) + 3 for record in group))),
            # A rare slow call must not flatten the picture, so the bands may be cut off above.
            ylim=(0, top),
            xticks=range(0, 100, 10),
        )
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, frameon=False, fontsize=8.5)
    caption(figure, _all(cells), "bands: p10 to p90; labels: time saved against dense")


def _label_point(axes: Axes, record: Record, group: list[Record], color: str, top: float) -> None:
    """Write what a point saves: above the upper line, below the lower one if there is room."""
    rivals = [one for one in group if one.sparsity == record.sparsity and one.kind not in ("dense", record.kind)]
    upper = all((record.latency_ms_median, record.kind) > (rival.latency_ms_median, rival.kind) for rival in rivals)
    cramped = min(one.latency_ms_median for one in [record, *rivals]) < LABEL_ROOM * top
    offset = (17 if cramped else 7) if upper else (7 if cramped else -7)
    axes.annotate(
        f"{record.relative_reduction_percent or 0:.0f} %".replace("-0 ", "0 ").replace("-", "\u2212"),
        (100 * (record.sparsity or 0), record.latency_ms_median),
        (0, offset),
        textcoords="offset points",
        ha="center",
        va="bottom" if offset > 0 else "top",
        color=color,
        fontsize=8,
        bbox=PATCH,
    )


def _bars(figure: Figure, cells: list[list[Record]]) -> None:
    """Draw one bar per target, one panel per batch size and length, labelled with its factor."""
    width = min(2, len(cells))
    height = -(-len(cells) // width)
    most = max(map(len, cells))
    figure.set_size_inches(2.2 + 4.2 * width, 1.2 + height * (0.75 + 0.42 * most))
    panels = _panels(figure, height, width)
    for place, (axes, group) in enumerate(zip(panels, cells, strict=False)):
        at = range(len(group))
        bars = axes.barh(
            at,
            [record.latency_ms_median for record in group],
            xerr=[
                [record.latency_ms_median - record.latency_ms_p10 for record in group],
                [record.latency_ms_p90 - record.latency_ms_median for record in group],
            ],
            height=0.62,
            color=[_color(record) for record in group],
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5},
        )
        for bar, record in zip(bars, group, strict=True):
            bar.set_hatch(HATCHES.get(record.dtype, ""))
        longest = max(record.latency_ms_p90 for record in group)
        for y, record in enumerate(group):
            axes.annotate(
                f"{three_digits(record.latency_ms_median)} ms  {record.relative_time_factor or 1:.2f}x",
                (record.latency_ms_p90, y),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                bbox=PATCH,
            )
        axes.set(
            xlabel="time of one pass (ms)" if group[0].task else "time of one batch (ms)",
            title=cell(group[0]),
            xlim=(0, 1.5 * longest),  # room for the labels
            yticks=at,
            yticklabels=[shortened(record.name) for record in group] if place % width == 0 else [],
        )
        axes.invert_yaxis()  # the first target on top
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    _legend(figure, _all(cells))
    baseline = shortened(cells[0][0].name)
    caption(figure, _all(cells), f"whiskers: p10 to p90; factor: against {baseline}, above 1 is faster")


def _panels(figure: Figure, rows: int, columns: int) -> list[Axes]:
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def _color(record: Record) -> str:
    return RUNTIMES.get(record.runtime, (record.runtime, ORANGE))[1]


def _legend(figure: Figure, records: list[Record]) -> None:
    """Explain colours and hatching if there is more than one of them."""
    handles = []
    there = {record.runtime for record in records}
    if len(there) > 1:
        handles += [Patch(color=color, label=name) for key, (name, color) in RUNTIMES.items() if key in there]
    for dtype in sorted({record.dtype for record in records} & HATCHES.keys()):
        handles.append(Patch(facecolor=QUIET, edgecolor="white", hatch=HATCHES[dtype], label=dtype))
    if handles:
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8.5)


def _all(cells: list[list[Record]]) -> list[Record]:
    return [record for group in cells for record in group]


def caption(figure: Figure, records: Sequence[Record], legend: str) -> None:
    """Write below the panels what was measured where, and what the marks mean."""
    width = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    text = f"{textwrap.fill(conditions(records), width)}\n{textwrap.fill(legend, width)}"
    figure.supxlabel(text, fontsize=8, color=QUIET, x=0.01, ha="left")
