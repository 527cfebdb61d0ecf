"""From the values of a label column to ids or numbers, and to the kind of task they make."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from gatepress.errors import DataError
from gatepress.schema import is_sound
from gatepress.tasks.spec import MIN_CLASSES

logger = logging.getLogger(__name__)

MAX_SCORE = 3.4e38  # float32 holds little more
_NAMED = (
    "a list names the classes of its row; if it holds 1 and 0 for every class, give each class a column: "
    "--label-column FIRST,SECOND"
)
_LIST = re.compile(r"\[\]|\[.*[,'\"].*\]")  # as pandas writes one; [A] may be the name of a class
_YES, _NO = {"1", "1.0", "true"}, {"0", "0.0", "false"}
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
MAX_CLASSES = 1000  # more distinct values are ids or texts: the wrong column


def infer_names(values: list[Any], where: str) -> tuple[str, ...] | None:
    """Return the class names that `values` hold, in id order, or None if they are scores.

    Numbers with a decimal point are scores, unless there are only two of them and both are whole
    (0.0 and 1.0, as pandas writes classes). Raises `DataError` if there are too many classes, or words among scores.
    """
    spelled: dict[str, int] = {}  # label -> the first row that has it
    for row, value in enumerate(values, start=1):
        spelled.setdefault(label_text(value, where, row), row)
    if all(map(_LIST.fullmatch, spelled)):
        raise DataError(
            f"{where}: every label is a list as text, as {next(iter(spelled))[:80]}; several classes in a row "
            "are lists of jsonl or parquet, or a column for each class: --label-column FIRST,SECOND"
        )
    numbers = [_number(text) for text in spelled]
    if all(number is not None for number in numbers):
        whole = all(number is not None and number.is_integer() for number in numbers)
        if not all(_is_int(text) for text in spelled):
            if not (whole and len(set(numbers)) == MIN_CLASSES):
                return None
            if len(spelled) > MIN_CLASSES:
                raise DataError(
                    f"{where}: two classes are spelled in {len(spelled)} ways ({', '.join(sorted(spelled))}); "
                    "write each in one"
                )
        names = sorted(spelled, key=lambda text: (float(text), text))  # 1 and 01 are two classes
    else:
        _refuse_mixed(spelled, where)
        _refuse_quoted(spelled, where)
        names = sorted(spelled)
        _tell_alike(names, where)
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"{where} has {len(names):,} distinct values, expected at most {MAX_CLASSES:,} classes; "
            "name another column with --label-column, or write scores with a decimal point for regression"
        )
    return tuple(names)


def _refuse_mixed(spelled: Mapping[str, int], where: str) -> None:
    """Raise `DataError` if there are words among scores, or if all scores have a decimal comma."""
    numbers = {text: number for text in spelled if (number := _number(text)) is not None}
    words = [text for text in spelled if text not in numbers]
    parts = [text for text, number in numbers.items() if math.isfinite(number) and number % 1]
    missing = [text for text, number in numbers.items() if math.isnan(number)]
    if missing:
        raise DataError(
            f"{where}, row {spelled[missing[0]]}: label {missing[0]!r} is how a missing value is written as text; drop "
            "the row or, if it is a class, give that another name"
        )
    if all(_DECIMAL_COMMA.fullmatch(text) for text in words):
        raise DataError(
            f"{where}, row {spelled[words[0]]}: label {words[0]!r} has a decimal comma, or one between thousands; "
            "write a point, or nothing"
        )
    if parts:
        raise DataError(
            f"{where}, row {spelled[words[0]]}: label {words[0]!r} is not a finite number, and others are, as "
            f"{parts[0]}; drop the row, or write all classes as words"
        )


def _refuse_quoted(spelled: Mapping[str, int], where: str) -> None:
    """Raise `DataError` if a class has quotes and is another without: behind a blank, a csv keeps them."""
    for text, row in spelled.items():
        bare = text[1:-1]
        if text[0] == text[-1] and text[0] in "\"'" and bare in spelled:
            raise DataError(
                f"{where}, row {row}: label {text!r} is another than {bare!r}, which has no quotes; drop them or, in a "
                "csv, the blank before them"
            )


def _tell_alike(names: Sequence[str], where: str) -> None:
    """Warn of classes whose names differ in nothing but capital letters."""
    first: dict[str, str] = {}
    for form, text in zip(folded(names), names, strict=True):
        if (other := first.setdefault(form, text)) != text:
            logger.warning(
                "%s: %r and %r are two classes; if they are one, write all of its rows alike", where, other, text
            )


def _bare(text: str) -> str | float:
    """Return what two spellings of one label have in common: the number, or the word in lower case without quotes."""
    number = _number(text)
    return text.strip("\"'").lower() if number is None else number


def in_order(id2label: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return a configuration's names for the outputs of a head, in the order of their ids."""
    return tuple(str(id2label[key]) for key in sorted(id2label, key=int))


def named(names: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    """Return what a configuration holds about the outputs of a head: id -> name, and name -> id."""
    return dict(enumerate(names)), {name: index for index, name in enumerate(names)}


def are_numbered(names: Sequence[str]) -> bool:
    """Return whether classes are only numbered (LABEL_0, ...), as transformers names them by default."""
    return folded(names) == tuple(f"label_{number}" for number in range(len(names)))


def folded(names: Sequence[str]) -> tuple[str, ...]:
    """Return names in the form in which they are compared: models from elsewhere may differ in case."""
    return tuple(name.lower() for name in names)


def class_ids(values: list[Any], names: tuple[str, ...], where: str, *, ids_too: bool) -> list[int]:
    """Return the id of each class name; with `ids_too`, a value may also be the id itself.

    Raises `DataError` that names the first row whose label is none of `names`.
    """
    ids = {str(number): number for number in range(len(names))} if ids_too else {}
    ids |= {name: number for number, name in enumerate(names)}
    result = []
    for row, value in enumerate(values, start=1):
        text = label_text(value, where, row)
        if text not in ids:
            or_id = f" or of their ids 0 to {len(names) - 1}" if ids_too else ", the labels of training"
            meant = next((f"; write {name}" for name in names if _bare(name) == _bare(text)), "")
            raise DataError(f"{where}, row {row}: label {text!r} is not one of {some(names)}{or_id}{meant}")
        result.append(ids[text])
    return result


def infer_set_names(values: list[Any], where: str) -> tuple[str, ...]:
    """Return the names of all classes that the lists in `values` hold, in id order."""
    sets = [_set_of(value, where, row) for row, value in enumerate(values, start=1)]
    spelled = set().union(*sets)
    if len(spelled) > MAX_CLASSES:
        raise DataError(f"{where} has {len(spelled):,} distinct classes, expected at most {MAX_CLASSES:,}")
    if spelled == {"0", "1"} and all(len(held) == MIN_CLASSES for held in sets):
        raise DataError(f"{where}: every list is of 0 and 1; {_NAMED}")
    whole = all(map(_is_int, spelled))
    return tuple(sorted(spelled, key=lambda text: (float(text) if whole else 0.0, text)))


def class_sets(values: list[Any], names: tuple[str, ...], where: str) -> list[list[float]]:
    """Return for each list of class names 1 for the classes in it and 0 for all others, in the order of `names`.

    Raises `DataError` that names the first row that is no such list, or holds a class that is none of `names`.
    """
    ids = {name: number for number, name in enumerate(names)}
    result = []
    for row, value in enumerate(values, start=1):
        held = [0.0] * len(names)
        for name in _set_of(value, where, row):
            if name not in ids:
                raise DataError(
                    f"{where}, row {row}: label {name!r} is not one of {some(names)}, the labels of training"
                )
            held[ids[name]] = 1.0
        result.append(held)
    return result


def sets_of_columns(columns: Mapping[str, list[Any]], where: str) -> list[list[str]]:
    """Return the names of the columns in which a row holds 1 or true; `DataError` if others hold no 0 or false."""
    result: list[list[str]] = [[] for _ in next(iter(columns.values()))]
    for name, values in columns.items():
        for row, value in enumerate(values, start=1):
            text = label_text(value, f"{where}, column {name!r}", row).lower()
            if text not in _YES | _NO:
                raise DataError(f"{where}, column {name!r}, row {row}: is {text!r}, expected 1 or 0 for each class")
            if text in _YES:
                result[row - 1].append(name)
    return result


def _set_of(value: Any, where: str, row: int) -> list[str]:
    """Return the classes of a row; `DataError` if they are no list, or one occurs twice."""
    if not isinstance(value, list):
        got = "missing" if value is None else type(value).__name__
        raise DataError(
            f"{where}, row {row}: the labels are {got}, expected a list of the row's classes, or a column "
            "for each class: --label-column FIRST,SECOND"
        )
    names = [label_text(one, where, row) for one in value]
    if len(set(names)) < len(names):
        raise DataError(f"{where}, row {row}: a class is twice in {', '.join(names)[:80]}; {_NAMED}")
    return names


def scores(values: list[Any], where: str) -> list[float]:
    """Return finite numbers; `DataError` that names the first row that holds none."""
    result = []
    for row, value in enumerate(values, start=1):
        number = _number(label_text(value, where, row))
        if number is None or not abs(number) <= MAX_SCORE:  # refuses NaN too
            raise DataError(f"{where}, row {row}: label {str(value)!r} is not a finite number")
        result.append(number)
    return result


def label_text(value: Any, where: str, row: int) -> str:
    """Return the one spelling of a label; `DataError` if there is none or it is a structure."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | Decimal):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        got = "missing" if value is None or isinstance(value, str) else type(value).__name__
        raise DataError(f"{where}, row {row}: the label is {got}, expected a class or a number")
    if not is_sound(value.strip()):
        raise DataError(f"{where}, row {row}: the label {value!r} holds a line break or control character; clean it")
    return value.strip()


def _number(text: str) -> float | None:
    try:
        return None if "_" in text else float(text)  # 1_0 is the name of a class; to Python it is ten
    except ValueError:
        return None


def _is_int(text: str) -> bool:
    return text.lstrip("+-").isdecimal()


def some(names: Sequence[str], limit: int = 10) -> str:
    """Return the first of the names, and how many there are if those are not all."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
