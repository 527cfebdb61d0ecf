"""Bad input through the whole command line: one line, the right exit code, nothing touched.

Every case asserts message, exit code, and that all files below the working directory are the same
bytes as before, those in hidden staging directories included.
"""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from forms import settings_for
from gatepress import latency
from gatepress.cli.app import app
from gatepress.errors import OutputError
from gatepress.files import check_output, explained, new_directory, release, replace_file, stage, temporary_directory
from gatepress.models import model_files
from gatepress.training import train

TRAINING = ["--epochs", "1", "--batch-size", "32", "--max-length", "16", "--device", "cpu"]
HEADER = ("text", "label")


def snapshot(root: Path) -> dict[str, str]:
    """Return what each path below `root` is, by content."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def names(directory: Path) -> list[str]:
    """Return the names in a directory, hidden ones too."""
    return sorted(path.name for path in directory.iterdir())


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(root: Path, arguments: list[object], exit_code: int, message: str) -> str:
    """Run a command that must refuse; check all that the contract says of it; return its message."""
    output = [] if "-o" in arguments or arguments[0] in ("evaluate", "bench") else ["-o", "out"]
    before = snapshot(root)
    result = run(*arguments, *output, "--json")
    assert result.exit_code == exit_code, result.output
    value = json.loads(result.stdout)
    assert value["exit_code"] == exit_code
    told = value["error"]["message"]
    assert re.search(message, told), told
    assert value["error"]["type"] != "InternalError"
    last = result.stderr.splitlines()[-1]
    assert last == f"error: {told}"
    assert "Traceback" not in result.stderr
    assert snapshot(root) == before
    return told


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_model_dir, tiny_task_files) -> Path:
    """A directory with a run that has learnt, its pruned and its ONNX form; to be copied, never changed."""
    root = tmp_path_factory.mktemp("made")
    learning = ["--epochs", 30, "--learning-rate", 5e-3, "--max-length", 16, "--device", "cpu"]
    model = ["--model", tiny_model_dir("bert"), *tiny_task_files.options()]
    steps = [
        ["train", *model, *learning, "-o", root / "run"],
        ["prune", root / "run", "-o", root / "pruned"],
        ["export", root / "pruned", "-o", root / "onnx"],
    ]
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def copied(made, here) -> Path:
    """The same in the working directory, to be spoilt."""
    shutil.copytree(made, here, dirs_exist_ok=True)
    return here


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["evaluate", "bench", "export"])
def test_a_path_in_nobody_s_home(here, verb):
    refused(here, [verb, "~nobody-of-that-name/x"], 2, "^~nobody-of-that-name/x: there is no such user's home")


def test_a_pruned_model_is_no_base(copied, tiny_task_files):
    arguments = ["train", *tiny_task_files.options(), *TRAINING, "--model", "pruned"]
    refused(copied, arguments, 1, r"pruned: is pruned, expected a dense model; go on from the run .* with --start$")


def test_a_decoder_is_refused(here, train_on, tiny_model_dir):
    """Its tokens do not see what follows them, and what is pruned lets all see all."""
    base = shutil.copytree(tiny_model_dir("bert"), here / "causal")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    refused(here, [*train_on("good.csv"), "--model", "causal"], 1, "causal: is a decoder by its config.json")


def test_a_run_whose_base_is_gone_says_so(here, train_on, tiny_model_dir):
    shutil.copytree(tiny_model_dir("bert"), here / "base")
    assert run(*train_on("good.csv", "-o", "run", "--model", "base")).exit_code == 0
    (here / "base").rename(here / "moved")
    for verb in ("prune", "evaluate"):
        refused(here, [verb, "run"], 1, r"^run: the model that it was trained on is missing; .*/base: is not there")


def test_a_run_finds_a_base_that_was_moved(here, train_on, tiny_model_dir, monkeypatch):
    """Also below a run that was moved, and never another model of that name."""
    shutil.copytree(tiny_model_dir("bert"), here / "base")
    assert run(*train_on("good.csv", "-o", "full", "--model", "base", "--method", "full")).exit_code == 0
    assert run(*train_on("good.csv", "-o", "run", "--model", "full")).exit_code == 0
    before = run("evaluate", "run", "--json").stdout
    for folder, name in (("models", "base"), ("runs", "full")):
        (here / folder).mkdir()
        (here / name).rename(here / folder / name)
        refused(here, ["prune", "run"], 1, r"is missing; .* if it was moved, set GATEPRESS_MODELS to the folder")
    monkeypatch.setenv("GATEPRESS_MODELS", os.pathsep.join([str(here / "nowhere"), "models", "runs"]))
    assert run("evaluate", "run", "--json").stdout == before
    assert run("prune", "run", "-o", "cut", "--sparsity", "0.6", "--recover-epochs", "1").exit_code == 0
    shutil.rmtree(here / "models" / "base")
    shutil.copytree(tiny_model_dir("roberta"), here / "models" / "base")
    refused(here, ["evaluate", "run"], 1, "^runs/full: was trained on other weights of .*/base' than")


def test_unknown_task(here):
    message = r"--task is 'sst3', no task of that name; did you mean sst2\? known: cola, .*demo"
    refused(here, ["train", "--task", "sst3", "--model", "demo"], 2, message)


def test_unknown_model_directory(here, tiny_task_files):
    options = ["train", *tiny_task_files.options(), "--model", "./nowhere"]
    refused(here, options, 1, r"nowhere: is not there, expected a model directory, a hub id, or demo")


def test_hub_out_of_reach_for_a_model(here, tiny_task_files):
    options = ["train", *tiny_task_files.options(), "--model", "someone/encoder"]
    told = refused(here, options, 1, r"^someone/encoder: .*the hub cannot be reached")
    for way_out in ("a directory that is here", "demo", "HF_HOME"):
        assert way_out in told


def test_hub_out_of_reach_for_rows(here, tiny_model_dir):
    options = ["train", "--task", "sst2", "--model", tiny_model_dir("bert")]
    told = refused(here, options, 1, r"the hub cannot be reached")
    for way_out in ("--data-dir", "--train-file", "--task demo"):
        assert way_out in told


@pytest.mark.parametrize("verb", ["prune", "export", "evaluate", "bench"])
def test_a_directory_that_is_not_there(here, verb):
    refused(here, [verb, "./nowhere"], 1, r"nowhere: ")


@pytest.mark.parametrize("verb", ["prune", "export", "evaluate", "bench"])
def test_a_directory_that_is_misspelt(here, verb):
    (here / "pruned/sst2").mkdir(parents=True)
    refused(here, [verb, "pruned/sts2"], 1, r"pruned/sts2: .*(no such directory|is not there)")


@pytest.mark.parametrize("verb", ["prune", "export", "evaluate", "bench"])
def test_a_directory_of_something_else(here, verb):
    (here / "other").mkdir()
    (here / "other/notes.txt").write_text("nothing of ours")
    refused(here, [verb, "./other"], 1, r"other\b.*: ")


# --- the model's files ---------------------------------------------------------------------------


def spoil_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def drop_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def cut_weights(directory: Path) -> None:
    halve(directory / "model.safetensors")


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def another_architecture(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "albert"}))


def values_of_another_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))


def unheard_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "unheard"}))


def drop_tokenizer(directory: Path) -> None:
    for path in directory.glob("*token*"):
        path.unlink()


def widen(key: str) -> Callable[[Path], None]:
    """Return what makes a configuration ask for larger tensors than the checkpoint has."""

    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, key: config[key] + 32}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *(
            (widen(key), r"weights .*\(bert\.")
            for key in ("vocab_size", "max_position_embeddings", "intermediate_size")
        ),
        (spoil_config, r"config.json: not readable as JSON"),
        (drop_config, r"has no config.json"),
        (cut_weights, r"model"),
        (only_pickles, r"pickles, which can run code and are never loaded"),
        (another_architecture, r"albert"),
        (values_of_another_architecture, r"model type 't5' is not supported"),
        (unheard_architecture, r"unheard"),
        (drop_tokenizer, r"tokenizer"),
    ],
)
def test_a_spoilt_model_directory(here, tiny_model_dir, tiny_task_files, spoil, message):
    shutil.copytree(tiny_model_dir("bert"), here / "model")
    spoil(here / "model")
    refused(here, ["train", *tiny_task_files.options(), *TRAINING, "--model", "./model"], 1, message)


# --- rows ----------------------------------------------------------------------------------------


def rows(count: int = 40, label: Callable[[int], object] = lambda index: ("calm", "wild")[index % 2]):
    texts = [text for text, _ in tiny.made_up_rows(count)]
    return [(text, label(index)) for index, text in enumerate(texts)]


@pytest.fixture
def train_on(here, tiny_model_dir):
    """Return (train file, options) -> arguments of a training on it and on a good validation file."""
    tiny.write_table(here / "good.csv", HEADER, rows())

    def arguments(train: str, *more: object, validation: str = "good.csv") -> list[object]:
        files = ["--train-file", train, "--validation-file", validation]
        return ["train", *files, "--model", tiny_model_dir("bert"), *TRAINING, *more]

    return arguments


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, r"missing.csv: no such file"),
        ("empty.csv", b"", r"empty.csv: the file is empty"),
        ("blank.csv", b"\n \n", r"blank.csv: the file is empty"),
        ("header.csv", b"text,label\n", r"header.csv: .*no rows"),
        ("binary.csv", b"\x00\x01\x02\xff" * 100, r"binary.csv: is binary"),
        ("latin.csv", b"text,label\ncaf\xe9,calm\n", r"latin.csv: line 2 is not UTF-8"),
        ("rows.xls", b"text,label\na,b\n", r"rows.xls: the suffix is '.xls', expected one of"),
        (
            "ragged.tsv",
            b"text\tlabel\none\tcalm\ntwo\twild\tmore\n",
            r"ragged.tsv: row 2 \(line 3\) has 3 fields",
        ),
        ("broken.jsonl", b'{"text": "a", "label": "b"}\n{"text"\n', r"broken.jsonl: .*2"),
        ("list.jsonl", b"[1, 2]\n", r"list.jsonl: "),
        ("broken.parquet", b"PAR1 and then nothing", r"broken.parquet: "),
    ],
)
def test_a_file_that_holds_no_rows(here, train_on, name, content, message):
    if content is not None:
        (here / name).write_bytes(content)
    refused(here, train_on(name), 1, message)
    refused(here, train_on("good.csv", validation=name), 1, message)


def test_a_directory_in_place_of_a_file(here, train_on):
    (here / "folder.csv").mkdir()
    refused(here, train_on("folder.csv"), 1, r"folder.csv: is a directory")


@pytest.mark.parametrize("option", ["--text-column", "--text-pair-column", "--label-column"])
def test_a_column_that_is_not_there(here, train_on, option):
    message = rf"good.csv: no column 'nope' \({option}\); it has text, label"
    refused(here, train_on("good.csv", option, "nope"), 1, message)


def test_a_column_that_only_training_has(here, train_on):
    tiny.write_table(here / "other.csv", ("text", "topic"), rows())
    refused(here, train_on("good.csv", validation="other.csv"), 1, r"other.csv: no column 'label'.* text, topic")


def test_a_label_that_only_validation_has(here, train_on):
    tiny.write_table(here / "other.csv", HEADER, [*rows(9), ("belu anda", "odd")])
    message = r"other.csv, column 'label', row 10: label 'odd' is not one of calm, wild"
    refused(here, train_on("good.csv", validation="other.csv"), 1, message)


def test_one_class_only(here, train_on):
    tiny.write_table(here / "one.csv", HEADER, rows(label=lambda _: "calm"))
    refused(here, train_on("one.csv"), 1, r"one.csv: every row .*label 'calm', expected two classes or more")


def test_one_class_among_the_first_rows(here, train_on):
    tiny.write_table(here / "late.csv", HEADER, rows(label=lambda index: "calm" if index < 30 else "wild"))
    message = r"late.csv: every row used has the label 'calm', .*raise --max-train-samples"
    refused(here, train_on("late.csv", "--max-train-samples", 20), 1, message)


@pytest.mark.parametrize("value", ["nan", "inf", ""])
def test_scores_that_are_no_numbers(here, train_on, value):
    good = rows(label=lambda index: index / 8)
    tiny.write_table(here / "scores.csv", HEADER, good)
    tiny.write_table(here / "bad.csv", HEADER, [*good[:3], ("anda", value), *good[4:]])
    message = r"bad.csv, column 'label', row 4: (label '\w+' is not a finite number|the label is missing)"
    refused(here, train_on("bad.csv", validation="scores.csv"), 1, message)
    refused(here, train_on("scores.csv", validation="bad.csv"), 1, message)


def test_a_word_among_scores(here, train_on):
    tiny.write_table(here / "scores.csv", HEADER, rows(label=lambda index: index / 8))
    tiny.write_table(here / "bad.csv", HEADER, [("anda", 1.5), ("boro", "high")])
    message = r"bad.csv, column 'label', row 2: label 'high' is not a finite number"
    refused(here, train_on("scores.csv", validation="bad.csv"), 1, message)


def test_a_text_that_is_empty(here, train_on):
    tiny.write_table(here / "holes.csv", HEADER, [*rows(6), ("  ", "calm")])
    refused(here, train_on("holes.csv"), 1, r"holes.csv, column 'text', row 7: the text is empty")


def test_no_validation_rows(here, tiny_model_dir):
    tiny.write_table(here / "good.csv", HEADER, rows())
    options = ["train", "--train-file", "good.csv", "--model", tiny_model_dir("bert")]
    refused(here, options, 2, r"--validation-file")


def test_a_data_directory_without_the_task(here, tiny_glue_dir, tiny_model_dir):
    options = ["train", "--task", "qqp", "--data-dir", tiny_glue_dir, "--model", tiny_model_dir("bert")]
    refused(here, options, 1, r"qqp/train.tsv: no such file")


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["-0.1", "1", "1.5", "nan", "inf"])
def test_sparsity_out_of_range(here, train_on, sparsity):
    message = rf"--sparsity is {float(sparsity)}, expected a fraction of at least 0 and below 1"
    refused(here, train_on("good.csv", f"--sparsity={sparsity}"), 2, message)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--weight-decay", "-1", "a number from 0 on"),
        ("--weight-decay", "inf", "a number from 0 on"),
        ("--penalty-weight", "nan", "a number from 0 on"),
        ("--warmup-ratio", "nan", "a fraction of at least 0 and at most 1"),
        ("--warmup-ratio", "1.5", "a fraction of at least 0 and at most 1"),
        ("--seed", "-1", "a whole number from 0 to 4294967295"),
        ("--seed", "4294967296", "a whole number from 0 to 4294967295"),
    ],
)
def test_other_numbers_out_of_range(here, train_on, option, value, expected):
    refused(
        here, train_on("good.csv", f"{option}={value}"), 2, rf"{option} is {value.rstrip('.0')}.*, expected {expected}$"
    )


@pytest.mark.parametrize("option", ["--batch-size", "--max-length"])
def test_sizes_that_are_measured_in(copied, option):
    refused(copied, ["evaluate", "run", option, "0"], 2, f"{option} is 0, expected 1 or more$")


@pytest.mark.parametrize("option", ["--model", "--data-dir"])
def test_nobody_s_home(here, train_on, option):
    refused(here, train_on("good.csv", option, "~nobody-here/x"), 2, "^~nobody-here/x: there is no such user's home")


def test_no_gpu(here, train_on, made):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused(here, [*train_on("good.csv"), "--device", "cuda"], 1, r"CUDA")
    for verb in ("evaluate", "bench"):
        for target in ("run", "pruned", "onnx"):
            refused(here, [verb, made / target, "--device", "cuda"], 1, r"(?i)cuda.*--device cpu")
    refused(here, ["bench", "--device", "cuda"], 1, r"(?i)cuda.*--device cpu")


# --- outputs that exist or cannot be written -----------------------------------------------------


def test_a_refusal_leaves_no_empty_directories(here, train_on):
    refused(here, train_on("missing.csv", "-o", "new/runs/x"), 1, r"missing.csv: no such file")


@pytest.fixture(params=["train", "prune", "export"])
def writer(request, made, tiny_model_dir, tiny_task_files) -> list[object]:
    """Return the arguments of each verb that writes a directory, without its output."""
    return {
        "train": ["train", *tiny_task_files.options(), *TRAINING, "--model", tiny_model_dir("bert")],
        "prune": ["prune", made / "run"],
        "export": ["export", made / "pruned"],
    }[request.param]


def test_an_output_that_exists(here, writer):
    (here / "out").mkdir()
    (here / "out/precious.txt").write_text("a week of work")
    message = r"^out: exists already; choose another with -o or replace it with --force$"
    refused(here, [*writer, "-o", "out"], 1, message)


def test_an_output_that_is_a_file(here, writer):
    (here / "out").write_text("a week of work")
    refused(here, [*writer, "-o", "out"], 1, r"^out: exists already")
    refused(here, [*writer, "-o", "out", "--force"], 1, r"^out: is a file, expected a directory")
    refused(here, [*writer, "-o", "out/below"], 1, r"out/below: cannot write \((Not a directory|File exists)\)")


@pytest.mark.parametrize("output", [".", "link", "some/.."])
def test_an_output_that_cannot_be_replaced(here, writer, output):
    (here / "some").mkdir()
    (here / "link").symlink_to("nowhere")
    refused(
        here, [*writer, "-o", output, "--force"], 1, r"cannot be replaced as a whole|is a link to what is not there"
    )


def test_force_replaces_what_a_link_points_to(here, writer):
    """Who links to a larger disk wants the result there."""
    (here / "disk").mkdir()
    (here / "out").symlink_to("disk/out")
    (here / "disk/out").mkdir()
    assert run(*writer, "-o", "out", "--force").exit_code == 0
    assert (here / "out").is_symlink()
    assert any((here / "disk/out").glob("gatepress_*.json"))
    assert names(here / "disk") == ["out"]


def test_force_does_not_replace_what_is_read(copied, tiny_model_dir, tiny_task_files):
    shutil.copytree(tiny_model_dir("bert"), copied / "model")
    shutil.copytree(tiny_task_files.train.parent, copied / "rows")
    files = ["--train-file", f"rows/{tiny_task_files.train.name}"]
    files += ["--validation-file", f"rows/{tiny_task_files.validation.name}"]
    train = ["train", *files, *TRAINING, "--model", "model", "--force", "-o"]
    for command in (
        [*train, "model"],
        [*train, "rows"],
        ["prune", "run", "--force", "-o", "run"],
        ["export", "pruned", "--force", "-o", "./pruned"],
    ):
        message = r"holds .*, which is read and would be gone; choose another|which gatepress did not write"
        refused(copied, command, 1, message)


def test_force_does_not_replace_what_runs_stand_on(here, tiny_model_dir, tiny_task_files, monkeypatch):
    """A pressed run stands on a finetuned one; moved, each is found by its name."""
    full = settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", epochs=1)
    train(full, here / "first/full")
    train(replace(full, model=str(here / "first/full")), here / "first/again")
    pressed = replace(full, method="gates", sparsity=0.3, distill=False, model=str(here / "first/again"))
    train(pressed, here / "first/pressed")
    for moved in (False, True):
        if moved:
            (here / "first").rename(here / "now")
            monkeypatch.setenv("GATEPRESS_MODELS", str(here / "now"))
        at = here / ("now" if moved else "first")
        for below in ("full", "again"):
            for verb in ("prune", "export"):
                message = r"holds .*, which is read and would be gone; choose another"
                refused(here, [verb, f"{at}/pressed", "-o", f"{at}/{below}", "--force"], 1, message)
    assert run("prune", "now/pressed", "-o", "pruned").exit_code == 0


def test_a_run_that_says_it_was_trained_on_itself_is_refused(here, tiny_model_dir, tiny_task_files):
    """Alone, or with another between."""
    full = settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", epochs=1)
    train(full, here / "a")
    train(replace(full, model=str(here / "a")), here / "b")
    path = here / "a" / "gatepress_run.json"
    for base in ("a", "b"):
        manifest = json.loads(path.read_text())
        manifest["settings"]["model"] = str(here / base)
        manifest["base_sha256"] = model_files(here / base)
        path.write_text(json.dumps(manifest))
        for verb in ("evaluate", "export"):
            refused(here, [verb, "a"], 1, "is trained on itself, it says; it is damaged")
        assert "is trained on itself" in run("verify", "a", "--json").stdout


def test_a_directory_in_the_way_of_a_base_on_the_hub_is_named(here, train_on):
    assert run(*train_on("good.csv", "-o", "run")).exit_code == 0
    path = here / "run" / "gatepress_run.json"
    manifest = json.loads(path.read_text())
    manifest["settings"] |= {"model": "owner/name", "revision": "main"}
    path.write_text(json.dumps(manifest))
    (here / "owner/name").mkdir(parents=True)
    refused(here, ["prune", "run"], 1, "^run: was trained on revision 'main' of owner/name on the hub, and a directory")


def test_force_does_not_write_measurements_over_what_is_read(copied, tiny_task_files):
    shutil.copyfile(tiny_task_files.validation, copied / "rows.csv")
    bench = ["bench", "pruned", "--batch-size", "1", "--force", "-o"]
    rows = ["--validation-file", "rows.csv"]
    refused(copied, [*bench, "rows.csv", *rows], 1, "^rows.csv: is read")
    refused(copied, [*bench, "pruned/config.json", "--seq-len", "8"], 1, "^pruned/config.json: .*lies in pruned, which")


def test_a_file_is_replaced_whole_or_not_at_all(here, monkeypatch):
    (here / "sweep.json").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OutputError, match="free some space"):
            replace_file(Path("sweep.json"), b"new")
    assert (here / "sweep.json").read_text() == "old"
    assert names(here) == ["sweep.json"]


def test_an_interrupt_between_two_renames_leaves_the_old_output(here, monkeypatch):
    def rename(old, new, *, real=os.rename):
        if Path(new) == Path("out") and ".new." in str(old):
            raise KeyboardInterrupt
        real(old, new)

    with new_directory(Path("out")) as staged:
        (staged / "gatepress_run.json").write_text("{}")
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), new_directory(Path("out"), force=True) as staged:
        (staged / "gatepress_pruned.json").write_text("{}")
    assert names(here / "out") == ["gatepress_run.json"]


def test_a_name_that_no_manifest_can_hold(copied):
    (copied / "run").rename(copied / "ru\nn")
    refused(copied, ["prune", "ru\nn", "-o", "out"], 2, "holds a control character")


def test_a_result_that_appeared_meanwhile_stays(here):
    def write(words: str) -> None:
        with new_directory(Path("out")) as staged:
            (staged / f"{words}.txt").write_text(words)
            if words == "slower":
                write("quicker")

    with pytest.raises(OutputError, match="was written by another process meanwhile"):
        write("slower")
    assert names(here) == ["out"]
    assert names(here / "out") == ["quicker.txt"]


def test_a_full_disk_of_temporary_files_is_not_mended_by_another_output():
    with (
        temporary_directory() as built,
        pytest.raises(OutputError, match=r"another disk with TMPDIR$"),
        explained(Path(built) / "dense"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_a_latency_table_is_measured_names_it_too(monkeypatch):
    def full(_: object, file: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr("gatepress.latency.onnx.save", full)
    with pytest.raises(OutputError, match=r"cannot write \(No space left on device\); .* another disk with TMPDIR$"):
        latency.measure("ort-cpu")


@pytest.mark.parametrize("beside", ["gatepress_run.json", "gatepress_notes.md", None])
@pytest.mark.parametrize(
    "thesis", ["below/thesis.txt", "my-notes.txt", "README.md", "modeling_gatepress.py", ".git/HEAD"]
)
def test_force_leaves_alone_what_others_wrote(here, writer, beside, thesis):
    (here / "out" / thesis).parent.mkdir(parents=True)
    (here / "out" / thesis).write_text("a year of work")
    if beside:
        (here / "out" / beside).write_text('{"sha256": [["thesis"]]}')
    message = r"^out: holds .*, which gatepress did not write, so --force leaves it alone; choose another with -o"
    refused(here, [*writer, "-o", "out", "--force"], 1, message)
    assert (here / "out" / thesis).read_text() == "a year of work"


def test_force_replaces_the_whole_output(here, writer):
    (here / "out").mkdir()
    (here / "out/gatepress_run.json").write_text('{"sha256": {"emoji.bin": "0"}}')
    old = ("emoji.bin", "tokenizer.json", "vocab.txt", "gates-00000003.safetensors", ".probe.safetensors.x1y2")
    for name in old:
        (here / "out" / name).write_text("not wanted any more")
    assert run(*writer, "-o", "out", "--force").exit_code == 0
    assert not [name for name in old if (here / "out" / name).exists() and "not" in (here / "out" / name).read_text()]
    assert names(here) == ["out"]


@pytest.mark.parametrize("name", ["xgboost.model", "tokenizer_notes.json", "vocab.txt"])
def test_names_like_those_of_a_tokenizer_are_ours_only_where_none_is_named(name: str, tmp_path: Path) -> None:
    """Early releases named no file of a tokenizer in their manifests."""
    (tmp_path / name).write_text("a year of work")
    manifest = tmp_path / "gatepress_run.json"
    manifest.write_text('{"sha256": {"tokenizer.json": "0", "tokenizer_config.json": "0"}}')
    with pytest.raises(OutputError, match=f"holds {name}, which gatepress did not write"):
        check_output(tmp_path, force=True)
    manifest.write_text('{"sha256": {"probe.safetensors": "0"}}')
    check_output(tmp_path, force=True)


MOUNT, UMOUNT = shutil.which("mount"), shutil.which("umount")
needs_mount = pytest.mark.skipif(not (MOUNT and UMOUNT), reason="there is no mount command here")


@contextmanager
def small_disk(at: Path, options: str) -> Iterator[None]:
    """Mount a tmpfs, or skip where that is not allowed."""
    at.mkdir()
    mounted = subprocess.run([MOUNT, "-t", "tmpfs", "-o", options, "tmpfs", str(at)], capture_output=True, check=False)
    if mounted.returncode:
        at.rmdir()
        pytest.skip("mounting a tmpfs needs rights that this test run has not")
    try:
        yield
    finally:
        subprocess.run([UMOUNT, str(at)], check=True)


@needs_mount
@pytest.mark.parametrize("size", ["8k", "64k"])
def test_a_full_disk(here, writer, size):
    with small_disk(here / "disk", f"size={size}"):
        told = refused(here, [*writer, "-o", "disk/out"], 1, r"cannot write \(.*No space left on device.*\)")
        assert "-o" in told


@needs_mount
def test_a_full_disk_leaves_the_earlier_result(here, writer):
    with small_disk(here / "disk", "size=16k"):
        (here / "disk/out").mkdir()
        (here / "disk/out/gatepress_run.json").write_text("{}")
        refused(here, [*writer, "-o", "disk/out", "--force"], 1, r"cannot write \(.*No space left on device.*\)")


@needs_mount
def test_a_disk_that_is_read_only(here, writer):
    with small_disk(here / "disk", "ro"):
        refused(here, [*writer, "-o", "disk/out"], 1, r"disk/out: cannot write \(Read-only file system\); .*-o")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_rights(here, writer):
    (here / "locked").mkdir(mode=0o555)
    refused(here, [*writer, "-o", "locked/out"], 1, r"locked/out: cannot write \(Permission denied\); .*-o")


def command(*arguments: object, **settings):
    """Start the command line as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "gatepress", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **settings,
    )


def test_files_that_may_not_grow(here, writer):
    """As a full disk, on any machine: no file of the process may be larger than a few bytes."""
    before = snapshot(here)
    with command(
        *writer, "-o", "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    ) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 1, stderr
    assert stdout == ""
    assert re.match(r"error: .*cannot write \(.*File too large.*\); ", stderr.splitlines()[-1]), stderr
    assert "Traceback" not in stderr
    assert snapshot(here) == before


# --- directories that were cut short or spoilt -----------------------------------------------------


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x5A for byte in path.read_bytes()))


def remove(path: Path) -> None:
    path.unlink()


FORMS = {
    "run": ["prune", "export", "evaluate", "bench"],
    "pruned": ["export", "evaluate", "bench"],
    "onnx": ["evaluate", "bench"],
}
ESSENTIAL = {
    "run": ["gatepress_run.json", "gates-*.safetensors"],
    "pruned": ["config.json", "model.safetensors"],
    "onnx": ["model.onnx"],
}


@pytest.mark.parametrize("spoil", [halve, empty, scramble, remove])
@pytest.mark.parametrize(("form", "pattern"), [(form, one) for form in ESSENTIAL for one in ESSENTIAL[form]])
def test_a_spoilt_essential_file(copied, form, pattern, spoil):
    (path,) = (copied / form).glob(pattern)
    spoil(path)
    for verb in FORMS[form]:
        told = refused(copied, [verb, form], 1, "")
        assert form in told


@pytest.mark.parametrize("spoil", [halve, scramble])
@pytest.mark.parametrize("form", FORMS)
def test_any_spoilt_file_is_noticed_or_not_needed(copied, made, form, spoil):
    """Success is allowed only with the result of the whole directory; a failure is one clear line."""
    good = json.loads(run("evaluate", made / form, "--json").stdout)["metric_value"]
    assert good > 0.7  # or it could not tell a broken tokenizer
    for path in sorted(path for path in (copied / form).iterdir() if path.is_file()):
        whole = path.read_bytes()
        spoil(path)
        result = run("evaluate", form, "--json")
        value = json.loads(result.stdout)
        assert result.exit_code in (0, 1), (path.name, result.output)
        if result.exit_code:
            assert value["error"]["type"] != "InternalError", (path.name, value)
        else:
            assert value["metric_value"] == good, path.name
        path.write_bytes(whole)
    assert names(copied) == ["onnx", "pruned", "run"]


# --- interrupted ---------------------------------------------------------------------------------


def _heard() -> None:
    """Let a process hear signals: shells ignore Ctrl-C in background jobs, nohup SIGHUP, and tests may be of these."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(("sign", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_training(here, train_on, sign, exit_code):
    arguments = train_on("good.csv", "-o", "run", "--json")
    arguments[arguments.index("--epochs") + 1] = "400"
    with command(*arguments, preexec_fn=_heard) as process:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("epoch 3: "):
                break
        process.send_signal(sign)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == exit_code, (seen, stderr)
    assert "Traceback" not in stderr
    assert json.loads(stdout)["error"]["type"] == "Interrupted"
    note = "the last complete checkpoint is in run; go on with: gatepress train --resume run"
    assert stderr.splitlines()[-1] == f"error: interrupted; {note}"
    assert names(here) == ["good.csv", "run"]
    for verb in ("evaluate", "prune"):
        result = run(verb, "run", *(["-o", "pruned"] if verb == "prune" else []))
        assert result.exit_code == 0, result.output
        assert "warning: run: is not finished" in result.stderr


@pytest.mark.parametrize(
    ("earlier", "note"),
    [
        (None, "nothing was written"),
        ("{}", "nothing was written, run is as it was"),
        ('{"resume": {}}', "nothing was written, run is as it was; go on with: gatepress train --resume run"),
    ],
)
def test_interrupted_before_the_first_checkpoint(here, train_on, earlier, note, monkeypatch):
    """What lies there is no checkpoint of this training."""

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gatepress.preparing.open_base", interrupted)
    if earlier:
        (here / "run").mkdir()
        (here / "run/gatepress_run.json").write_text(earlier)
    refused(here, train_on("good.csv", "-o", "run", *(["--force"] if earlier else [])), 130, f"interrupted; {note}$")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Return what is flushed and renamed from now on, in order: what, name, bytes."""
    done: list[tuple[str, str, int]] = []
    sync = os.fsync

    def flushed(handle: int) -> None:
        sync(handle)
        done.append(("flushed", Path(f"/proc/self/fd/{handle}").readlink().name, os.fstat(handle).st_size))

    monkeypatch.setattr(os, "fsync", flushed)
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def named(old: Any, new: Any, *, real: Any = real) -> None:
            real(old, new)
            done.append(("named", Path(new).name, 0))

        monkeypatch.setattr(os, name, named)
    return done


def test_a_file_is_on_the_disk_before_it_has_its_name(synced: list[Any], tmp_path: Path) -> None:
    replace_file(tmp_path / "sweep.json", b"whole")
    assert [what for what, *_ in synced] == ["flushed", "named"]
    assert synced[0][2] == len(b"whole")


def test_a_directory_is_on_the_disk_before_it_has_its_name(synced: list[Any], tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as staged:
        (staged / "inner").mkdir()
        (staged / "config.json").write_text("{}")
        (staged / "inner" / "weights").write_bytes(b"12345")
    names = [name for what, name, _ in synced if what == "flushed"]
    assert {"config.json", "weights", "inner"} <= set(names)
    assert len(names) == 4  # the directory itself too
    assert synced[-1][:2] == ("named", "out")


def test_what_is_written_has_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "one.json", b"{}")
        with new_directory(tmp_path / "out") as staged:
            (staged / "two.json").write_text("{}")
            (staged / "two.json").chmod(0o600)  # as some writers leave it
        assert os.umask(0o027) == 0o027  # which nobody else has to notice
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("one.json", "out/two.json", "out")]
    assert modes == [0o640, 0o640, 0o750]


def test_what_killed_writers_left_goes_with_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for kind in ("new", "old"):
        left = tmp_path / f".out.{kind}.abc_1234"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half of it")
    (tmp_path / ".out.2.new.abc_1234").mkdir()  # of another one
    with new_directory(target):
        assert (tmp_path / ".out.old.abc_1234").exists()  # without a target it may be all that there is
    with new_directory(target, force=True):
        pass
    assert names(tmp_path) == [".out.2.new.abc_1234", "out"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    theirs, claim = stage(tmp_path / "out")
    with pytest.raises(OutputError, match="out: another gatepress is training into it"):
        stage(tmp_path / "out", alone=True)
    with new_directory(tmp_path / "out") as ours:
        assert theirs.exists()
        assert ours != theirs
    release(claim)
    stage(tmp_path / "out", alone=True)
    assert not theirs.exists()


def test_what_a_killed_writer_left_in_a_directory_does_not_keep_it_from_being_replaced(tmp_path: Path) -> None:
    (tmp_path / "demo" / ".dense.new.abc_1234").mkdir(parents=True)
    check_output(tmp_path / "demo", force=True)
    (tmp_path / "demo" / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"notes\.txt, which gatepress did not write"):
        check_output(tmp_path / "demo", force=True)


@pytest.mark.parametrize(
    ("option", "name"), [("-o", "times.json"), ("--plot", "times.png")], ids=lambda value: value.strip("-")
)
def test_where_nothing_can_be_written_nothing_is_timed(here, monkeypatch, option, name):
    (here / "file").touch()
    monkeypatch.setattr("gatepress.bench.matmul.run", lambda *_, **__: pytest.fail("timed"))
    result = run("bench", option, f"file/{name}")
    assert result.exit_code == 1
    assert f"file/{name}: cannot write" in result.stderr


@pytest.mark.parametrize("models", [[], ["no-such-model"]])
@pytest.mark.parametrize("seed", ["-1", str(2**32)])
@pytest.mark.usefixtures("here")
def test_a_seed_that_no_generator_takes(models, seed):
    result = run("bench", *models, "--seed", seed)
    assert result.exit_code == 2
    assert f"--seed is {seed}, expected 0 to 4,294,967,295" in result.stderr


@pytest.mark.usefixtures("here")
def test_a_batch_that_no_memory_holds():
    result = run("bench", "no-such-model", "--batch-size", "1,10000000000000000000000")
    assert result.exit_code == 2
    assert "--batch-size is 10000000000000000000000, expected 1,048,576 or less" in result.stderr


def test_an_interrupted_bench_tells_what_it_wrote(here, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gatepress.bench.render.plot", interrupted)
    tiny = ("--shape", "8x8", "--sparsity", "0.5", "--tokens", "2", "--repetitions", "2", "--warmup", "0")
    result = run("bench", *tiny, "-o", "times.json", "--plot", "times.png")
    assert result.exit_code == 130
    assert "interrupted; times.json is written" in result.stderr
    assert names(here) == ["times.json"]


def test_a_demo_that_is_interrupted_at_once_leaves_nothing(here, monkeypatch):
    def interrupted(_settings: Any, output: Path, **_options: Any) -> None:
        output.parent.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("gatepress.training.train", interrupted)
    result = run("demo", "-o", "demo")
    assert result.exit_code == 130
    assert "interrupted; nothing was written" in result.stderr
    assert names(here) == []


def test_a_link_to_a_file_goes_on_leading_there(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    replace_file(tmp_path / "link.json", b"new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_name_that_is_no_text_is_refused_before_the_work(tmp_path):
    with pytest.raises(OutputError, match="is no text in UTF-8"):
        check_output(tmp_path / "x\udcffy", force=False)
