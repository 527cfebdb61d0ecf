"""Rows from files, tokens from rows, batches from tokens, metrics from logits."""

import json
import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import tiny
from gatepress import batches
from gatepress.batches import GroupedBatches, make_loader, tokenize
from gatepress.config import DataSettings
from gatepress.errors import ArtifactError, DataError, HubError, ModelError, UsageError
from gatepress.metrics import compute_metric
from gatepress.processes import Processes
from gatepress.tasks import TASKS, TaskSpec, task_named
from gatepress.tasks.labels import infer_names
from gatepress.tasks.sources import Rows, load_rows

GOOD = [("anda boro cito", "calm"), ("duma efra fuli", "wild"), ("gano hilu ivo", "calm")]


def own(train: Path, validation: Path, **settings) -> DataSettings:
    return DataSettings(train_file=str(train), validation_file=str(validation), **settings)


def write(path: Path, rows: list, header: tuple[str, ...] = ("text", "label")) -> Path:
    """Write the rows in the format that the suffix names."""
    records = [dict(zip(header, row, strict=True)) for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    else:
        tiny.write_table(path, header, rows)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "good.csv", GOOD)


def refused(data: DataSettings, kind: type[Exception] = DataError, **options) -> str:
    with pytest.raises(kind) as caught:
        load_rows(data, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- tasks


def test_every_task_survives_its_json_form():
    for spec in TASKS.values():
        assert TaskSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        assert spec.num_labels == (len(spec.label_names) if spec.label_names else 1)


@pytest.mark.parametrize(
    "change",
    [
        {"metric": "bleu"},
        {"metric": "pearson"},
        {"metric": ["accuracy"]},
        {"label_names": None},
        {"label_names": ["one"]},
        {"label_names": ["same", "same"]},
        {"label_names": [0, 1]},
        {"text_columns": []},
        {"text_columns": ["a", "b", "c"]},
        {"text_columns": "sentence"},
        {"name": 7},
        {"validation_splits": [["validation"]]},
        {"surplus": 1},
    ],
)
def test_a_malformed_task_in_a_manifest_is_refused(change):
    with pytest.raises(ArtifactError, match="task in the manifest"):
        TaskSpec.from_json({**TASKS["cola"].to_json(), **change})


@pytest.mark.parametrize("value", [None, [], "cola", {}, {"name": "cola"}])
def test_what_is_no_task_at_all_is_refused(value):
    with pytest.raises(ArtifactError, match="task in the manifest"):
        TaskSpec.from_json(value)


def test_an_unknown_task_names_the_nearest_and_all_others():
    with pytest.raises(UsageError, match=r"--task is 'SST-2'.*did you mean sst2\?.*cola.*--train-file"):
        task_named("SST-2")


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("task", ["sst2", "cola", "rte", "stsb", "mnli"])
def test_a_glue_directory_gives_every_split_of_a_task(tiny_glue_dir: Path, task: str):
    rows = load_rows(DataSettings(task=task, data_dir=str(tiny_glue_dir)))
    assert rows.spec == TASKS[task]
    assert tuple(rows.validation) == rows.spec.validation_splits
    assert rows.train is not None
    assert len(rows.train) == 160
    assert all(len(split) == 64 for split in rows.validation.values())
    assert len({tuple(split["label"]) for split in rows.validation.values()}) == len(rows.validation)
    pair = ["text_pair"] if len(rows.spec.text_columns) == 2 else []
    assert rows.train.column_names == ["text", *pair, "label"]
    assert isinstance(rows.train[0]["label"], float if task == "stsb" else int)


def test_unbalanced_quotes_in_tsv_are_text(tmp_path: Path):
    rows = [('he said "no', 0), ('"', 1), ("", 0)]
    for split in ("train", "validation"):
        write(tmp_path / "sst2" / f"{split}.tsv", rows, ("sentence", "label"))
    loaded = load_rows(DataSettings(task="sst2", data_dir=str(tmp_path)))
    assert loaded.train["text"][:] == ['he said "no', '"', ""]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, good: Path, suffix: str):
    file = write(tmp_path / f"other{suffix}", GOOD)
    one, other = load_rows(own(good, good)), load_rows(own(file, file))
    assert one.fingerprint == other.fingerprint
    assert other.spec.label_names == ("calm", "wild")
    assert other.train["label"][:] == [0, 1, 0]


AWKWARD = {
    "late": pa.array([253_402_300_800] * 3, pa.timestamp("s")),
    "bytes": pa.Array.from_buffers(pa.string(), 3, pa.array([b"\xff"] * 3, pa.binary()).buffers()),
    "elsewhere": pa.array([0, 1, 2], pa.timestamp("s", tz="Nowhere/Atlantis")),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_a_column_that_nobody_asks_for_is_not_read(tmp_path: Path, name: str):
    table = pa.Table.from_pylist([dict(zip(("text", "label"), row, strict=True)) for row in GOOD])
    parquet.write_table(table.append_column(name, AWKWARD[name]), tmp_path / "rows.parquet")
    data = own(tmp_path / "rows.parquet", tmp_path / "rows.parquet")
    assert load_rows(data).train["label"][:] == [0, 1, 0]
    message = refused(replace(data, text_column=name))
    assert message.startswith(f"{tmp_path / 'rows.parquet'}: column {name!r} cannot be read (")


def test_two_columns_of_one_name_in_parquet(tmp_path: Path):
    table = pa.table([pa.array(["a", "b"])] * 3, names=["text", "label", "label"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert "two columns have the same name" in refused(own(tmp_path / "rows.parquet", tmp_path / "rows.parquet"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_text_may_be_long(tmp_path: Path, suffix: str):
    file = write(tmp_path / f"long{suffix}", [("word " * 40_000, "calm"), *GOOD])
    assert len(load_rows(own(file, file)).train["text"][0]) == 200_000


def test_rows_of_some_classes_are_measured_with_those_of_the_model(tmp_path: Path):
    file = write(tmp_path / "some.csv", [("a b", "calm"), ("c d", "wild")])
    data = own(file, file)
    names = ("wild", "odd", "calm")
    loaded = load_rows(data, splits="validation", classes=names)
    assert (loaded.spec.label_names, loaded.validation["validation"]["label"][:]) == (names, [2, 0])
    for others in (None, ("calm", "odd")):
        assert load_rows(data, splits="validation", classes=others).spec.label_names == ("calm", "wild")


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),  # by number, not by spelling
        ([-1, 0, 1], ("-1", "0", "1"), [0, 1, 2]),
        ([True, False, True], ("false", "true"), [1, 0, 1]),
        (["1_0", "2_0", "1_0"], ("1_0", "2_0"), [0, 1, 0]),  # codes, which Python would read as 10 and 20
        ([1.0, 0.0, 1.0], ("0.0", "1.0"), [1, 0, 1]),  # as pandas writes classes beside a gap
        ([0.5, 3, 1.25], None, [0.5, 3.0, 1.25]),
        ([1.0, 2.0, 3.0], None, [1.0, 2.0, 3.0]),
    ],
)
def test_labels_tell_the_kind_of_task(tmp_path: Path, labels, names, ids):
    rows = [(text, label) for (text, _), label in zip(GOOD, labels, strict=True)]
    file = write(tmp_path / "own.jsonl", rows)
    loaded = load_rows(own(file, file))
    assert loaded.spec.label_names == names
    assert loaded.spec.metric == ("pearson" if names is None else "accuracy")
    assert loaded.train["label"][:] == ids


def test_columns_are_guessed_from_usual_names_and_can_be_named(tmp_path: Path):
    rows = [("a b c", "d e f", "yes"), ("g h i", "j k l", "no")]
    guessed = write(tmp_path / "guess.csv", rows, ("Premise", "hypothesis", "Label"))
    assert load_rows(own(guessed, guessed)).spec.text_columns == ("Premise", "hypothesis")
    odd = write(tmp_path / "odd.csv", rows, ("x", "y", "z"))
    message = refused(own(odd, odd))
    assert "--label-column" in message
    assert "x, y, z" in message
    assert "--text-column" in refused(own(odd, odd, label_column="z"))
    named = load_rows(own(odd, odd, text_column="y", label_column="z"))
    assert named.spec.text_columns == ("y",)
    both = load_rows(own(odd, odd, text_column="y", text_pair_column="x", label_column="z"))
    assert both.train[0] == {"text": "d e f", "text_pair": "a b c", "label": 1}


def test_first_rows_only(good: Path):
    rows = load_rows(own(good, good, max_train_samples=2, max_validation_samples=1))
    assert (len(rows.train), len(rows.validation["validation"])) == (2, 1)
    assert rows.train["text"][:] == [text for text, _ in GOOD[:2]]
    assert rows.fingerprint != load_rows(own(good, good)).fingerprint


def test_validation_alone_reads_no_training_rows_when_the_labels_are_known(tmp_path: Path, good: Path):
    spec = load_rows(own(good, good)).spec
    data = own(tmp_path / "gone.csv", good)
    rows = load_rows(data, splits="validation", spec=spec)
    assert rows.train is None
    assert rows.spec == spec
    assert "no such file" in refused(data, splits="validation")


def test_class_ids_of_a_run_do_not_depend_on_the_rows_at_hand(good: Path):
    spec = TaskSpec("good", ("text",), ("wild", "odd", "calm"), "accuracy")
    assert load_rows(own(good, good), spec=spec).train["label"][:] == [2, 0, 2]
    narrow = TaskSpec("good", ("text",), ("calm", "odd"), "accuracy")
    message = refused(own(good, good), spec=narrow)
    assert "row 2" in message
    assert "'wild'" in message


def test_a_run_of_one_task_is_not_measured_on_another(tiny_glue_dir: Path):
    data = DataSettings(task="cola", data_dir=str(tiny_glue_dir))
    assert "trained for sst2" in refused(data, UsageError, spec=TASKS["sst2"])
    same_labels = load_rows(DataSettings(task="rte", data_dir=str(tiny_glue_dir)), spec=TASKS["qnli"])
    assert same_labels.spec == TASKS["rte"]


def test_a_named_task_takes_label_names_for_ids(tmp_path: Path):
    header = ("sentence1", "sentence2", "label")
    for split in ("train", "validation"):
        rows = [("a", "b", "not_entailment"), ("c", "d", "entailment"), ("e", "f", 1)]
        write(tmp_path / "rte" / f"{split}.tsv", rows, header)
    loaded = load_rows(DataSettings(task="rte", data_dir=str(tmp_path)))
    assert loaded.train["label"][:] == [1, 0, 1]


BROKEN = {
    "empty.csv": (b"", "the file is empty"),
    "blank.csv": (b" \n\n", "the file is empty"),
    "header.csv": (b"text,label\n", "has a header and no rows"),
    "binary.csv": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is binary or UTF-16"),
    "utf16.csv": ("text,label\na,b\n".encode("utf-16"), "is binary or UTF-16"),
    "latin.csv": (b"text,label\ncaf\xe9,a\n", "line 2 is not UTF-8"),
    "semicolon.csv": (b"text;label\na;b\n", "separated by ';'"),
    "ragged.csv": (b"text,label\na,b\nc\n", r"row 2 \(line 3\) has 1 fields, expected 2"),
    "ragged.tsv": (b"text\tlabel\na\tb\nc\td\te\n", r"row 2 \(line 3\) has 3 fields, expected 2"),
    "quote.csv": (b'text,label\n"a,b\nc,d\n', "malformed"),
    "twice.csv": (b"text,text\na,b\n", "two columns have the same name"),
    "broken.jsonl": (b'{"text": "a", "label": 1}\n{"text": \n', "line 2 is not JSON"),
    "list.jsonl": (b'["a", 1]\n', "line 1 is list"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    "fake.parquet": (b"text,label\na,b\n", "not readable as parquet"),
    "rows.txt": (b"text,label\na,b\n", "expected one of .csv, .tsv, .jsonl, .parquet"),
    "rows": (b"text,label\na,b\n", "suffix is 'missing'"),
    "notext.csv": (b"text,label\na,x\n  ,y\n", r"column 'text', row 2: the text is empty"),
    "number.jsonl": (b'{"text": 3, "label": "a"}\n{"text": "b", "label": "c"}\n', "row 1: the text is int"),
    "gap.jsonl": (b'{"text": "a", "label": "a"}\n{"label": "b"}\n', "row 2: the text is missing"),
    "nolabel.csv": (b"text,label\na,x\nb,\n", r"column 'label', row 2: the label is missing"),
    "nested.jsonl": (b'{"text": "a", "label": {"x": 1}}\n', "row 1: the label is dict"),
    "one.csv": (b"text,label\na,x\nb,x\n", "every row has the label 'x', expected two classes"),
    "nan.csv": (b"text,label\na,1.5\nb,nan\nc,2.0\n", "row 2: label 'nan' is not a finite number"),
    "cr.csv": (b'text,label\na,"very\ncalm"\nb,x\n', r"row 1: the label 'very\\ncalm' holds a line break"),
    "half.jsonl": (
        b'{"text": "\\ud800 a", "label": "a"}\n{"text": "b", "label": "c"}\n',
        "row 1: the text holds half of a character",
    ),
    "huge.csv": (b"text,label\na,1.5\nb,1e39\n", "row 2: label '1e39' is not a finite number"),
    "tabs.csv": (b"text\tlabel\na\tb\n", r"separated by '\\t', expected ','"),
    "mixed.csv": (
        b"text,label\na,1.5\nb,2.0\nc,n/a\n",
        "row 3: label 'n/a' is not a finite .* as 1.5; drop",
    ),
    "thousands.csv": (b'text,label\na,"1,000"\nb,"2,000"\nc,3\n', "row 1: label '1,000' has .* between thousands"),
    "missing.csv": (b"text,label\na,pos\nb,nan\nc,neg\n", "row 2: label 'nan' is how a missing value is written"),
    "commas.tsv": (b"text,label\na,b\n", r"separated by ',', expected '\\t'"),
    "comma.csv": (b'text,label\na,"3,5"\nb,"4,0"\n', "row 1: label '3,5' has a decimal comma"),
    "quoted.csv": (b'text,label\n"a", "x"\n"b",y\n"c",x\n', "row 1: label '\"x\"' is another than 'x'"),
    "constant.csv": (b"text,label\na,2.5\nb,2.5\n", "every row has the label 2.5, expected numbers that differ"),
    "inf.csv": (b"text,label\na,1.5\nb,inf\n", "row 2: label 'inf' is not a finite number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unusable_file_is_one_clear_line(tmp_path: Path, name: str):
    content, expected = BROKEN[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        load_rows(own(file, file))
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_missing_files_and_directories(tmp_path: Path, good: Path):
    assert "no such file" in refused(own(tmp_path / "no.csv", good))
    (tmp_path / "folder.csv").mkdir()
    assert "is a directory" in refused(own(tmp_path / "folder.csv", good))
    assert "--validation-file" in refused(DataSettings(train_file=str(good)))
    assert "--train-file" in refused(DataSettings(validation_file=str(good)))
    message = refused(DataSettings(task="qqp", data_dir=str(tmp_path)))
    assert str(Path("qqp", "train.tsv")) in message
    assert "--data-dir" in message
    (tmp_path / "SST-2").mkdir()  # as in GLUE's own archives, whose files have other columns as well
    message = refused(DataSettings(task="sst2", data_dir=str(tmp_path)))
    assert "holds SST-2; give its files with --train-file and --validation-file" in message
    assert "--task NAME" in refused(own(good, good, data_dir=str(tmp_path)), UsageError)
    assert "drop --data-dir" in refused(DataSettings(task="demo", data_dir=str(tmp_path)), UsageError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(good: Path):
    good.chmod(0)
    assert "Permission denied" in refused(own(good, good))


@pytest.mark.parametrize(
    ("trained", "validated", "said"),
    [
        (("0", "1"), ("0.0", "1.0"), "label '0.0' is not one of 0, 1, the labels of training; write 0"),
        (("yes", "no"), ("Yes", "no"), "label 'Yes' is not one of no, yes, the labels of training; write yes"),
        (("yes", "no"), (' "yes"', "no"), "is not one of no, yes, the labels of training; write yes"),
    ],
)
def test_another_spelling_of_a_label_is_named(
    tmp_path: Path, trained: tuple[str, ...], validated: tuple[str, ...], said: str
):
    files = []
    for name, labels in (("t.csv", trained), ("v.csv", validated)):
        rows = [f"a b,{label}" for label in labels]
        (tmp_path / name).write_text("\n".join(["text,label", *rows, ""]))
        files.append(tmp_path / name)
    assert refused(own(*files)).endswith(said)


def test_columns_that_are_not_there(good: Path):
    for option in ("text_column", "text_pair_column", "label_column"):
        message = refused(own(good, good, **{option: "nope"}))
        assert f"--{option.replace('_', '-')}" in message
        assert "text, label" in message


def test_each_text_and_the_label_have_a_column_of_their_own(tmp_path: Path, good: Path):
    assert "--text-pair-column" in refused(own(good, good, text_column="text", text_pair_column="text"), UsageError)
    assert "--label-column" in refused(own(good, good, text_column="label", label_column="label"), UsageError)
    odd = tmp_path / "odd.csv"
    odd.write_text('text,"Label\n(0/1)"\na,0\nb,1\n')
    assert "rename it in the file" in refused(own(odd, odd, label_column="Label\n(0/1)"))


def test_classes_that_are_equal_as_numbers_have_one_order(tmp_path: Path):
    rows = [(f"text {name}", name) for name in ("2", "+1", "1", "01", "001")]
    file = write(tmp_path / "numbers.csv", rows)
    assert load_rows(own(file, file)).spec.label_names == ("+1", "001", "01", "1", "2")


def test_labels_of_validation_must_be_those_of_training(tmp_path: Path, good: Path):
    other = write(tmp_path / "other.csv", [*GOOD, ("jela kapo lumi", "odd")])
    message = refused(own(good, other))
    assert message.startswith(str(other))
    assert "row 4: label 'odd' is not one of calm, wild" in message


def test_classes_that_differ_in_capital_letters_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = write(tmp_path / "case.csv", [("a", "Calm"), ("b", "wild"), ("c", "calm")])
    assert load_rows(own(file, file)).spec.label_names == ("Calm", "calm", "wild")
    assert caplog.messages == [
        f"{file}, column 'label': 'Calm' and 'calm' are two classes; if they are one, write all of its rows alike"
    ]


def test_validation_rows_of_one_class_are_told(tmp_path: Path, good: Path, caplog: pytest.LogCaptureFixture):
    one = write(tmp_path / "one.csv", [("a", "calm"), ("b", "calm")])
    load_rows(own(good, good))
    assert not caplog.messages
    load_rows(own(good, one))
    assert caplog.messages == [f"{one}: every row used has the same label, so naming it always would score highest"]


def test_decimal_numbers_of_a_parquet_file_are_numbers(tmp_path: Path):
    table = {"text": ["a", "b", "c"], "label": [Decimal("0.50"), Decimal("1.25"), Decimal("3.00")]}
    parquet.write_table(pa.table(table), tmp_path / "scores.parquet")
    rows = load_rows(own(tmp_path / "scores.parquet", tmp_path / "scores.parquet"))
    assert rows.train["label"][:] == [0.5, 1.25, 3.0]


def test_too_many_classes_is_the_wrong_column(tmp_path: Path):
    rows = [(f"text {i}", f"name {i}") for i in range(1001)]
    file = write(tmp_path / "ids.csv", rows)
    assert "1,001 distinct values" in refused(own(file, file))


def test_one_class_among_the_first_rows_names_the_cut(good: Path):
    assert "raise --max-train-samples" in refused(own(good, good, max_train_samples=1))


def test_ids_outside_a_named_task(tmp_path: Path):
    for split in ("train", "validation"):
        write(tmp_path / "sst2" / f"{split}.tsv", [("a", 0), ("b", -1)], ("sentence", "label"))
    message = refused(DataSettings(task="sst2", data_dir=str(tmp_path)))
    assert "row 2: label '-1' is not one of negative, positive or of their ids 0 to 1" in message


def test_the_hub_out_of_reach_names_the_ways_out():
    message = refused(DataSettings(task="qnli"), HubError)
    for way in ("--data-dir", "--train-file", "--validation-file", "--task demo"):
        assert way in message


def test_a_cached_copy_of_the_hub_serves_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "datasets--nyu-mll--glue"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    folder = root / "snapshots" / ("0" * 40) / "mrpc"
    folder.mkdir(parents=True)
    header = ("sentence1", "sentence2", "label", "idx")
    for split in ("train", "validation"):
        write(folder / f"{split}-00000-of-00002.parquet", [("a", "b", 1, 0)], header)
        write(folder / f"{split}-00001-of-00002.parquet", [("c", "d", 0, 1)], header)
    rows = load_rows(DataSettings(task="mrpc"))
    assert rows.train.to_list() == [
        {"text": "a", "text_pair": "b", "label": 1},
        {"text": "c", "text_pair": "d", "label": 0},
    ]
    assert "--data-dir" in refused(DataSettings(task="qqp"), HubError)


@pytest.mark.skipif("GATEPRESS_GLUE_DIR" not in os.environ, reason="GATEPRESS_GLUE_DIR names no GLUE directory")
@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [("sst2", 67349, 872), ("cola", 8551, 1043), ("stsb", 5749, 1500), ("rte", 2490, 277)],
)
def test_real_glue_has_its_official_row_counts(task: str, train: int, validation: int):
    rows = load_rows(DataSettings(task=task, data_dir=os.environ["GATEPRESS_GLUE_DIR"]))
    assert (len(rows.train), len(rows.validation["validation"])) == (train, validation)


# ---------------------------------------------------------------- tokens and batches


@pytest.fixture(params=["bert", "mpnet"])
def tokenizer(request: pytest.FixtureRequest):
    return tiny.build_tokenizer(tiny.BY_FAMILY[request.param])


@pytest.fixture(params=["sst2", "stsb"])
def rows(request: pytest.FixtureRequest, tiny_glue_dir: Path) -> Rows:
    return load_rows(DataSettings(task=request.param, data_dir=str(tiny_glue_dir)))


def test_tokens_are_those_of_the_tokenizer(rows: Rows, tokenizer):
    tokens = tokenize(rows.train, tokenizer, max_length=12)
    row = rows.train[3]
    expected = tokenizer(*[row[k] for k in ("text", "text_pair") if k in row], truncation=True, max_length=12)
    assert {key: value for key, value in tokens[3].items() if key != "query"} == {**expected, "label": row["label"]}
    if "text_pair" in row:  # whose first texts are numbered
        numbers = dict(zip(rows.train["text"], tokens["query"], strict=True))
        assert [numbers[text] for text in rows.train["text"]] == tokens["query"][:]
        assert len(set(numbers.values())) == len(numbers)
    assert max(map(len, tokens["input_ids"])) == 12


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_that_special_tokens_fill_is_refused(rows: Rows, tokenizer, length: int):
    with pytest.raises(UsageError, match=r"of which \d are special tokens; expected \d or more"):
        tokenize(rows.train, tokenizer, length)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_serves_every_row_once_and_tells_the_order(rows: Rows, tokenizer, shuffle):
    tokens = tokenize(rows.train, tokenizer, max_length=64)
    loader = make_loader(tokens, tokenizer, 7, shuffle=shuffle, seed=3)
    served = []
    for batch in loader:
        width = int(batch["attention_mask"].sum(1).max())
        assert set(batch) == {*tokenizer.model_input_names, "labels"}
        assert all(batch[name].shape[1] == width for name in tokenizer.model_input_names)
        assert batch["labels"].dtype == (torch.float32 if rows.spec.label_names is None else torch.int64)
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            assert torch.all(ids[mask == 0] == tokenizer.pad_token_id)
            served.append((ids[mask == 1].tolist(), label.item()))
    order = np.concatenate(loader.batch_sampler.batches(0))
    restored = [served[place] for place in np.argsort(order)]
    assert sorted(order) == list(range(len(tokens)))
    assert restored == list(zip(tokens["input_ids"], tokens["label"], strict=True))
    assert len(loader) == -(-len(tokens) // 7)


@pytest.mark.parametrize("longest", [64, 11])
def test_widths_can_be_multiples_that_a_model_takes(longest: int, tiny_glue_dir: Path, tokenizer):
    rows = load_rows(DataSettings(task="sst2", data_dir=str(tiny_glue_dir)))
    tokens = tokenize(rows.train, tokenizer, max_length=longest)
    most = max(map(len, tokens["input_ids"]))
    for batch in make_loader(tokens, tokenizer, 7, shuffle=True, seed=0, pad_to_multiple_of=8):
        needed = int(batch["attention_mask"].sum(1).max())
        assert batch["input_ids"].shape[1] == min(most, -(-needed // 8) * 8)


def test_a_tokenizer_without_padding_is_refused(rows: Rows, tokenizer):
    tokens = tokenize(rows.train, tokenizer, max_length=8)
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no padding token"):
        make_loader(tokens, tokenizer, 4, shuffle=False, seed=0)


@pytest.fixture
def lengths() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 60, size=1003)


def batches_of(lengths: np.ndarray, seed: int = 5, **options) -> GroupedBatches:
    return GroupedBatches(lengths, 8, **{"shuffle": True, "seed": seed, **options})


def test_order_is_a_function_of_seed_and_epoch(lengths):
    first, again = batches_of(lengths), batches_of(lengths)
    assert list(first) == list(again)
    again.skip_to(1)
    assert list(first) != list(again)
    assert list(first) != list(batches_of(lengths, seed=6))
    again.skip_to(0)
    assert list(first) == list(again)


def test_a_pass_resumes_at_any_batch(lengths):
    whole, resumed = batches_of(lengths), batches_of(lengths)
    whole.skip_to(2)
    resumed.skip_to(2, 40)
    assert list(resumed) == list(whole)[40:]
    whole.skip_to(3)
    resumed.skip_to(3)
    assert list(resumed) == list(whole)
    assert len(resumed) == len(list(whole))


def test_rows_of_a_batch_have_like_lengths_and_only_the_last_is_short(lengths):
    batches = list(batches_of(lengths))
    assert [len(batch) for batch in batches] == [8] * 125 + [3]
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert lengths.sum() / padded > 0.9
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3  # not served from long to short


@pytest.mark.parametrize("count", [2, 5])
def test_processes_share_each_batch(lengths, count):
    alone = batches_of(lengths)
    shares = [batches_of(lengths, processes=Processes(index, count)) for index in range(count)]
    for number, (batch, *parts) in enumerate(zip(alone, *shares, strict=True)):
        weights = [share.share(number) * len(batch) for share in shares]
        owned = [part for part, weight in zip(parts, weights, strict=True) if weight]
        assert sorted(row for part in owned for row in part) == sorted(batch)
        assert [weight for weight in weights if weight] == pytest.approx([len(part) for part in owned])
    assert len(batch) == 3
    assert all(parts)  # five processes: two of them have no row of the last batch, and step all the same


# ---------------------------------------------------------------- metrics


def test_metrics_of_perfect_and_inverted_answers():
    labels = np.array([0, 1, 1, 0, 1])
    right = np.eye(2)[labels]
    assert compute_metric("accuracy", right, labels) == 1.0
    assert compute_metric("accuracy", 1 - right, labels) == 0.0
    assert compute_metric("matthews", right, labels) == pytest.approx(1.0)
    assert compute_metric("matthews", 1 - right, labels) == pytest.approx(-1.0)
    scores = np.array([0.5, 1.0, 4.0], dtype=np.float32)
    assert compute_metric("pearson", scores[:, None] * -3 + 1, scores) == pytest.approx(-1.0)


@pytest.mark.parametrize("metric", ["matthews", "pearson"])
def test_constant_answers_correlate_with_nothing(metric):
    labels = np.array([0, 1, 1, 0])
    logits = np.ones((4, 1 if metric == "pearson" else 2))
    assert compute_metric(metric, logits, labels) == 0.0
    assert compute_metric(metric, logits[:1], labels[:1]) == 0.0


def test_a_diverged_model_has_no_metric():
    with pytest.raises(ModelError, match="--learning-rate"):
        compute_metric("accuracy", np.array([[np.nan, 0.0]]), np.array([0]))


def test_rows_that_are_measured_come_longest_first() -> None:
    """What does not fit into memory is told by the first batch."""
    order = batches.GroupedBatches(np.array([3, 9, 5, 9]), 2, shuffle=False, seed=0).batches(0)
    assert [rows.tolist() for rows in order] == [[1, 3], [2, 0]]


def test_names_of_columns_may_have_blanks_around_them(tmp_path: Path) -> None:
    """As spreadsheets and people write a header, guessed or asked for."""
    file = tmp_path / "blanks.csv"
    file.write_text("text, label\na,calm\nb,wild\n")
    for asked in (own(file, file), own(file, file, label_column="label")):
        assert load_rows(asked).spec.label_column == "label"


def test_versions_and_words_are_classes() -> None:
    assert infer_names(["1.0", "2.0", "beta"], "here") == ("1.0", "2.0", "beta")


@pytest.mark.parametrize("values", [["0", "1", "1.0"], ["0.0", "0", "1", "1.0"]])
def test_two_classes_in_more_spellings_are_not_scores(values: list[str]) -> None:
    """Two exports in one file, of which one came by way of pandas."""
    with pytest.raises(DataError, match=rf"^here: two classes are spelled in {len(values)} ways \(0, "):
        infer_names(values, "here")
    assert infer_names(["0.0", "1.0"], "here") == ("0.0", "1.0")
    assert infer_names(["1", "01", "2"], "here") == ("01", "1", "2")
    assert infer_names(["0", "1.0", "2"], "here") is None
