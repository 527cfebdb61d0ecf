"""`gatepress inspect` says what is there: counts of the prune report, settings that make it again, documented keys."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner

import tiny
from forms import save_run, settings_for
from gatepress.cli.app import app
from gatepress.cli.inspect import BAR, blocks, sparkline
from gatepress.commands import commands_of
from gatepress.config import DataSettings, TrainSettings
from gatepress.embedding import write_modules
from gatepress.errors import ArtifactError
from gatepress.export import export
from gatepress.inspecting import inspect
from gatepress.manifests import RUN_FORMAT
from gatepress.pruning import prune
from gatepress.training import train

KINDS = ("run", "pruned", "onnx")
CONTRACT = Path(__file__).parents[1] / "docs/json-contract.md"
WITHOUT_TORCH = """
import sys
from gatepress.inspecting import inspect
inspect(__import__("pathlib").Path(sys.argv[1]))
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""


@pytest.fixture(scope="module")
def made(tiny_model_dir: Any, tiny_task_files: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One trained model in every form."""
    root = tmp_path_factory.mktemp("inspected")
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.4, epochs=2)
    report = train(settings, root / "run")
    pruned = prune(root / "run", root / "pruned")
    export(root / "pruned", root / "onnx")
    paths = {kind: root / kind for kind in KINDS}
    return SimpleNamespace(**paths, report=report, prune_report=pruned, settings=settings)


@pytest.mark.parametrize("granularity", ["structured", "matrix", "heads"])
def test_what_a_run_would_keep_is_what_pruning_keeps(
    family: str, granularity: Any, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", tiny_model_dir(family), tiny_task_files, granularity=granularity, closed=0.6)
    report = prune(run, tmp_path / "pruned", layout="inner")
    for path in (run, tmp_path / "pruned"):
        layers = inspect(path)["layers"]
        for layer, planned in zip(layers, report["plan"]["layers"], strict=True):
            assert layer["heads"] == len(planned["heads"]) <= layer["dense_heads"] == 4
            for key in ("qk_width", "vo_width", "neurons", "macs_left"):
                assert layer[key] == planned[key]
            assert max(layer["qk_width"], layer["vo_width"]) <= layer["dense_head_width"] == 8
            assert layer["neurons"] <= layer["dense_neurons"] == 64


def test_the_forms_of_one_run_tell_the_same(made: SimpleNamespace) -> None:
    run, pruned, onnx = (inspect(getattr(made, kind)) for kind in KINDS)
    for key in ("metric_name", "metric_value", "examples", "task"):
        assert run[key] == pruned[key] == onnx[key] == made.report[key]
    for key in ("model", "base_sha256", "data_fingerprint", "seed", "settings"):
        assert run["provenance"][key] == pruned["provenance"][key] == onnx["provenance"][key] is not None
    assert pruned["layers"] == onnx["layers"]
    assert pruned["closed_gates"] == made.prune_report["closed_gates"]
    assert pruned["total_params"] == onnx["total_params"] == made.prune_report["total_params"]
    assert onnx["commands"][:-1] == pruned["commands"]
    assert len(run["curve"]) == made.settings.epochs
    assert run["provenance"]["settings"]["lora_rank"] == made.settings.rank


def test_no_model_is_loaded(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    for kind in KINDS:
        inspect(getattr(made, kind))


@pytest.mark.parametrize("kind", ["pruned", "onnx"])
def test_torch_is_not_needed_for_what_is_cut(made: SimpleNamespace, kind: str) -> None:
    line = [sys.executable, "-c", WITHOUT_TORCH, str(getattr(made, kind))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_without_its_base_is_still_described(tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model_dir("bert"), tmp_path / "base")
    run = save_run(tmp_path / "run", base, tiny_task_files)
    shutil.rmtree(base)
    found = inspect(run)
    assert found["layers"] is None
    assert found["provenance"]["model"] == str(base)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"sparsity": 0.55, "granularity": "matrix", "gate_axes": "in", "matrices": ("q", "down"), "train_biases": False},
    {"sparsity": 0.2, "train_layer_norms": False, "lora_matrices": ("o", "down")},
    {"method": "vera", "lora_rank": 4, "model": "/models/it's mine", "revision": None},
    {"distill": True, "open_epochs": 1, "epochs": 3, "budget": "macs", "precision": "bf16", "seed": 7, "device": "cpu"},
    {"controller": "penalty", "penalty_weight": 12.5, "learning_rate": 2e-4, "start": "/runs/first"},
]
DATA = [
    DataSettings(task="sst2"),
    DataSettings(train_file="/a b/t.csv", validation_file="/v.csv", label_column="la bel"),
]


@pytest.mark.parametrize("data", DATA, ids=["task", "files"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_training_command_gives_the_settings_back(
    options: dict[str, Any], data: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, asked = TrainSettings(data=data, **options), []
    (line,) = commands_of({**RUN_FORMAT, "settings": settings.to_json()}, "x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gatepress.cli.train.refuse_misspelt", lambda *_: None)  # these models are nowhere
    monkeypatch.setattr("gatepress.training.train", lambda got, *_args, **_options: asked.append(got) or {})
    program, *arguments = shlex.split(line)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (program, asked) == ("gatepress", [settings])
    changed = {name for name, value in options.items() if value is not None and value != ()}
    assert len(re.findall(r" --", line)) == len(changed) + (1 if data.task else 3)


def test_a_portable_command_names_no_place_of_this_machine(made: SimpleNamespace) -> None:
    manifest = json.loads((made.pruned / "gatepress_pruned.json").read_text())
    for line in commands_of(manifest, "pruned", portable=True):
        assert not [word for word in shlex.split(line) if word.startswith("/")]


def test_a_portable_command_names_no_place_of_a_plain_model(made: SimpleNamespace) -> None:
    manifest = json.loads((made.onnx / "gatepress_onnx.json").read_text())
    plain = {**manifest, "source": "/home/me/secret/foo", "source_manifest": None}
    assert commands_of(plain, "x", portable=True) == ["gatepress export foo -o onnx/x"]
    assert commands_of(plain, "x") == ["gatepress export /home/me/secret/foo -o onnx/x"]


def test_what_was_exported_from_within_is_called_as_the_result(made: SimpleNamespace) -> None:
    manifest = json.loads((made.onnx / "gatepress_onnx.json").read_text()) | {"source": "."}
    *_, prune_it, export_it = commands_of(manifest, "x")
    assert prune_it.endswith("-o pruned/x")
    assert export_it == "gatepress export pruned/x -o onnx/x"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_commands_of_methods_without_gates_say_nothing_of_gates(method: str) -> None:
    """A sweep shares its options among methods, and older releases took them all."""
    options: dict[str, Any] = {"sparsity": 0.5, "budget": "macs", "granularity": "matrix", "gate_axes": "in"}
    settings = TrainSettings(data=DATA[0], method=method, train_biases=False, matrices=("q",), **options)  # type: ignore[arg-type]
    (line,) = commands_of({**RUN_FORMAT, "settings": settings.to_json()}, "x")
    matrices = " --matrices q" if method == "lora" else ""
    assert line == f"gatepress train --task sst2 --method {method}{matrices} -o runs/x"


def test_a_run_without_gates_has_no_facts_of_gates(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: Any, tmp_path: Path
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", epochs=1, sparsity=0.5)
    report = train(settings, tmp_path / "run")
    told = inspect(tmp_path / "run")
    asked = told["provenance"]["settings"]
    for facts in (report, told):
        assert [facts[key] for key in ("budget", "granularity", "controller")] == [None] * 3
    assert (told["asked_sparsity"], asked["sparsity"], asked["budget"]) == (0, 0, None)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert "None" not in shown.stdout


def test_a_point_without_a_metric_is_left_out_of_the_curve(made: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(made.run, tmp_path / "run")
    path = tmp_path / "run" / "gatepress_run.json"
    manifest = json.loads(path.read_text())
    points = manifest["report"]["curve"]
    for curve, shown in (([{"step": 1}, *points], f"in {len(points)} epochs"), ([{"step": 1}], "-")):
        manifest["report"]["curve"] = curve
        path.write_text(json.dumps(manifest))
        told = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
        assert told.exit_code == 0, told.output
        assert shown in next(line for line in told.stdout.splitlines() if "while training" in line)


def test_the_command_of_an_export_says_what_code_may_run(made: SimpleNamespace, tmp_path: Path) -> None:
    export(made.pruned, tmp_path / "o", trust_remote_code=True)
    assert inspect(tmp_path / "o")["commands"][-1] == "gatepress export pruned/pruned --trust-remote-code -o onnx/o"


def test_commands_of_pruning_and_export_tell_what_was_asked(made: SimpleNamespace, tmp_path: Path) -> None:
    prune(made.run, tmp_path / "p", layout="paper", sparsity=0.6, target="torch-cpu")
    export(tmp_path / "p", tmp_path / "o", opset=18)
    lines = inspect(tmp_path / "o")["commands"]
    assert lines[1:] == [
        "gatepress prune runs/run --sparsity 0.6 --layout paper --for torch-cpu -o pruned/p",
        "gatepress export pruned/p --opset 18 -o onnx/o",
    ]
    pruned = inspect(tmp_path / "p")
    assert pruned["metric_value"] is None
    assert any(layer["by_index"] for layer in pruned["layers"])


def test_a_bare_graph_is_described(made: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copyfile(made.onnx / "model.onnx", tmp_path / "other.onnx")
    found = inspect(tmp_path / "other.onnx")
    assert set(found) == {"kind", "directory", "size_bytes", "graph"}
    assert [one["name"] for one in found["graph"]["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    assert found["graph"]["nodes"]["MatMul"] > 0
    assert found["graph"]["initializers"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_documented(made: SimpleNamespace, kind: str) -> None:
    result = CliRunner().invoke(app, ["inspect", str(getattr(made, kind)), "--json"])
    value = json.loads(result.stdout)
    assert value["kind"] == kind
    text = CONTRACT.read_text(encoding="utf-8")
    section = text[text.index("## `gatepress inspect`") : text.index("## `gatepress verify`")]
    documented = set(re.findall(r"`(\w+)`", section))
    assert set(value) <= documented
    assert {*value["provenance"], *value["layers"][0], *value.get("graph", {})} <= documented


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_terminal_it_is_plain_text(made: SimpleNamespace, kind: str) -> None:
    result = CliRunner().invoke(app, ["inspect", str(getattr(made, kind))])
    assert result.exit_code == 0, result.output
    assert "4 of 4" in result.stdout
    assert not set(result.stdout) & set("▁▂▃▄▅▆▇█▏▎▍▌▋▊▉\x1b")


def test_bars_are_as_long_as_what_is_left() -> None:
    lengths = [blocks(number / 96).count("█") for number in range(97)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, BAR)
    assert {len(blocks(number / 96)) for number in range(-5, 101)} == {BAR}
    assert sparkline([0.5, 0.75, 1.0])[::2] == "▁█"
    assert len(sparkline([0.5, 0.5])) == 2


def test_what_is_not_ours_is_refused(tiny_model_dir: Any, made: SimpleNamespace, tmp_path: Path) -> None:
    for path in (tiny_model_dir("bert"), tmp_path / "nothing", tmp_path / "no.onnx"):
        with pytest.raises(ArtifactError, match="expected a run"):
            inspect(path)
    shutil.copytree(made.pruned, tmp_path / "old")
    manifest = json.loads((tmp_path / "old/gatepress_pruned.json").read_text())
    (tmp_path / "old/gatepress_pruned.json").write_text(json.dumps({**manifest, "report": 3}))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "old")])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "report is 3, expected an object" in result.stderr


def test_a_directory_of_an_older_release_is_described(made: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(made.pruned, tmp_path / "old")
    manifest = json.loads((tmp_path / "old/gatepress_pruned.json").read_text())
    older = {key: value for key, value in manifest.items() if key not in ("run", "asked")}
    (tmp_path / "old/gatepress_pruned.json").write_text(json.dumps(older))
    found = inspect(tmp_path / "old")
    assert (found["commands"], found["metric_value"]) == ([], None)
    assert found["layers"] == inspect(made.pruned)["layers"]
    assert replace(made.settings).seed == found["provenance"]["seed"]


@pytest.mark.parametrize("parts", ["modules.json", "no parts"])
def test_a_run_of_an_embedder_is_described(
    parts: str, family: str, tiny_model_dir: Any, tiny_regression_files: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir(family), base)
    if parts == "modules.json":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "architectures": None}))
        write_modules(base, {"pooling": "mean", "normalize": True}, tiny.HIDDEN)
    run = save_run(tmp_path / "run", base, tiny_regression_files, closed=0.6, embed=True)
    report = prune(run, tmp_path / "pruned", layout="inner")
    kept = [layer["neurons"] for layer in report["plan"]["layers"]]
    for path in (run, tmp_path / "pruned"):
        assert [layer["neurons"] for layer in inspect(path)["layers"]] == kept
