"""OpenVINO computes exported graphs as ONNX Runtime does: the same answers, told in the same way."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import gatepress
import tiny
from forms import every_form
from gatepress.bench import endtoend, figures
from gatepress.bench.tables import conditions
from gatepress.cli.app import app
from gatepress.errors import DeviceError, MissingExtraError, UsageError
from gatepress.evaluation import evaluate
from gatepress.runtime import open_runner

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")

SMALL: dict[str, Any] = {"batch_sizes": [2], "seq_lens": [8], "repetitions": 2, "warmup": 0, "threads": 1}


@pytest.fixture(scope="module")
def made(tiny_model_dir, tiny_task_files, tmp_path_factory) -> SimpleNamespace:
    return every_form(tmp_path_factory.mktemp("openvino"), tiny_model_dir("bert"), tiny_task_files)


def batch(rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tiny.random_batch("bert", rows, length, seed=seed).items()}


def can(arithmetic: str) -> bool:
    return arithmetic in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_it_says_what_onnx_runtime_says(made) -> None:
    ours, theirs = open_runner(made.onnx, runtime="openvino"), open_runner(made.onnx)
    assert (ours.runtime, theirs.runtime) == ("openvino", "onnxruntime")
    for told in (
        *("name", "kind", "device", "tokenizer_dir", "size_bytes", "manifest", "dtype", "input_names", "label_names"),
        *("problem_type", "embeds", "num_labels", "max_tokens", "parameters", "output_name"),
    ):
        assert getattr(ours, told) == getattr(theirs, told), told
    assert ours.macs(3, 9) == theirs.macs(3, 9) > 0


def test_answers_are_the_same_in_float32_and_none_is_written_over(made) -> None:
    ours, theirs = open_runner(made.onnx, runtime="openvino"), open_runner(made.onnx)
    batches = [batch(3, 9), batch(3, 9, seed=1), batch(1, 2), batch(7, 40)]
    results = [ours.run(ours.prepare(one)) for one in batches]
    for one, result in zip(batches, results, strict=True):
        np.testing.assert_allclose(result, theirs.logits(one), atol=1e-5)
        np.testing.assert_array_equal(result, ours.logits(one))


def test_inputs_are_fitted(made) -> None:
    runner = open_runner(made.onnx, runtime="openvino")
    ids = batch()["input_ids"]
    full = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    bare = {"input_ids": ids.astype(np.int32), "special_tokens_mask": np.ones_like(ids)}
    np.testing.assert_array_equal(runner.logits(bare), runner.logits(full))


def test_int8_products_stay_what_they_are(made) -> None:
    ours, theirs = open_runner(made.int8, runtime="openvino", precision="bf16"), open_runner(made.int8)
    assert (ours.dtype, ours.takes_precision) == ("int8", False)
    wanted = theirs.logits(batch())
    assert np.abs(ours.logits(batch()) - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_float32_files_are_rounded_on_demand(made, precision: str, dtype: str) -> None:
    if not can(precision.upper()):
        pytest.skip(f"this CPU computes no {precision}")
    exact = open_runner(made.onnx, runtime="openvino")
    rounded = open_runner(made.onnx, runtime="openvino", precision=precision)
    assert (exact.dtype, rounded.dtype) == ("float32", dtype)
    wanted = exact.logits(batch())
    assert 0 < np.abs(rounded.logits(batch()) - wanted).max() < 0.1 * np.abs(wanted).max()
    assert rounded.logits(batch()).dtype == np.float32


def test_threads_are_those_of_torch(made) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runner = open_runner(made.onnx, runtime="openvino")
        assert runner.compiled.get_property("INFERENCE_NUM_THREADS") == 2
    finally:
        torch.set_num_threads(before)


def test_the_metric_is_that_of_onnx_runtime(made) -> None:
    ours, theirs = (evaluate(made.onnx, runtime=runtime) for runtime in ("openvino", "onnxruntime"))
    assert ours.pop("runtime") == "openvino"
    assert theirs.pop("runtime") == "onnxruntime"
    assert ours == theirs


def test_a_file_is_timed_once_in_each_runtime_and_precision(made) -> None:
    kinds = ["fp32", "bf16"] if can("BF16") else ["fp32"]
    targets = {"torch": made.pruned, "graph": made.onnx, "int8": made.int8}
    records = endtoend.run(targets, runtimes=["onnxruntime", "openvino"], precisions=kinds, **SMALL)
    assert [(one.name, one.runtime, one.dtype) for one in records if "bf16" not in one.name] == [
        ("torch", "torch", "float32"),
        ("graph", "onnxruntime", "float32"),
        ("graph openvino", "openvino", "float32"),
        ("int8", "onnxruntime", "int8"),
        ("int8 openvino", "openvino", "int8"),
    ]
    rounded = ["torch bf16", "graph openvino bf16"] if can("BF16") else []
    assert [one.name for one in records if one.dtype == "bfloat16"] == rounded
    assert {one.macs for one in records if one.runtime != "torch"} == {records[1].macs}
    figure = figures.draw(records, "svg").decode()
    assert all(name in figure for name in (">torch<", ">ONNX Runtime<", ">OpenVINO<"))
    assert f"openvino {openvino.__version__.partition('-')[0]}" in conditions(records)


def test_alone_it_needs_no_other_name(made) -> None:
    one = endtoend.run([made.onnx], runtimes=["openvino"], **SMALL)[0]
    assert (one.name, one.runtime) == ("onnx", "openvino")


def test_what_is_no_file_of_onnx_is_told(made) -> None:
    with pytest.raises(UsageError, match="--runtime chooses what computes ONNX files"):
        endtoend.run([made.pruned], runtimes=["openvino"], **SMALL)
    with pytest.raises(UsageError, match=r"--runtime is openvino, but .* is no ONNX file"):
        evaluate(made.pruned, runtime="openvino")
    with pytest.raises(UsageError, match="precision"):
        evaluate(made.int8, runtime="openvino", precision="bf16")
    with pytest.raises(UsageError, match="runtime"):
        open_runner(made.onnx, runtime="tensorrt")


def test_a_graphics_card_is_no_place_for_it(made, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="OpenVINO computes on the CPU here"):
        open_runner(made.onnx, runtime="openvino", device="cuda")
    assert open_runner(made.onnx, runtime="openvino", device="auto").device == "cpu"


def test_an_arithmetic_that_the_cpu_has_not_is_told(made, monkeypatch) -> None:
    from gatepress import in_openvino

    class Old:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(in_openvino.openvino, "Core", Old)
    with pytest.raises(DeviceError, match="computes no bf16 on this CPU, only FP32, INT8; use --precision fp32"):
        open_runner(made.onnx, runtime="openvino", precision="bf16")


def test_without_the_package_one_line_says_how_to_get_it(made, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "gatepress.in_openvino", raising=False)
    monkeypatch.delattr(gatepress, "in_openvino", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'gatepress\[openvino\]'"):
        open_runner(made.onnx, runtime="openvino")
    assert open_runner(made.onnx).runtime == "onnxruntime"


def test_commands_take_it(made) -> None:
    ran = CliRunner().invoke(app, ["evaluate", str(made.onnx), "--runtime", "openvino", "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["runtime"] == "openvino"
    for line in (
        ["bench", str(made.onnx), "--runtime", "tensorrt"],
        ["bench", str(made.pruned), "--runtime", "openvino"],
        ["bench", "--runtime", "openvino"],
        ["bench", str(made.run), "--alternatives", "--runtime", "openvino"],
    ):
        assert CliRunner().invoke(app, line).exit_code == 2, line
