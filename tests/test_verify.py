"""`gatepress verify` passes what is whole and names each fault of what is not, in one line."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import pytest
from huggingface_hub import constants, errors
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from conftest import TaskFiles
from forms import save_run, settings_for
from gatepress.cli.app import app
from gatepress.errors import ArtifactError, GatepressError, ModelError
from gatepress.export import export
from gatepress.files import sha256_of
from gatepress.graph import check_graph
from gatepress.inspecting import inspect
from gatepress.metrics import compute_metric
from gatepress.models import load_pruned, open_tokenizer
from gatepress.pruning import prune
from gatepress.runtime import open_runner
from gatepress.training import train
from gatepress.verifying import _finite, verify

KINDS = ("run", "pruned", "onnx")
TOKENS = {"input_ids": np.full((2, 8), 5)}
MANIFESTS = {kind: f"gatepress_{kind}.json" for kind in KINDS}


@pytest.fixture(scope="module")
def made(tiny_model_dir: Any, tiny_task_files: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One model in every form."""
    root = tmp_path_factory.mktemp("verified")
    base = shutil.copytree(tiny_model_dir("bert"), root / "base")
    run = save_run(root / "run", base, tiny_task_files)
    prune(run, root / "pruned")
    export(root / "pruned", root / "onnx")
    return SimpleNamespace(base=base, **{kind: root / kind for kind in KINDS})


@pytest.fixture
def copy(made: SimpleNamespace, tmp_path: Path) -> Callable[[str], Path]:
    """Return kind -> a copy that may be broken."""
    return lambda kind: shutil.copytree(getattr(made, kind), tmp_path / kind)


def test_a_graph_without_a_tokenizer_is_whole(made: SimpleNamespace, tmp_path: Path) -> None:
    """One that was asked for, as `export` takes models that come without."""
    model = shutil.copytree(made.base, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    AutoModelForSequenceClassification.from_pretrained(model).save_pretrained(model)
    export(model, tmp_path / "onnx")
    found = verify(tmp_path / "onnx")
    assert found["ok"], found
    assert "tokenizer: the model was exported without one" in found["skipped"]


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def weights(directory: Path) -> Path:
    return next(path for name in ("gates-*", "model.*") for path in directory.glob(name))


def sign(directory: Path, file: Path) -> None:
    """Write the sha256 that a file now has into the manifest, as who forges it would."""
    (kind,) = (kind for kind in KINDS if (directory / MANIFESTS[kind]).is_file())
    key = ("tensors", "sha256") if kind == "run" else ("sha256", file.name)
    change(directory / MANIFESTS[kind], lambda value: value[key[0]].update({key[1]: sha256_of(file)}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_directory_passes(made: SimpleNamespace, kind: str) -> None:
    found = verify(getattr(made, kind))
    assert (found["ok"], found["faults"], found["skipped"]) == (True, [], [])
    assert any("sha256" in line for line in found["checked"])


def test_the_graph_of_a_directory_is_verified_with_all_beside_it(made: SimpleNamespace) -> None:
    assert verify(made.onnx / "model.onnx") == verify(made.onnx)


def test_a_base_of_the_hub_is_looked_for_on_this_disk_alone(copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def snapshot(*_: Any, **__: Any) -> None:
        asked.append(constants.HF_HUB_OFFLINE)
        raise errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    run = copy("run")
    change(run / MANIFESTS["run"], lambda value: value["settings"].update({"model": "someone/encoder"}))
    found = verify(run)
    assert (found["ok"], len(found["skipped"])) == (True, 1)
    assert inspect(run)["layers"] is None
    assert len(asked) > 1
    assert all(asked)
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("layout", ["inner", "index", "paper", "stock"])
def test_every_layout_of_every_family_passes(
    family: str, layout: Any, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", tiny_model_dir(family), tiny_task_files, granularity="matrix")
    prune(run, tmp_path / "pruned", layout=layout)
    assert verify(tmp_path / "pruned")["faults"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_byte_is_found(copy: Any, kind: str) -> None:
    path = copy(kind)
    content = weights(path).read_bytes()
    weights(path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (fault,) = verify(path)["faults"]
    assert "does not match its sha256" in fault


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_found(copy: Any, kind: str) -> None:
    path = copy(kind)
    weights(path).unlink()
    faults = verify(path)["faults"]
    assert any("is missing" in fault for fault in faults)
    assert all("\n" not in fault for fault in faults)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_outside_the_directory_is_refused(copy: Any, kind: str) -> None:
    path = copy(kind)
    shutil.copyfile(weights(path), path.parent / "x")
    digest = sha256_of(path.parent / "x")
    edit = {"file": "../x", "sha256": digest} if kind == "run" else {"../x": digest}
    change(path / MANIFESTS[kind], lambda value: value["tensors" if kind == "run" else "sha256"].update(edit))
    assert any("'../x' is missing, only files in the directory count" in fault for fault in verify(path)["faults"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_of_a_newer_version_is_refused(copy: Any, kind: str) -> None:
    path = copy(kind)
    change(path / MANIFESTS[kind], lambda value: value.update(version=2))
    (fault,) = verify(path)["faults"]
    assert "upgrade gatepress" in fault


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_huge_is_not_read(copy: Any, kind: str) -> None:
    path = copy(kind)
    with (path / MANIFESTS[kind]).open("r+b") as file:
        file.truncate(65 * 1024 * 1024)  # a hole, no bytes on the disk
    (fault,) = verify(path)["faults"]
    assert "larger than" in fault


@pytest.mark.parametrize("kind", ["run", "pruned"])
def test_truncated_weights_are_found_however_signed(copy: Any, kind: str) -> None:
    path = copy(kind)
    file = weights(path)
    file.write_bytes(file.read_bytes()[:-100])
    sign(path, file)
    assert any("not readable as safetensors" in fault for fault in verify(path)["faults"])


@pytest.mark.parametrize("layers", [3, 10**9])
def test_a_layer_too_many_in_the_configuration_is_found(copy: Any, layers: int) -> None:
    path = copy("pruned")
    change(path / "config.json", lambda value: value.update(num_hidden_layers=layers))
    sign(path, path / "config.json")
    (fault,) = verify(path)["faults"]
    assert ("layer.2" in fault and "is absent, expected [" in fault) or "asks for 1000000000 layers" in fault


def test_weights_of_another_shape_are_found(copy: Any) -> None:
    for kind, words in (("pruned", "do not fit config.json"), ("run", "expected")):
        path = copy(kind)
        state = load_file(weights(path))
        name = next(name for name in state if state[name].dim() == 2)
        save_file({**state, name: state[name][:-1].contiguous()}, weights(path))
        sign(path, weights(path))
        (fault,) = verify(path)["faults"]
        assert words in fault


def test_a_graph_that_is_not_that_of_the_manifest_is_found(copy: Any) -> None:
    path = copy("onnx")
    model = onnx.load(path / "model.onnx")
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="../weights")
    (path / "model.onnx").write_bytes(model.SerializeToString())  # onnx.save would refuse
    sign(path, path / "model.onnx")
    change(path / MANIFESTS["onnx"], lambda value: value.update(opset=1))
    (fault,) = verify(path)["faults"]
    assert "../weights" in fault


def test_weights_that_are_no_numbers_are_found(copy: Any) -> None:
    path = copy("run")
    state = load_file(weights(path))
    name = next(name for name in state if name.startswith("classifier"))
    save_file({**state, name: state[name] * float("nan")}, weights(path))
    sign(path, weights(path))
    (fault,) = verify(path)["faults"]
    assert "logits are not finite" in fault


def test_another_base_is_found_and_a_missing_one_is_told(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model_dir("bert"), tmp_path / "base")
    run = save_run(tmp_path / "run", base, tiny_task_files)
    shutil.copyfile(tiny_model_dir("electra") / "model.safetensors", base / "model.safetensors")
    (fault,) = verify(run)["faults"]
    assert "was trained on other weights" in fault
    shutil.rmtree(base)
    found = verify(run)
    assert found["ok"]
    assert str(base) in found["skipped"][0]


def test_a_missing_base_below_a_base_is_told_too(tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model_dir("bert"), tmp_path / "base")
    full, run = tmp_path / "full", tmp_path / "run"
    train(settings_for(base, tiny_task_files, method="full", epochs=1), full)
    train(settings_for(full, tiny_task_files, epochs=1), run)
    found = verify(run)
    assert found["ok"]
    assert found["skipped"] == []
    shutil.rmtree(base)
    found = verify(run)
    assert found["ok"]
    assert len(found["skipped"]) == 1
    (full / "gatepress_run.json").write_text("{}")
    assert not verify(run)["ok"]


def test_a_bare_graph_is_run(made: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copyfile(made.onnx / "model.onnx", tmp_path / "a.onnx")
    found = verify(tmp_path / "a.onnx")
    assert found["ok"]
    assert "sha256" in found["skipped"][0]
    (tmp_path / "a.onnx").write_bytes(b"\x00" * 64)
    assert not verify(tmp_path / "a.onnx")["ok"]


@pytest.mark.parametrize("odd", [None, 3, [], {"x": None}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_of_odd_values_ends_in_faults(copy: Any, kind: str, odd: Any) -> None:
    path = copy(kind)
    file = path / MANIFESTS[kind]
    whole = json.loads(file.read_text())
    for name in ("format", "version", "tensors" if kind == "run" else "sha256"):
        file.write_text(json.dumps({**whole, name: odd}))
        assert not verify(path)["ok"], name


def test_exit_codes_and_json(made: SimpleNamespace, copy: Any, tmp_path: Path) -> None:
    good = CliRunner().invoke(app, ["verify", str(made.pruned), "--json"])
    assert good.exit_code == 0
    path = copy("pruned")
    weights(path).unlink()
    bad = CliRunner().invoke(app, ["verify", str(path), "--json"])
    faults = json.loads(bad.stdout)["faults"]
    assert (bad.exit_code, bad.stderr.splitlines()) == (1, [f"fault: {fault}" for fault in faults])
    nothing = CliRunner().invoke(app, ["verify", str(tmp_path / "nothing"), "--json"])
    assert nothing.exit_code == 1
    assert json.loads(nothing.stdout)["error"]["type"] == "ArtifactError"


@pytest.mark.parametrize("hashes", [None, {}, "x", {"config.json": ""}])
def test_a_manifest_that_binds_no_weights_is_not_loaded(copy: Any, hashes: Any) -> None:
    path = copy("pruned")
    change(path / MANIFESTS["pruned"], lambda value: value.update(sha256=hashes))
    with pytest.raises(ArtifactError, match=r"names no sha256 of|sha256 is .*, expected an object"):
        load_pruned(path)


BESIDE = {
    "run": ("probe.safetensors", "tokenizer.json"),
    "pruned": ("tokenizer_config.json",),
    "onnx": ("config.json",),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BESIDE.items() for name in names])
def test_what_lies_beside_the_weights_is_bound_too(copy: Any, kind: str, name: str) -> None:
    path = copy(kind)
    (path / name).write_bytes((path / name).read_bytes() + b" ")
    assert any(name in fault and "does not match its sha256" in fault for fault in verify(path)["faults"])
    with pytest.raises(ArtifactError, match="does not match its sha256"):
        prune(path, path.parent / "again") if name == "probe.safetensors" else open_tokenizer(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_of_an_earlier_release_binds_less_and_is_read(copy: Any, kind: str) -> None:
    path = copy(kind)
    older = {
        "run": (),
        "pruned": ("config.json", "model.safetensors", "modeling_gatepress.py"),
        "onnx": ("model.onnx",),
    }
    named = json.loads((path / MANIFESTS[kind]).read_text())["sha256"]
    kept = {name: named[name] for name in older[kind]}
    change(path / MANIFESTS[kind], lambda value: value.update(sha256=kept) if kept else value.pop("sha256"))
    assert verify(path)["ok"]
    assert open_runner(path).logits(TOKENS).shape == (2, 2)
    assert open_tokenizer(path)("anda")["input_ids"]


LARGE = [("num_labels", 10**9), ("vocab_size", 10**12), ("hidden_size", 10**6), ("max_position_embeddings", 10**12)]


@pytest.mark.parametrize(("name", "size"), LARGE, ids=[name for name, _ in LARGE])
def test_a_configuration_that_asks_for_memory_gets_none(copy: Any, name: str, size: int) -> None:
    path = copy("pruned")
    change(path / "config.json", lambda value: value.update({name: size}))
    sign(path, path / "config.json")
    assert not verify(path)["ok"]
    with pytest.raises(GatepressError, match=r"do not fit|never writes|cannot be loaded"):
        load_pruned(path)


@pytest.mark.parametrize("name", ["transformers_weights", "attn_implementation", "quantization_config"])
def test_a_configuration_that_asks_for_other_files_or_code_is_refused(copy: Any, name: str) -> None:
    path = copy("pruned")
    change(path / "config.json", lambda value: value.update({name: "someone/else"}))
    sign(path, path / "config.json")
    with pytest.raises(ArtifactError, match=f"has {name}, which gatepress never writes"):
        load_pruned(path)


def test_a_rank_that_no_tensor_holds_is_refused(copy: Any) -> None:
    path = copy("run")
    change(path / MANIFESTS["run"], lambda value: value["settings"].update(lora_rank=10**9))
    with pytest.raises(ArtifactError, match="says 1000000000 lora_rank"):
        open_runner(path)


def _loop(graph: onnx.GraphProto) -> None:
    body = onnx.helper.make_graph([], "body", [], [])
    graph.node.append(onnx.helper.make_node("Loop", ["", ""], [], body=body))


def _expand(graph: onnx.GraphProto) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([10**9]), "huge"))
    graph.node.append(onnx.helper.make_node("ConstantOfShape", ["huge"], ["nothing"]))


def _count_back(graph: onnx.GraphProto) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-65])[:1], "huge"))
    graph.node.append(onnx.helper.make_node("ConstantOfShape", ["huge"], ["nothing"]))


def _lie(graph: onnx.GraphProto) -> None:
    graph.initializer[0].dims[:] = [2**40]


def _elsewhere(graph: onnx.GraphProto) -> None:
    graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    graph.initializer[0].external_data.add(key="location", value="config.json")
    del graph.initializer[0].dims[:]


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (_loop, "a node Loop, expected no loops"),
        (_expand, "makes a size of huge, 1000000000"),
        (_count_back, "makes a size of huge, -65"),
        (_lie, "make no tensor"),
        (_elsewhere, "make no tensor"),
    ],
)
def test_a_graph_that_is_not_handed_to_onnx_runtime(copy: Any, forge: Any, words: str) -> None:
    path = copy("onnx")
    model = onnx.load(path / "model.onnx")
    forge(model.graph)
    (path / "model.onnx").write_bytes(model.SerializeToString())
    sign(path, path / "model.onnx")
    with pytest.raises(ArtifactError, match=words):
        open_runner(path)
    assert any(words in fault for fault in verify(path)["faults"])


@pytest.mark.parametrize(("offset", "more"), [(-4, 0), (0, 1), (4, 0)])
def test_weights_beside_a_graph_lie_within_their_file(tmp_path: Path, offset: int, more: int) -> None:
    (tmp_path / "model.onnx.data").write_bytes(bytes(16))
    tensor = onnx.TensorProto(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "model.onnx.data", "offset": offset, "length": 16 + more}.items():
        tensor.external_data.add(key=key, value=str(value))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["weight"], ["y"])], "g", [], [], [tensor])
    with pytest.raises(ArtifactError, match="is shorter than the"):
        check_graph(onnx.helper.make_model(graph), tmp_path)


def test_weights_beside_a_graph_that_its_manifest_does_not_name_are_not_read(copy: Any) -> None:
    path = copy("onnx")
    onnx.save(onnx.load(path / "model.onnx"), path / "model.onnx", save_as_external_data=True, location="x.data")
    sign(path, path / "model.onnx")
    with pytest.raises(ArtifactError, match=r"names no sha256 of x\.data"):
        open_runner(path)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_logits_without_bounds_are_no_numbers(number: float, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        _finite(np.array([[0.0, number]]), tmp_path)
    with pytest.raises(ModelError, match="not finite"):
        compute_metric("accuracy", np.array([[0.0, number], [1.0, 0.0]]), np.array([0, 1]))


def test_a_graph_of_another_operator_set_than_its_manifest_says_is_found(tmp_path: Path) -> None:
    from gatepress.verifying import _graph

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("input_ids", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["logits"])], "few", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "model.onnx")
    manifest = {"inputs": ["input_ids"], "opset": 18, "sha256": {}}
    _graph(tmp_path / "model.onnx", manifest)
    with pytest.raises(ArtifactError, match="opset is 18, its manifest says 17"):
        _graph(tmp_path / "model.onnx", manifest | {"opset": 17})


@pytest.mark.parametrize("number", [1.0, math.nan, math.inf])
def test_a_graph_alone_is_verified_by_what_it_computes(number: float, tmp_path: Path) -> None:
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1, 2], [1.0, number])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=1),
        helper.make_node("MatMul", ["sum", "weight"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "few", [ids], [logits], [weight, axes])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "few.onnx")
    found = verify(tmp_path / "few.onnx")
    assert found["ok"] is math.isfinite(number)
    if not found["ok"]:
        assert ["logits are not finite" in fault for fault in found["faults"]] == [True]


def test_a_tokenizer_that_no_manifest_binds_is_opened(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    """Earlier releases named the weights alone."""
    run = save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files)
    prune(run, tmp_path / "pruned", layout="inner")
    for name in ("run/gatepress_run.json", "pruned/gatepress_pruned.json"):
        file = tmp_path / name
        value = json.loads(file.read_text())
        value["sha256"] = {one: digest for one, digest in value["sha256"].items() if "token" not in one}
        file.write_text(json.dumps(value))
        assert verify(file.parent)["ok"]
        (file.parent / "tokenizer.json").write_text("{}")
        assert not verify(file.parent)["ok"]


@pytest.mark.parametrize("form", ["run", "pruned", "onnx"])
def test_a_file_that_may_not_be_read_is_told_as_that(
    form: str, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as one that is missing, as safetensors says, nor as a field that is wrong."""
    whole = Path.open

    def denied(self: Path, *args: Any, **options: Any) -> Any:
        if self.suffix in (".safetensors", ".onnx") or self.name == "tokenizer.json":
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    faults = verify(getattr(made, form))["faults"]
    assert faults
    for fault in faults:
        assert "Permission denied" in fault
        assert "field is missing" not in fault
