"""The page: what it says about the facts, section by section. All text from files is escaped here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

from gatepress import __version__
from gatepress.bench.record import Record
from gatepress.bench.tables import cell, conditions, groups, three_digits
from gatepress.config import METHODS, Method
from gatepress.report.charts import Axis, Bar, Point, Series, Square, bars, heat, plot
from gatepress.report.facts import BYTES_A_PARAMETER, Item, Kept, Sheet

UNKNOWN = "-"
DENSE = "the dense model in float32"
TEMPLATE = "page.html"


class Section(NamedTuple):
    """One part of the page: its anchor, the finding as a heading, and HTML."""

    name: str
    heading: str
    body: str


@dataclass(frozen=True)
class Finding:
    """What the page says first: about which model, in one sentence, and the two numbers that matter."""

    item: Item
    sentence: str
    numbers: tuple[tuple[str, str], ...]  # (number, what it is)


@dataclass(frozen=True)
class Page:
    """What was drawn, and the part of it that a command reports."""

    html: str
    title: str
    finding: str  # a sentence
    sections: list[str]  # their anchors


def render(sheet: Sheet, title: str | None = None) -> Page:
    """Draw the page; `title` names its tasks unless given. Sections with nothing to say are left out."""
    title = title or f"gatepress on {_and(dict.fromkeys(map(_task, sheet.items)))}"
    found = _finding(sheet)
    sections = [section for part in _PARTS for section in part(sheet) if section.body]
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for value, name in found.numbers)
    template = Template(files("gatepress.report").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    html = template.substitute(
        title=escape(title),
        lead=escape(found.sentence),
        tiles=tiles,
        sections="\n".join(map(_section, sections)),
        footer=f"Written by gatepress {escape(__version__)}. Nothing on this page is loaded from anywhere else.",
    )
    return Page(html, title, found.sentence, [section.name for section in sections])


def _finding(sheet: Sheet) -> Finding:
    """Return what matters most: the knee of a sweep, or else the last form of a model that was given."""
    item = max(
        sheet.items, key=lambda one: (one.knee, one.metric is not None, _LATE.index(one.kind), one.closed or 0.0)
    )
    record = item.timed
    numbers = []
    said = f"is a model of {_task(item)}"
    if item.metric is not None:
        said = f"reaches {_metric_name(item)} {_metric(item.metric)} on validation rows of {_task(item)}"
        numbers.append((_metric(item.metric), f"{_metric_name(item)} on validation rows of {_task(item)}"))
    sentence = f"{item.label}{', the knee of its curve,' if item.knee else ''} {said}"
    if item.removed:
        sentence += f" with {_share(item.removed)} of the encoder's multiplications removed"
    if record and record.relative_time_factor and record.baseline != record.name:
        sentence += f", and is {_factor(record)} as fast as {record.baseline}"
        numbers.append((_factor(record), f"as fast as {record.baseline}, {cell(record)}"))
    elif item.removed is not None:
        numbers.append((_share(item.removed), "of the encoder's multiplications removed"))
    elif item.params is not None:
        numbers.append((f"{item.params:,.0f}", "parameters"))
    return Finding(item, f"{sentence}.", tuple(numbers))


_LATE = ("run", "sweep", "pruned", "onnx")  # later forms are nearer to what is deployed


# --- sections -------------------------------------------------------------------------------------


def _models(sheet: Sheet) -> Iterable[Section]:
    """Yield the table of the models that were given."""
    chosen = _finding(sheet).item
    columns: dict[str, Callable[[Item], str]] = {
        "model": lambda item: item.label,
        "task": _task,
        "metric": lambda item: _or(item.metric, lambda value: f"{_metric_name(item)} {_metric(value)}"),
        "asked": lambda item: _or(item.asked, _share),
        "gates closed": lambda item: _or(item.closed, _share),
        "MACs removed": lambda item: _or(item.removed, _share),
        "parameters": lambda item: _or(item.params, "{:,.0f}".format),
        "on disk": lambda item: _or(item.size_bytes, _megabytes),
    }
    if len(set(map(_task, sheet.items))) == 1:
        del columns["task"]  # it is in the heading
    columns = {name: show for name, show in columns.items() if any(show(item) != UNKNOWN for item in sheet.items)}
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = [_row(item, columns.values(), chosen=item is chosen) for item in sheet.items]
    count = f"{len(sheet.items)} models" if len(sheet.items) > 1 else "One model"
    tasks = _and(dict.fromkeys(map(_task, sheet.items)))
    note = "Asked is the sparsity; gates closed and multiply-accumulates (MACs) of the encoder's matrices are counted."
    if any(item.kind in ("run", "sweep") and item.size_bytes for item in sheet.items):
        note += " On the disk a run holds what it trained, its base lies elsewhere."
    note += "".join(f" Not there: {lost}." for lost in dict.fromkeys(item.absent for item in sheet.items) if lost)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    yield Section("models", f"{count} on {tasks}", f'<div class="scroll" tabindex="0">{table}</div>{_note(note)}')


def _row(item: Item, columns: Iterable[Callable[[Item], str]], *, chosen: bool) -> str:
    mark = ' class="chosen"' if chosen else ""
    return f"<tr{mark}>{''.join(f'<td>{escape(show(item))}</td>' for show in columns)}</tr>"


def _tradeoff(sheet: Sheet) -> Iterable[Section]:
    """Yield the picture of each sweep: metric over latency, or over what is removed if nothing was timed."""
    for number, points in enumerate(points for points in sheet.sweeps if len(points) > 1):
        one, records = points[0], [point.timed for point in points if point.timed]
        timed = len(records) == len(points)
        x = Axis("multiply-accumulates of the encoder removed", percent=True)
        if timed:
            x = Axis(f"latency, {cell(records[0])} (ms)", logarithmic=True)
        methods = dict.fromkeys(map(_method, points))
        series = [
            Series(method, list(_scattered(points, method, timed=timed)), joined=METHODS[method].gated)
            for method in methods
        ]
        if not any(one.points for one in series):
            continue
        picture = plot(
            f"{_metric_name(one)} over {x.name}", series, x, Axis(f"validation {_metric_name(one)} on {_task(one)}")
        )
        note = "Beside each point its sparsity; the ring is the knee, where the curve leaves its chord most."
        if one.spread:
            note += " Points are medians over seeds, whiskers the least and the most."
        if timed:
            note += f" {conditions(records)}."
        yield Section(_numbered("tradeoff", number), _traded(points), picture + _note(note))


def _method(point: Item) -> Any:
    return point.name.split(" ")[0]


def _scattered(points: Sequence[Item], method: Method, *, timed: bool) -> Iterable[Point]:
    """Return the points of one method from left to right."""
    places = [
        (point.timed.latency_ms_median if timed and point.timed else point.removed or 0.0, point.metric, point)
        for point in points
        if _method(point) == method
    ]
    for x, y, point in sorted(places, key=lambda place: place[0]):
        if y is not None:
            low, high = point.spread or (None, None)
            label = f"{point.asked:g}" if METHODS[method].gated else ""
            yield Point(x, y, f"{point.name}: {_metric_name(point)} {_metric(y)}", label, low, high, point.knee)


def _traded(points: Sequence[Item]) -> str:
    """Return what the knee, or else the sparsest point, gains and loses compared with the densest one."""
    first, best = points[0], next((point for point in points if point.knee), points[-1])
    gain = f"does {_share(best.removed or 0.0)} less work than"
    if best.timed and best.timed.relative_time_factor and best.timed.baseline == first.name:
        gain = f"is {_factor(best.timed)} as fast as"
    where = "At the knee, " if best.knee else ""
    return f"{where}{best.name} {gain} {first.name}, {_change(first, best)}"


def _change(before: Item, after: Item) -> str:
    """Return the change of the metric, in its own unit."""
    if before.metric is None or after.metric is None:
        return f"its {_metric_name(after)} is not known"
    lost = before.metric - after.metric
    return f"{_metric_name(after)} {_metric(abs(lost))} {'lower' if lost > 0 else 'higher' if lost < 0 else 'apart'}"


def _metrics(sheet: Sheet) -> Iterable[Section]:
    """Yield bars of the metric, before and after, one picture for each task and metric."""
    kinds = dict.fromkeys((_task(item), _metric_name(item)) for item in sheet.items)
    for number, (task, metric) in enumerate(kinds):
        items = [item for item in sheet.items if (_task(item), _metric_name(item)) == (task, metric)]
        told: dict[Any, Bar] = {}
        for item in items:
            for key, bar in _before_and_after(item):
                told.setdefault(key, bar)
        rows = list(told.values())
        if rows:
            picture = bars(f"validation {metric} on {task}", rows)
            yield Section(
                _numbered("metric", number),
                _moved(items),
                picture + _note(_bars_explained(rows)),
            )


def _bars_explained(rows: Sequence[Bar]) -> str:
    grey = "; grey: before" if any(bar.quiet for bar in rows) else ""
    lines = "; lines: the least and the most over seeds" if any(bar.low is not None for bar in rows) else ""
    return f"Bars begin at zero{grey}{lines}."


def _before_and_after(item: Item) -> Iterable[tuple[Any, Bar]]:
    """Yield (key, bar): a run and its later forms share one before."""
    low, high = item.spread or (None, None)
    text = _metric(item.metric)
    if item.before is not None:
        key = (item.before, item.before_is, item.curve)
        yield key, Bar(f"{item.label}, {item.before_is}", item.before, _metric(item.before), quiet=True)
        text += "" if item.metric is None else f" ({item.metric - item.before:+.4f})"
    if item.metric is not None:
        yield item.label, Bar(item.label, item.metric, text, low, high)


def _moved(items: Sequence[Item]) -> str:
    """Return a sentence on the change of the metric."""
    measured = [item for item in items if item.metric is not None]
    told = next((item for item in reversed(measured) if item.before is not None), None)
    name = _metric_name(items[0]).capitalize()
    if told and told.before is not None:
        return f"{name} of {told.label} goes from {_metric(told.before)} ({told.before_is}) to {_metric(told.metric)}"
    values = sorted({item.metric for item in measured if item.metric is not None})
    if not values:
        return f"{name} was not measured in the end"
    if len(values) > 1:
        return f"{name} lies between {_metric(values[0])} and {_metric(values[-1])}"
    return f"{name} is {_metric(values[0])}" + (" in every form" if len(measured) > 1 else "")


def _sizes(sheet: Sheet) -> Iterable[Section]:
    """Yield bars of what has to be stored, beside the dense model in float32."""
    dense = dict.fromkeys(item.dense_params for item in sheet.items if item.dense_params)
    rows = [Bar(DENSE, size * BYTES_A_PARAMETER, _megabytes(size * BYTES_A_PARAMETER), quiet=True) for size in dense]
    for item in sheet.items:
        if item.kind in ("pruned", "onnx"):
            size, what = item.size_bytes, ""
        else:
            size = item.params * BYTES_A_PARAMETER if item.params else None
            what = " once pruned" if item.closed else ""
        if size:
            rows.append(Bar(f"{item.label}{what}", size, _megabytes(size)))
    if not rows:
        return
    least, most = min(rows, key=lambda bar: bar.value), max(rows, key=lambda bar: bar.value)
    heading = f"{least.label} takes {least.text}"
    if least.value < most.value:
        heading += f", {_share(1 - least.value / most.value)} less than {most.label}"
    note = "Models on the disk as their files are; dense, and what a run gives once pruned, as 4 bytes a parameter."
    yield Section("size", heading, bars("sizes", rows) + _note(note))


def _latency(sheet: Sheet) -> Iterable[Section]:
    """Yield bars of the timings, one picture for each batch size and length."""
    timed = [group for records in sheet.records for group in groups(records)]
    if not timed:
        return
    fastest = max((record for group in timed for record in group), key=lambda one: one.relative_time_factor or 0.0)
    heading = f"{fastest.name} takes {three_digits(fastest.latency_ms_median)} ms"
    if fastest.relative_time_factor and fastest.baseline != fastest.name:
        heading = f"{fastest.name} is up to {_factor(fastest)} as fast as {fastest.baseline}"
    pictures = [
        f"<div><h3>{escape(cell(group[0]))}</h3>{bars(cell(group[0]), list(map(_timed, group)))}</div>"
        for group in timed
    ]
    under = dict.fromkeys(conditions(group) for group in sheet.records)
    note = f"Milliseconds of one call; line: 10th to 90th percentile; grey: the baseline. {'. '.join(under)}."
    yield Section("latency", heading, f'<div class="pair">{"".join(pictures)}</div>{_note(note)}')


def _timed(record: Record) -> Bar:
    factor = "" if record.relative_time_factor is None else f" ({_factor(record)})"
    return Bar(
        record.name,
        record.latency_ms_median,
        f"{three_digits(record.latency_ms_median)} ms{factor}",
        record.latency_ms_p10,
        record.latency_ms_p90,
        quiet=record.name == record.baseline,
    )


def _curves(sheet: Sheet) -> Iterable[Section]:
    """Yield metric and closed gates over the steps of each training; forms of one run share a curve, drawn once."""
    trained = {(item.curve, item.commands[:1]): item for item in reversed(sheet.items) if item.curve}
    items = list(reversed(trained.values()))
    if not items:
        return
    sparsest = max(items, key=_closed_in_training)
    heading = f"{sparsest.label} ends at {_metric_name(sparsest)} {_metric(sparsest.curve[-1].metric)}"
    closed = _closed_in_training(sparsest)
    if closed:
        heading += f" with {_share(closed)} of its gates closed"
    metrics = _and(dict.fromkeys(map(_metric_name, items)))
    both = [
        ("the metric in training", [_curve(item, "metric") for item in items], Axis(metrics)),
        (
            "closed gates in training",
            [_curve(item, "closed") for item in items if closed],
            Axis("fraction of the gates that is closed", percent=True, least=0.0),
        ),
    ]
    pictures = [
        f"<div>{plot(name, series, Axis('step', least=0.0), y)}</div>"
        for name, series, y in both
        if any(one.points for one in series)
    ]
    body = f'<div class="pair">{"".join(pictures)}</div>' if pictures else ""
    yield Section("training", heading, body)


def _closed_in_training(item: Item) -> float:
    """Return the fraction of gates that its training closed; a model pruned to another size has more or fewer."""
    return item.curve[-1].closed or 0.0


def _curve(item: Item, what: str) -> Series:
    known = [(point.step, getattr(point, what)) for point in item.curve if getattr(point, what) is not None]
    return Series(item.label, [Point(x, y, f"{item.label}, step {x:,.0f}: {y:.4f}") for x, y in known])


def _layers(sheet: Sheet) -> Iterable[Section]:
    """Yield a heat map of what each layer keeps, once for each plan."""
    kept = {item.layers: item for item in reversed(sheet.items) if item.layers}
    for number, item in enumerate(reversed(kept.values())):
        work = [layer.macs_left for layer in item.layers]
        least, most = work.index(min(work)), work.index(max(work))
        heading = f"{item.label} keeps least in layer {least}, {_share(work[least])} of its work"
        if least != most:
            heading += f", and most in layer {most}, {_share(work[most])}"
        rows = [(f"layer {index}", _squares(index, layer)) for index, layer in enumerate(item.layers)]
        picture = heat("what each layer keeps", ("heads", "q/k width", "v/o width", "neurons", "work left"), rows)
        note = "Numbers are what is left, widths those of one head; the deeper the colour, the more of the dense layer."
        yield Section(_numbered("layers", number), heading, picture + _note(note))


def _squares(index: int, layer: Kept) -> list[Square]:
    parts = {"heads": layer.heads, "q/k width": layer.qk_width, "v/o width": layer.vo_width, "neurons": layer.neurons}
    counted = [
        Square(left / of if of else 0.0, f"{left:,}", f"layer {index}: {left:,} of {of:,} {name}")
        for name, (left, of) in parts.items()
    ]
    share = f"{layer.macs_left:.0%}"
    return [*counted, Square(layer.macs_left, share, f"layer {index}: {share} of its multiply-accumulates")]


def _origin(sheet: Sheet) -> Iterable[Section]:
    """Yield where each model comes from; models of one origin share a table."""
    shared: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for item in sheet.items:
        if item.origin:
            shared.setdefault(tuple(item.origin.items()), []).append(item.label)
    tables = []
    for origin, labels in shared.items():
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in origin if text)
        tables.append(f'<h3>{escape(_and(labels))}</h3><table class="origin"><tbody>{rows}</tbody></table>')
    bases = dict.fromkeys(item.origin["base"] for item in sheet.items if item.origin.get("base"))
    heading = f"Made from {_and(bases)}" if bases else "Made from an unknown base"
    yield Section("origin", heading, "".join(tables))


def _commands(sheet: Sheet) -> Iterable[Section]:
    """Yield the command lines; lines that several models share appear once."""
    lines = dict.fromkeys(line for item in sheet.items for line in item.commands)
    several = f"{len(lines)} commands make" if len(lines) > 1 else "One command makes"
    blocks = "".join(f"<pre>{escape(line)}</pre>" for line in lines)
    note = _note("A click marks a whole command. Directories and files are shown by name.") if lines else ""
    yield Section("commands", f"{several} it again", blocks + note)


_PARTS: tuple[Callable[[Sheet], Iterable[Section]], ...] = (
    *(_models, _tradeoff, _metrics, _sizes, _latency),
    *(_curves, _layers, _origin, _commands),
)


# --- words ----------------------------------------------------------------------------------------


def _section(section: Section) -> str:
    return f'<section id="{section.name}">\n<h2>{escape(section.heading)}</h2>\n{section.body}\n</section>'


def _numbered(name: str, number: int) -> str:
    """Return the anchor of the first, second, ... section of one kind."""
    return name if number == 0 else f"{name}-{number + 1}"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _and(words: Iterable[str]) -> str:
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def _or(value: float | None, show: Callable[[float], str]) -> str:
    return UNKNOWN if value is None else show(value)


def _task(item: Item) -> str:
    return item.task or "no task"


def _metric_name(item: Item) -> str:
    return item.metric_name or "metric"


def _metric(value: float | None) -> str:
    return _or(value, "{:.4f}".format)


def _share(value: float) -> str:
    return f"{value:.1%}"


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _factor(record: Record) -> str:
    return f"{record.relative_time_factor:.2f}x"
