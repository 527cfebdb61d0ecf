"""docs/schemas says what gatepress writes: all of it is valid, no key goes undescribed, what is wrong is refused."""

import copy
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import jsonschema
import pytest
from referencing import Registry, Resource
from typer.testing import CliRunner

from gatepress import config, errors, export, latency, sweep, training
from gatepress.bench.record import Record
from gatepress.cli import demo
from gatepress.cli.app import app
from gatepress.config import Metric
from gatepress.manifests import MARKS
from gatepress.tasks import TaskSpec

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/json-contract.md").read_text(encoding="utf-8")
SCHEMAS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "docs/schemas").glob("*.json")}
PARTS = SCHEMAS["common.json"]["$defs"]
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
DOCUMENTS = sorted(set(SCHEMAS) - {"common.json"})
ROWS = re.findall(
    r"^\| (`\w+`(?:, `\w+`)*) \| (string|number|integer|object|array) \| .* \| ([a-z, ]+) \|$", DOCUMENT, re.MULTILINE
)
SECTIONS = dict(re.findall(r"^## `gatepress (\w+)`\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL))
LITERALS = {
    "method": config.Method,
    "budget": config.BudgetUnit,
    "granularity": config.Granularity,
    "controller": config.Controller,
    "layout": config.Layout,
    "target": config.Target,
    "runtime": Literal["torch", config.Runtime],
    "metric_name": Metric,
}
CLASSES = {"settings": config.TrainSettings, "data": config.DataSettings, "task": TaskSpec, "record": Record}
OUTSIDE = {"OutOfMemory": MemoryError(), "OSError": OSError(5, "I/O"), "Interrupted": KeyboardInterrupt()}
OUTSIDE["InternalError"] = ZeroDivisionError()
LEAVES = {kind.__name__: kind("no") for kind in errors.GatepressError.__subclasses__()}

Written = dict[str, dict[str, Any]]  # schema -> command line or file -> value


def closed(schema: Any) -> Any:
    """Return a schema that refuses every key it does not describe."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    shut = {key: closed(value) for key, value in schema.items()}
    kinds = schema.get("type", ())
    is_object = kinds == "object" or (isinstance(kinds, list) and "object" in kinds)
    return {**shut, "unevaluatedProperties": False} if is_object and "additionalProperties" not in schema else shut


def registry(schemas: dict[str, Any]) -> Registry:
    return Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in schemas.items())


OPEN, CLOSED = registry(SCHEMAS), registry({name: closed(schema) for name, schema in SCHEMAS.items()})


def faults(name: str, value: Any, known: Registry = OPEN) -> list[str]:
    checked = jsonschema.Draft202012Validator({"$ref": name}, registry=known)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in checked.iter_errors(value)]


def parts(name: str, schema: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a schema (all of `name`, or one in it) and all that say something of the same value, each with its file."""
    schema = SCHEMAS[name] if schema is None else schema
    yield name, schema
    if "$ref" in schema:
        file, _, pointer = schema["$ref"].partition("#")
        there = SCHEMAS[file or name]
        for step in pointer.split("/")[1:]:
            there = there[step]
        yield from parts(file or name, there)
    for one in (*schema.get("allOf", ()), *(schema[key] for key in ("then", "else") if key in schema)):
        yield from parts(name, one)


# --- what is written ------------------------------------------------------------------------------


class Shell:
    """Runs commands in a directory and keeps what they print, by the name of its schema."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.printed: Written = defaultdict(dict)

    def __call__(self, line: str, *more: str, ends: tuple[int, ...] = (0,)) -> Any:
        words = [*line.split(), *more]
        done = CliRunner().invoke(app, [*words, "--json", "--quiet"])
        assert done.exit_code in ends, (line, done.stdout, done.stderr, done.exception)
        value = json.loads(done.stdout)
        self.printed["error.json" if "error" in value else f"{words[0]}.json"][" ".join([line, *more])] = value
        return value


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_model_dir, tiny_task_files, tiny_regression_files) -> Written:
    """All that commands print and write on a tiny model: schema -> command line or file -> value."""
    root, base = tmp_path_factory.mktemp("schemas"), str(tiny_model_dir("bert"))
    few = ["--max-train-samples", "32", "--max-validation-samples", "16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shell = Shell(patch)
        common = [*few, "--model", base, "--max-length", "16", "--device", "cpu"]
        _train(shell, common, tiny_task_files, tiny_regression_files)
        _press(shell, base)
        _measure(shell, tiny_task_files)
        _sweep(shell, ["--model", base, *tiny_task_files.options(), *few])
        _demo(shell, base, tiny_task_files)
        _look(shell)
    files = {
        "gatepress_run.json": root.rglob("gatepress_run.json"),
        "gatepress_pruned.json": root.rglob("gatepress_pruned.json"),
        "gatepress_onnx.json": root.rglob("gatepress_onnx.json"),
        "sweep_manifest.json": root.rglob("sweep*.json"),
        "latency_table.json": root.glob("table.json"),
        "measurements.json": root.glob("bench-*.json"),
    }
    for name, paths in files.items():
        shell.printed[name] |= {str(path.relative_to(root)): json.loads(path.read_text()) for path in paths}
    return shell.printed


def _train(shell: Shell, common: list[str], classes: Any, numbers: Any) -> None:
    for line in (
        "train -o runs/gates --sparsity 0.4 --epochs 2",
        "train -o runs/full --epochs 1 --method full",
        "train -o runs/lora --epochs 1 --method lora",
        "train -o runs/penalty --epochs 1 --controller penalty",
        "train -o runs/heads --epochs 2 --granularity heads --budget macs --distill --open-epochs 1",
        "train -o runs/latency --epochs 1 --budget latency --granularity matrix --gate-axes in --matrices q,down",
    ):
        shell(line, *common, *classes.options())
    shell("train -o runs/numbers --epochs 1", *common, *numbers.options())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_figures", interrupt)
        shell("train -o runs/stopped --epochs 1 --batch-size 4", *common, *classes.options(), ends=(130,))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _press(shell: Shell, base: str) -> None:
    shell("prune runs/gates -o pruned/gates")
    shell("prune runs/gates --layout paper --for torch-cpu -o pruned/paper")
    shell("prune runs/gates --dry-run")
    shell("prune runs/gates --sparsity 0.3,0.5 --recover-epochs 1 -o pruned/several")
    shell("prune runs/heads --sparsity 0.6 --latency-table analytic -o pruned/anew")
    shell("export pruned/gates -o onnx/gates")
    shell("export runs/gates --quantize int8 --max-metric-drop 1 -o onnx/int8")
    shell("export --quantize int8 -o onnx/headless", base)


def _measure(shell: Shell, classes: Any) -> None:
    for line in ("runs/gates", "pruned/gates", "onnx/gates", "runs/numbers --batch-size 7"):
        shell(f"evaluate {line}")
    if find_spec("openvino"):
        shell("evaluate onnx/gates --runtime openvino")
        shell(
            "bench onnx/gates onnx/int8 --runtime onnxruntime,openvino --batch-size 1 --seq-len 8 --repetitions 2 "
            "-o bench-runtimes.json"
        )
    shell("evaluate onnx/int8 --against runs/full --max-metric-drop 0", ends=(0, 1))
    shell("bench --shape 8x16 --sparsity 0,0.5 --tokens 4 --repetitions 2 -o bench-weight.json")
    timed, sizes = "runs/gates pruned/gates onnx/gates onnx/int8", "--batch-size 1 --seq-len 8 --repetitions 2"
    shell(f"bench {timed} {sizes} -o bench-models.json --plot models.svg")
    shell(f"bench runs/gates pruned/gates {sizes} --fail-under 1000000", ends=(1,))
    shell(f"bench runs/gates pruned/gates {sizes} --fail-under 0.000001 --threads 1")
    rows = ["--validation-file", str(classes.validation), "--max-validation-samples", "8"]
    shell("bench pruned/gates onnx/gates --batch-size 4 --repetitions 1 -o bench-rows.json", *rows)
    few = {"TOKENS": (2,), "PRODUCTS": ((8, 8), (16, 8)), "MOVED": ((8, 4), (16, 8)), "ROUNDS": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in few.items():
            patch.setattr(latency, name, value)
        shell("bench --latency-table torch-cpu -o table.json")


def _sweep(shell: Shell, common: list[str]) -> None:
    """Sweep in this process, with one training that fails, and keep the manifest as it is before the last."""

    def train(settings: Any, output: Path) -> Any:
        shutil.copyfile(output.parents[1] / "sweep.json", "sweep-so-far.json")
        if settings.sparsity == 0.6:
            raise errors.ModelError("no")
        return training.train(settings, output, force=True)

    shell.patch.setattr(sweep, "train_apart", train)
    grid = "--method gates,lora --sparsity 0.2,0.4,0.6 --epochs 1"
    timed = "--bench-batch-size 1 --bench-seq-len 8 --for torch-cpu --threads 1 --no-plot"
    shell(f"sweep {grid} {timed} --device cpu -o sweeps/few", *common, ends=(1,))


def _demo(shell: Shell, base: str, classes: Any) -> None:
    """Run the demo on a tiny model; its graphs are one that is there, since exporting takes most of the time."""

    def exported(_: str, target: Path, **_options: Any) -> Any:
        shutil.copytree("onnx/gates", target)
        return shell.printed["export.json"]["export pruned/gates -o onnx/gates"]

    own = {"train_file": str(classes.train), "validation_file": str(classes.validation)}
    data = replace(demo.DEMO.data, task=None, **own, text_column="text", label_column="label")
    shell.patch.setattr(export, "export", exported)
    shell.patch.setattr(demo, "DEMO", replace(demo.DEMO, data=data, model=base, max_length=16))
    for name, few in (("SEQ_LEN", 8), ("REPETITIONS", 2)):
        shell.patch.setattr(demo, name, few)
    shell("demo --max-train-samples 32 --max-validation-samples 16 --epochs 1 -o demo")


def _look(shell: Shell) -> None:
    shutil.copyfile("onnx/gates/model.onnx", "bare.onnx")
    shutil.copytree("pruned/gates", "pruned/broken")
    Path("pruned/broken/model.safetensors").unlink()
    models = ("runs/gates", "runs/full", "runs/stopped", "pruned/gates", "pruned/anew", "onnx/gates", "onnx/int8")
    for model in (*models, "onnx/headless", "bare.onnx"):
        shell(f"inspect {model}")
        shell(f"verify {model}")
    shell("verify pruned/broken", ends=(1,))
    shown = "runs/gates pruned/gates pruned/anew onnx/gates onnx/int8 onnx/headless sweeps/few"
    shell(f"report {shown} --bench bench-models.json -o page.html")
    shell("report runs/gates -o page.html", ends=(1,))
    shell("prune runs/full -o pruned/full", ends=(2,))
    shell("evaluate --batch-size 0 onnx/gates", ends=(2,))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_written_is_valid_and_no_key_goes_undescribed(name: str, written: Written) -> None:
    assert written[name], "nothing was written that this schema is of"
    found = {source: faults(name, value, CLOSED) for source, value in written[name].items()}
    assert {source: wrong for source, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_key_that_is_added_is_no_fault_but_would_not_go_unseen_here(name: str, written: Written) -> None:
    value = largest(written[name])
    assert faults(name, {**value, "added": True}) == []
    unseen = [place for place, grown in edited(value, with_one_more) if not faults(name, grown, CLOSED)]
    assert unseen == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_without_a_required_key_it_is_refused(name: str, written: Written) -> None:
    value = next(iter(written[name].values()))
    needed = {key for _, schema in parts(name) for key in schema.get("required", ())} & set(value)
    assert needed
    kept = [key for key in needed if not faults(name, {one: value[one] for one in value if one != key})]
    assert kept == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_value_of_another_type_is_refused(name: str, written: Written) -> None:
    taken = [place for place, wrong in edited(largest(written[name]), of_another_type) if not faults(name, wrong)]
    assert taken == []


def largest(values: dict[str, Any]) -> Any:
    return max(values.values(), key=lambda value: len(json.dumps(value)))


def edited(value: Any, edit: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """Yield the value with one of its parts at a time edited, where `edit` does not give None; of lists, the first."""
    changed = edit(value)
    if changed is not None:
        yield "", changed
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, part in items:
        for place, changed in edited(part, edit):
            whole = copy.copy(value)
            whole[key] = changed
            yield f"{key}/{place}", whole


def with_one_more(part: Any) -> Any:
    return {**part, "added": True} if isinstance(part, dict) else None


def of_another_type(part: Any) -> Any:
    return 0 if isinstance(part, bool) else [None] if part is None else True


@pytest.mark.parametrize("part", ["closed_fraction", "asked_sparsity", "metric_value", "train_seconds", "total_gates"])
def test_a_number_out_of_range_is_refused(part: str) -> None:
    for wrong in (-1.5, *([1.5] if "maximum" in PARTS[part] or "exclusiveMaximum" in PARTS[part] else [])):
        assert faults(f"common.json#/$defs/{part}", wrong)
    assert faults(f"common.json#/$defs/{part}", 0) == []


def test_one_metric_in_every_form(written: Written) -> None:
    values = [value["metric_value"] for line, value in written["evaluate.json"].items() if line.endswith("/gates")]
    assert len(values) == 3
    assert {next(iter(written["train.json"].values()))["metric_value"]} == set(values)


@pytest.mark.parametrize("kind", sorted({**LEAVES, **OUTSIDE}))
def test_every_kind_of_error_is_valid(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = {**LEAVES, **OUTSIDE}[kind]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("gatepress.manifests.written_form", lambda _: None)  # as if there were something to verify
    monkeypatch.setattr("gatepress.verifying.verify", fail)
    done = CliRunner().invoke(app, ["verify", "x", "--json"])
    value = json.loads(done.stdout)
    assert faults("error.json", value, CLOSED) == []
    assert (value["error"]["type"], value["exit_code"]) == (kind, done.exit_code)


def test_the_kinds_of_errors_are_those_that_there_are() -> None:
    listed = SCHEMAS["error.json"]["properties"]["error"]["properties"]["type"]["enum"]
    assert sorted(listed) == sorted({**LEAVES, **OUTSIDE})


# --- what is committed ----------------------------------------------------------------------------


def test_directories_of_earlier_releases_are_valid() -> None:
    manifests = [
        path for mark in dict(MARKS) for path in (ROOT / "tests/artefacts").rglob(mark) if path.suffix == ".json"
    ]
    assert manifests
    assert {str(path): wrong for path in manifests if (wrong := faults(path.name, json.loads(path.read_text())))} == {}


def test_committed_measurements_are_valid() -> None:
    values = {path.name: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")}
    benches = {name: value for name, value in values.items() if "format_version" in value}
    assert benches
    assert {name: wrong for name, value in benches.items() if (wrong := faults("measurements.json", value))} == {}


# --- schemas, code and document -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_schema_is_one_and_describes_its_parts(name: str) -> None:
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert (schema["$schema"], schema["$id"]) == ("https://json-schema.org/draft/2020-12/schema", name)
    assert schema["title"]
    told = {"description", "$ref", "anyOf"}
    assert [
        place for place, part in described(schema) if not told & set(part) and {"type", "enum", "const"} & set(part)
    ] == []


def described(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all that a schema says of keys, but for conditions."""
    for key, part in schema.items() if isinstance(schema, dict) else ():
        if key in ("properties", "$defs"):
            yield from ((f"{place}/{name}", one) for name, one in part.items())
        if key != "if":
            yield from described(part, f"{place}/{key}")


@pytest.mark.parametrize("name", CLASSES)
def test_fields_are_those_of_the_class(name: str) -> None:
    assert set(PARTS[name]["properties"]) == {field.name for field in fields(CLASSES[name])}


@pytest.mark.parametrize("name", LITERALS)
def test_words_are_those_of_the_code(name: str) -> None:
    assert PARTS[name]["enum"] == list(get_args(LITERALS[name]))


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("gatepress_run", "Run directory"),
        ("gatepress_pruned", "Pruned directory"),
        ("gatepress_onnx", "ONNX directory"),
        ("latency_table", "Latency table"),
    ],
)
def test_the_page_on_files_names_every_key_of_a_manifest(name: str, heading: str) -> None:
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    assert [key for key in SCHEMAS[f"{name}.json"]["properties"] if f"`{key}`" not in section] == []


def test_every_command_and_every_manifest_has_a_schema() -> None:
    files = {name for name, _ in MARKS if name.endswith(".json")}
    others = {"error.json", "sweep_manifest.json", "latency_table.json", "measurements.json"}
    assert set(DOCUMENTS) == {*(f"{command}.json" for command in COMMANDS), *files, *others}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_document_names_every_schema(name: str) -> None:
    assert f"(schemas/{name})" in DOCUMENT


@pytest.mark.parametrize("command", COMMANDS)
def test_the_keys_of_the_document_are_those_of_the_schema(command: str) -> None:
    schemas = [schema for _, schema in parts(f"{command}.json")]
    known = {key for schema in schemas for key in schema.get("properties", ())}
    section = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", SECTIONS.get(command, ""), re.MULTILINE)
    promised = {key for keys, _, commands in ROWS if command in commands.split(", ") for key in quoted(keys)}
    assert promised or section
    assert promised <= {key for schema in schemas for key in required(schema)}
    assert {key for keys in section for key in quoted(keys)} <= known


def test_the_types_of_the_document_are_those_of_the_schema() -> None:
    promised = [
        (command, key, kind)
        for keys, kind, commands in ROWS
        for key in quoted(keys)
        for command in commands.split(", ")
    ]
    wrong = [(command, key, kind) for command, key, kind in promised if kind not in types(f"{command}.json", key)]
    assert wrong == [("demo", "max_abs_logit_diff", "number")]  # the table says that it is an object there


def types(name: str, key: str) -> set[str]:
    """Return the JSON types that a schema allows for a key."""
    keyed = [(file, schema["properties"][key]) for file, schema in parts(name) if key in schema.get("properties", ())]
    found = [part for file, schema in keyed for _, part in parts(file, schema)]
    names = {
        name
        for part in found
        for name in ([part["type"]] if isinstance(part.get("type"), str) else part.get("type", ()))
    }
    return names | {"string" for part in found for word in part.get("enum", ()) if isinstance(word, str)}


def required(schema: dict[str, Any]) -> set[str]:
    """Return the keys that are required, and those that stand or fall together."""
    together = schema.get("dependentRequired", {})
    return {*schema.get("required", ()), *together, *(key for keys in together.values() for key in keys)}


def quoted(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)
