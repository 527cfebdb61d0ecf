"""int8: what is quantized, what it costs, and that nothing is kept where it costs too much."""

import hashlib
import json
import logging
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

import tiny
from forms import PROBE_ROWS, data_settings, save_run
from gatepress import export as exporting
from gatepress import quantize, tracing
from gatepress.cli.app import app
from gatepress.commands import commands_of
from gatepress.errors import DataError, MetricDropError, ModelError, ParityError, UsageError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.models import load_pruned
from gatepress.pruning import prune
from gatepress.quantize import quantize_file_
from gatepress.runtime import open_runner

UNSEEN = [(1, 2), (2, 1), (3, 11), (7, 40)]  # none of them is compared by export itself
PRODUCTS = 6 * tiny.LAYERS  # with a weight


@pytest.fixture(scope="module")
def made(tiny_model_dir, tiny_task_files, tmp_path_factory) -> SimpleNamespace:
    """One run in its forms, for the tests that only look at them."""
    root = tmp_path_factory.mktemp("int8")
    run = save_run(root / "run", tiny_model_dir("bert"), tiny_task_files)
    prune(run, root / "pruned")
    export(root / "pruned", root / "float32")
    result = export(root / "pruned", root / "onnx", quantize="int8")
    return SimpleNamespace(run=run, pruned=root / "pruned", float32=root / "float32", onnx=root / "onnx", result=result)


@pytest.fixture
def written(made, monkeypatch) -> SimpleNamespace:
    """The same, where the pruned directory's graph is not written again by torch, which takes seconds."""
    graph = made.float32 / "model.onnx"
    monkeypatch.setattr(exporting, "write_onnx", lambda _model, file, **_: shutil.copy(graph, file))
    return made


def files(directory: Path) -> dict[str, str]:
    """Return what lies below a directory, hidden files too, by content."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "gatepress_onnx.json").read_text())


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("roberta", "inner"),
        ("mpnet", "index"),
        ("distilbert", "inner"),
        ("deberta-v2", "index"),
        ("deberta-v2", "inner"),
    ],
)
def test_any_shape_is_near_what_torch_computes(
    family: str, layout, tiny_model_dir: Callable[[str], Path], tiny_task_files, tmp_path: Path
) -> None:
    """Without gatepress, on shapes that it did not try."""
    granularity = "matrix" if layout == "index" else "structured"
    run = save_run(tmp_path / "run", tiny_model_dir(family), tiny_task_files, granularity=granularity)
    prune(run, tmp_path / "pruned", layout=layout)
    result = export(tmp_path / "pruned", tmp_path / "onnx", quantize="int8")
    of_positions = 2 * tiny.LAYERS if family == "deberta-v2" else 0
    assert result["quantized"]["operators"]["MatMul"]["quantized"] == PRODUCTS + of_positions
    assert result["quantized"]["operators"]["Gemm"]["of"] == 2  # pooler and head
    assert result["quantized"]["embeddings"]
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    model = load_pruned(tmp_path / "pruned")
    apart, spread = [], []
    for rows, length in UNSEEN:
        batch = tiny.random_batch(family, rows, length, seed=rows)
        with torch.inference_mode():
            wanted = model(**batch).logits.numpy()
        got = session.run(["logits"], {name: batch[name].numpy() for name in names})[0]
        assert got.shape == wanted.shape
        apart.append(np.abs(got - wanted).ravel())
        spread.append(wanted.ravel())
    assert 0 < np.concatenate(apart).mean() < 0.25 * np.concatenate(spread).std()


def test_no_sum_of_two_products_leaves_16_bits(made) -> None:
    """Processors without VNNI cut off what does; word embeddings are not added up and use all 8 bits."""
    graph = onnx.load(made.onnx / "model.onnx").graph
    values = {one.name: one for one in graph.initializer}

    def largest(name: str) -> int:
        return int(np.abs(onnx.numpy_helper.to_array(values[name]).astype(int)).max())

    products = [largest(node.input[1]) for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == PRODUCTS
    assert 2 * 255 * max(products) < 2**15
    words = next(node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    assert largest(words.input[0]) > 64


def test_result_and_manifest_say_what_is_quantized(made) -> None:
    quantized = made.result["quantized"]
    assert quantized["operators"] == {
        "MatMul": {"quantized": PRODUCTS, "of": PRODUCTS + 2 * tiny.LAYERS},
        "Gemm": {"quantized": 0, "of": 2},
        "Gather": {"quantized": 1, "of": 4},
    }
    assert (quantized["weight_type"], quantized["per_channel"], quantized["embeddings"]) == ("int8", True, True)
    assert (made.result["quantize"], made.result["dtype"]) == ("int8", "int8")
    assert made.result["size_bytes"] == (made.onnx / "model.onnx").stat().st_size < made.result["size_bytes_fp32"]
    manifest = manifest_of(made.onnx)
    assert all(manifest[key] == value for key, value in made.result.items() if key != "output_dir")
    assert json.loads((made.pruned / "gatepress_pruned.json").read_text())["data"] == manifest["data"]


def test_only_what_was_chosen_is_in_int8(made) -> None:
    graph = onnx.load(made.onnx / "model.onnx").graph
    weights = {one.name: one for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            assert weights[node.input[1]].data_type == onnx.TensorProto.INT8
            assert weights[node.input[3]].dims == weights[node.input[1]].dims[1:]  # a scale for each output
    looked_up = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in weights]
    kinds = {node.input[1]: weights[node.input[0]].data_type for node in looked_up}
    assert kinds["input_ids"] == onnx.TensorProto.UINT8
    assert kinds["token_type_ids"] == onnx.TensorProto.FLOAT
    assert not graph.value_info
    assert not made.result["operators"].get("SkipLayerNormalization")  # slower than what it replaces
    fused = made.result["fused_operators"]
    assert fused["DynamicQuantizeMatMul"] + fused["MatMulIntegerToFloat"] == PRODUCTS
    assert fused["FusedMatMul"] == fused["Gelu"] == tiny.LAYERS


def test_metric_before_and_after_is_that_of_evaluate(made) -> None:
    before, after = evaluate(made.pruned), evaluate(made.onnx)
    assert (before["dtype"], after["dtype"]) == ("float32", "int8")
    assert made.result["metric_name"] == after["metric_name"] == "accuracy"
    assert made.result["metric_value_fp32"] == before["metric_value"]
    assert made.result["metric_value"] == after["metric_value"]
    assert made.result["metric_drop"] == before["metric_value"] - after["metric_value"]
    assert made.result["examples"] == after["examples"]


def test_differences_of_logits_are_those_on_real_and_on_random_rows(made, tmp_path: Path) -> None:
    apart = made.result["quantized"]["logit_diff"]
    assert apart["probe"]["rows"] == 32  # the first validation rows: a pruned directory keeps none
    for kind in ("random", "probe"):
        assert 0 < apart[kind]["mean"] < apart[kind]["max"] < math.inf
    assert made.result["max_abs_logit_diff"] <= 1e-4  # of the float32 graph
    result = export(made.run, tmp_path / "onnx", quantize="int8")
    assert result["quantized"]["logit_diff"]["probe"]["rows"] == PROBE_ROWS  # those of the run


def test_dtype_is_known_of_every_form(made, tmp_path: Path) -> None:
    assert manifest_of(made.float32)["dtype"] == "float32"
    shutil.copy(made.float32 / "model.onnx", tmp_path / "alone.onnx")
    for target in (made.run, made.pruned, made.float32, tmp_path / "alone.onnx"):
        assert open_runner(target).dtype == "float32"
    assert open_runner(made.onnx).dtype == "int8"
    shutil.copy(made.onnx / "model.onnx", tmp_path / "bare.onnx")
    assert open_runner(tmp_path / "bare.onnx").dtype == "int8"  # as its graph says: no manifest does


def test_same_source_gives_the_same_bytes(made, tmp_path: Path) -> None:
    assert export(made.pruned, tmp_path / "again", quantize="int8")["metric_value"] == made.result["metric_value"]
    assert files(tmp_path / "again") == files(made.onnx)


def test_weights_in_a_file_of_their_own_stay_there(made, tmp_path: Path, monkeypatch, capfd) -> None:
    """And the quantizer says not a word, nor leaves a handler that lets others speak."""
    monkeypatch.setattr(tracing, "EXTERNAL_DATA_BYTES", 0)
    handlers = list(logging.getLogger().handlers)
    result = export(made.pruned, tmp_path / "onnx", quantize="int8")
    assert logging.getLogger().handlers == handlers
    said = capfd.readouterr()
    assert said.out == ""
    assert "pre-processing" not in said.err
    assert set(manifest_of(tmp_path / "onnx")["sha256"]) >= {"model.onnx", "model.onnx.data"}
    assert result["size_bytes"] < result["size_bytes_fp32"]
    opened = open_runner(tmp_path / "onnx")
    assert opened.size_bytes == result["size_bytes"]
    batch = {name: value.numpy() for name, value in tiny.random_batch("bert").items()}
    np.testing.assert_array_equal(opened.logits(batch), open_runner(made.onnx).logits(batch))


# --- rows that cannot be had ---------------------------------------------------------------------


def test_a_model_that_names_no_rows_is_not_measured(tiny_classifier_dir, tmp_path: Path, caplog) -> None:
    source = tiny_classifier_dir("bert", 3)
    result = export(source, tmp_path / "onnx", quantize="int8")
    assert [result[key] for key in ("metric_name", "metric_value", "metric_value_fp32", "metric_drop")] == [None] * 4
    assert result["quantized"]["logit_diff"]["probe"] is None
    rows = r"does not say what to measure on; give --task NAME or --validation-file FILE"
    assert rows in caplog.text
    with pytest.raises(UsageError, match=rows):
        export(source, tmp_path / "limited", quantize="int8", max_metric_drop=0.1)
    with pytest.raises(UsageError, match=rows):
        export(source, tmp_path / "limited", quantize="int8", data={"max_validation_samples": 4})
    assert not (tmp_path / "limited").exists()


def test_what_a_model_from_elsewhere_was_measured_on_is_kept(
    tiny_classifier_dir, tiny_task_files, tmp_path: Path
) -> None:
    result = export(
        tiny_classifier_dir("bert", 2), tmp_path / "onnx", quantize="int8", data=data_settings(tiny_task_files)
    )
    again = evaluate(tmp_path / "onnx")
    assert again["metric_value"] == result["metric_value"]
    assert again["examples"] == result["examples"]


def test_rows_that_are_gone_are_told(written, tmp_path: Path, caplog) -> None:
    shutil.copytree(written.pruned, tmp_path / "pruned")
    path = tmp_path / "pruned" / "gatepress_pruned.json"
    manifest = json.loads(path.read_text())
    manifest["data"]["validation_file"] = str(tmp_path / "gone.csv")
    path.write_text(json.dumps(manifest))
    assert export(tmp_path / "pruned", tmp_path / "onnx", quantize="int8")["metric_value"] is None
    assert "gone.csv: no such file" in caplog.text
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        export(tmp_path / "pruned", tmp_path / "limited", quantize="int8", max_metric_drop=0.1)


def test_rows_from_elsewhere_stand_in_and_can_be_found_again(written, tiny_task_files, tmp_path: Path) -> None:
    """In the shell, on a machine that has not the rows of the training."""
    shutil.copyfile(tiny_task_files.validation, tmp_path / "here.csv")
    columns = ["--text-column", tiny_task_files.text_column, "--label-column", tiny_task_files.label_column]
    data = ["--validation-file", str(tmp_path / "here.csv"), *columns, "--max-validation-samples", "5"]
    line = ["export", str(written.pruned), "--quantize", "int8", *data, "-o", str(tmp_path / "onnx"), "--json"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["examples"] == 5
    manifest = manifest_of(tmp_path / "onnx")
    assert (
        manifest["data"] == json.loads((written.pruned / "gatepress_pruned.json").read_text())["data"]
    )  # what it was trained on, as ever
    assert shlex.join(data) in commands_of(manifest, "onnx")[-1]


# --- what costs too much -------------------------------------------------------------------------


@pytest.fixture
def worse(monkeypatch) -> None:
    """Every second measurement, that of int8, comes out at 0.75 after 0.875."""
    values = iter([0.875, 0.75] * 4)

    def measure(*_args: Any, **_options: Any) -> dict[str, Any]:
        return {"metric_name": "accuracy", "metric_value": next(values), "examples": 8}

    monkeypatch.setattr(exporting, "evaluate_runner", measure)


@pytest.mark.usefixtures("worse")
def test_a_drop_above_the_limit_keeps_nothing_and_harms_nothing(written, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "gatepress_onnx.json").write_text("{}")
    before = files(tmp_path)
    line = ["export", str(written.pruned), "--quantize", "int8", "--max-metric-drop", "0.1", "--json"]
    for output in (["-o", "new/onnx"], ["-o", "earlier", "--force"]):
        result = CliRunner().invoke(app, [*line, *output])
        assert result.exit_code == 1, result.output
        told = json.loads(result.stdout)["error"]
        assert told["type"] == "MetricDropError"
        for part in ("0.7500 in int8", "0.8750 in float32", "drop of 0.1250", "--max-metric-drop 0.1;", "nothing was"):
            assert part in told["message"]
        assert files(tmp_path) == before


@pytest.mark.usefixtures("worse")
def test_a_drop_up_to_the_limit_is_kept(written, tmp_path: Path) -> None:
    assert export(written.pruned, tmp_path / "onnx", quantize="int8", max_metric_drop=0.125)["metric_drop"] == 0.125
    with pytest.raises(MetricDropError):
        export(written.pruned, tmp_path / "none", quantize="int8", max_metric_drop=0)


def test_no_drop_is_within_a_limit_of_nothing(written, tmp_path: Path, monkeypatch) -> None:
    def same(*_args: Any, **_options: Any) -> dict[str, Any]:
        return {"metric_name": "accuracy", "metric_value": 0.5, "examples": 8}

    monkeypatch.setattr(exporting, "evaluate_runner", same)
    assert export(written.pruned, tmp_path / "onnx", quantize="int8", max_metric_drop=0)["metric_drop"] == 0


def test_logits_that_are_no_numbers_are_refused(written, tmp_path: Path, monkeypatch) -> None:
    def spoil(file: Path) -> dict[str, Any]:
        model = onnx.load(file)
        for one in model.graph.initializer:
            if one.name.endswith("LayerNorm.bias"):
                one.CopyFrom(onnx.numpy_helper.from_array(np.full(one.dims, np.nan, np.float32), one.name))
        onnx.save(model, file)
        return {}

    monkeypatch.setattr(exporting, "quantize_file_", spoil)
    with pytest.raises(ParityError, match="not finite numbers; nothing was written"):
        export(written.pruned, tmp_path / "onnx", quantize="int8")
    assert not list(tmp_path.iterdir())


def test_products_that_stay_as_they_were_are_an_error(written, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quantize, "quantize_dynamic", lambda source, target, **_: shutil.copyfile(source, target))
    with pytest.raises(ModelError, match=r"0 of \d+ products came out in int8"):
        export(written.pruned, tmp_path / "onnx", quantize="int8")
    assert not list(tmp_path.iterdir())


# --- wrong requests, and graphs that cannot be quantized -----------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "int4"], "--quantize"),
        (["--task", "sst2"], "data options say what the metric of --quantize int8 is measured on"),
        (["--max-metric-drop", "0.1"], "--max-metric-drop limits what --quantize costs; give --quantize int8 with it"),
        (
            ["--quantize", "int8", "--max-metric-drop=-0.1"],
            "--max-metric-drop is -0.1, expected 0 or a positive number",
        ),
        (["--quantize", "int8", "--max-metric-drop", "nan"], "--max-metric-drop is nan, expected 0 or a positive"),
        (["--quantize", "int8", "--max-metric-drop", "inf"], "--max-metric-drop is inf, expected 0 or a positive"),
    ],
)
def test_options_that_make_no_sense(options, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", "no-such-model", *options, "-o", "out", "--json"])
    assert result.exit_code == 2, result.output
    assert message in json.loads(result.stdout)["error"]["message"]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_library_call_is_checked_too() -> None:
    with pytest.raises(UsageError, match="--quantize is 'int4', expected int8"):
        export("no-such-model", Path("out"), quantize="int4")


def graph_of(node: onnx.NodeProto, path: Path, **values: np.ndarray) -> Path:
    """Write a graph of one node from x [1, n, 4] to y."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, "n", 4]) for name in "xy"]
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = onnx.helper.make_graph([node], "one", ends[:1], ends[1:], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_file_may_be_quantized_in_its_place(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    file = graph_of(onnx.helper.make_node("MatMul", ["x", "w"], ["y"]), tmp_path / "one.onnx", w=weight)
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    opened = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert quantize_file_(file)["operators"]["MatMul"] == {"quantized": 1, "of": 1}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], opened.run(None, {"x": x})[0], atol=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]


def test_a_graph_without_weights_to_quantize_is_refused(tmp_path: Path) -> None:
    file = graph_of(onnx.helper.make_node("Relu", ["x"], ["y"]), tmp_path / "one.onnx")
    with pytest.raises(ModelError, match="no matrix product with a float32 weight"):
        quantize_file_(file)


def test_what_onnxruntime_cannot_quantize_is_one_line(tmp_path: Path, monkeypatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("an operator is unknown\nand more")

    monkeypatch.setattr(quantize, "quantize_dynamic", fail)
    weight = np.ones((4, 4), np.float32)
    file = graph_of(onnx.helper.make_node("MatMul", ["x", "w"], ["y"]), tmp_path / "one.onnx", w=weight)
    with pytest.raises(ModelError, match=r"cannot quantize the graph \(an operator is unknown and more\)"):
        quantize_file_(file)
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]
