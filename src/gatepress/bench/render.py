"""Benchmark records as files: JSON, JSON lines, CSV or Markdown by suffix, and as a plot (PNG or SVG)."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gatepress.bench.record import FORMAT_VERSION, Record
from gatepress.bench.tables import Table, tables
from gatepress.errors import ArtifactError, MissingExtraError, OutputError, UsageError
from gatepress.files import json_text, read_json, refuse_unwritable, replace_file

PLOT_SUFFIXES = (".png", ".svg")


def check_file(path: Path, suffixes: Sequence[str], option: str, *, force: bool) -> None:
    """Refuse a wrong suffix, a directory, a file that exists unless `force`, and a file that cannot be written."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} is {path}, expected a name that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise OutputError(f"{path}: is a directory, expected a file; choose another name with {option}")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; choose another with {option} or replace it with --force")
    refuse_unwritable(path, way=f"with {option}")


def check_report(path: Path, *, force: bool = False) -> None:
    """Refuse an unknown suffix or a file that exists; call it before anything is timed."""
    check_file(path, tuple(WRITERS), "--output", force=force)


def check_plot(path: Path, *, force: bool = False) -> None:
    """Refuse what `plot` would refuse, including a missing matplotlib, before anything is timed."""
    check_file(path, PLOT_SUFFIXES, "--plot", force=force)
    drawing()


def write(records: Sequence[Record], path: Path, *, force: bool = False) -> None:
    """Write the records in the format that the suffix of `path` names, whole or not at all.

    Raises `UsageError` on an unknown suffix, `OutputError` if the file exists and not `force`.
    """
    check_report(path, force=force)
    replace_file(path, WRITERS[path.suffix.lower()](records).encode())


def plot(records: Sequence[Record], path: Path, *, force: bool = False) -> None:
    """Draw the records into a `.png` or `.svg`: lines over sparsity, or one bar per target.

    Raises `UsageError` on another suffix or on mixed records, `OutputError` if the file exists
    and not `force`, `MissingExtraError` without matplotlib.
    """
    check_plot(path, force=force)
    if len({record.what for record in records}) != 1:
        raise UsageError("--plot draws one kind of benchmark, expected records of matmul or of endtoend only")
    replace_file(path, drawing().draw(records, path.suffix.lower()[1:]))


def read(path: Path) -> list[Record]:
    """Read records back from `.json` or `.jsonl`; `ArtifactError` if they are not understood."""
    if path.suffix.lower() == ".json":
        values = read_json(path).get("records")
        if not isinstance(values, list):
            raise ArtifactError(f"{path}: no list of records in it; expected what `gatepress bench` wrote")
    elif path.suffix.lower() == ".jsonl":
        try:
            values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: not readable as JSON lines ({error})") from None
    else:
        raise UsageError(f"{path}: records are read from .json and .jsonl only")
    return [Record.from_json(value) for value in values]


def json_object(records: Sequence[Record], *, samples: bool = True) -> dict[str, Any]:
    """Return the records as the one JSON object that `.json` files and `--json` hold."""
    return {
        "format": "gatepress_bench",
        "format_version": FORMAT_VERSION,
        "records": [record.to_json(samples=samples) for record in records],
    }


def drawing() -> ModuleType:
    """Return the module that draws; `MissingExtraError` without matplotlib."""
    try:
        from gatepress.bench import figures  # noqa: PLC0415 - matplotlib is an extra, not always there
    except ImportError:
        raise MissingExtraError("--plot needs matplotlib; install it with: pip install 'gatepress[plot]'") from None
    return figures


def _json(records: Sequence[Record]) -> str:
    return json_text(json_object(records))


def _json_lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record.to_json(), allow_nan=False) + "\n" for record in records)


def _csv(records: Sequence[Record]) -> str:
    """Return one row per record; raw samples are left out, nested values are written as `a=b` or `axb`."""
    file = io.StringIO()
    rows = [record.to_json(samples=False) for record in records]
    names = list(rows[0]) if rows else [name for name in Record.__dataclass_fields__ if name != "samples_ms"]
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        row["versions"] = " ".join(f"{package}={number}" for package, number in row["versions"].items())
        row["shape"] = "x".join(map(str, row["shape"])) if row["shape"] else None
        writer.writerow(row)
    return file.getvalue()


def _markdown(records: Sequence[Record]) -> str:
    return "\n".join(markdown(table) for table in tables(records))


def markdown(table: Table) -> str:
    """Return a table in Markdown, with its title above it."""
    marks = ["---"] * table.left + ["--:"] * (len(table.columns) - table.left)
    rows = [_markdown_row(row) for row in (table.columns, marks, *table.rows)]
    return "\n".join([f"{table.title}.", "", *rows, ""])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


WRITERS: dict[str, Callable[[Sequence[Record]], str]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".md": _markdown,
}
