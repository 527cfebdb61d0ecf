"""The scripts of benchmarks/ as reproducers and maintainers run them: options, failures, and what a cell says."""

import argparse
import importlib
import json
import re
import shlex
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fuzz
from gatepress.checkpoint import read_run
from gatepress.cli.app import app
from gatepress.models import model_files

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("benchmarks/*.py") if "__main__" in path.read_text("utf-8"))
RESULTS = ROOT / "benchmarks/results"
KEY = ("encoder", "seed")
MODEL = ("--model", "tiny=DIR")

# Until 0.29 one query/key dimension a head was computed, of zeros alone, where all of a layer had closed: 12 of the
# 13,824 inner dimensions of MiniLM for each such layer. Encoder, task, arm, seed -> what was removed of the encoder.
UNIFORM = {
    ("minilm", "cola", "8x", 0): 0.8741,
    ("minilm", "stsb", "8x", 0): 0.8741,
    ("minilm", "stsb", "8x", 2): 0.8741,
    ("minilm", "stsb", "8x", 4): 0.8741,
    ("minilm", "sst2", "4x, heads as they are", 2): 0.7483,
    ("minilm", "sst2", "4x, heads as they are", 3): 0.7483,
    ("minilm", "sst2", "4x, heads as they are", 5): 0.7483,
    ("minilm", "sst2", "8x, heads as they are", 0): 0.8741,
    ("minilm", "sst2", "8x, heads as they are", 2): 0.8741,
    ("minilm", "sst2", "8x, heads as they are", 5): 0.8741,
}


@pytest.fixture
def script(monkeypatch):
    """Return name -> module of a script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def cells(script):
    return script("cells")


@pytest.fixture
def here(monkeypatch, script):
    """Run `gatepress` of the scripts in this process: one of its own takes seconds to start. Return the verbs."""
    verbs = []

    def gatepress(*words):
        verbs.append(words[0])
        done = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    for name in ("cells", "paper", "deployed", "main_job"):
        monkeypatch.setattr(script(name), "gatepress", gatepress)
    return verbs


# --- the command line -------------------------------------------------------------------------------


def printed() -> list[str]:
    """Return the commands that README and docstrings print, without what marks an option as one."""
    texts = re.findall(r"`(python (?:benchmarks|tests)/[^`]*)`", (ROOT / "benchmarks/README.md").read_text("utf-8"))
    for name in SCRIPTS:
        source = (ROOT / f"benchmarks/{name}.py").read_text("utf-8")
        found = re.findall(r"^    (python .*(?:\n {8,}.*)*)", source.partition('"""\n\n')[0], re.MULTILINE)
        texts += [" ".join(re.sub(r"  +#.*", "", text).split()) for text in found]
    return list(dict.fromkeys(re.sub(r"[\[\]]|\.\.\.", "", text) for text in texts))


@pytest.mark.parametrize("command", printed())
def test_every_printed_command_can_be_parsed(command, script, monkeypatch):
    _, path, *words = shlex.split(command)
    assert (ROOT / path).exists()
    if path == "tests/fuzz.py":  # the one that would go on
        parse_args = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda made: sys.exit(f"{parse_args(made, words)}"))
        with pytest.raises(SystemExit, match="Namespace"):
            fuzz.main()
        return
    script(Path(path).stem).parse(words)


def test_every_script_prints_a_command_and_is_in_the_readme():
    told = " ".join(printed())
    assert [name for name in SCRIPTS if f"benchmarks/{name}.py" not in told] == []


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("paper", ["accuracy", *MODEL], "--work is required"),
        ("paper", ["accuracy", "--work", "W"], "--model is required"),
        ("paper", ["figure3b", "--work", "W"], "--model is required"),
        ("paper", ["figure3b", "--work", "W", *MODEL, "--model", "other=DIR"], "figure3b takes one"),
        ("paper", ["accuracy", "--work", "W", *MODEL, "--arm", "3x"], ", 4x, heads as they are, "),
        ("paper", ["accuracy", "--work", "W", *MODEL, "--task", "sst3"], "(choose from cola, stsb, mrpc, rte, sst2, "),
        ("paper", ["accuracy", "--work", "W", *MODEL, "--device", "gpu"], "(choose from auto, cpu, cuda)"),
        ("paper", ["figure3a", "--work", "W", "--task", "cola"], "unrecognized arguments: --task"),
        ("main_job", MODEL, "--work is required"),
        ("main_job", ["--work", "W"], "--model is required"),
        ("main_job", ["--work", "W", *MODEL, "--task", "mnli"], "(choose from sst2, cola, stsb, rte)"),
        ("deployed", ["--work", "W", *MODEL, "--task", "cola", "--task", "rte"], "--task is given twice"),
        ("deployed", ["--work", "W", *MODEL, "--seed", "1", "--seed", "0"], "--seed is given twice"),
        ("training_time", ["--work", "W", *MODEL, "--seed", "1"], "unrecognized arguments: --seed"),
        ("pruning_baselines", ["--work", "W", *MODEL, "--device", "cuda"], "unrecognized arguments: --device"),
        ("pruning_baselines", ["--work", "W", *MODEL], "--data-dir is required"),
        ("speed", ["trained"], "--run"),
        ("speed", ["base", "--run", "R"], "unrecognized arguments: --run"),
        ("steps", [], "--results is required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list | tuple) else None,
)
def test_what_is_missing_unknown_or_without_use_is_refused(name, words, told, script, capsys):
    with pytest.raises(SystemExit) as end:
        script(name).parse(words)
    assert end.value.code == 2
    assert told in capsys.readouterr().err.replace("'", "")  # Python 3.13 quotes no choices


def test_results_are_the_reproducers_own_unless_they_say_where(script):
    parse = script("paper").parse
    assert parse(["table4", *MODEL, "--work", "W"]).results == Path("W/results")
    assert parse(["table4", *MODEL, "--work", "W", "--results", "R"]).results == Path("R")
    assert parse(["table4", "--render"]).results == RESULTS
    assert parse(["table4", "--render", "--results", "R"]).results == Path("R")


def test_accuracy_runs_four_arms_unless_others_are_asked(script, monkeypatch):
    paper, asked = script("paper"), []
    monkeypatch.setattr(paper, "sweep", lambda _, keys, *__, **___: asked.append([arm for _, _, arm, _ in keys]))
    words = ["paper.py", "accuracy", *MODEL, "--work", "W", "--task", "rte"]
    for more in ([], ["--arm", "4x, penalty"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        paper.main()
    assert asked == [["full", "2x", "4x", "8x"], ["4x, penalty"]]


def test_the_main_job_tells_sparsities_and_seeds_apart(script, tmp_path, monkeypatch):
    main_job, runs = script("main_job"), {}
    committed = json.loads((RESULTS / "main_job.json").read_text())
    assert len({tuple(one[name] for name in main_job.KEY) for one in committed}) == len(committed)
    scored = {"metric_value": 0.5, "total_params": 1, "max_abs_logit_diff": 0.0}
    monkeypatch.setattr(main_job, "gatepress", lambda *_: scored)
    monkeypatch.setattr(main_job, "train", lambda run, _, __, words, ___: runs.update({run: words}) or scored)
    options = main_job.parse([*MODEL, "--work", str(tmp_path)])
    for key in (("tiny", "rte", 0.5, 0), ("tiny", "rte", 0.5, 1), ("tiny", "rte", 0.25, 0)):
        main_job.cell(key, options)
    asked = [(words[words.index("--sparsity") + 1], words[words.index("--seed") + 1]) for words in runs.values()]
    assert asked == [(0.5, 0), (0.5, 1), (0.25, 0)]  # a run directory for each

    table = main_job.render(committed)
    assert "one seed" in table
    assert ", seed 0 |" not in table
    table = main_job.render([*committed, {**committed[0], "seed": 1}])
    assert "seeds 0, 1" in table
    assert f"| {committed[0]['task']}, seed 1 |" in table


# --- a sweep ----------------------------------------------------------------------------------------


def test_a_cell_that_fails_does_not_stop_the_others(cells, tmp_path, capsys):
    def cell(key):
        if key[1] == 1:
            raise SystemExit("no space is left")
        return {"value": key[1]}

    path, keys = tmp_path / "new/some.json", [("e", seed) for seed in range(3)]
    cells.sweep(path, keys[:1], KEY, cell, str)
    assert "0 of 1 cells are there already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cells.sweep(path, keys, KEY, cell, str)
    assert end.value.code == "1 of 3 cells failed:\ne 1: failed: no space is left"  # printed, and exit code 1
    told = capsys.readouterr().err
    assert "1 of 3 cells are there already" in told
    assert "e 1: failed: no space is left" in told
    assert [one["value"] for one in json.loads(path.read_text())] == [0, 2]
    assert path.with_suffix(".md").read_text() == str(json.loads(path.read_text()))


def test_a_cell_that_is_there_is_run_again_only_when_asked(cells, tmp_path):
    path, keys = tmp_path / "some.json", [("e", 0), ("e", 1)]
    cells.sweep(path, keys, KEY, lambda _: {"value": "old"}, str)
    cells.sweep(path, keys, KEY, lambda _: {"value": "new"}, str)
    assert [one["value"] for one in json.loads(path.read_text())] == ["old", "old"]
    cells.sweep(path, keys[:1], KEY, lambda _: {"value": "new"}, str, anew=True)
    assert {one["seed"]: one["value"] for one in json.loads(path.read_text())} == {0: "new", 1: "old"}


def test_cells_of_processes_that_write_at_once_are_all_kept(cells, tmp_path):
    path = tmp_path / "some.json"

    def write(encoder):
        for seed in range(10):
            cells.put(path, KEY, {"encoder": encoder, "seed": seed}, str)

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(json.loads(path.read_text())) == 20


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("kill -9 $$", f"was killed by {signal.Signals.SIGKILL.name} before it printed a result"),
        ("exit 3", "ended with exit code 3 before it printed a result"),
        ('echo \'{"error": "no such task"}\'; exit 2', "no such task"),
    ],
)
def test_a_command_that_ends_without_a_result_says_how(lines, told, cells, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    monkeypatch.setattr(cells.sys, "executable", str(program))
    with pytest.raises(SystemExit, match=rf"gatepress train --seed 0 --json: .*{told}"):
        cells.gatepress("train", "--seed", 0)


def test_what_is_timed_is_trained_as_the_accuracy_table_trains_it(script, tmp_path, monkeypatch):
    paper, timed = script("paper"), script("training_time")

    def recipe(words):
        asked = dict(pairwise(words))
        told = [asked.get(option) for option in ("--method", "--sparsity", "--epochs", "--precision")]
        return [*told, "--distill" in words]

    monkeypatch.setattr(paper, "train", lambda *call: {"command": "", "recipe": recipe(call[3])})
    options = paper.parse(["accuracy", *MODEL, "--work", str(tmp_path)])
    arms = ("full", "2x", "4x", "8x")
    keys = [("tiny", task, arm, 0) for task in timed.TASKS for arm in arms]
    trained = [paper.trained("accuracy", key, options.models, options)[1]["recipe"] for key in keys]

    ran = []
    told = {"train_seconds": 1.0, "device": "cpu"}
    monkeypatch.setattr(timed, "gatepress", lambda *words: ran.append(recipe(words)) or told)
    asked = timed.parse([*MODEL, "--work", str(tmp_path), "--repetitions", "1"])
    for task in timed.TASKS:
        assert list(timed.measure(("tiny", task, "bf16"), asked)["seconds"]) == list(arms)
    assert ran == trained


def test_epochs_that_are_asked_are_those_that_are_told(script, tmp_path, monkeypatch):
    timed = script("training_time")
    monkeypatch.setattr(timed, "gatepress", lambda *_: {"train_seconds": 1.0, "device": "cpu"})
    asked = timed.parse([*MODEL, "--work", str(tmp_path), "--repetitions", "1", "--epochs", "2"])
    assert set(timed.measure(("tiny", "cola", "bf16"), asked)["epochs"].values()) == {2}


TRAINING = {  # script -> what it trains by `paper.trained`, asked as the script asks
    "deployed": ("deployed", "measure", ()),
    "shares": ("shares", "measure", (("tiny", "cola", "full", 0),)),
    "sizes": ("sizes", "measure", (("tiny", "cola", 0, "as cut", 0.3),)),
    "pruning_baselines": ("pruning_job", "load_job", ("tiny", "cola", 0)),
}


@pytest.mark.parametrize("name", TRAINING)
def test_every_script_that_trains_gets_as_far_as_the_training(name, script, tmp_path, monkeypatch):
    class Asked(Exception):  # noqa: N818 - no error
        pass

    def train(*call):
        raise Asked(call[3])

    module, function, key = TRAINING[name]
    monkeypatch.setattr(script("paper"), "train", train)
    options = script(name).parse(["--data-dir", "GLUE", *MODEL, "--work", str(tmp_path)])
    with pytest.raises(Asked, match="--task"):
        getattr(script(module), function)(*key, options)


def test_a_cell_of_other_settings_is_no_answer(cells, script, tmp_path):
    path, keys = tmp_path / "some.json", [("e", 0), ("e", 1)]

    def asked(*words):
        return script("paper").parse(["accuracy", *MODEL, "--work", str(tmp_path), *words])

    done = {"precision": "fp32", "epochs": 1}
    cells.sweep(path, keys[:1], KEY, lambda _: done, str, options=asked("--precision", "fp32", "--epochs", "1"))
    for words in (("--precision", "bf16"), ("--precision", "fp32", "--epochs", "2")):
        with pytest.raises(SystemExit, match=r"1 of 1 cells failed:\ne 0: failed: is in .*some.json with"):
            cells.sweep(path, keys[:1], KEY, lambda _: done, str, options=asked(*words))
    cells.sweep(path, keys, KEY, lambda _: done, str, options=asked("--precision", "fp32"))
    assert len(json.loads(path.read_text())) == 2


def test_kills_of_another_command_are_no_part_of_the_claim(script, tmp_path, monkeypatch):
    killing, ran = script("resume"), []
    monkeypatch.setattr(killing, "gatepress", lambda *words: ran.append(words[0]))
    monkeypatch.setattr(killing, "cell", lambda *_, words, **__: {**committed[0], "command": killing.command_of(words)})
    committed = json.loads((RESULTS / "resume.json").read_text())
    committed[0]["versions"] = killing.versions(*killing.MADE_WITH)
    del committed[0]["kill"]

    def begun(*words):
        monkeypatch.setattr(sys, "argv", ["resume.py", "--work", str(tmp_path), "--kills", "2", *words])
        killing.main()

    begun()
    begun()
    assert ran == ["train", "train"]
    with pytest.raises(SystemExit, match=r"resume.json: holds kills with another command \(gatepress train"):
        begun("--save-every", "5")
    assert ran == ["train", "train"]  # nor is anything trained for it


@pytest.mark.usefixtures("here")
def test_shares_of_other_epochs_or_weights_are_no_answer(script, options, tiny_classifier_dir):
    shares = script("shares")
    options.work.mkdir(exist_ok=True)
    key = ("tiny", "sst2", "full", 0)
    cell = shares.measure(key, options)
    assert (cell["epochs"], cell["base_sha256"]) == (1, model_files(Path(options.models["tiny"])))

    def asked() -> None:
        script("cells").sweep(options.work / "x.json", [key], shares.KEY, lambda _: cell, str, options=options)

    asked()
    options.epochs = 2
    with pytest.raises(SystemExit, match=r"with {'epochs': 1}"):
        asked()
    options.epochs, options.models = 1, {"tiny": str(tiny_classifier_dir("bert"))}
    with pytest.raises(SystemExit, match="with other weights"):
        asked()


def test_figure_2_reads_all_rows_at_the_paper_s_size_alone(script, tmp_path, monkeypatch):
    paper = script("paper")
    monkeypatch.setattr(paper, "train", lambda *call: {"command": " ".join(map(str, call[3]))})
    told = []
    for size in ("laptop", "paper"):
        options = paper.parse(["figure2", *MODEL, "--work", str(tmp_path), "--size", size])
        run, one = paper.trained("figure2", ("tiny", "sst2", "10%", 0), options.models, options)
        told.append(("--max-train-samples 10000" in one["command"], "10000" in run.name))
    assert told == [(True, True), (False, False)]


# --- tables -----------------------------------------------------------------------------------------


def test_what_a_size_began_with_stands_beside_it(script, tmp_path):
    baselines = script("pruning_baselines")
    committed = json.loads((RESULTS / "pruning_baselines.json").read_text())
    one = next(cell for cell in committed if cell["method"] == "magnitude")
    cells = [
        {**one, "seed": 0, "asked_kept": kept, "full_metric_value": full} for kept, full in ((0.5, 0.8), (0.25, 0.9))
    ]
    row = next(
        line for line in baselines.render(cells, tmp_path).splitlines() if line.startswith(f"| {one['encoder']}")
    )
    assert [f"{full} (1 seed)" in row for full in ("0.8000", "0.9000")] == [True, True]


def test_gates_are_compared_from_the_start_that_the_others_had(script, tmp_path):
    baselines = script("pruning_baselines")
    key = {"encoder": "tiny", "task": "stsb", "seed": 0}
    of_taylor = [{**key, "method": "taylor", "asked_kept": 0.25, "full_metric_value": 0.85}]
    cell = {**key, "arm": "4x", "metric_value": 0.8}

    def compared(**files):
        for name, one in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps([one]))
        return [one["metric_value"] for one in baselines.of_gates(of_taylor, tmp_path)]

    assert compared(paper_accuracy={**cell, "start_metric": 0.85}) == [0.8]
    assert compared(paper_accuracy=cell) == [0.8]  # of a release that did not say
    assert compared(paper_accuracy={**cell, "start_metric": 0.86}) == []
    assert compared(pruning_gates={**cell, "start_metric": 0.85, "metric_value": 0.79}) == [0.79]


def test_medians_are_compared_over_the_same_seeds(script):
    shares, sizes = script("shares"), script("sizes")
    told = {"accuracy": 0.5, "loss": 0.5, "larger_share": 0.5}
    about = {"encoder": "tiny", "task": "cola", "cpu": "a CPU", "threads": 1, "versions": {"gatepress": "0.1.0"}}
    cells = [
        {**about, "metric_name": "matthews", "arm": arm, "seed": seed, "larger_share": 0.5, "trained_by": "0.1.0"}
        | {way: {**told, "metric_value": 0.3 * (1 + seed)} for way in ("as_trained", "matched")}
        for arm, seed in (("full", 0), ("2x", 0), ("4x", 0), ("4x", 1))
    ]
    rows = {row.split(" | ")[3]: row for row in shares.render(cells).splitlines() if row.startswith("| tiny")}
    assert "100.0%" in rows["2x"]
    assert "%" not in rows["4x"].partition(" of ")[0]

    (way, *_), (size, other, *_) = sizes.WAYS, sizes.SIZES
    cells = [
        {**about, "way": way, "seed": seed, "sparsity": sparsity, "metric_value": 0.1 * (1 + seed)}
        | {"start_metric": 0.5, "run_metric": 0.5, "seconds": None}
        for seed, sparsity in ((0, size), (2, size), (1, other))
    ]
    assert "| 0.2000 [2] | 0.2000 [1] |" in sizes.render(cells)
    fitted = {**cells[0], "way": list(sizes.WAYS)[1], "metric_value": 0.4}
    rows = [row for row in sizes.render([*cells, fitted]).splitlines() if row.startswith("| tiny")]
    assert ["0.1000 [1]" in rows[0], "0.4000" in rows[1]] == [True, True]  # of seed 0 alone, which both have

    cells = [{**one, "start_metric": 0.5 + one["seed"] / 10} for one in cells[:2]]
    rows = [row.split(" | ") for row in sizes.render([*cells, {**fitted, "start_metric": 0.5}]).splitlines()]
    assert {row[3] for row in rows if row[0] == "| tiny"} == {"0.5000"}  # as what stands beside it


# --- what a cell says -------------------------------------------------------------------------------


@pytest.fixture
def options(script, tiny_model_dir, tiny_glue_dir, tmp_path):
    words = ["--data-dir", tiny_glue_dir, "--model", f"tiny={tiny_model_dir('bert')}", "--work", tmp_path]
    words += ["--epochs", 1, "--precision", "fp32", "--device", "cpu"]
    return script("paper").parse(["accuracy", *map(str, words)])


def test_a_cell_says_what_it_started_from_and_which_machine_trained_it(here, script, options, cells, monkeypatch):
    paper = script("paper")
    full, pressed = ("tiny", "sst2", "full", 0), ("tiny", "sst2", "2x", 0)
    run, told = paper.trained("accuracy", pressed, options.models, options)
    start, of_start = paper.trained("accuracy", full, options.models, options)
    assert here == ["train", "train"]
    assert told["start_sha256"] == read_run(run).base_sha256 == model_files(start)
    assert told["start_metric"] == of_start["metric_value"]
    assert told["base_sha256"] == of_start["base_sha256"] == model_files(Path(options.models["tiny"]))
    assert not {"start_sha256", "start_metric"} & of_start.keys()
    assert (told["device"], told["device_name"]) == ("cpu", told["cpu"])
    assert told["threads"] == 1

    # Collected elsewhere, it is still the one that was trained here.
    monkeypatch.setattr(cells, "machine", lambda _: pytest.fail("it asked for the machine that collects"))
    assert paper.trained("accuracy", pressed, options.models, options)[1] == told

    manifest = run / "gatepress_run.json"
    manifest.write_text(manifest.read_text().replace(next(iter(told["start_sha256"].values())), "0" * 64))
    with pytest.raises(SystemExit, match="was trained from other weights than"):
        paper.trained("accuracy", pressed, options.models, options)


def test_a_run_of_another_model_or_other_epochs_is_not_taken(here, script, options, tiny_classifier_dir):
    paper, full = script("paper"), ("tiny", "sst2", "full", 0)
    told = paper.trained("accuracy", full, options.models, options)[1]
    assert told["base_sha256"] == model_files(Path(options.models["tiny"]))
    with pytest.raises(SystemExit, match="was trained from other weights than"):
        paper.trained("accuracy", full, {"tiny": str(tiny_classifier_dir("bert"))}, options)
    options.epochs, options.size = None, "paper"  # whose epochs gatepress chooses
    with pytest.raises(SystemExit, match=r"was trained with {'--epochs': 1}"):
        paper.trained("accuracy", full, options.models, options)
    assert here == ["train"]


def test_what_is_deployed_is_built_anew_of_a_run_that_was_trained_anew(script, tmp_path, monkeypatch):
    deployed, built = script("deployed"), []

    def gatepress(verb, *words):
        built.append(verb)
        words[words.index("-o") + 1].mkdir(parents=True)

    monkeypatch.setattr(deployed, "gatepress", gatepress)
    run, place = tmp_path / "run", tmp_path / "built"
    run.mkdir()
    for content, verbs in (("old", ["prune", "export", "export"]), ("old", []), ("new", ["prune", "export", "export"])):
        (run / "gatepress_run.json").write_text(content)
        built.clear()
        assert [dtype for dtype, _ in deployed._export(run, place, "4x")] == ["float32", "int8"]
        assert built == verbs


def of_gpu(cell):
    return {**cell, "device": "cuda:0", "device_name": "A Card", "threads": 16, "peak_memory_bytes": 3e9}


def test_a_table_tells_memory_and_name_of_a_gpu_from_those_of_a_cpu(script):
    paper = script("paper")
    experiment = paper.EXPERIMENTS["table4"]
    cells = json.loads((RESULTS / "paper_table4.json").read_text())
    cpu, gpu = cells[0], of_gpu({**cells[0], "seed": 7})
    assert " GB CPU" not in paper.render(experiment, [cpu])
    assert "| 3.0 GB GPU |" in paper.render(experiment, [gpu])
    assert f"Trained in {cpu['precision']} on A Card; measured" in paper.render(experiment, [gpu])
    both = paper.render(experiment, [cpu, gpu])
    assert re.search(r"\| \d\.\d GB CPU, 3\.0 GB GPU \|", both)
    assert f"on {cpu['cores']} cores of {cpu['cpu']}" in both


def test_figure_3_is_drawn_from_what_is_there_and_runs_nothing(script, tmp_path, monkeypatch):
    paper = script("paper")
    monkeypatch.setattr(paper, "gatepress", lambda *_: pytest.fail("it ran a command"))
    monkeypatch.setattr(sys, "argv", ["paper.py", "figure3a", "--render", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="time it first"):
        paper.main()
    (tmp_path / "paper_figure3a.json").write_bytes((RESULTS / "matmul.json").read_bytes())
    paper.main()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png", ".svg"]


def test_figure_3b_trains_what_it_needs(script, tmp_path, monkeypatch):
    paper, ran = script("paper"), []
    monkeypatch.setattr(paper, "trained", lambda _, key, *__: (Path("/".join(map(str, key))), {}))
    monkeypatch.setattr(paper, "gatepress", lambda *words: ran.append(words))
    paper._passes(paper.parse(["figure3b", *MODEL, "--work", str(tmp_path), "--seed", "3", "--device", "cpu"]))
    arms = list(paper.EXPERIMENTS["figure2"].arms)
    assert [words[:2] for words in ran] == [("prune", Path(f"tiny/cola/{arm}/3")) for arm in arms]


# --- what is committed ------------------------------------------------------------------------------


def committed():
    """Yield the cells of all results that say what was asked and what was removed."""
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        for one in found if isinstance(found, list) else ():
            if "asked_sparsity" in one:
                yield path, one


def near(found, wanted):
    return abs(found - wanted) <= 0.005 * wanted


def test_every_cell_removed_what_was_asked():
    there = [(path, one) for path, one in committed() if "removed_of_budget" in one]
    assert len(there) > 100
    assert [one for _, one in there if not near(one["removed_of_budget"], one["asked_sparsity"])] == []


def test_structured_gates_keep_the_multiply_accumulates_that_were_asked():
    off = {}
    for path, one in committed():
        structured = one.get("granularity") in ("structured", "heads") and one["asked_sparsity"]
        if structured and not near(1 - one["encoder_macs_removed"], 1 - one["asked_sparsity"]):
            assert path.stem in ("paper_accuracy", "pruning_gates")
            off[one["encoder"], one["task"], one["arm"], one["seed"]] = round(one["encoder_macs_removed"], 4)
    assert off == UNIFORM
