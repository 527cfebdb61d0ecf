"""Charts as inline SVG, by hand: bars, lines and points, a heat map.

Horizontal places are a percentage of the width, vertical ones are pixels. So a chart fills a phone or a wide screen,
and its letters stay as large as those of the text. Colours are CSS classes of the page, so dark mode is the page's.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from gatepress.bench.tables import shortened

LOGARITHMIC_FROM = 4.0  # ratio of most to least
STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
LOGARITHMIC_STEPS = (1, 1.5, 2, 3, 5, 7)
HUES = 6  # classes h0 to h5 of the page
# Around the origin, about 9 px wide: shapes repeat what colours say.
SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "M0 -5l5 9h-10z",
    "M0 5l5 -9h-10z",
    "M-1.5 -5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    "M-5 -3l2 -2l3 3l3 -3l2 2l-3 3l3 3l-2 2l-3 -3l-3 3l-2 -2l3 -3z",
)
BAR_ROW, BAR_TOP, BAR_HEIGHT = 44, 20, 10  # px
PLOT_HEIGHT, PLOT_TOP, PLOT_BOTTOM = 300, 12, 44
LABEL_BELOW, LABEL_ABOVE = 16, -8  # baseline of a point's label, relative to the point
HEAT_ROW, HEAT_TOP = 30, 26
DEEP_FROM = 0.8  # fraction from which letters in the colour of ink are hard to read


@dataclass(frozen=True)
class Bar:
    """One bar; `low` and `high` are the ends of its whisker; `quiet` marks what others are compared with."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Point:
    """One point of a plot, with a word beside it, a ring around it and a whisker through it."""

    x: float
    y: float
    title: str
    label: str = ""
    low: float | None = None
    high: float | None = None
    ring: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one colour and shape, joined by a line or not."""

    name: str
    points: Sequence[Point]
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis shows and how its ticks are spelled; `logarithmic` only if the values span a wide range."""

    name: str
    percent: bool = False  # of fractions
    logarithmic: bool = False
    least: float | None = None  # the axis begins here or lower


@dataclass(frozen=True)
class Square:
    """One cell of a heat map: a fraction as colour, a text on it."""

    fraction: float
    text: str
    title: str


def bars(name: str, rows: Sequence[Bar]) -> str:
    """Return horizontal bars from zero; the longest value takes the whole width."""
    ends = [end for row in rows for end in (row.value, row.low, row.high, 0.0) if end is not None]
    place = _Scale(min(ends), max(ends), 0, 100)
    drawn = [_bar(row, index * BAR_ROW, place) for index, row in enumerate(rows)]
    return _svg(name, len(rows) * BAR_ROW, drawn, "bars")


def plot(name: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Return lines or points over two axes, with a legend if there is more than one series."""
    points = [point for one in series for point in one.points]
    across = _scale(x, [point.x for point in points], 0, 100)
    heights = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    up = _scale(y, heights, PLOT_HEIGHT - PLOT_BOTTOM, PLOT_TOP)
    parts = [
        *(_grid_line(up(tick), text) for tick, text in _spelled(y, up)),
        *(_tick(across(tick), text) for tick, text in _spelled(x, across)),
        _text("100%", PLOT_HEIGHT - 4, x.name, "name end"),
        *(part for index, one in enumerate(series) for part in _series(one, index, across, up)),
    ]
    drawn = f'<p class="axis">{escape(y.name)}</p>{_svg(name, PLOT_HEIGHT, parts, "plot")}'
    return drawn + (_legend(series) if len(series) > 1 else "")


def heat(name: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Square]]]) -> str:
    """Return a heat map, a row of squares for each (label, squares): the larger the fraction, the deeper the colour."""
    width = 100 / len(columns)
    parts = [_text(_percent((index + 0.5) * width), 14, column, "name middle") for index, column in enumerate(columns)]
    for number, (label, squares) in enumerate(rows):
        top = HEAT_TOP + number * HEAT_ROW
        parts.append(_text("-8", top + 19, label, "tick end"))
        parts += [_square(square, index * width, top, width) for index, square in enumerate(squares)]
    return _svg(name, HEAT_TOP + len(rows) * HEAT_ROW, parts, "heat")


# --- scales ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """Map values to places, linearly or by logarithms."""

    least: float
    most: float
    start: float
    end: float
    ticks: Sequence[float] = ()
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        least, most, at = (math.log(v) if self.logarithmic else v for v in (self.least, self.most, value))
        share = (at - least) / (most - least) if most > least else 0.0
        return self.start + share * (self.end - self.start)


def _scale(axis: Axis, values: Sequence[float], start: float, end: float) -> _Scale:
    """Return a scale that holds all values, from tick to tick."""
    reach = [*values] if axis.least is None else [*values, axis.least]
    least, most = min(reach), max(reach)
    if axis.logarithmic and least > 0 and most > LOGARITHMIC_FROM * least:
        least, most = least / 1.15, most * 1.15
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        every = [base * 10.0**power for power in powers for base in LOGARITHMIC_STEPS]
        return _Scale(least, most, start, end, [tick for tick in every if least <= tick <= most], logarithmic=True)
    ticks = _ticks(least, most)
    return _Scale(ticks[0], ticks[-1], start, end, ticks)


def _spelled(axis: Axis, scale: _Scale) -> list[tuple[float, str]]:
    """Return the ticks with their texts, with as many decimals as they need."""
    if scale.logarithmic:
        return [(tick, f"{tick:g}") for tick in scale.ticks]
    times, unit = (100, "%") if axis.percent else (1, "")
    decimals = max(len(f"{times * tick:.10g}".partition(".")[2]) for tick in scale.ticks)
    return [(tick, f"{times * tick:,.{decimals}f}{unit}") for tick in scale.ticks]


def _ticks(least: float, most: float) -> list[float]:
    """Return four to seven round numbers, the first at or below `least`, the last at or above `most`."""
    span = most - least or abs(most) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = power * next(one for one in STEPS if one * power >= span / 5 * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


# --- parts ----------------------------------------------------------------------------------------


def _svg(name: str, height: float, parts: Iterable[str], kind: str) -> str:
    label = escape(name)
    return (
        f'<div class="{kind}"><svg role="img" aria-label="{label}" width="100%" height="{height:g}">'
        f"{''.join(parts)}</svg></div>"
    )


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def _text(x: str, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y:.1f}">{escape(text)}</text>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _line(kind: str, start: tuple[str, float], end: tuple[str, float]) -> str:
    return f'<line class="{kind}" x1="{start[0]}" y1="{start[1]:.1f}" x2="{end[0]}" y2="{end[1]:.1f}"/>'


def _bar(row: Bar, top: float, place: Callable[[float], float]) -> str:
    """Return label and number on one line, with the bar below them."""
    start, end = sorted((place(0.0), place(row.value)))
    middle = top + BAR_TOP + BAR_HEIGHT / 2
    whisker = ""
    if row.low is not None and row.high is not None:
        whisker = _line("whisker", (_percent(place(row.low)), middle), (_percent(place(row.high)), middle))
    size = f'y="{top + BAR_TOP:g}" height="{BAR_HEIGHT}" rx="2"'
    return (
        f"<g>{_title(f'{row.label}: {row.text}')}"
        f'<rect class="track" x="0" width="100%" {size}/>'
        f'<rect class="{"quiet" if row.quiet else "accent"}" x="{_percent(start)}" width="{_percent(end - start)}" '
        f"{size}/>{whisker}"
        f"{_text('0', top + BAR_TOP - 6, shortened(row.label), 'label')}"
        f"{_text('100%', top + BAR_TOP - 6, row.text, 'number end')}</g>"
    )


def _grid_line(y: float, text: str) -> str:
    return _line("grid", ("0", y), ("100%", y)) + _text("-8", y + 4, text, "tick end")


def _tick(x: float, text: str) -> str:
    bottom = PLOT_HEIGHT - PLOT_BOTTOM
    return _line("grid", (_percent(x), bottom), (_percent(x), bottom + 4)) + _text(
        _percent(x), bottom + 18, text, "tick middle"
    )


def _series(one: Series, index: int, across: _Scale, up: _Scale) -> list[str]:
    """Return the lines of a series, then its marks: no line covers a mark."""
    hue = f"h{index % HUES}"
    places = [(_percent(across(point.x)), up(point.y)) for point in one.points]
    steps = pairwise(places) if one.joined else ()
    dashed = " dashed" if index >= HUES else ""
    return [
        *(_line(f"path {hue}{dashed}", start, end) for start, end in steps),
        *(_mark(point, place, index, up) for point, place in zip(one.points, places, strict=True)),
    ]


def _mark(point: Point, place: tuple[str, float], index: int, up: _Scale) -> str:
    """Return a mark with everything that belongs to it, drawn around its place."""
    x, y = place
    whisker = ""
    if point.low is not None and point.high is not None:
        whisker = _line(f"path h{index % HUES}", ("0", up(point.low) - y), ("0", up(point.high) - y))
    ring = '<circle class="ring" r="11"/>' if point.ring else ""
    fits_below = y + LABEL_BELOW < PLOT_HEIGHT - PLOT_BOTTOM  # otherwise it would stand on the ticks
    down = LABEL_BELOW if fits_below else LABEL_ABOVE
    label = _text("9" if not point.ring else "15", down, point.label, "tick") if point.label else ""
    parts = f"{_title(point.title)}{whisker}{_shape(index)}{ring}{label}"
    return f'<svg x="{x}" y="{y:.1f}" overflow="visible"><g>{parts}</g></svg>'


def _shape(index: int) -> str:
    return f'<path class="mark h{index % HUES}" d="{SHAPES[index % len(SHAPES)]}"/>'


def _legend(series: Sequence[Series]) -> str:
    keys: list[Any] = [
        f'<li><svg width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">{_shape(index)}</svg>'
        f"{escape(shortened(one.name))}</li>"
        for index, one in enumerate(series)
    ]
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _square(square: Square, left: float, top: float, width: float) -> str:
    share = min(1.0, max(0.0, square.fraction))
    side = "on-square" if share >= DEEP_FROM else "number"
    return (
        f"<g>{_title(square.title)}"
        f'<rect class="square" x="{_percent(left)}" y="{top}" width="{_percent(width)}" height="{HEAT_ROW}" '
        f'fill-opacity="{0.05 + 0.9 * share:.3f}"/>'
        f"{_text(_percent(left + width / 2), top + 19, square.text, f'{side} middle')}</g>"
    )
