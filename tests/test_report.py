"""The page that people look at: complete in itself, true to the manifests, safe whatever names say."""

import copy
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import forms
from gatepress import sweep
from gatepress.bench import render
from gatepress.bench.record import Record, latencies, relative_to
from gatepress.bench.summary import Cell, summarize
from gatepress.cli.app import app
from gatepress.config import DataSettings, TrainSettings
from gatepress.errors import ArtifactError, OutputError, UsageError
from gatepress.manifests import ONNX_FORMAT, PRUNED_FORMAT, RUN_FORMAT, SWEEP_FORMAT
from gatepress.pruning import prune
from gatepress.report import charts, facts
from gatepress.report.build import report

DOCUMENT = Path(__file__).parents[1] / "docs/json-contract.md"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = "</title><script>alert(1)</script>\"'&<b>\ud800"
LAYERS, HEADS, WIDTH, NEURONS = 12, 12, 768, 3072
DENSE = 124_647_170
TASK = {
    "name": "sst2",
    "text_columns": ["sentence"],
    "label_names": ["negative", "positive"],
    "metric": "accuracy",
    "validation_splits": ["validation"],
    "label_column": "label",
}


# --- made-up directories --------------------------------------------------------------------------


def run_report(sparsity=0.5, metric=0.9243, steps=2100):
    at = [(step, min(1.0, max(0.0, step - 700) / 900) * sparsity) for step in range(300, steps + 1, 300)]
    return {
        "task": "sst2",
        "metric_name": "accuracy",
        "metric_value": metric,
        "examples": 872,
        "method": "gates+lora",
        "asked_sparsity": sparsity,
        "closed_fraction": sparsity,
        "encoder_weights_removed": sparsity * 0.98,
        "encoder_macs_removed": sparsity * 0.98,
        "dense_params": DENSE,
        "total_params": int(DENSE - sparsity * 85e6),
        "trainable_params": {"total": 3_500_000},
        "train_seconds": 812.5,
        "peak_memory_bytes": 3_000_000_000,
        "curve": [
            {
                "step": step,
                "metric_value": 0.944 - (0.944 - metric) * closed / (sparsity or 1),
                "closed_fraction": closed,
            }
            for step, closed in at
        ],
    }


def run_manifest(*, task="sst2", model="FacebookAI/roberta-base", method="gates+lora", seed=0, value=None):
    value = value or run_report()
    settings = TrainSettings(
        data=DataSettings(task="sst2"), model=model, method=method, sparsity=value["asked_sparsity"], seed=seed
    )
    return {
        **RUN_FORMAT,
        "status": "finished",
        "step": value["curve"][-1]["step"],
        "settings": settings.to_json(),
        "data": settings.to_json()["data"],
        "max_length": 128,
        "task": {**TASK, "name": task},
        "base_sha256": {"model.safetensors": "8d1a0f5c" * 8},
        "data_fingerprint": "c69f2ea9" * 8,
        "tensors": {"file": "gates-00002100.safetensors", "sha256": "0" * 64},
        "report": value,
        "versions": {"gatepress": "0.3.0", "torch": "2.13.0"},
    }


def layer(index):
    neurons, heads = 2432 - 160 * index, list(range(HEADS - index // 2))
    matrices = {role: {"dense": [WIDTH, WIDTH]} for role in ("q", "k", "v", "o")}
    matrices |= {"up": {"dense": [NEURONS, WIDTH]}, "down": {"dense": [WIDTH, NEURONS]}}
    left = (neurons / NEURONS * 2 + len(heads) / HEADS) / 3
    qk, vo = 56 - 3 * index, 60 - 2 * index
    return {"heads": heads, "qk_width": qk, "vo_width": vo, "neurons": neurons, "macs_left": left, "matrices": matrices}


def pruned_manifest(run, name="sst2"):
    value = {key: run["report"][key] for key in ("asked_sparsity", "closed_fraction", "encoder_macs_removed")}
    value |= {"dense_params": DENSE, "total_params": run["report"]["total_params"], "layout": "auto"}
    return {
        **PRUNED_FORMAT,
        "task": run["task"],
        "base": {"model": run["settings"]["model"], "revision": None},
        "seed": 0,
        "run": {"name": name, "settings": run["settings"], "report": run["report"]},
        "asked": {"sparsity": None, "layout": "auto", "target": "ort-cpu", "latency_table": None},
        "report": {**value, "plan": {"layers": list(map(layer, range(LAYERS)))}},
        **{key: run[key] for key in ("data", "max_length", "base_sha256", "data_fingerprint", "versions")},
    }


def onnx_manifest(pruned, source="pruned/sst2"):
    return {
        **ONNX_FORMAT,
        "source": source,
        "source_manifest": pruned,
        "asked": {"opset": None, "max_diff": 1e-4, "quantize": "int8", "max_metric_drop": None},
        "task": pruned["task"],
        "total_params": pruned["report"]["total_params"],
        "size_bytes": 84_100_000,
        "quantize": "int8",
        "dtype": "int8",
        "metric_value": 0.9209,
        "metric_value_fp32": 0.9243,
        "versions": {"gatepress": "0.3.0", "onnxruntime": "1.24.1"},
    }


def records(times, kinds=()):
    every = []
    for batch, length, factor in ((1, 32, 0.08), (8, 128, 1.0)):
        group = [
            Record(
                what="endtoend",
                name=name,
                kind=dict(kinds).get(name, "onnx"),
                runtime="onnxruntime",
                device="cpu",
                device_name="AMD EPYC 7B13",
                threads=4,
                dtype="float32",
                batch_size=batch,
                seq_len=length,
                warmup=3,
                versions={"torch": "2.13.0", "onnxruntime": "1.24.1"},
                **latencies([ms * factor * (1 + 0.01 * number) for number in range(20)]),
            )
            for name, ms in times.items()
        ]
        every += [relative_to(record, group[0]) for record in group]
    return every


def sweep_reports(seeds=2):
    sizes = {"full": [(0.0, 0.9461)], "lora": [(0.0, 0.9427)]}
    sizes["gates+lora"] = [(0.0, 0.9438), (0.3, 0.9392), (0.5, 0.9323), (0.7, 0.8991)]
    return {
        Cell(method, sparsity, seed): run_report(sparsity, metric - 0.004 * seed)
        for seed in range(seeds)
        for method, points in sizes.items()
        for sparsity, metric in points
    }


def sweep_manifest(reports, *, timed=True):
    points = dict.fromkeys(cell.point for cell in reports)
    times = records(dict(zip(points, (231.0, 232.0, 233.5, 171.0, 128.0, 92.0), strict=True))) if timed else []
    cells = [
        {"method": cell.method, "sparsity": cell.sparsity, "seed": cell.seed, "status": "finished"}
        | {key: value.get(key) for key in sweep.KEPT}
        for cell, value in reports.items()
    ]
    return {
        **SWEEP_FORMAT,
        "settings": {},
        "cells": cells,
        "latency": [record.to_json(samples=False) for record in times],
        "summary": summarize(reports, times),
    }


def write(path, name, value):
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(json.dumps(value, ensure_ascii=True), encoding="utf-8")
    return path


class Made:
    """A directory of each kind, and what their manifests say."""

    def __init__(self, root, task="sst2", model="FacebookAI/roberta-base", name="sst2"):
        self.run_manifest = run_manifest(task=task, model=model)
        self.pruned_manifest = pruned_manifest(self.run_manifest, name)
        self.onnx_manifest = onnx_manifest(self.pruned_manifest, f"pruned/{name}")
        self.sweep_manifest = sweep_manifest(sweep_reports())
        self.run = write(root / "runs" / name, "gatepress_run.json", self.run_manifest)
        self.pruned = write(root / "pruned" / name, "gatepress_pruned.json", self.pruned_manifest)
        write(self.pruned, "config.json", {"num_attention_heads": HEADS})
        (self.pruned / "model.safetensors").write_bytes(bytes(4_000_000))
        self.onnx = write(root / "onnx" / name, "gatepress_onnx.json", self.onnx_manifest)
        write(self.onnx, "config.json", {"num_attention_heads": HEADS})
        self.sweep = write(root / "sweeps" / name, "sweep.json", self.sweep_manifest)
        for cell, value in sweep_reports(1).items():
            manifest = run_manifest(method=cell.method, value=value)
            write(self.sweep / "runs" / cell.name, "gatepress_run.json", manifest)
        self.bench = root / "bench.json"
        render.write(
            records({"pruned/sst2": 128.4, "onnx/sst2": 61.3}, {"pruned/sst2": "pruned"}), self.bench, force=True
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


# --- reading pages --------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements that open and close as they should, ids, attributes that load something, and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.loaded, self.texts, self.sections = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.loaded += [value for key, value in attributes if key in ("src", "href", "action", "data", "style")]
        assert not any(key.startswith("on") for key, _ in attributes)
        if tag == "section":
            self.sections.append(values["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def page(tmp_path, *directories, **options):
    report(directories, tmp_path / "page.html", force=True, **options)
    return Page(tmp_path / "page.html")


def test_times_are_those_of_the_directory_that_was_timed(made, tmp_path):
    twins = [Path(shutil.copytree(made.onnx, tmp_path / side / "model")) for side in "ab"]
    told = {}
    for names in ([str(twins[0]), str(twins[1])], ["model", "other"]):
        render.write(records(dict(zip(names, (128.4, 61.3), strict=True))), tmp_path / "bench.json", force=True)
        for given in (twins, twins[1:]):
            items = facts.read(given, [(tmp_path / "bench.json", render.read(tmp_path / "bench.json"))]).items
            told[names[0] == "model", len(given)] = [one.timed and one.timed.name for one in items]
    again = [Path(shutil.copytree(made.sweep, tmp_path / side / "sweep")) for side in "ab"]
    assert all(one.timed for one in facts.read(again).items)
    assert told == {
        (False, 2): [str(twins[0]), str(twins[1])],
        (False, 1): [str(twins[1])],
        (True, 2): [None, None],  # one of them, and nobody knows which
        (True, 1): ["model"],
    }


@pytest.mark.parametrize(
    ("asked", "task", "metric"),
    [
        ({}, "sst2", "accuracy"),
        ({"metric": "f1"}, "sst2", "f1"),
        ({"task": "mrpc", "metric": "f1"}, "mrpc", "f1"),
        ({"validation_file": "served/rare.csv"}, "rare", "accuracy"),
        ({"validation_file": "/data/own.csv"}, "sst2", "accuracy"),  # by which it was trained
    ],
)
def test_int8_is_told_by_the_metric_and_the_rows_that_measured_it(asked, task, metric, made, tmp_path):
    manifest = {**made.onnx_manifest, "metric_name": metric, "data": {"validation_file": "/data/own.csv"}}
    manifest["asked"] = {**manifest["asked"], **asked}
    onnx = Path(shutil.copytree(made.onnx, tmp_path / "onnx"))
    write(onnx, "gatepress_onnx.json", manifest)
    (item,) = facts.read([onnx]).items
    assert (item.task, item.metric_name, item.metric) == (task, metric, 0.9209)


COMMON = ["models", "metric", "size"]


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("run", [*COMMON, "training", "origin", "commands"]),
        ("pruned", [*COMMON, "training", "layers", "origin", "commands"]),
        ("onnx", [*COMMON, "training", "layers", "origin", "commands"]),
        ("sweep", ["models", "tradeoff", "metric", "size", "latency", "training", "origin", "commands"]),
    ],
)
def test_each_kind_of_directory_gives_its_sections(kind, sections, made, tmp_path):
    assert page(tmp_path, getattr(made, kind)).sections == sections


def test_a_page_is_complete_in_itself(made, tmp_path):
    shown = page(tmp_path, made.run, made.pruned, made.onnx, made.sweep, benches=[made.bench])
    assert shown.loaded == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(shown.tags)
    text = (tmp_path / "page.html").read_text()
    assert re.search(r"url\(|@import|https?:", text) is None
    assert "default-src 'none'" in text


def test_the_numbers_are_those_of_the_manifests(made, tmp_path):
    text = page(tmp_path, made.run, made.pruned, made.onnx, benches=[made.bench]).text
    told = made.run_manifest["report"]
    for number in (
        f"{told['metric_value']:.4f}",
        f"{told['curve'][0]['metric_value']:.4f}",
        f"{told['encoder_macs_removed']:.1%}",
        f"{told['total_params']:,}",
        f"{DENSE * 4 / 1e6:,.1f} MB",
        f"{made.onnx_manifest['metric_value']:.4f} (-0.0034)",
        "84.1 MB",
        "4.0 MB",
        "8d1a0f5c8d1a",
        "c69f2ea9c69f",
        "2.09x",
    ):
        assert number in text
    for one in map(layer, range(LAYERS)):
        assert f"{one['neurons']:,}" in text
    for line in ("train --task sst2", "prune runs/sst2 -o", "export pruned/sst2 --quantize int8"):
        assert f"gatepress {line}" in text


def test_a_metric_of_training_stands_beside_what_training_closed(made, tmp_path):
    manifest = copy.deepcopy(made.pruned_manifest)
    manifest["report"] |= {"closed_fraction": 0.75, "metric_value": None}
    other = write(tmp_path / "quarter", "gatepress_pruned.json", manifest)
    write(other, "config.json", {"num_attention_heads": HEADS})
    assert "quarter ends at accuracy 0.9243 with 50.0% of its gates closed" in page(tmp_path, other).text


def test_times_are_told_against_what_they_were_measured_against(made, tmp_path):
    manifest = copy.deepcopy(made.sweep_manifest)
    for record in manifest["latency"]:
        record["baseline"] = "gates+lora 0.3"
    shown = page(tmp_path, write(tmp_path / "sweep", "sweep.json", manifest)).text
    assert "as fast as full" not in shown
    assert "At the knee, gates+lora 0.5 does 49.0% less work than full, accuracy 0.0138 lower" in shown


def test_a_sweep_that_timed_nothing_shows_what_is_removed(tmp_path):
    directory = write(tmp_path / "sweep", "sweep.json", sweep_manifest(sweep_reports(1), timed=False))
    shown = page(tmp_path, directory)
    assert "latency" not in shown.sections
    assert "multiply-accumulates of the encoder removed" in shown.text
    assert "At the knee, gates+lora 0.5 does 49.0% less work than full" in shown.text


def test_a_sweep_without_metrics_has_no_picture(tmp_path):
    value = sweep_manifest(sweep_reports(1), timed=False)
    for row in value["summary"]:
        row.update(dict.fromkeys(("metric_median", "metric_min", "metric_max")))
    assert "tradeoff" not in page(tmp_path, write(tmp_path / "sweep", "sweep.json", value)).sections


def test_a_sweep_of_one_point_has_no_picture(tmp_path):
    one = dict(list(sweep_reports(1).items())[:1])
    directory = write(tmp_path / "sweep", "sweep.json", sweep_manifest(one, timed=False))
    assert page(tmp_path, directory).sections == ["models", "metric", "size"]


def test_hostile_names_are_text(tmp_path):
    named = HOSTILE.removesuffix("\ud800")  # half of a character is refused in a manifest
    bad = Made(tmp_path, task=named, model=named, name="a<img src=x onerror=alert(1)>")
    shown = page(tmp_path, bad.run, bad.pruned, bad.onnx, title=HOSTILE)
    assert not {"script", "img", "b"} & set(shown.tags)
    assert "<script>alert(1)</script>" in shown.text
    assert "<img src=x onerror=alert(1)>" in shown.text


def test_a_real_pruned_model_is_shown(tiny_model_dir, tiny_task_files, tmp_path):
    run = forms.save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files)
    result = prune(run, tmp_path / "pruned")
    shown = page(tmp_path, run, tmp_path / "pruned")
    assert {"models", "size", "layers", "origin", "commands"} <= set(shown.sections)
    assert f"{result['total_params']:,}" in shown.text
    assert f"{result['size_bytes'] / 1e6:,.1f} MB" in shown.text
    assert all(f"{one['neurons']}" in shown.text for one in result["plan"]["layers"])


def test_a_task_that_no_manifest_names_is_null_and_any_name_is_a_name(made, tmp_path):
    nameless = {**made.run_manifest, "task": None}
    for name, manifest in {"unnamed": nameless, "named": run_manifest(task="no task")}.items():
        write(tmp_path / name, "gatepress_run.json", manifest)
    told = report([tmp_path / "unnamed", tmp_path / "named"], tmp_path / "page.html")["models"]
    assert [one["task"] for one in told] == [None, "no task"]
    assert told[0]["metric_name"] is None
    assert "no task" in Page(tmp_path / "page.html").text


def test_a_model_of_no_task_has_blank_cells(made, tmp_path, capsys):
    plain = {**json.loads((made.onnx / "gatepress_onnx.json").read_text()), "task": None}
    plain |= {"source_manifest": None, "dtype": "float32", "quantize": None}
    onnx = write(tmp_path / "plain", "gatepress_onnx.json", plain)
    code, out, err = command(capsys, onnx, "-o", tmp_path / "page.html")
    assert (code, "plain" in out) == (0, True), err
    head = re.search("<thead>.*</thead>", (tmp_path / "page.html").read_text())
    assert head is not None
    assert "metric" not in head[0]  # a column of nothing is none


def test_models_of_one_name_are_told_apart(made, tmp_path):
    text = page(tmp_path, made.run, made.run, made.pruned).text
    assert "run sst2 (2)" in text
    assert "pruned sst2" in text


def test_a_run_that_is_not_finished_says_so(made, tmp_path):
    half = {**made.run_manifest, "status": "interrupted", "step": 900}
    assert "interrupted, step 900" in page(tmp_path, write(tmp_path / "half", "gatepress_run.json", half)).text
    assert "interrupted" not in page(tmp_path, made.run).text


# --- what cannot be -------------------------------------------------------------------------------


def test_an_existing_page_is_refused_and_kept(made, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        report([made.run], target)
    assert target.read_text() == "mine"
    with pytest.raises(UsageError, match=r"ends in \.html"):
        report([made.run], tmp_path / "page.pdf")


def test_directories_of_no_kind_are_refused(made, tmp_path):
    with pytest.raises(ArtifactError, match="is not there, expected a directory of gatepress"):
        report([tmp_path / "nothing"], tmp_path / "page.html")
    with pytest.raises(ArtifactError, match="holds no manifest"):
        report([tmp_path], tmp_path / "page.html")
    with pytest.raises(ArtifactError, match="is a file"):
        report([made.bench], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def spoil(value, path, bad):
    """Return `value` with `bad` at a path such as `report.plan.layers`."""
    key, _, rest = path.partition(".")
    return {**value, key: spoil(value[key], rest, bad) if rest else bad}


BAD = (None, 7, "text", [], [None], {}, {"a": 1}, 10**400, float("nan"), True)
PATHS = {
    "gatepress_run.json": ("run_manifest", ("report", "report.curve", "report.metric_value", "settings", "task")),
    "gatepress_pruned.json": ("pruned_manifest", ("report.plan", "report.plan.layers", "base", "run", "asked")),
    "gatepress_onnx.json": ("onnx_manifest", ("source_manifest", "size_bytes", "task", "versions", "quantize")),
    "sweep.json": ("sweep_manifest", ("summary", "cells", "latency")),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_spoilt_manifest_is_shown_or_refused_in_one_line(name, made, tmp_path):
    attribute, paths = PATHS[name]
    for path in paths:
        for number, bad in enumerate(BAD):
            directory = write(tmp_path / f"{path}-{number}", name, spoil(getattr(made, attribute), path, bad))
            write(directory, "config.json", {"num_attention_heads": HEADS})
            try:
                page(tmp_path, directory)
            except (ArtifactError, UsageError) as error:
                assert "\n" not in str(error)  # noqa: PT017 - either is right


def test_a_file_that_times_no_model_is_refused(made, tmp_path):
    of_a_weight = [replace(record, what="matmul", shape=(8, 8)) for record in records({"dense": 1.0})]
    render.write(of_a_weight, tmp_path / "matmul.json")
    with pytest.raises(ArtifactError, match="times no models"):
        report([made.run], tmp_path / "page.html", benches=[tmp_path / "matmul.json"])


def test_times_of_other_models_are_told(made, tmp_path, caplog):
    other = tmp_path / "other.json"
    render.write(records({"onnx/cola": 3.0, "dense": 9.0}), other, force=True)
    report([made.onnx], tmp_path / "page.html", benches=[made.bench, other])
    assert caplog.messages == [
        f"{other}: times no model of this page, but onnx/cola, dense; the page shows it as it is"
    ]


def test_a_model_that_was_measured_is_told_first(made, tmp_path):
    unknown = dict.fromkeys(("source_manifest", "task", "data", "quantize"))
    manifest = {**made.onnx_manifest, **unknown, "source": "elsewhere"}
    bare = write(tmp_path / "onnx" / "bare", "gatepress_onnx.json", manifest)
    told = report([made.run, bare], tmp_path / "page.html")
    assert told["models"][1]["metric_value"] is None
    assert told["finding"].startswith("run sst2 reaches accuracy")


# --- charts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "most"), [(0, 1), (0.8971, 0.9461), (0.5, 0.5), (0, 0), (-0.2, 0.7), (1e-9, 3e9), (12_345, 12_346)]
)
def test_ticks_are_few_and_hold_all_values(least, most):
    ticks = charts._ticks(least, most)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= least + 1e-9 * abs(least)
    assert most - 1e-9 * abs(most) <= ticks[-1]
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("most", "percent", "shown"),
    [
        (0.12, True, ["0.0%", "2.5%", "5.0%", "7.5%", "10.0%", "12.5%"]),
        (0.02, True, ["0.0%", "0.5%", "1.0%", "1.5%", "2.0%"]),
        (1, True, ["0%", "20%", "40%", "60%", "80%", "100%"]),
        (12, False, ["0.0", "2.5", "5.0", "7.5", "10.0", "12.5"]),
        (7_500_000, False, ["0", "2,000,000", "4,000,000", "6,000,000", "8,000,000"]),
    ],
)
def test_ticks_say_where_they_stand(most, percent, shown):
    axis = charts.Axis("axis", percent=percent)
    assert [text for _, text in charts._spelled(axis, charts._scale(axis, [0, most], 0, 100))] == shown


def test_bars_begin_at_zero_and_negative_values_go_left():
    drawn = charts.bars("correlation", [charts.Bar("a", 0.5, "0.5"), charts.Bar("b", -0.5, "-0.5")])
    assert re.findall(r'class="accent" x="([\d.]+)%" width="([\d.]+)%"', drawn) == [
        ("50.00", "50.00"),
        ("0.00", "50.00"),
    ]


def test_latencies_that_span_far_are_drawn_by_their_logarithm():
    points = [charts.Point(x, 1.0 + x, "a point") for x in (1.0, 10.0, 100.0)]
    axis = charts.Axis("latency (ms)", logarithmic=True)
    drawn = charts.plot("latency", [charts.Series("one", points)], axis, charts.Axis("metric"))
    first, middle, last = map(float, re.findall(r'<svg x="([\d.]+)%"', drawn))
    assert middle - first == pytest.approx(last - middle, abs=0.02)


# --- command line ---------------------------------------------------------------------------------


def command(capsys, *line):
    with pytest.raises(SystemExit) as ended:
        app(["report", *map(str, line)])
    return ended.value.code, *capsys.readouterr()


def test_the_command_prints_the_documented_object(made, tmp_path, capsys):
    code, out, err = command(capsys, made.run, made.sweep, "-o", tmp_path / "page.html", "--json")
    assert code == 0, err
    result = json.loads(out)
    section = DOCUMENT.read_text(encoding="utf-8").split("## `gatepress report`")[1].split("\n## ")[0]
    paragraph = section[section.index("In each object of `models`") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) - {"models"} == set(result["models"][0])
    assert result["models"][0]["metric_value"] == made.run_manifest["report"]["metric_value"]
    assert result["sections"] == Page(tmp_path / "page.html").sections


def test_the_command_ends_as_its_siblings_do(made, tmp_path, capsys):
    code, out, err = command(capsys, made.run, "--bench", made.bench, "-o", tmp_path / "page.html")
    assert (code, "gatepress on sst2" in out, "open it in a browser" in err) == (0, True, True)
    code, out, err = command(capsys, made.run, "-o", tmp_path / "page.html")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert command(capsys, tmp_path, "-o", tmp_path / "other.html")[0] == 1
    assert command(capsys, made.run, "-o", tmp_path / "other.txt")[0] == 2


# --- looks ----------------------------------------------------------------------------------------


def chromium(profile, page, *options):
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    line += ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    line += ["--force-device-scale-factor=1", f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(line, capture_output=True, check=True, timeout=60).stdout.decode()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(width, made, tmp_path):
    page(tmp_path, made.run, made.pruned, made.onnx, made.sweep, benches=[made.bench], title="W" * 200)
    shown, framed = tmp_path / "page.html", tmp_path / "framed.html"
    # A window is never narrower than 500 px, a frame is as narrow as asked.
    frame = f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{escape(shown.read_text())}"></iframe>'
    script = "onload = () => { document.title = `wide ${frames[0].document.documentElement.scrollWidth}` }"
    framed.write_text(f"<!doctype html><title></title>{frame}<script>{script}</script>")
    told = chromium(tmp_path / "profile", framed, "--dump-dom", "--window-size=1400,1000")
    assert re.search(r"<title>wide (\d+)</title>", told)[1] == str(width)
    picture = tmp_path / "page.png"
    chromium(tmp_path / "profile", shown, f"--screenshot={picture}", f"--window-size={width},2400")
    assert picture.stat().st_size > 30_000  # a blank one is a few kB


def test_a_sweep_shows_its_summary_with_the_knee_ringed(made, tmp_path):
    shown = page(tmp_path, made.sweep)
    for row in made.sweep_manifest["summary"]:
        assert f"accuracy {row['metric_median']:.4f}" in shown.text
    text = (tmp_path / "page.html").read_text()
    assert text.count('class="ring"') == sum(row["knee"] for row in made.sweep_manifest["summary"]) == 1
    assert "At the knee, gates+lora 0.5 is 1.80x as fast as full, accuracy 0.0138 lower" in shown.text
