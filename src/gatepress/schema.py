"""What the fields of a JSON file may hold, as plain values, and the check of a file against it. No torch here.

A schema is a leaf of `LEAVES`, a set of words, a list of one schema (for any number of values) or of one for each
value, an object of schemas ("*": any other key), or
(schema,), which may be null. A key may be missing, which its readers find out; unknown keys are ignored,
because later releases may add some.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gatepress.errors import ArtifactError, UsageError

MAX_DEPTH = 32  # levels of a JSON value
MAX_NUMBER = 1e300  # an integer of a thousand digits is not ours
_UNSOUND = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")  # control characters, halves of characters

Schema = Any


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number of a size that may be ours; NaN and truth values are not."""
    return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER


LEAVES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: type(value) is int),
    "size": ("a whole number from 1 on", lambda value: type(value) is int and value > 0),
    "number": ("a number", is_number),
    "scalar": ("a text or a number", lambda value: value is None or isinstance(value, str | int | float)),
}
_HINTS = {str: "text", bool: "bool", int: "int", float: "number"}


def every(names: str, schema: Schema) -> dict[str, Schema]:
    """Return one schema for each of some names, which are separated by blanks."""
    return dict.fromkeys(names.split(), schema)


def schema_of(kind: type) -> dict[str, Schema]:
    """Return the schema of a settings class by its annotations."""
    return {name: _schema_of_hint(hint) for name, hint in typing.get_type_hints(kind).items()}


def _schema_of_hint(hint: Any) -> Schema:
    if dataclasses.is_dataclass(hint):
        return schema_of(typing.cast("type", hint))
    inner = typing.get_args(hint)
    if type(None) in inner:
        return (_schema_of_hint(inner[0]),)
    if typing.get_origin(hint) is dict:
        return {"*": _schema_of_hint(inner[1])}
    if typing.get_origin(hint) is tuple:
        return [_schema_of_hint(one) for one in inner if one is not ...]
    return frozenset(inner) if inner else _HINTS[hint]


def check_fields(path: Path, value: dict[str, Any], schema: Schema) -> None:
    """Raise `ArtifactError` at the first field of the file at `path` that does not fit its schema."""
    fault = next(_unsound(value), None) or next(_faults(value, schema, ""), None)
    if fault:
        raise ArtifactError(f"{path}: {fault}; it is damaged, or not written by gatepress")


def refuse_unsound(value: dict[str, Any]) -> None:
    """Raise `UsageError` if a manifest that is to be written could not be read back."""
    if fault := next(_unsound(value), None):
        raise UsageError(
            f"{fault}, which no manifest can hold; rename the file, column or label, or give another value"
        )


def is_sound(text: str) -> bool:
    """Return whether a terminal and a manifest can show a text: no control characters, no halves of characters."""
    return not _UNSOUND.search(text)


def _unsound(value: Any, where: str = "it", depth: int = 0) -> Iterator[str]:
    """Yield what no field may hold: numbers that are not finite or beyond 64 bits, text that no terminal can show."""
    if depth > MAX_DEPTH:
        yield f"{where} is nested deeper than {MAX_DEPTH} levels"
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _unsound(key, f"a key of {where}")
            yield from _unsound(one, key, depth + 1)
    elif isinstance(value, list):
        for one in value:
            yield from _unsound(one, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, expected a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"{where} is a number beyond 64 bits"
    elif isinstance(value, str) and _UNSOUND.search(value):
        yield f"{where} holds a control character or half of a character"


def _leaf(schema: str | frozenset[str]) -> tuple[str, Callable[[Any], bool]]:
    """Return what a leaf or a set of words expects, and whether a value is that."""
    if isinstance(schema, str):
        return LEAVES[schema]
    return f"one of {', '.join(sorted(schema))}", lambda value: isinstance(value, str) and value in schema


def _faults_in_list(value: list[Any], schema: list[Schema], where: str) -> Iterator[str]:
    each = schema if len(schema) > 1 else schema * len(value)
    if len(value) != len(each):
        yield f"{where} has length {len(value)}, expected {len(each)}"
    for one, inner in zip(value, each, strict=False):
        yield from _faults(one, inner, where)


def _faults(value: Any, schema: Schema, where: str) -> Iterator[str]:
    """Yield where a value does not fit its schema."""
    if isinstance(schema, tuple):
        if value is not None:
            yield from _faults(value, schema[0], where)
    elif isinstance(schema, str | frozenset):
        name, fits = _leaf(schema)
        if not fits(value):
            yield f"{where} is {repr(value)[:80]}, expected {name}"
    elif not isinstance(value, type(schema)):
        yield f"{where} is {repr(value)[:80]}, expected {'an object' if isinstance(schema, dict) else 'a list'}"
    elif isinstance(schema, list):
        yield from _faults_in_list(value, schema, where)
    else:
        for key, one in value.items():
            if (inner := schema.get(key, schema.get("*"))) is not None:
                yield from _faults(one, inner, f"{where}.{key}" if where else key)
