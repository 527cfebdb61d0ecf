"""The command line's contract: what goes where, exit codes, JSON, help. The verbs are stand-ins here."""

import errno
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gatepress
from gatepress import errors
from gatepress.cli import demo as demo_verb
from gatepress.cli import sweep as sweep_verb
from gatepress.cli import train as train_verb
from gatepress.cli._console import Screen, Terminated, facts, grid, lines
from gatepress.cli._groups import spread
from gatepress.cli._launched import is_first
from gatepress.cli._progress import BarProgress, LineProgress, clock_text, rate_text
from gatepress.cli.app import app
from gatepress.config import DataSettings, TrainSettings
from gatepress.files import ONNX_FILE
from gatepress.progress import NoProgress

VERBS = ("train", "prune", "export", "bench", "evaluate", "sweep", "inspect", "verify", "report", "demo")
MODULES = {"train": "training", "prune": "pruning", "export": "export", "evaluate": "evaluation"}
TRAINED = {
    "metric_name": "accuracy",
    "metric_value": 0.75,
    "examples": 96,
    "asked_sparsity": 0.3,
    "closed_gates": 300,
    "total_gates": 1000,
    "encoder_weights_removed": 0.31,
    "encoder_macs_removed": 0.29,
    "total_params": 1_234_567,
    "trainable_params": {
        "gates": 1000,
        "biases": 20,
        "layer_norms": 4,
        "low_rank": 0,
        "head": 6,
        "total": 1030,
    },
}
PRUNED = {
    "encoder_weights_removed": 0.31,
    "encoder_macs_removed": 0.29,
    "total_params": 1_234_567,
    "max_abs_logit_diff": 3e-7,
}
EXPORTED = {"max_abs_logit_diff": 1.5e-6, "opset": 18}
EVALUATED = {
    "metric_name": "accuracy",
    "metric_value": 0.75,
    "examples": 96,
    "kind": "run",
    "runtime": "torch",
}
ANSWERS = {"train": TRAINED, "prune": PRUNED, "export": EXPORTED, "evaluate": EVALUATED}
ARGUMENTS = {
    "train": ["train", "--task", "demo", "--model", "demo"],
    "prune": ["prune", "runs/x"],
    "export": ["export", "pruned/x"],
    "evaluate": ["evaluate", "pruned/x"],
}


class Library:
    """Stands in the place of the verbs: keeps the calls, answers or raises as told."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.calls = []
        self.raises = None
        for name, module in MODULES.items():
            self.put(module, name, ANSWERS[name])
        self.put("bench.endtoend", "run", None)
        self.put("bench.matmul", "run", None)

    def put(self, module, name, answer):
        def stand_in(*args, **kwargs):
            self.calls.append((name if name != "run" else module, args, kwargs))
            if self.raises is not None:
                raise self.raises
            sys.stdout.write("a library speaks its mind on stdout\n")
            if progress := kwargs.get("progress"):
                progress.start(40, "working")
                for step in range(40):
                    progress.advance(loss=1 / (step + 1))
                progress.finish()
            if name in {"train", "prune", "export"} and not kwargs.get("dry_run"):
                return {**answer, "output_dir": str(args[1])}
            return answer if answer is not None else records(*args)

        fake = types.ModuleType(f"gatepress.{module}")
        setattr(fake, name, stand_in)
        parent, _, child = f"gatepress.{module}".rpartition(".")
        self.monkeypatch.setitem(sys.modules, fake.__name__, fake)
        self.monkeypatch.setattr(importlib.import_module(parent), child, fake, raising=False)

    def only_call(self):
        (call,) = self.calls
        return call


def records(targets=("weight",)):
    """Return one record a target, each a millisecond faster than the one before."""
    from gatepress.bench.record import Record, relative_to

    whole = [
        Record(
            what="endtoend",
            name=str(target),
            kind="model",
            runtime="torch",
            device="cpu",
            device_name="a [fast] processor",
            threads=1,
            dtype="float32",
            batch_size=1,
            seq_len=8,
            repetitions=2,
            warmup=0,
            latency_ms_median=10.0 - index,
            latency_ms_p10=9.0 - index,
            latency_ms_p90=11.0 - index,
            latency_ms_min=8.5 - index,
            samples_ms=(9.0 - index, 11.0 - index),
            parameters=1000 - index,
            size_bytes=4_000_000,
        )
        for index, target in enumerate(targets)
    ]
    return [relative_to(record, whole[0]) for record in whole]


@pytest.fixture
def library(monkeypatch, tmp_path):
    # What takes functions of other modules by name must take the real ones, also where it is imported here first.
    for name in ("alternatives", "recovery", "report", "sweep"):
        importlib.import_module(f"gatepress.{name}")
    for check in ("run_file", "written_form", "refuse_absent"):  # no directory that these tests name is there
        monkeypatch.setattr(f"gatepress.manifests.{check}", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return Library(monkeypatch)


def run(*arguments, env=None):
    return CliRunner().invoke(app, list(arguments), env={"NO_COLOR": "1", **(env or {})})


def json_of(result):
    """Return the one JSON object that stdout holds and nothing else."""
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


# --- help and version ----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_by_example(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"Usage: root {verb}" in result.stdout
    assert f"gatepress {verb}" in result.stdout.partition("Examples:")[2]
    for option in ("--json", "--quiet", "--debug", "--help"):
        assert option in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_explains_itself(verb):
    (command,) = (one.callback for one in app.registered_commands if one.callback.__name__ == verb)
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        (info,) = parameter.annotation.__metadata__
        assert info.help.endswith("."), name


def test_help_names_the_verbs_in_the_order_of_use():
    text = run("--help").stdout
    listed = re.findall(r"^  (\w+)  ", text.partition("Commands:")[2], flags=re.MULTILINE)
    assert tuple(listed) == VERBS
    assert "Exit codes" in text


def test_no_arguments_is_a_question_for_help():
    result = run()
    assert result.exit_code == 2
    assert "Usage:" in result.output


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"gatepress {gatepress.__version__}\n")


# --- options and settings ------------------------------------------------------------------------


def test_every_setting_has_an_option_with_its_default():
    parameters = inspect.signature(spread(train_verb.train)).parameters
    for settings in (TrainSettings, DataSettings):
        for field in fields(settings):
            if field.name not in ("data", "commit"):  # a commit is found, not asked for
                default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
                assert parameters[field.name].default == default, field.name


def test_a_sweep_takes_what_a_training_takes_but_what_only_one_run_can_have():
    def options(verb):
        return set(inspect.signature(spread(verb)).parameters)

    assert options(train_verb.train) - options(sweep_verb.sweep) == {"start", "save_every", "resume"}


@pytest.mark.parametrize("schedule", [{"open_epochs": 1, "closing": 0.5}, {"open_epochs": 0, "start": "runs/x"}])
def test_train_options_become_settings(library, schedule):
    given = {
        **schedule,
        "model": "demo",
        "sparsity": 0.25,
        "granularity": "matrix",
        "controller": "penalty",
        "method": "gates+lora",
        "budget": "macs",
        "gate_axes": "in",
        "matrices": ("q", "down"),
        "lora_rank": 4,
        "lora_matrices": ("q", "down"),
        "penalty_weight": 7.0,
        "epochs": 2,
        "batch_size": 5,
        "max_length": 16,
        "learning_rate": 0.01,
        "gate_learning_rate": 0.02,
        "weight_decay": 0.5,
        "warmup_ratio": 0.1,
        "seed": 3,
        "device": "cpu",
        "precision": "bf16",
        "revision": "abc",
    }
    data = {
        "train_file": "a.csv",
        "validation_file": "b.csv",
        "text_column": "t",
        "text_pair_column": "u",
        "label_column": "l",
        "metric": "f1",
        "max_train_samples": 9,
        "max_validation_samples": 8,
    }
    lists = dict.fromkeys(("matrices", "lora_matrices"), "down,q,down")  # their order and number say nothing
    texts = {**given, **data, **lists}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in texts.items()]
    switches = ["--no-train-biases", "--no-train-layer-norms", "--distill"]
    result = run("train", *options, *switches, "-o", "out", "--force")
    assert result.exit_code == 0, result.output
    _, (settings, output), kwargs = library.only_call()
    assert settings == TrainSettings(
        data=DataSettings(**data),
        train_biases=False,
        train_layer_norms=False,
        distill=True,
        **given,
    )
    assert output == Path("out")
    assert kwargs["force"] is True


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (ARGUMENTS["train"], Path("runs/demo-demo-s0.3")),
        (ARGUMENTS["prune"], Path("pruned/x")),
        (ARGUMENTS["export"], Path("onnx/x")),
        (["export", "owner/name"], Path("onnx/name")),
    ],
)
def test_outputs_have_a_default_place_and_are_told(library, arguments, expected):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert library.only_call()[1][1] == expected
    assert json_of(result)["output_dir"] == str(expected)


@pytest.mark.parametrize("more", [[], ["--sparsity", "0.3"]])
def test_one_size_does_not_wait_for_what_trains(library, monkeypatch, more):
    monkeypatch.delattr(gatepress, "recovery")
    monkeypatch.setitem(sys.modules, "gatepress.recovery", None)  # importing it now fails
    assert run("prune", "runs/x", *more).exit_code == 0
    (_, _, kwargs) = library.only_call()
    assert kwargs["sparsity"] == (0.3 if more else None)
    assert run("prune", "runs/x", "--sparsity", "0.3,0.5").exit_code == 1


@pytest.mark.parametrize(
    "line", [["prune", "x"], ["verify", "x"], ["train", "--resume", "x"], ["bench", "x", "--alternatives"]]
)
def test_a_missing_directory_is_told_before_the_slow_imports(monkeypatch, tmp_path, line):
    monkeypatch.chdir(tmp_path)
    for name in ("pruning", "verifying", "training", "alternatives"):
        monkeypatch.delattr(gatepress, name, raising=False)
        monkeypatch.setitem(sys.modules, f"gatepress.{name}", None)  # importing it now fails
    result = run(*line)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: x: is not there, expected a run")


MISSING = """
import json, sys
from typer.testing import CliRunner
from gatepress.cli.app import app
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, line)
    print(json.dumps([line, result.exit_code, result.stderr]))
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""


def test_a_missing_model_is_told_before_torch_is_imported(tmp_path):
    (tmp_path / "empty").mkdir()
    places = {
        "nowhere": "nowhere: not cached here and the hub cannot be reached; ",
        "./nowhere": "nowhere: is not there, expected a model directory, a hub id, or demo",
        "empty/x": "empty/x: no such directory; not cached here and the hub cannot be reached; ",
        "empty": "empty: holds no model; expected gatepress_run.json ",
        "gone.onnx": "gone.onnx: no such file, expected an ONNX model; ",
    }
    asked = [[verb, place] for verb in ("export", "evaluate", "bench") for place in places]
    asked += [["evaluate", "owner/name", "--against", "empty"], ["bench", "owner/name", "empty"]]
    asked += [
        [verb, "--task", "sst2", "--model", place] for verb in ("train", "sweep") for place in ("nowhere", "./nowhere")
    ]
    done = subprocess.run(
        [sys.executable, "-c", MISSING, json.dumps(asked)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line, exit_code, told in map(json.loads, done.stdout.splitlines()):
        assert exit_code == 1, line
        assert told.startswith(f"error: {places[line[-1]]}"), line
        assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["export", "x", "--max-diff", "0"], "--max-diff is 0.0, expected a positive number"),
        (["prune", "x", "--tokens", "-3"], "--tokens is -3, expected 1 or more"),
        (["prune", "x", "--refit"], "--refit is for gates that are closed anew; give --sparsity FRACTION with it"),
        (["export", "x", "--task", "sst2"], "data options say what the metric of --quantize int8 is measured on"),
        (["evaluate", "x", "--batch-size", "0"], "--batch-size is 0, expected 1 or more"),
        (["bench", "x", "--seed", "-1"], "--seed is -1, expected 0 to 4,294,967,295"),
        (["bench", "x", "--alternatives", "--repetitions", "0"], "--repetitions is 0, expected 1 or more"),
    ],
)
def test_what_is_wrong_with_options_is_told_before_what_is_missing(monkeypatch, tmp_path, line, told):
    monkeypatch.chdir(tmp_path)
    for name in ("export", "evaluation", "alternatives", "pruning", "recovery"):
        monkeypatch.delattr(gatepress, name, raising=False)
        monkeypatch.setitem(sys.modules, f"gatepress.{name}", None)  # importing it now fails
    (tmp_path / "pruned" / "x").mkdir(parents=True)  # the output that it would have
    result = run(*line)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("line", "exit_code", "told"),
    [
        (["prune", "pruned/x"], 1, "pruned/x: has no gatepress_run.json, expected a run directory written by "),
        (["export", "onnx/x", "--quantize", "int8"], 2, "onnx/x: is ONNX already; give the directory that it was "),
    ],
)
def test_a_wrong_source_is_told_before_an_output_that_is_in_the_way(monkeypatch, tmp_path, line, exit_code, told):
    """By default the output of one is where the other is: nobody is to be told of --force."""
    monkeypatch.chdir(tmp_path)
    for name in ("pruned/x/config.json", "onnx/x/model.onnx", "onnx/x/gatepress_onnx.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    result = run(*line)
    assert result.exit_code == exit_code
    assert result.stderr.startswith(f"error: {told}")


def test_dry_run_promises_no_output(library):
    result = run("prune", "runs/x", "--dry-run", "--layout", "stock", "--json")
    assert "output_dir" not in json_of(result)
    asked = {key: library.only_call()[2][key] for key in ("layout", "target", "latency_table", "force", "dry_run")}
    assert asked == {"layout": "stock", "target": "ort-cpu", "latency_table": None, "force": False, "dry_run": True}


def test_evaluate_takes_the_rows_of_the_manifest_unless_told(library):
    assert run("evaluate", "pruned/x").exit_code == 0
    assert library.only_call()[2]["data"] is None


def test_evaluate_takes_the_rows_it_is_told(library):
    assert run("evaluate", "pruned/x", "--task", "cola", "--max-validation-samples", "5").exit_code == 0
    assert library.only_call()[2]["data"] == DataSettings(task="cola", max_validation_samples=5)


# --- stdout is data, stderr is the rest ----------------------------------------------------------


@pytest.mark.parametrize("verb", MODULES)
@pytest.mark.usefixtures("library")
def test_json_is_one_object_alone_on_stdout(verb):
    result = run(*ARGUMENTS[verb], "--json")
    assert result.exit_code == 0, result.output
    value = json_of(result)
    assert ANSWERS[verb].items() <= value.items()
    assert "speaks its mind" in result.stderr


@pytest.mark.parametrize("verb", MODULES)
@pytest.mark.usefixtures("library")
def test_tables_go_to_stdout(verb):
    result = run(*ARGUMENTS[verb])
    assert result.exit_code == 0, result.output
    assert "speaks its mind" not in result.stdout
    assert "\x1b" not in result.output
    label = {"prune": "3.0e-07", "export": "1.5e-06"}.get(verb, "0.7500  (on 96 examples)")
    assert label in result.stdout


@pytest.mark.usefixtures("library")
def test_train_shows_asked_beside_counted():
    text = run(*ARGUMENTS["train"]).stdout
    for line in (
        r"sparsity asked +30.00 %",
        r"gates closed +300 of 1,000 \(30.00 %\)",
        r"encoder weights to go +31.00 %",
        r"parameters +1,234,567",
        r"trained: layer norms +4",
    ):
        assert re.search(line, text), line


def test_values_that_json_lacks_become_null(library):
    library.put("evaluation", "evaluate", {"metric_value": float("nan"), "path": Path("a"), "pair": (1, 2)})
    value = json_of(run("evaluate", "x", "--json"))
    assert value == {"metric_value": None, "path": "a", "pair": [1, 2]}


def test_quiet_leaves_result_and_errors_only(library):
    library.put("evaluation", "evaluate", EVALUATED)
    result = run("train", "--task", "demo", "-q")
    assert result.stderr == "a library speaks its mind on stdout\n"
    assert isinstance(library.only_call()[2]["progress"], NoProgress)
    assert "0.7500" in result.stdout


@pytest.mark.usefixtures("library")
def test_log_records_are_notes():
    import logging

    def noisy(*_args, **_kwargs):
        logging.getLogger("gatepress.hub").info("downloading x")
        logging.getLogger("gatepress.hub").warning("x is old")
        logging.getLogger("someone.else").warning("noise")
        return EVALUATED

    sys.modules["gatepress.evaluation"].evaluate = noisy
    assert run("evaluate", "x").stderr == "downloading x\nwarning: x is old\n"
    assert run("evaluate", "x", "--quiet").stderr == "warning: x is old\n"
    assert "WARNING someone.else: noise" in run("evaluate", "x", "--debug").stderr
    assert logging.getLogger("gatepress").handlers == []


# --- errors --------------------------------------------------------------------------------------

LEAVES = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.GatepressError)]


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_an_error_is_one_line_and_its_exit_code(library, kind):
    library.raises = kind("first\n  second")
    result = run("evaluate", "x")
    assert result.exit_code == (2 if kind is errors.UsageError else 1)
    assert (result.stdout, result.stderr) == ("", "error: first second\n")


@pytest.mark.parametrize("verb", MODULES)
def test_an_error_is_an_object_with_json(library, verb):
    library.raises = errors.DataError("rows are missing")
    result = run(*ARGUMENTS[verb], "--json")
    assert result.exit_code == 1
    assert json_of(result) == {"error": {"type": "DataError", "message": "rows are missing"}, "exit_code": 1}
    assert result.stderr == "error: rows are missing\n"


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "exit_code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted; "),
        (Terminated(), 143, "interrupted; "),
        (MemoryError(), 1, "out of memory; take smaller batches"),
        (OutOfMemoryError("CUDA out of memory"), 1, "out of memory; take smaller batches"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; take smaller batches"),
        (OSError(errno.ENOSPC, "No space left on device", "there"), 1, "there: cannot write (No space left"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "output: cannot write (No space left on device); free"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), 1, "there: cannot read or write (Perm"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "internal error (ZeroDivisionError: division by zero); run",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_no_one_foresaw_is_one_line_too(library, error, exit_code, text):
    library.raises = error
    result = run("evaluate", "x", "--json")
    assert result.exit_code == exit_code
    assert result.stderr.startswith(f"error: {text}")
    assert result.stderr.count("\n") == 1
    assert json_of(result)["exit_code"] == exit_code


def test_debug_shows_the_traceback_before_the_line(library):
    library.raises = errors.DataError("rows are missing")
    result = run("evaluate", "x", "--debug")
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("error: rows are missing\n")
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["train", "--sparsty", "0.3"],
            "no such option: --sparsty (Possible options: --sparsity, --start); see 'root",
        ),
        (["trian"], "no such command 'trian'. Did you mean 'train'? See 'root --help'"),
        (["prune"], "missing argument 'RUN'; see 'root prune --help'"),
        (["train", "--task", "demo", "--sparsity", "much"], "invalid value for '--sparsity' / '-s': "),
        (["train", "--task", "demo", "--granularity", "fine"], "invalid value for '--granularity': "),
        (
            ["train", "--task", "demo", "--sparsity", "1"],
            "--sparsity is 1.0, expected a fraction of at least 0",
        ),
        (
            ["train", "--task", "demo", "--sparsity", "nan"],
            "--sparsity is nan, expected a fraction of at least 0",
        ),
        (["train", "--task", "demo", "--epochs", "0"], "--epochs is 0, expected 1 or more"),
        (["train"], "no data: give --task NAME, or --train-file and --validation-file"),
        (
            ["train", "--task", "demo", "--train-file", "a.csv"],
            "--task and --train-file/--validation-file exclude",
        ),
        (
            ["evaluate", "x", "--task", "demo", "--max-validation-samples", "0"],
            "--max-validation-samples is 0, expected 1 or more",
        ),
        (["train", "--train-file", "a.csv"], "own data has no validation rows; give them with --validation-file"),
        (["train", "--validation-file", "a.csv"], "own data has no train rows; give them with --train-file"),
        (["train", "--sparsity", "0,3"], "invalid value for '--sparsity' / '-s': Input should be a valid number"),
        (["train", "--method", "lora-fb"], "invalid value for '--method': 'lora-fb' is not one of"),
        (["bench", "x", "--max-length", "5"], "--max-length cuts rows of a task; give --task, or --seq-len"),
        (["bench", "x", "--task", "demo", "--seq-len", "5"], "--seq-len means nothing to the rows of a task"),
        (["bench", "--latency-table", "ort-cpu", "--alternatives"], "--alternatives means nothing to --latency-table"),
        (["bench", "x", "--precision", "fp32,int8"], "--precision is 'fp32,int8', expected some of fp32, bf16, fp16"),
        (["bench", "--precision", "bf16"], "--precision times models; name at least one"),
        (["bench", "--trust-remote-code"], "--trust-remote-code times models; name at least one"),
        (
            ["train", "--task", "demo", "--method", "lora", "-s", "0.9", "--closing", "0.2", "--budget", "macs"],
            "--sparsity, --budget, --closing means nothing to --method lora, which has no gates; drop it",
        ),
        (
            ["train", "--task", "demo", "--method", "full", "-s", "0.9", "--closing", "0.2", "--budget", "macs"],
            "--sparsity, --budget, --closing means nothing to --method full, which trains the whole model; drop it",
        ),
        (
            ["train", "--task", "demo", "--method", "full", "--matrices", "q", "--no-train-biases"],
            "--no-train-biases, --matrices means nothing to --method full, which trains the whole model; drop it",
        ),
        (
            ["train", "--task", "demo", "--penalty-weight", "3"],
            "--penalty-weight means nothing to --controller importance, which has no penalty; drop it",
        ),
        (
            ["sweep", "--task", "demo", "--penalty-weight", "3"],
            "--penalty-weight means nothing to --controller importance, which has no penalty; drop it",
        ),
        (
            ["train", "--task", "demo", "--start", "runs/x", "--closing", "0.3", "--penalty-weight", "3"],
            (
                "--penalty-weight means nothing to --controller importance, which has no penalty; drop it; "
                "--closing means nothing to --start, whose gates are closed at once; drop it"
            ),
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(library, arguments, text):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {text}")
    assert result.stderr.count("\n") == 1
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 2
    assert json_of(as_json)["error"]["type"] == "UsageError"
    assert library.calls == []


PROCESS = """
import sys, time, types
import gatepress
from gatepress import manifests
manifests.refuse_absent = lambda *_: None  # no model that these tests name is there
fake = types.ModuleType("gatepress.evaluation")
gatepress.evaluation = sys.modules[fake.__name__] = fake

def evaluate(*args, progress, **kwargs):
    progress.start(40, "evaluating")
    for _ in range(40):
        progress.advance(rows=1)
    progress.finish()
    return {"rows": ["x" * 100] * int(sys.argv[2])}

fake.evaluate = evaluate
from gatepress.cli.app import main
main()
"""


@contextmanager
def process(rows: int, **settings):
    """Start the command line as a process, with a stand-in for `evaluate`."""
    unwanted = ("PYTHONUNBUFFERED", "NO_COLOR", "FORCE_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **settings.pop("env", {})}
    arguments = [sys.executable, "-c", PROCESS, "evaluate", str(rows), "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment, **settings) as started:
        yield started


def test_a_reader_that_goes_away_is_no_traceback():
    with process(10_000, stderr=subprocess.PIPE) as started:
        assert started.stdout.read(1) == b"{"
        started.stdout.close()
        noise = started.stderr.read().decode()
    assert "Error" not in noise
    assert "Traceback" not in noise
    assert started.returncode == 1


def test_a_reader_of_progress_that_goes_away_does_not_end_the_work():
    with process(3, stderr=subprocess.PIPE) as started:
        started.stderr.close()
        assert len(json.loads(started.stdout.read())["rows"]) == 3
    assert started.returncode == 0


COMMAND = [sys.executable, "-m", "gatepress"]


@pytest.mark.parametrize("stderr", ["2>&-", "2> /dev/full"])
def test_a_stderr_that_takes_nothing_leaves_the_object_on_stdout(stderr):
    line = " ".join(map(shlex.quote, COMMAND)) + f" inspect nowhere --json {stderr}"
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S602 - as below
    assert (json.loads(done.stdout)["exit_code"], done.returncode) == (1, 1)


@pytest.mark.parametrize("arguments", ["train --bogus", "train --bogus --json", "inspect nowhere --json", "--help"])
@pytest.mark.parametrize("stdout", ["1>&-", "> /dev/full"])
def test_a_stdout_that_takes_nothing_is_no_traceback(arguments, stdout):
    line = " ".join(map(shlex.quote, COMMAND)) + f" {arguments} {stdout}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)  # noqa: S602 - its redirection
    assert "Traceback" not in done.stderr
    assert done.returncode in (1, 2) or (arguments, stdout) == ("--help", "1>&-")
    assert done.stderr.count("error: ") <= 1


def test_an_option_without_its_value_names_the_help_of_its_verb():
    result = run("train", "--task")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: option '--task' requires an argument; see 'gatepress train --help'\n"


def test_a_stdout_that_knows_ascii_only_gets_ascii():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    line = [*COMMAND, "inspect", "modèle", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert json.loads(done.stdout)["error"]["message"].startswith("modèle: ")
    assert done.returncode == 1


def test_only_the_first_of_several_processes_prints_what_is_wrong():
    line = [*COMMAND, "train", "--bogus", "--json"]
    done = [subprocess.run(line, capture_output=True, check=False, env={**os.environ, "RANK": rank}) for rank in "01"]
    assert [json.loads(one.stdout)["exit_code"] for one in done if one.stdout] == [2]
    assert [one.returncode for one in done] == [2, 2]


def test_a_verb_that_no_launcher_starts_prints_whatever_number_it_has():
    environment = {**os.environ, "RANK": "1"}
    for line, code in ((["inspect", "nowhere", "--json"], 1), (["inspect", "--bogus", "--json"], 2)):
        done = subprocess.run([*COMMAND, *line], capture_output=True, check=False, env=environment)
        assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (code, code)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_starts(sign):
    """A signal is answered by a line, whatever is being imported when it comes."""
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gatepress.cli import app\n"
        "def swallow(*_args, **_kwargs):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(sign)})\n"
        "        for _ in range(1_000_000): pass\n"
        "    except KeyboardInterrupt:\n"
        "        raise RecursionError from None\n"
        "import gatepress.inspecting\n"
        "gatepress.inspecting.inspect = swallow\n"
        "sys.argv = ['gatepress', 'inspect', 'x', '--json']\n"
        "app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + sign, done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "Interrupted"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "where", [("mend_streams", ""), ("Verb.make_context", ""), ("Verb.make_context", "RuntimeError")]
)
@pytest.mark.parametrize(
    ("verb", "rank", "prints"), [("inspect", "1", True), ("train", "0", True), ("train", "1", False)]
)
def test_stopped_outside_of_a_session(sign, where, verb, rank, prints):
    """While modules are imported, or options read: there is no session, and pipelines parse stdout all the same."""
    place, becomes = where  # an import may make another exception of what it is stopped by
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import gatepress.__main__\n"
        "from gatepress.cli import app\n"
        "def stop(*_args, **_kwargs):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(sign)})\n"
        "        for _ in range(1_000_000): pass\n"
        "    except KeyboardInterrupt:\n"
        f"        raise {becomes}\n"
        f"app.{place} = stop\n"
        f"sys.argv = ['gatepress', '{verb}', 'x', '--json']\n"
        "gatepress.__main__.main()\n"
    )
    environment = {**os.environ, "RANK": rank}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 128 + sign, done.stderr
    told = {"type": "Interrupted", "message": "interrupted; nothing was written"}
    assert (json.loads(done.stdout) if prints else done.stdout) == (
        {"error": told, "exit_code": 128 + sign} if prints else ""
    )
    assert done.stderr == "error: interrupted; nothing was written\n"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_stopped_before_the_command_line_is_loaded(options):
    """Whatever an import makes of what a handler raises: RuntimeError in place of KeyboardInterrupt, or nothing."""
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import gatepress.__main__\n"
        "assert 'typer' not in sys.modules\n"  # its import is long, and nothing answers before main() runs
        "class Stop:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'typer':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "                for _ in range(1_000_000): pass\n"
        "            except BaseException:\n"
        "                raise RuntimeError from None\n"
        "sys.meta_path.insert(0, Stop)\n"
        f"sys.argv = ['gatepress', 'inspect', 'x', *{options}]\n"
        "gatepress.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was written\n")
    told = {"type": "Interrupted", "message": "interrupted; nothing was written"}
    assert (json.loads(done.stdout) if options else done.stdout) == (
        {"error": told, "exit_code": 130} if options else ""
    )


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_behind_the_result_changes_nothing(options, sign):
    """All is written: nothing says that it was not, and the exit code is that of the result."""
    program = (
        "import atexit, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import gatepress.inspecting\n"
        "from gatepress.cli import app, inspect\n"
        "gatepress.inspecting.inspect = lambda _: {}\n"
        "inspect.tables = lambda *_, **__: []\n"
        "Screen = app.Screen\n"
        "def result(self, *given, shown=Screen.result):\n"
        "    shown(self, *given)\n"
        f"    os.kill(os.getpid(), {int(sign)})\n"
        "    for _ in range(1_000_000): pass\n"
        "Screen.result = result\n"
        f"atexit.register(lambda: print(int(signal.getsignal({int(sign)})), file=sys.stderr))\n"
        f"sys.argv = ['gatepress', 'inspect', 'x', *{options}]\n"
        "app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    ignored = f"{int(signal.SIG_IGN)}\n"  # what Python handles is the system's again before the process has ended
    assert (done.returncode, done.stdout, done.stderr) == (0, "{}\n" if options else "", ignored)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_windows_is_told_where_it_runs(options):
    program = (
        "import gatepress.__main__, os, sys\n"
        f"sys.argv = ['gatepress', 'train', *{options}]\n"
        "os.name = 'nt'\n"
        "gatepress.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    line = "gatepress runs on Linux and macOS; on Windows run it in WSL (wsl --install)"
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")
    told = {"error": {"type": "UsageError", "message": line}, "exit_code": 2}
    assert (json.loads(done.stdout) if options else done.stdout) == (told if options else "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
@pytest.mark.parametrize(
    ("colours", "environment"), [(True, {}), (False, {"NO_COLOR": "1"}), (False, {"TERM": "dumb"})]
)
def test_bars_are_live_on_a_terminal_only(colours, environment):
    import pty

    terminal, its_end = pty.openpty()
    with process(1, stderr=its_end, env={"TERM": "xterm-256color", **environment}) as started:
        os.close(its_end)
        assert json.load(started.stdout) == {"rows": ["x" * 100]}
    drawn = os.read(terminal, 1 << 20).decode()
    os.close(terminal)
    assert "evaluating" in drawn
    assert ("\x1b[?25h" in drawn) == (environment.get("TERM") != "dumb")
    assert bool(re.search(r"\x1b\[3\d", drawn)) == colours
    assert started.returncode == 0


def test_a_log_has_no_bars_and_no_colours():
    with process(1, stderr=subprocess.PIPE) as started:
        stdout, stderr = started.communicate()
    assert json.loads(stdout) == {"rows": ["x" * 100]}
    assert b"\x1b" not in stderr
    assert b"\r" not in stderr
    assert stderr.count(b"evaluating: ") == 2


# --- bench ---------------------------------------------------------------------------------------


def test_bench_without_models_times_a_weight(library):
    result = run("bench", "--shape", "8x4,16x8", "--sparsity", "0,0.5", "--tokens", "3", "--repetitions", "7")
    assert result.exit_code == 0, result.output
    name, args, kwargs = library.only_call()
    progress = kwargs.pop("progress")
    assert isinstance(progress, LineProgress)
    assert (name, args) == ("bench.matmul", ())
    assert kwargs == {
        "shapes": [(8, 4), (16, 8)],
        "sparsities": [0.0, 0.5],
        "tokens": 3,
        "repetitions": 7,
        "device": "cpu",
        "threads": None,
        "seed": 0,
    }


def test_bench_with_models_times_them(library):
    arguments = ["a", "b", "--batch-size", "1,4", "--max-length", "16", "--warmup", "0", "--task", "cola"]
    result = run("bench", *arguments, "--json")
    assert result.exit_code == 0, result.output
    name, args, kwargs = library.only_call()
    assert (name, args) == ("bench.endtoend", (["a", "b"],))
    assert kwargs["batch_sizes"] == [1, 4]
    assert kwargs["max_length"] == 16
    assert kwargs["warmup"] == 0
    assert kwargs["data"] == DataSettings(task="cola")
    first, second = json_of(result)["records"]
    assert (first["relative_time_factor"], second["latency_ms_median"]) == (1.0, 9.0)


@pytest.mark.usefixtures("library")
def test_bench_shows_a_table_for_people():
    result = run("bench", "a", "b")
    assert "a [fast] processor" in result.stdout
    assert "1.11x" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch-size", "1"], "--batch-size times models"),
        (["--task", "cola", "--seq-len", "8"], "--seq-len, --task times models"),
        (["a", "--shape", "8x8"], "--shape times one weight"),
        (["a", "--batch-size", "1,x"], "--batch-size is '1,x', expected whole numbers"),
        (["--shape", "8"], "--shape is '8', expected sizes like 768x768"),
        (["--sparsity", "half"], "--sparsity is 'half', expected numbers"),
        (["--output", "out.xml"], "--output is out.xml, expected a name that ends in"),
        (["--plot", "out.pdf"], "--plot is out.pdf, expected a name that ends in"),
        (["a", "--data-dir", "glue"], "--data-dir does not say which rows; give --task NAME"),
        (["--alternatives"], "--alternatives takes one run directory"),
        (["a", "b", "--alternatives"], "--alternatives takes one run directory"),
        (["a", "--for", "ort-int8", "--baseline", "x"], "--for, --baseline goes with --alternatives"),
        (["a", "b", "--fail-under", "0"], "--fail-under is 0, expected a factor above 0"),
        (["a", "b", "--fail-under", "-1.5"], "--fail-under is -1.5, expected a factor above 0"),
        (["a", "b", "--fail-under", "nan"], "--fail-under is nan, expected a factor above 0"),
        (["a", "--fail-under", "1.5"], "--fail-under compares the last model with the first"),
        (["a", "b", "--fail-under", "1.5", "--precision", "fp32,bf16"], "--precision with several values leaves open"),
        (["a", "b", "--fail-under", "1.5", "--runtime", "openvino,onnxruntime"], "--runtime with several values"),
        (["--fail-under", "1.5"], "--fail-under compares the last model with the first"),
    ],
)
def test_bench_refuses_before_it_times(library, arguments, text):
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {text}")
    assert library.calls == []


def test_bench_builds_the_alternatives_of_a_run(library):
    library.put("alternatives", "run", records(["dense ORT", "gatepress ORT"]))
    arguments = ["runs/x", "--alternatives", "--baseline", "dense torch", "--for", "ort-int8", "--batch-size", "2"]
    result = run("bench", *arguments, "--json")
    assert result.exit_code == 0, result.output
    name, args, kwargs = library.only_call()
    assert (name, args) == ("alternatives", (Path("runs/x"),))
    assert (kwargs["baseline"], kwargs["target"], kwargs["batch_sizes"]) == ("dense torch", "ort-int8", [2])
    assert {"fail_under", "missed"}.isdisjoint(json_of(result))
    assert run("bench", "runs/x", "--alternatives").exit_code == 0
    assert {"baseline", "target"}.isdisjoint(library.calls[-1][2])


@pytest.mark.usefixtures("library")
def test_bench_gates_on_a_factor(tmp_path):
    result = run("bench", "a", "b", "--fail-under", "1.11", "--json")
    assert result.exit_code == 0, result.output
    assert (json_of(result)["fail_under"], json_of(result)["missed"]) == (1.11, [])

    path = tmp_path / "out.json"
    result = run("bench", "a", "b", "--fail-under", "1.2", "--json", "--output", str(path))
    assert result.exit_code == 1
    (missed,) = json_of(result)["missed"]
    assert missed == {
        "name": "b",
        "baseline": "a",
        "task": None,
        "batch_size": 1,
        "seq_len": 8,
        "relative_time_factor": 1.1111,
    }
    assert len(json_of(result)["records"]) == 2
    assert len(json.loads(path.read_text())["records"]) == 2
    last = result.stderr.splitlines()[-1]
    assert last == "error: b is not 1.2 times as fast as a (--fail-under): 1.11x at batch 1 x 8 tokens"

    result = run("bench", "a", "b", "--fail-under", "1.2")
    assert result.exit_code == 1
    assert "1.11x" in result.stdout


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".md"])
@pytest.mark.usefixtures("library")
def test_bench_writes_records(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    result = run("bench", "a", "b", "--output", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert json_of(result)["output"] == str(path)
    before = path.read_bytes()
    assert b"relative" in before or suffix == ".md"
    again = run("bench", "a", "--output", str(path))
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    assert path.read_bytes() == before
    assert run("bench", "a", "--output", str(path), "--force").exit_code == 0
    assert path.read_bytes() != before


# --- demo ----------------------------------------------------------------------------------------


def test_demo_takes_the_five_steps_and_shows_one_table(library):
    result = run("demo", "-o", "out", "--sparsity", "0.6")
    assert result.exit_code == 0, result.output
    steps = [name for name, _, _ in library.calls]
    assert steps == [
        *(verb for verb in ("train", "prune", "export") for _ in "ab"),
        "bench.endtoend",
        *["evaluate"] * 4,
    ]
    dense, settings = (library.calls[step][1][0] for step in (0, 1))
    assert (dense.sparsity, settings.sparsity) == (0.0, 0.6)
    assert replace(dense, sparsity=0.6) == settings
    assert settings.model == settings.data.task == "demo"
    assert re.search(r"accuracy +0.7500 +0.7500 +1.00", result.stdout)
    for row in ("parameters", "file, safetensors", "file, ONNX", "latency, torch", "latency, ONNX Runtime"):
        assert row in result.stdout
    assert re.findall(r"^(\d)/5 ", result.stderr, flags=re.MULTILINE) == list("112345")


@pytest.mark.usefixtures("library")
def test_demo_as_json():
    value = json_of(run("demo", "-o", "out", "--json"))
    assert value["metric_values"] == dict.fromkeys(("dense-onnx", "run", "pruned", "onnx"), 0.75)
    assert value["before"]["metric_value"] == 0.75
    assert value["after"]["latency_ms_median"] == {"torch": 9.0, "onnxruntime": 7.0}
    assert value["output_dir"] == "out"


def test_demo_does_not_touch_an_earlier_result(library, tmp_path):
    (tmp_path / "out").mkdir()
    result = run("demo", "-o", "out")
    assert (result.exit_code, result.stderr.strip()) == (
        1,
        "error: out: exists already; choose another with -o or replace it with --force",
    )
    assert library.calls == []


def test_demo_settings_stand_in_one_place():
    parameters = inspect.signature(demo_verb.demo).parameters
    assert parameters["epochs"].default == demo_verb.DEMO.epochs
    assert parameters["sparsity"].default == demo_verb.DEMO.sparsity


def test_force_takes_no_run_of_another_task_for_an_earlier_demo(tmp_path):
    run_file = tmp_path / "dense/gatepress_run.json"
    for task in ("sst2", None):
        run_file.parent.mkdir(exist_ok=True)
        run_file.write_text(json.dumps({"format": "gatepress-run", "task": {"name": task} if task else None}))
        result = run("demo", "-o", str(tmp_path), "--force")
        assert result.exit_code == 1
        assert "dense: was not written by gatepress demo" in result.stderr
        assert run_file.is_file()
    files = dict.fromkeys(demo_verb.STEPS, "gatepress_pruned.json")
    files |= {"dense": run_file.name, "run": run_file.name, "dense-onnx": ONNX_FILE, "onnx": ONNX_FILE}
    for step, name in files.items():
        (tmp_path / step).mkdir(exist_ok=True)
        (tmp_path / step / name).write_text(json.dumps({"task": {"name": "demo"}}))
    demo_verb._refuse_other_tasks(tmp_path)


# --- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def work(progress, steps=1000):
    progress.start(steps, "training")
    for step in range(steps):
        progress.advance(loss=0.5, closed=step)
    progress.finish()


def test_a_log_gets_a_line_at_every_tenth(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("gatepress.cli._progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    work(LineProgress(stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "training: 1,000 to do"
    assert re.match(r"training: 50 % \(500/1,000, 1.0/s, 8:20 left, loss 0.5, closed 499\)", lines[5])
    assert "left" not in lines[-1]
    assert "\r" not in stream.getvalue()


def test_quick_work_gets_a_first_and_a_last_line():
    stream = io.StringIO()
    work(LineProgress(stream))
    first, last = stream.getvalue().splitlines()
    assert first == "training: 1,000 to do"
    assert last.startswith("training: 100 % (1,000/1,000, ")


def test_few_units_have_their_own_percentage():
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.start(3, "trainings")
    progress._open[-1].last -= 60  # as if they took a minute
    progress.advance(1)
    assert stream.getvalue().splitlines()[-1].startswith("trainings: 33 % (1/3, ")


def test_a_terminal_gets_a_live_bar_that_ends(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = BarProgress(stream)
    progress.start(2, "epochs")
    work(progress, steps=4)
    progress.advance(2)
    progress.finish()
    drawn = stream.getvalue()
    assert "training" in drawn
    assert "4/4" in drawn
    assert "loss 0.5, closed 3" in drawn
    assert drawn.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_an_error_ends_a_live_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = BarProgress(stream)
    progress.start(2, "epochs")
    progress.close()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")
    progress.advance()  # whoever still reports draws nothing more
    progress.finish()


@pytest.mark.parametrize(("speed", "text"), [(None, ""), (0.25, "4.0 s each"), (12.34, "12.3/s"), (4321, "4,321.0/s")])
def test_speed_is_readable(speed, text):
    assert rate_text(speed) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65.4, "1:05"), (3723, "1:02:03")])
def test_time_is_readable(seconds, text):
    assert clock_text(seconds) == text


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "gatepress", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == f"gatepress {gatepress.__version__}\n"


def test_a_signal_behind_the_one_object_brings_no_second():
    """As a launcher sends it to the others when one process of a training has died."""
    program = (
        "import os, signal\n"
        "from gatepress.cli._console import session\n"
        "from gatepress.cli.app import _stop\n"
        "from gatepress.errors import ProcessError\n"
        "signal.signal(signal.SIGTERM, _stop)\n"
        "try:\n"
        "    with session(as_json=True, quiet=False, debug=False):\n"
        "        raise ProcessError('another process has ended')\n"
        "finally:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["error"]["type"] == "ProcessError"
    assert "Terminated" not in done.stderr


@pytest.mark.parametrize(
    ("drop", "code"),
    [(0.87 - 0.86, 0), (-0.5, 0), (0.011, 1), (float("nan"), 1)],
    ids=["as much", "better", "worse", "nan"],
)
def test_a_metric_that_drops_by_more_than_is_allowed_ends_with_1(library, drop, code):
    """A difference of two decimals is off by rounding: 0.87 - 0.86 is more than 0.01."""
    measured = {**ANSWERS["evaluate"], "metric_value_against": 0.87, "metric_drop": drop}
    library.put(MODULES["evaluate"], "evaluate", measured)
    result = run("evaluate", "small", "--against", "large", "--max-metric-drop", "0.01")
    assert (result.exit_code, "Evaluated" in result.stdout) == (code, True)
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == code
    assert all("less than that of large, expected at most --max-metric-drop 0.01" in line for line in told)


@pytest.mark.parametrize(
    "options", [["0.01"], ["-0.1", "--against", "large"], ["nan", "--against", "large"], ["inf", "--against", "large"]]
)
def test_a_limit_of_a_drop_that_is_none_is_refused(library, options):
    assert run("evaluate", "small", "--max-metric-drop", *options).exit_code == 2
    assert library.calls == []


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": ""}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_of_one_process_the_only_one_prints(monkeypatch, environment, first):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


@pytest.mark.parametrize(
    "line", [("prune", "run", "--sparsity", "0.5", "--recover-epochs", "1"), ("sweep", "--task", "sst2"), ("demo",)]
)
def test_verbs_that_train_in_one_process_are_not_launched_in_several(monkeypatch, tmp_path, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        ran.append(run(*line, "--json"))
    assert [one.exit_code for one in ran] == [2, 2]
    assert "start it without torchrun or accelerate launch" in json.loads(ran[0].stdout)["error"]["message"]
    assert (ran[1].stdout, ran[1].stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_tables_lose_nothing_of_what_is_too_long() -> None:
    """Texts go on in the next line, and a command that is to be copied stays in one."""
    path, command = f"/data/{'abcdefghij' * 20}/dev.csv", f"gatepress train --train-file {'x y' * 60} -o runs/x"
    numbers = ["123.45 ms", "12,345,678", "1,234.5 MB", "0.000123", "123.45 to 678.90", "onnxruntime"] * 2
    stream = io.StringIO()
    rows = [[path, *numbers]]
    views = [facts("files", [("rows", path)]), grid("times", ["model", *numbers], rows), lines("again", [command])]
    Screen(stream, io.StringIO(), as_json=False, quiet=False).result({}, lambda _: views)
    shown = stream.getvalue()
    joined = "".join(line.strip() for line in shown.splitlines())
    assert "…" not in shown
    assert path in joined
    assert all(number in line for line in shown.splitlines() if "123.45 ms" in line for number in numbers)
    assert f" 1  {command}" in shown.splitlines()


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_libraries_keep_no_usage_data_unless_asked(monkeypatch, tmp_path, debug, before, after):
    for name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, before or "")  # what is set here is restored, whatever the command does
        if before is None:
            monkeypatch.delenv(name)
    CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing"), *debug])
    assert os.environ["ORT_DISABLE_TELEMETRY"] == os.environ["HF_HUB_DISABLE_TELEMETRY"] == after
