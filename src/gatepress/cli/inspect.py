"""`gatepress inspect`: what a directory is, where it comes from, what each layer keeps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from gatepress.cli import _options as opt
from gatepress.cli._console import Titled, count, facts, grid, lines, megabytes, percent, pick, session
from gatepress.cli.train import metric_rows

EXAMPLES = opt.examples(
    "gatepress inspect runs/sst2",
    "gatepress inspect pruned/sst2 --json | jq -r '.commands[]'",
    "gatepress inspect onnx/sst2/model.onnx",
)

BAR = 6  # columns of a full bar
EIGHTHS = " ▏▎▍▌▋▊▉█"
HEIGHTS = "▁▂▃▄▅▆▇█"
SAID = ("model", "revision", "commit", "seed", "method", "sparsity")  # shown in another row already
HASH = 12  # characters of a sha256 that a person compares

Bar = Callable[[float], str]


def inspect(
    directory: opt.Written,
    *,
    shown: opt.Shown,
) -> None:
    """Show what a directory is and where it comes from.

    Shows the base model, data, seed, versions, the settings that took effect, the commands that rebuild it,
    the metric, and what is left of each layer. Reads manifests, headers and gates; loads no model.
    """
    with session(**vars(shown)) as screen:
        from gatepress import inspecting

        drawn = draws(screen.stdout)
        screen.result(inspecting.inspect(directory), lambda result: tables(result, drawn=drawn))


def draws(stream: TextIO) -> bool:
    """Return whether bars can be drawn on the stream: on a terminal that has the characters."""
    return stream.isatty() and (stream.encoding or "").lower().startswith("utf")


def tables(result: dict[str, Any], *, drawn: bool) -> list[Titled]:
    """Return what the directory is, where it comes from, how to rebuild it, and what each layer keeps."""
    shown = [facts(f"{result['kind']}: {result['directory']}", _about(result, drawn=drawn))]
    if result.get("provenance"):
        shown.append(facts("Where it comes from", _origin(result["provenance"])))
    if result.get("commands"):
        shown.append(lines("Making it again", result["commands"]))
    if result.get("layers"):
        columns = ["layer", "heads", "query/key width", "value/output width", "neurons", "by index"]
        rows = [_layer(number, layer, drawn=drawn) for number, layer in enumerate(result["layers"])]
        shown.append(grid("What each layer keeps", [*columns, "multiplications left"], rows))
    if result.get("graph"):
        shown.append(facts("Graph", _graph(result["graph"])))
    return shown


def _about(result: dict[str, Any], *, drawn: bool) -> list[tuple[str, str]]:
    rows = pick(result, [("status", "training", str), ("source", "exported from", str), ("task", "task", str)])
    rows += metric_rows(result)
    rows += pick(result, [("curve", "  while training", lambda curve: _curve(curve, drawn=drawn))])
    return rows + pick(
        result,
        [
            ("method", "method", str),
            ("asked_sparsity", "sparsity asked", percent),
            ("closed_fraction", "gates closed", percent),
            ("encoder_weights_removed", "encoder weights removed", percent),
            ("encoder_macs_removed", "encoder multiplications removed", percent),
            ("layout", "layout", str),
            ("target", "fastest on", str),
            ("dtype", "arithmetic", str),
            ("total_params", "parameters", count),
            ("dense_params", "  before gates", count),
            ("size_bytes", "size", megabytes),
            ("max_abs_logit_diff", "largest difference of a logit", "{:.1e}".format),
        ],
    )


def _curve(curve: Sequence[dict[str, Any]], *, drawn: bool) -> str:
    values = [value for point in curve if (value := point.get("metric_value")) is not None]
    if not values:
        return "-"
    ends = f"{values[0]:.4f} to {values[-1]:.4f} in {len(values)} epochs"
    return f"{sparkline(values)}  {ends}" if drawn else ends


def _origin(origin: dict[str, Any]) -> list[tuple[str, str]]:
    rows = pick(origin, [("model", "base model", str), ("revision", "  revision", str)])
    rows += [(f"  {name}", f"sha256 {digest[:HASH]}...") for name, digest in (origin["base_sha256"] or {}).items()]
    fingerprint = ("data_fingerprint", "rows", lambda digest: f"sha256 {digest[:HASH]}...")
    rows += pick(origin, [fingerprint, ("seed", "seed", str)])
    settings = dict(origin.get("settings") or {})
    data = settings.pop("data", {})
    said = {name: value for name, value in {**data, **settings}.items() if value is not None and name not in SAID}
    rows += [(name.replace("_", " "), _value(value)) for name, value in said.items()]
    versions = ", ".join(f"{name} {version}" for name, version in (origin["versions"] or {}).items())
    return rows + ([("versions", versions)] if versions else [])


def _value(value: Any) -> str:
    return ",".join(value) if isinstance(value, list | tuple) else str(value)


def _layer(number: int, layer: dict[str, Any], *, drawn: bool) -> list[str]:
    bar: Bar = (lambda fraction: f"{blocks(fraction)} ") if drawn else (lambda _: "")
    pairs = (
        ("heads", "dense_heads"),
        ("qk_width", "dense_head_width"),
        ("vo_width", "dense_head_width"),
        ("neurons", "dense_neurons"),
    )
    return [
        str(number),
        *(f"{bar(layer[kept] / layer[dense])}{layer[kept]} of {layer[dense]}" for kept, dense in pairs),
        " ".join(layer["by_index"]) or "-",
        f"{bar(layer['macs_left'])}{percent(layer['macs_left'])}",
    ]


def _graph(graph: dict[str, Any]) -> list[tuple[str, str]]:
    ends = [
        (kind, f"{one['name']} {one['dtype']} {_shape(one['shape'])}")
        for kind in ("inputs", "outputs")
        for one in graph[kind]
    ]
    nodes = ", ".join(f"{name} {number}" for name, number in graph["nodes"].items())
    largest = sorted(graph["initializers"], key=lambda one: -math.prod(one["shape"]))[:3]
    stored = [("  among the largest", f"{one['name']} {one['dtype']} {_shape(one['shape'])}") for one in largest]
    total = sum(math.prod(one["shape"]) for one in graph["initializers"])
    return [
        *ends,
        ("operator set", str(graph["opset"])),
        ("operators", f"{sum(graph['nodes'].values())}: {nodes}"),
        ("stored tensors", f"{len(graph['initializers'])}, {count(total)} numbers"),
        *stored,
    ]


def _shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def blocks(fraction: float) -> str:
    """Return a bar of `BAR` columns that is full at 1."""
    eighths = round(min(max(fraction, 0.0), 1.0) * BAR * 8)
    full, rest = divmod(eighths, 8)
    return f"{'█' * full}{EIGHTHS[rest] if rest else ''}".ljust(BAR)


def sparkline(values: Sequence[float]) -> str:
    """Return one block per value, between the lowest and the highest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(HEIGHTS[round((value - low) / span * (len(HEIGHTS) - 1))] for value in values)
