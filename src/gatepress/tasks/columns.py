"""Which columns of a user's own file hold the texts and the labels."""

from collections.abc import Collection

from gatepress.config import DataSettings
from gatepress.errors import DataError
from gatepress.tasks.labels import some
from gatepress.tasks.readers import Columns

SHOWN = 20  # columns in a message

# The first match wins, so pairs come before the single names that they contain.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("query", "passage"),
    ("query", "document"),
)
_TEXTS = ("text", "sentence", "content", "document", "review", "comment", "tweet", "title", "question")
_LABELS = ("label", "labels", "target", "class", "category", "sentiment", "score", "rating", "relevance", "relevant")


def choose_columns(data: DataSettings, names: list[str], where: str) -> tuple[tuple[str, ...], str]:
    """Return the text columns (one or two) and the label column: those asked for, or else common names.

    Raises `DataError` that lists the columns there are.
    """
    label = data.label_column or _first(_LABELS, names)
    labels = label_columns(label or "", names)
    if label is None:
        raise DataError(
            f"{where}: no column has a usual label name; choose one of {some(names, SHOWN)} with --label-column"
        )
    texts = tuple(filter(None, [data.text_column, data.text_pair_column]))
    if not data.text_column:
        texts = _guess_texts(data.text_pair_column, [name for name in names if name not in labels])
    if not texts:
        raise DataError(
            f"{where}: no column has a usual text name; choose one of {some(names, SHOWN)} with --text-column"
        )
    return texts, label


def label_columns(name: str, columns: Collection[str]) -> list[str]:
    """Return the columns that hold the labels: that of this `name`, or one for each class if it lists several."""
    several = [part.strip() for part in name.split(",")]
    return [name] if name in columns or len(several) == 1 else several


def require_column(columns: Columns, name: str, option: str, where: str) -> list[object]:
    """Return the values of a column; if it is missing, `DataError` that lists the columns there are."""
    if name not in columns:
        raise DataError(f"{where}: no column {name!r} ({option}); it has {some(list(columns), SHOWN)}")
    return columns[name]


def _guess_texts(pair: str | None, names: list[str]) -> tuple[str, ...]:
    if pair is None:
        for first, second in _PAIRS:
            found = _first((first,), names), _first((second,), names)
            if found[0] and found[1]:
                return found[0], found[1]
    text = _first(_TEXTS, [name for name in names if name != pair])
    return () if text is None else (text,) if pair is None else (text, pair)


def _first(wanted: tuple[str, ...], names: list[str]) -> str | None:
    there = {name.strip().lower(): name for name in names}
    return next((there[name] for name in wanted if name in there), None)
