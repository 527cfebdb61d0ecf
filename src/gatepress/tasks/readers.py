"""One file of rows into columns: csv, tsv, jsonl, parquet. Whatever is wrong is one `DataError`.

csv is read with quotes, as spreadsheets write it; tsv without, like the GLUE files on people's disks
(their texts hold unbalanced quotes).
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from gatepress.errors import DataError, reason_of

Columns = Mapping[str, list[Any]]  # column name -> values, all of one length; row i of a file is at i - 1


def read_columns(path: Path) -> Columns:
    """Read a whole file by its suffix; `DataError` if it is missing, empty or not what it says."""
    kinds = ", ".join(_READERS)
    if path.is_dir():
        raise DataError(f"{path}: is a directory, expected a file of rows ({kinds})")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the suffix is {path.suffix or 'missing'!r}, expected one of {kinds}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty, expected a header and rows")
        columns = reader(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not columns:
        raise DataError(f"{path}: has no rows, expected at least one after the header")
    return columns


def _text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data[: 1 << 20]:
        raise DataError(f"{path}: is binary or UTF-16, expected UTF-8 text; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {row} is not UTF-8 text; save the file as UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty, expected a header and rows")
    return text


def _table(path: Path, rows: Any, advice: str) -> Columns:
    """Turn an iterator over lists of fields, of which the first is the header, into columns."""
    usual = csv.field_size_limit(sys.maxsize)  # texts may be long
    try:
        header = [name.strip() for name in next(rows)]
        _refuse_twins(path, header)
        body: list[list[str]] = []
        for row in rows:
            if not row:
                continue  # an empty line, usually the last
            if len(row) != len(header):
                raise DataError(
                    f"{path}: row {len(body) + 1} (line {rows.line_num}) has {len(row)} fields, "
                    f"expected {len(header)} as in the header; {advice}"
                )
            body.append(row)
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num} is malformed ({error}); {advice}") from None
    finally:
        csv.field_size_limit(usual)
    if not body:
        raise DataError(f"{path}: has a header and no rows")
    return dict(zip(header, map(list, zip(*body, strict=True)), strict=True))


def _refuse_twins(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise DataError(f"{path}: two columns have the same name in the header: {', '.join(names)}")


def _separated(path: Path, separator: str, others: Sequence[str]) -> str:
    """Return the text of a file; `DataError` if its header has another separator and not this one."""
    text = _text(path)
    header = text.partition("\n")[0]
    if separator not in header and (found := [one for one in others if one in header]):
        raise DataError(f"{path}: the header is separated by {found[0]!r}, expected {separator!r}")
    return text


def _read_csv(path: Path) -> Columns:
    text = _separated(path, ",", (";", "\t"))
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    return _table(path, rows, 'put texts with commas or line breaks in "quotes"')


def _read_tsv(path: Path) -> Columns:
    text = _separated(path, "\t", (",", ";"))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    return _table(path, rows, "tsv is read without quotes, save texts with tabs or line breaks as .csv")


def _read_jsonl(path: Path) -> Columns:
    rows = []
    for number, line in enumerate(io.StringIO(_text(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is {type(row).__name__}, expected one JSON object a line")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Columns:
    try:
        table = parquet.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet ({reason_of(error)})") from None
    _refuse_twins(path, table.column_names)
    return _Parquet(path, table) if table.num_rows else {}


class _Parquet(Mapping[str, list[Any]]):
    """The columns of a table, each made a list when it is asked for: others may hold what Python cannot."""

    def __init__(self, path: Path, table: pa.Table) -> None:
        self.path, self.table = path, table

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self:
            raise KeyError(name)
        try:
            values: list[Any] = self.table.column(name).to_pylist()
        # UnicodeDecodeError is a ValueError; for an unknown time zone, some releases raise a KeyError
        except (ValueError, OverflowError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: column {name!r} cannot be read ({reason_of(error)})") from None
        return values

    def __contains__(self, name: object) -> bool:
        return name in self.table.column_names

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table.column_names)


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
