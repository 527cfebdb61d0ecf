"""Many trainings as one picture: what is finished stays, what is measured is summed up rightly."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

import forms
from gatepress import apart, bench, sweep, training
from gatepress.bench import tradeoff
from gatepress.bench.record import Record, latencies
from gatepress.bench.summary import Cell, knee, seeds, summarize, unbeaten
from gatepress.checkpoint import read_run
from gatepress.config import Target, TrainSettings
from gatepress.costs import TARGETS
from gatepress.errors import ArtifactError, DataError, MissingExtraError, ModelError, OutputError, UsageError
from gatepress.files import lock, release
from gatepress.progress import NoProgress
from gatepress.report.build import report

DOCUMENT = Path(__file__).parents[1] / "docs/json-contract.md"
GRID = {"methods": ["gates+lora", "lora"], "sparsities": [0.0, 0.5], "seeds": 1}
# In torch: nothing is exported, which takes most of the time.
TIMES = {"target": "torch-cpu", "batch_sizes": [1, 2], "seq_lens": [8], "repetitions": 2, "threads": 1}
RUNS = ["gates+lora-s0-seed0", "gates+lora-s0.5-seed0", "lora-s0-seed0"]


@pytest.fixture
def settings(tiny_model_dir, tiny_task_files):
    data = replace(forms.data_settings(tiny_task_files), max_train_samples=32, max_validation_samples=24)
    return TrainSettings(
        data=data, model=str(tiny_model_dir("bert")), lora_rank=2, epochs=1, max_length=24, device="cpu"
    )


@pytest.fixture
def trained(monkeypatch):
    """The names of what is trained, here and not in processes of their own: those take seconds to start."""
    names = []

    def train(settings, output):
        names.append(output.name)
        return sweep.train_or_resume(settings, output)

    monkeypatch.setattr(sweep, "train_apart", train)
    return names


@pytest.fixture
def never(monkeypatch):
    monkeypatch.setattr(sweep, "train_apart", lambda *_: pytest.fail("it went on"))


def run(settings, output, **changes):
    return sweep.run(settings, output, **{**GRID, **TIMES, **changes})


def test_a_sweep_trains_times_and_sums_up(settings, trained, tmp_path):
    result = run(settings, tmp_path / "sweep", target="ort-cpu", sparsities=[0.5])
    assert trained == RUNS[1:]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        *("runs", "sweep.json", "sweep.md", "sweep.png", "sweep.svg")
    }
    written = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert {**written, "output_dir": str(tmp_path / "sweep")} == result
    assert [cell["status"] for cell in result["cells"]] == ["finished"] * 2
    assert [(row["method"], row["sparsity"]) for row in result["summary"]] == [
        ("lora", 0.0),
        ("gates+lora", 0.5),
    ]
    lora, half = result["summary"]
    assert lora["encoder_macs_removed"] == 0 < half["encoder_macs_removed"]
    assert {row["baseline"] for row in result["summary"]} == {"lora"}
    assert (lora["latency_batch_size"], lora["latency_seq_len"], lora["relative_time_factor"]) == (2, 8, 1.0)
    assert {record["name"] for record in result["latency"]} == {"lora", "gates+lora 0.5"}
    assert {record["runtime"] for record in result["latency"]} == {"onnxruntime"}
    assert len({record["macs"] for record in result["latency"] if record["batch_size"] == 1}) == 2
    assert re.findall(r"^\| (\S+ ?\S*) \|", (tmp_path / "sweep/sweep.md").read_text(), re.MULTILINE) == [
        *("method", "---", "lora", "gates+lora 0.5")
    ]


def test_a_sweep_may_grow_and_start_over_and_does_nothing_twice(settings, trained, tmp_path):
    result = run(settings, tmp_path / "sweep", plot=False)
    again = run(settings, tmp_path / "sweep", plot=False)
    assert trained == RUNS
    assert again == result  # the times of measuring too
    more = run(settings, tmp_path / "sweep", seeds=2, sparsities=[0.0, 0.3, 0.5], plot=False)
    assert len(trained) == 3 + 1 + 4
    assert len(more["latency"]) == 2 * 4
    assert [row["seeds"] for row in more["summary"]] == [2] * 4
    over = run(settings, tmp_path / "sweep", methods=["lora"], force=True, plot=False)
    assert trained[-1] == "lora-s0-seed0"
    assert [path.name for path in (tmp_path / "sweep/runs").iterdir()] == ["lora-s0-seed0"]
    assert len(over["cells"]) == 1


def test_what_was_asked_before_stays_and_nothing_else_is_added(settings, trained, tmp_path):
    whole = run(settings, tmp_path / "sweep")
    assert (tmp_path / "sweep/sweep.svg").exists()
    trained.clear()
    added = run(settings, tmp_path / "sweep", methods=["full"], seeds=1, plot=False)
    assert trained == ["full-s0-seed0"]
    assert added["cells"][: len(RUNS)] == whole["cells"]
    assert added["cells"][len(RUNS) :][0]["method"] == "full"
    points = {"full", "lora", "gates+lora 0", "gates+lora 0.5"}
    assert {record["name"] for record in added["latency"]} == points  # all of them anew, by turns
    assert all(point in (tmp_path / "sweep/sweep.md").read_text() for point in points)
    assert not (tmp_path / "sweep/sweep.svg").exists()  # it showed other points
    less = run(settings, tmp_path / "sweep", methods=["lora"], plot=False)
    assert less["cells"] == added["cells"]
    assert trained == ["full-s0-seed0"]
    shutil.rmtree(tmp_path / "sweep/runs" / RUNS[1])  # a run that is gone, and that nobody asks for, is no point
    assert len(run(settings, tmp_path / "sweep", methods=["lora"], plot=False)["cells"]) == len(RUNS)
    assert trained == ["full-s0-seed0"]


@pytest.mark.parametrize("cell", [3, {}, {"status": "finished", "method": "lora", "sparsity": "much", "seed": 0}])
def test_cells_that_are_not_understood_are_refused(tmp_path, cell):
    with pytest.raises(ArtifactError, match="wrong kind"):
        sweep._finished_cells({"cells": [cell]}, tmp_path / "sweep.json")


class Stop(NoProgress):
    def advance(self, *_, **__):
        raise KeyboardInterrupt


def test_a_training_that_was_stopped_is_gone_on_with(settings, tmp_path):
    cell = tmp_path / RUNS[1]
    with pytest.raises(KeyboardInterrupt):
        training.train(replace(settings, sparsity=0.5, method="gates+lora", epochs=2), cell, progress=Stop())
    manifest = json.loads((cell / "gatepress_run.json").read_text())
    manifest["resume"]["train_seconds"] = 1000.0  # what only going on adds to
    (cell / "gatepress_run.json").write_text(json.dumps(manifest))
    report = sweep.train_or_resume(settings, cell)
    assert report["train_seconds"] >= 1000
    assert read_run(cell).status == "finished"


def test_a_run_of_another_method_may_be_what_is_swept(settings, trained, tmp_path):
    training.train(replace(settings, method="full", lora_rank=None), tmp_path / "full")
    pressed = replace(settings, model=str(tmp_path / "full"))
    result = run(pressed, tmp_path / "sweep", methods=["gates+lora"], sparsities=[0.5], plot=False)
    assert [cell["status"] for cell in result["cells"]] == ["finished"]
    assert trained == ["gates+lora-s0.5-seed0"]
    with pytest.raises(ModelError, match="160"):  # what its base takes at most
        run(pressed, tmp_path / "long", methods=["gates+lora"], seq_lens=[161], plot=False)


def test_what_is_interrupted_goes_on_where_it_was(settings, trained, tmp_path, monkeypatch):
    whole = sweep.train_apart

    def once(cell_settings, output):
        if trained:
            output.mkdir()  # what a kill leaves
            raise KeyboardInterrupt
        return whole(cell_settings, output)

    monkeypatch.setattr(sweep, "train_apart", once)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "sweep")
    assert [cell["status"] for cell in json.loads((tmp_path / "sweep/sweep.json").read_text())["cells"]] == [
        *("finished", "missing", "missing")
    ]
    monkeypatch.setattr(sweep, "train_apart", whole)
    result = run(settings, tmp_path / "sweep")
    assert trained == RUNS
    assert [cell["status"] for cell in result["cells"]] == ["finished"] * 3


def test_the_first_training_may_be_stopped_too(settings, tmp_path, monkeypatch):
    def stop(cell_settings, output):
        return training.train(cell_settings, output, progress=Stop())

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "train_apart", stop)
        with pytest.raises(KeyboardInterrupt):
            run(replace(settings, epochs=2), tmp_path / "sweep")
    assert read_run(tmp_path / "sweep/runs" / RUNS[0]).status == "interrupted"


@pytest.mark.parametrize("name", ["probe.safetensors", "tokenizer.json"])
def test_a_run_whose_other_files_were_damaged_is_trained_again(settings, trained, tmp_path, name):
    whole = run(settings, tmp_path / "sweep", plot=False)
    trained.clear()
    with (tmp_path / "sweep/runs" / RUNS[1] / name).open("ab") as file:
        file.write(b" ")
    again = run(settings, tmp_path / "sweep", plot=False, threads=1)
    assert trained == RUNS[1:2]
    assert [cell["metric_value"] for cell in again["cells"]] == [cell["metric_value"] for cell in whole["cells"]]


def test_a_cell_that_is_half_trained_is_not_finished(settings, trained, tmp_path):
    half = replace(settings, epochs=2)
    run(half, tmp_path / "sweep", plot=False)
    shutil.rmtree(tmp_path / "sweep/runs" / RUNS[0])
    cell = replace(half, method="gates+lora", sparsity=0.0)
    with pytest.raises(KeyboardInterrupt):
        training.train(cell, tmp_path / "sweep/runs" / RUNS[0], progress=Stop())
    run(half, tmp_path / "sweep", plot=False)
    assert trained == [*RUNS, RUNS[0]]
    assert read_run(tmp_path / "sweep/runs" / RUNS[0]).status == "finished"


def test_seeds_count_up_from_the_first_and_that_is_timed(settings, trained, tmp_path, monkeypatch):
    built = []
    build = sweep._build

    def remember(run_dir, cell, *others):
        built.append((cell.seed, torch.get_num_threads()))  # layouts are chosen for as many as are timed
        return build(run_dir, cell, *others)

    monkeypatch.setattr(sweep, "_build", remember)
    run(replace(settings, seed=5), tmp_path / "sweep", methods=["lora"], seeds=2, threads=2, plot=False)
    assert trained == ["lora-s0-seed5", "lora-s0-seed6"]
    assert built == [(5, 2)]
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("never")
def test_starting_over_never_removes_what_is_swept(settings, tmp_path):
    (tmp_path / "sweep/runs/full").mkdir(parents=True)
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({**sweep.SWEEP_FORMAT, "settings": {}}))
    with pytest.raises(OutputError, match=r"holds .*full, which is read"):
        run(replace(settings, model=str(tmp_path / "sweep/runs/full")), tmp_path / "sweep", force=True)
    assert (tmp_path / "sweep/runs/full").is_dir()


@pytest.mark.parametrize("name", ["notes.txt", "mine/notes.txt", f"{RUNS[0]}/notes.txt"])
def test_starting_over_leaves_alone_what_the_sweep_did_not_write(settings, trained, tmp_path, name):
    run(settings, tmp_path / "sweep", methods=["lora"], plot=False)
    runs = tmp_path / "sweep/runs"
    (runs / name).parent.mkdir(exist_ok=True)
    (runs / name).write_text("a year of work")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    with pytest.raises(OutputError, match=r"holds (notes\.txt|mine), which gatepress did not write"):
        run(settings, tmp_path / "sweep", methods=["lora"], force=True)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    (runs / name).unlink()
    if not any((runs / name).parent.iterdir()):
        (runs / name).parent.rmdir()
    run(settings, tmp_path / "sweep", methods=["lora"], force=True, plot=False)
    assert trained == ["lora-s0-seed0"] * 2


@pytest.mark.usefixtures("trained")
def test_starting_over_begins_once_there_are_rows(settings, tmp_path):
    run(settings, tmp_path / "sweep", methods=["lora"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    wrong = replace(settings, data=replace(settings.data, label_column="lable"))
    with pytest.raises(DataError, match="no column 'lable'"):
        run(wrong, tmp_path / "sweep", methods=["lora"], force=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_starting_over_leaves_no_table_of_what_is_gone(settings, trained, tmp_path, monkeypatch):
    run(settings, tmp_path / "sweep", methods=["lora"])
    monkeypatch.setattr(sweep, "train_apart", lambda *_: (_ for _ in ()).throw(ModelError("it breaks")))
    with pytest.raises(ModelError, match="it breaks"):
        run(settings, tmp_path / "sweep", methods=["lora"], force=True)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"sweep.json"}
    assert trained == ["lora-s0-seed0"]


def test_what_is_trained_may_be_timed_otherwise(settings, trained, tmp_path):
    first = run(settings, tmp_path / "sweep", plot=False)
    again = run(settings, tmp_path / "sweep", plot=False, batch_sizes=[3], seq_lens=[4])
    assert trained == RUNS
    assert [(one["batch_size"], one["seq_len"]) for one in again["latency"]] == [(3, 4)] * len(RUNS)
    assert [cell["metric_value"] for cell in again["cells"]] == [cell["metric_value"] for cell in first["cells"]]
    assert run(settings, tmp_path / "sweep", plot=False, batch_sizes=[3], seq_lens=[4])["latency"] == again["latency"]


@pytest.mark.parametrize("damaged", [None, 3, [None], [{"format_version": 99}]])
def test_measurements_that_cannot_be_read_are_made_anew(settings, trained, tmp_path, damaged):
    first = run(settings, tmp_path / "sweep", plot=False)
    path = tmp_path / "sweep" / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latency": damaged}))
    again = run(settings, tmp_path / "sweep", plot=False)
    assert trained == RUNS
    assert [one["name"] for one in again["latency"]] == [one["name"] for one in first["latency"]]


def test_an_error_of_all_is_raised_and_leaves_nothing(settings, tmp_path, monkeypatch):
    def fail(*_):
        raise ModelError("no such thing")

    monkeypatch.setattr(sweep, "train_apart", fail)
    with pytest.raises(ModelError, match="no such thing"):
        run(settings, tmp_path / "sweep")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_one_is_told_and_the_others_go_on(settings, trained, tmp_path, monkeypatch):
    whole = sweep.train_apart

    def fail(cell_settings, output):
        if cell_settings.sparsity:
            raise ModelError("the loss is nan")
        return whole(cell_settings, output)

    monkeypatch.setattr(sweep, "train_apart", fail)
    result = run(settings, tmp_path / "sweep", plot=False)
    assert [cell["status"] for cell in result["cells"]] == ["finished", "failed", "finished"]
    assert result["cells"][1]["error"] == "the loss is nan"
    assert len(result["summary"]) == 2
    failed = result["cells"][1]
    told = f"without {failed['method']} {failed['sparsity']:g} seed {failed['seed']} (failed)"
    assert told in (tmp_path / "sweep/sweep.md").read_text()
    report([tmp_path / "sweep"], tmp_path / "page.html")
    assert told.replace("without", "Not there:") in (tmp_path / "page.html").read_text()
    monkeypatch.setattr(sweep, "train_apart", whole)
    assert len(run(settings, tmp_path / "sweep")["summary"]) == 3
    assert trained[-1] == RUNS[1]
    assert "without" not in (tmp_path / "sweep/sweep.md").read_text()


def test_a_picture_says_of_how_many_seeds_its_points_are():
    def told(*counts):
        return seeds([{"seeds": count} for count in counts])

    assert [told(1, 1), told(3, 1, 2), told(5)] == ["1 seed", "1 to 3 seeds", "5 seeds"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 16}, r"--max-length 24, asked is 16"),
        ({"seed": 3}, r"--seed 0, asked is 3"),
        ({"revision": "v1"}, r"was made without --revision, asked is v1"),
    ],
)
def test_other_settings_are_refused(settings, trained, tmp_path, changes, message):
    grid = {"methods": ["lora"], "plot": False}
    run(settings, tmp_path / "sweep", **grid)
    before = (tmp_path / "sweep/sweep.json").read_bytes()
    train = {key: value for key, value in changes.items() if hasattr(settings, key)}
    others = {key: value for key, value in changes.items() if key not in train}
    with pytest.raises(UsageError, match=message):
        run(replace(settings, **train), tmp_path / "sweep", **grid, **others)
    assert trained == ["lora-s0-seed0"]
    assert (tmp_path / "sweep/sweep.json").read_bytes() == before


def test_the_metric_that_a_sweep_chose_may_be_named(settings, trained, tmp_path):
    first = run(settings, tmp_path / "sweep", methods=["lora"], plot=False)
    named = replace(settings, data=replace(settings.data, metric="accuracy"))
    assert run(named, tmp_path / "sweep", methods=["lora"], plot=False) == first
    run(named, tmp_path / "sweep", methods=["lora"], seeds=2, plot=False)
    assert len(run(settings, tmp_path / "sweep", methods=["lora"], seeds=2, plot=False)["cells"]) == 2
    assert trained == ["lora-s0-seed0", "lora-s0-seed1"]
    other = replace(settings, data=replace(settings.data, metric="f1"))
    with pytest.raises(UsageError, match="was made without --metric, asked is f1"):
        run(other, tmp_path / "sweep", methods=["lora"], plot=False)


def test_a_run_that_lost_its_manifest_is_told_what_to_remove(settings, tmp_path):
    cell = tmp_path / "runs" / "lora-s0-seed0"
    cell.mkdir(parents=True)
    (cell / "gates-00000002.safetensors").touch()
    with pytest.raises(OutputError, match=rf"has no gatepress_run.json.*; remove {cell}, and run the same command"):
        sweep.train_or_resume(settings, cell)
    assert list(cell.iterdir())


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_no_place_for_a_sweep(settings, tmp_path, force):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match="is a file, expected a directory"):
        run(settings, tmp_path / "file", force=force)
    assert (tmp_path / "file").read_text() == "precious"


def test_runs_that_were_not_matched_are_not_added_to_where_matching_is_the_default(settings, trained, tmp_path):
    own = replace(settings, data=replace(settings.data, metric="matthews"))
    grid = {"methods": ["lora"], "plot": False}
    run(own, tmp_path / "sweep", **grid)
    assert run(own, tmp_path / "sweep", **grid)["cells"][0]["status"] == "finished"
    for path in (tmp_path / "sweep" / "runs" / trained[0] / "gatepress_run.json", tmp_path / "sweep/sweep.json"):
        written = json.loads(path.read_text())
        of_training = written["settings"].get("train", written["settings"])
        del of_training["match_shares"]  # a release of before could not
        path.write_text(json.dumps(written))
    with pytest.raises(UsageError, match=r"--match-shares False, asked is True"):
        run(own, tmp_path / "sweep", **grid, seeds=2)
    assert trained == ["lora-s0-seed0"]
    cells = run(replace(own, match_shares=False), tmp_path / "sweep", **grid, seeds=2)["cells"]  # as the message says
    assert [cell["status"] for cell in cells] == ["finished", "finished"]
    assert trained == ["lora-s0-seed0", "lora-s0-seed1"]


@pytest.mark.parametrize("what", ["rows", "weights"])
def test_figures_of_other_rows_or_weights_are_not_added(settings, trained, tmp_path, what):
    data, model = settings.data, shutil.copytree(settings.model, tmp_path / "model")
    rows = shutil.copyfile(data.validation_file, tmp_path / "rows.csv")
    own = replace(settings, model=str(model), data=replace(data, validation_file=str(rows)))
    grid = {"methods": ["lora"], "plot": False}
    run(own, tmp_path / "sweep", **grid)
    if what == "rows":
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-80]))
    else:
        weights = load_file(model / "model.safetensors")
        save_file({key: value * 1.01 for key, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"lora-s0-seed0: the {what}.* have changed since the run began"):
        run(own, tmp_path / "sweep", **{**grid, "seeds": 2})
    if what == "rows":
        rows.rename(tmp_path / "gone.csv")
        run(own, tmp_path / "sweep", **grid)  # nothing is added: what is there is shown without its rows
        (tmp_path / "gone.csv").rename(rows)
    assert trained == ["lora-s0-seed0"]
    run(own, tmp_path / "sweep", **grid, force=True)


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("text", [None, "{}", '{"format": "gatepress-run", "version": 1}'])
def test_a_foreign_directory_is_not_touched(settings, tmp_path, text, force):
    (tmp_path / "mine").write_text("precious")
    if text:
        (tmp_path / "sweep.json").write_text(text)
    before = sorted(tmp_path.iterdir())
    for metric in (None, "accuracy"):
        asked = replace(settings, data=replace(settings.data, metric=metric))
        with pytest.raises(OutputError, match="exists and holds no sweep"):
            run(asked, tmp_path, force=force)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("changes", "raised"),
    [
        ({"methods": ["magic"]}, UsageError("--method is 'magic'")),
        ({"methods": []}, UsageError("--method is empty")),
        ({"sparsities": [0.5, 1.0]}, UsageError("--sparsity is 1.0")),
        ({"sparsities": [0.5, 0.50000001]}, UsageError("fractions too near to each other")),
        ({"seeds": 0}, UsageError("--seeds is 0")),
        ({"batch_sizes": [0]}, UsageError("--bench-batch-size is 0")),
        ({"repetitions": 0}, UsageError("--repetitions is 0")),
        ({"seq_lens": [5000]}, ModelError("takes at most 160 tokens")),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_trained(settings, tmp_path, changes, raised):
    with pytest.raises(type(raised), match=str(raised)):
        run(settings, tmp_path / "sweep", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("never")
def test_a_figure_that_is_asked_for_needs_matplotlib(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "gatepress.bench.figures", raising=False)
    monkeypatch.delattr(bench, "figures", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'gatepress\[plot\]'"):
        run(settings, tmp_path / "sweep", plot=True)


def test_options_reach_the_methods_that_have_a_use_for_them(settings):
    settings = replace(settings, distill=True, open_epochs=1, lora_matrices=("o",))
    wanted = sweep._cells(settings, ["gates+lora", "lora", "full", "gates"], [0.5], 1)
    assert [(one.distill, one.open_epochs, one.lora_rank, one.lora_matrices) for one in wanted.values()] == [
        (True, 1, 2, ("o",)),
        (False, None, 2, None),
        (False, None, None, None),
        (True, 1, None, None),
    ]


# --- processes ------------------------------------------------------------------------------------


def test_a_training_apart_is_the_training_here_and_its_errors_come_over(settings, tmp_path):
    report = sweep.train_apart(settings, tmp_path / "there")
    here = training.train(settings, tmp_path / "here")
    assert report["metric_value"] == here["metric_value"]
    assert read_run(tmp_path / "there").tensors == read_run(tmp_path / "here").tensors


def test_a_process_that_dies_is_an_error_with_a_remedy(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "_answer", print)
    with pytest.raises(ModelError, match=r"ended without a word \(exit code 0; .* lower --batch-size"):
        sweep.train_apart(settings, tmp_path / "run")


@pytest.mark.parametrize("started", [True, False])
def test_an_interrupt_while_a_training_is_started_leaves_none_behind(settings, tmp_path, monkeypatch, started):
    """A signal that was held back meanwhile arrives as soon as the process is there."""

    @contextlib.contextmanager
    def interrupted():
        if started:
            yield
        raise KeyboardInterrupt

    monkeypatch.setattr(apart, "_deaf_to_interrupts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.train_apart(replace(settings, epochs=5000), tmp_path / "run")
    assert multiprocessing.active_children() == []


@pytest.fixture
def endless(settings, tmp_path):
    """A sweep in a process of its own whose first training has begun and never ends."""
    line = [sys.executable, "-m", "gatepress", "sweep", "--model", settings.model, "--epochs", "5000", "-o", "sweep"]
    line += ["--train-file", settings.data.train_file, "--validation-file", settings.data.validation_file, "--json"]
    # A shell starts what runs in its background with this signal ignored, and what tests start would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("sweep/runs/*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_ctrl_c_ends_both_processes_and_keeps_the_checkpoint(endless, tmp_path):
    until = time.monotonic() + 120
    while not list(tmp_path.glob("sweep/runs/*/gatepress_run.json")) and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(endless.pid, signal.SIGINT)
    out, err = endless.communicate(timeout=120)  # the end of what all processes write to: none is left
    assert endless.returncode == 130, err
    assert json.loads(out)["error"]["type"] == "Interrupted"
    assert b"Traceback" not in err
    assert b"the same command goes on from there" in err
    assert [path.name for path in (tmp_path / "sweep/runs").iterdir()] == ["gates+lora-s0-seed0"]
    assert read_run(tmp_path / "sweep/runs/gates+lora-s0-seed0").status in ("interrupted", "training")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_training_ends_with_the_sweep_that_was_killed(endless, sent, code):
    os.kill(endless.pid, sent)
    endless.communicate(timeout=120)  # returns when no process is left that could write
    assert endless.returncode == code


# --- figures of the summary -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        ([1, 2, 3, 4], [0.5, 0.88, 0.9, 0.91], 1),
        ([4, 3, 2, 1], [0.91, 0.9, 0.88, 0.5], 2),  # any order
        ([0, 0.3, 0.5, 0.7], [0.9, 0.89, 0.87, 0.6], 2),  # falling, over what is removed
        ([1, 2, 3], [1, 2, 3], None),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], None),
        ([1, 2, 3], [1, 0, 3], None),  # all below the chord
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
        ([1, 2, 3], [2, 2, 2], None),
    ],
)
def test_the_knee_is_farthest_above_the_chord(x, y, place):
    assert knee(x, y) == place


def test_the_summary_is_of_medians_over_seeds():
    reports = {
        Cell("gates", sparsity, seed): {
            "task": "t",
            "metric_name": "accuracy",
            "metric_value": metric,
            "encoder_macs_removed": sparsity,
            "train_seconds": 10.0 * seed,
            "trainable_params": {"total": 7},
        }
        for sparsity, metrics in {0.0: (0.9, 0.8, 0.85), 0.5: (0.7, 0.84, 0.83), 0.8: (0.1, 0.2, 0.3)}.items()
        for seed, metric in enumerate(metrics)
    }
    rows = summarize(reports, [])
    assert [row["metric_median"] for row in rows] == [0.85, 0.83, 0.2]
    assert [(row["metric_min"], row["metric_max"]) for row in rows] == [(0.8, 0.9), (0.7, 0.84), (0.1, 0.3)]
    assert [row["seeds"] for row in rows] == [3, 3, 3]
    assert [row["train_seconds"] for row in rows] == [10.0] * 3
    assert [row["trainable_total"] for row in rows] == [7] * 3
    assert [row["knee"] for row in rows] == [False, True, False]  # over what is removed: nothing is timed
    assert rows[0]["latency_ms_median"] is rows[0]["peak_memory_bytes"] is None


def made_up(times):
    names = [("full", 0.0), ("lora", 0.0), ("gates", 0.0), ("gates", 0.5), ("gates", 0.8)]
    row = {"task": "t", "metric_name": "accuracy", "seeds": 3, "latency_batch_size": 8, "latency_seq_len": 128}
    rows = [
        {**row, "method": method, "sparsity": sparsity, "latency_ms_median": ms, "knee": sparsity == 0.5}
        | {"metric_median": 0.9 - sparsity / 5, "metric_min": 0.6, "metric_max": 0.95}
        for (method, sparsity), ms in zip(names, times, strict=True)
    ]
    record = Record(
        what="endtoend",
        name="full",
        kind="onnx",
        runtime="onnxruntime",
        device="cpu",
        device_name="a processor",
        threads=2,
        dtype="float32",
        batch_size=8,
        seq_len=128,
        warmup=3,
        **latencies([1.0] * 20),
    )
    lost = {"method": "gates", "sparsity": 0.9, "seed": 1, "status": "failed"}
    return {"summary": rows, "latency": [record.to_json()], "cells": [lost]}


@pytest.mark.parametrize("times", [(10, 10, 10, 8, 6), (40, 40, 40, 9, 6)])
def test_the_figure_names_methods_sparsities_and_conditions(times):
    drawn = tradeoff.draw(made_up(times), "svg").decode()
    for text in (
        "gates",
        "lora",
        "full",
        "0.5",
        "0.8",
        "accuracy on t",
        "8 x 128 tokens (ms)",
        "a processor, 2 threads",
        "gates 0.9 seed 1 (failed)",
    ):
        assert text in drawn
    assert "median of 3 seeds" in drawn
    assert tradeoff.draw(made_up(times), "svg").decode() == drawn
    assert tradeoff.draw(made_up(times), "png").startswith(b"\x89PNG")


def test_points_at_one_place_share_a_label():
    axes = Figure().subplots()
    rows = [{**row, "latency_ms_median": 9.0, "metric_median": 0.8} for row in made_up([10] * 5)["summary"]]
    tradeoff._method(axes, [row for row in rows if row["method"] == "gates"], "k", "o")
    assert [text.get_text() for text in axes.texts] == ["0, 0.5, 0.8"]
    assert len(axes.lines) - len(axes.containers[0].lines[1]) == 2  # the curve, and one ring around the knee


# --- command line ---------------------------------------------------------------------------------


def test_the_command_prints_the_documented_object(settings, trained, tmp_path, capsys, monkeypatch):
    from gatepress.cli.app import app

    monkeypatch.chdir(tmp_path)
    data = settings.data
    line = ["sweep", "--train-file", data.train_file, "--validation-file", data.validation_file, "--json"]
    line += ["--model", settings.model, "--epochs", "1", "--max-train-samples", "32", "--device", "cpu"]
    line += [
        "--method",
        "lora,gates",
        "--sparsity",
        "0,0.4,0.6",
        "--bench-seq-len",
        "8",
        "--for",
        "torch-cpu",
        "-o",
        "my sweep",
    ]
    with pytest.raises(SystemExit) as ended:
        app(line)
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    result = json.loads(out)
    section = DOCUMENT.read_text(encoding="utf-8").split("## `gatepress sweep`")[1].split("\n## ")[0]
    for key in ("summary", "cells"):
        paragraph = section[section.index(f"In each object of `{key}`") :].split("\n\n")[0]
        fields = set(re.findall(r"`(\w+)`", paragraph)) - {key}
        assert fields == set(result[key][0]) | ({"error"} if key == "cells" else set())
    assert trained == ["lora-s0-seed0", "gates-s0-seed0", "gates-s0.4-seed0", "gates-s0.6-seed0"]
    with pytest.raises(SystemExit) as ended:
        app([one for one in line if one != "--json"])
    assert ended.value.code == 0
    shown, err = capsys.readouterr()
    assert "next: look at 'my sweep/sweep.md', then gatepress prune 'my sweep/runs'/NAME" in " ".join(err.split())
    assert "gates" in shown
    assert ("knee" in shown) == any(row["knee"] for row in result["summary"])


def test_the_knee_is_looked_for_over_the_latency_of_the_largest_batch() -> None:
    """Not over what is removed, which says little of time, nor over a batch that a server does not see."""
    metrics = {0.0: 0.90, 0.5: 0.89, 0.8: 0.88, 0.9: 0.5}
    cells = {Cell("gates", sparsity, 0): metric for sparsity, metric in metrics.items()}
    reports = {cell: {"metric_value": metric, "encoder_macs_removed": cell.sparsity} for cell, metric in cells.items()}
    times = {0.0: 100.0, 0.5: 20.0, 0.8: 19.0, 0.9: 10.0}
    facts = {"relative_time_factor": 1.0, "baseline": "gates 0"}
    records: list[Any] = [
        SimpleNamespace(name=cell.point, batch_size=rows, seq_len=8, latency_ms_median=ms, **facts)
        for cell in cells
        for rows, ms in ((1, 1.0), (8, times[cell.sparsity]))
    ]
    rows = summarize(reports, records)
    assert [row["latency_ms_median"] for row in rows] == list(times.values())
    assert {row["latency_batch_size"] for row in rows} == {8}
    place = knee([*times.values()], [*metrics.values()])
    assert [index for index, row in enumerate(rows) if row["knee"]] == [place]
    assert place != knee([*metrics], [*metrics.values()])


@pytest.mark.parametrize("target", TARGETS)
def test_a_sweep_builds_for_the_runtime_that_it_times(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(sweep, "prune", lambda *_, **options: asked.append(options.get("target")))
    monkeypatch.setattr(sweep, "export", lambda *_, **options: asked.append(options["quantize"]))
    sweep._build(tmp_path / "run", Cell("gates", 0.5, 0), tmp_path, target, NoProgress())
    assert asked == [target, *{"ort-cpu": [None], "ort-int8": ["int8"]}.get(target, [])]


@pytest.mark.parametrize("held", ["", "runs/gates+lora-s0-seed0"])
def test_what_another_process_trains_is_not_swept_into(settings, trained, tmp_path, held):
    run(settings, tmp_path / "sweep")
    before = (tmp_path / "sweep" / held / "gatepress_run.json").stat() if held else None
    claim = lock(tmp_path / "sweep" / held)
    with pytest.raises(OutputError, match="another gatepress is training into it"):
        run(settings, tmp_path / "sweep", force=True)
    release(claim)
    if held:
        assert (tmp_path / "sweep" / held / "gatepress_run.json").stat() == before
    run(settings, tmp_path / "sweep", force=True)
    assert len(trained) == 2 * len(RUNS)


@pytest.mark.parametrize("costs", [[100.0, 20.0, 2.0], [0.0, -0.5, -0.8]])
def test_no_point_is_the_knee_if_another_is_as_good_for_less(costs):
    assert unbeaten(costs, [0.9, 0.55, 0.55]) == [0, 2]
    assert unbeaten(costs, [0.9, 0.91, 0.92]) == [2]
    assert unbeaten(costs, [0.9, 0.88, 0.5]) == [0, 1, 2]
    assert unbeaten([1.0, 1.0], [0.5, 0.5]) == [0, 1]


def test_the_summary_has_no_knee_that_is_beaten():
    reports = {
        Cell("gates", sparsity, 0): {"metric_value": metric, "encoder_macs_removed": sparsity}
        for sparsity, metric in {0.0: 0.54, 0.5: 0.55, 0.8: 0.55}.items()
    }
    assert not any(row["knee"] for row in summarize(reports, []))


@pytest.mark.usefixtures("trained")
def test_what_was_timed_stays_until_all_is_timed_anew(settings, tmp_path, monkeypatch):
    before = run(settings, tmp_path / "sweep", methods=["lora"], plot=False)
    written, told = (tmp_path / "sweep" / name for name in ("sweep.json", "sweep.md"))
    text = told.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_build", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "sweep", methods=["lora"], plot=False, batch_sizes=[3])
    there = json.loads(written.read_text())
    assert (there["latency"], there["settings"]) == (before["latency"], before["settings"])
    assert told.read_text() == text
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_build", stopped)
        assert run(settings, tmp_path / "sweep", methods=["lora"], plot=False) == before  # nothing is timed again
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "sweep", methods=["lora"], seeds=1, sparsities=[0.5], plot=False, repetitions=3)
    again = run(settings, tmp_path / "sweep", methods=["lora"], plot=False, batch_sizes=[3])
    assert again["settings"]["batch_sizes"] == [3]
    assert {record["batch_size"] for record in again["latency"]} == {3}


def stopped(*_):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("trained")
def test_no_table_is_left_of_another_sweep(settings, tmp_path, monkeypatch):
    run(settings, tmp_path / "sweep", methods=["lora"], plot=False)
    monkeypatch.setattr(sweep, "_build", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "sweep", methods=["lora", "full"], plot=False)
    assert not (tmp_path / "sweep/sweep.md").exists()
