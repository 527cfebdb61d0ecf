"""Pruned and ONNX directories keep what they answered when they were written, and `verify` asks them again."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import gatepress
import tiny
from forms import every_form
from gatepress.cli.app import app
from gatepress.errors import MissingExtraError, UsageError
from gatepress.expected import EXPECTED_FILE, write_expected
from gatepress.files import sha256_of
from gatepress.runtime import open_runner
from gatepress.verifying import verify

FORMS = ("pruned", "onnx", "int8")
BOUND = {"pruned": "gatepress_pruned.json", "onnx": "gatepress_onnx.json", "int8": "gatepress_onnx.json"}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tiny_model_dir, tiny_task_files, tmp_path_factory) -> SimpleNamespace:
    return every_form(tmp_path_factory.mktemp("expected"), tiny_model_dir("bert"), tiny_task_files)


@pytest.fixture
def copy(made: SimpleNamespace, tmp_path: Path) -> Callable[[str], Path]:
    return lambda form: shutil.copytree(getattr(made, form), tmp_path / form)


def sign(directory: Path, form: str, name: str) -> None:
    manifest = directory / BOUND[form]
    value = json.loads(manifest.read_text())
    value["sha256"][name] = sha256_of(directory / name)
    manifest.write_text(json.dumps(value))


@pytest.mark.parametrize("form", FORMS)
def test_a_directory_answers_as_when_it_was_written(made, form: str) -> None:
    found = verify(getattr(made, form))
    assert (found["faults"], found["skipped"]) == ([], [])
    assert 0 <= found["max_abs_logit_diff"] < 1e-6
    kept = load_file(getattr(made, form) / EXPECTED_FILE)
    logits = open_runner(getattr(made, form)).logits({name: kept[name].numpy() for name in kept if name != "logits"})
    np.testing.assert_allclose(logits, kept["logits"].numpy(), atol=1e-6)
    assert len(set(kept["attention_mask"].sum(1).tolist())) == len(logits)  # padding counts as well


def test_a_run_is_compared_when_it_is_pruned(made) -> None:
    assert verify(made.run)["max_abs_logit_diff"] is None


@pytest.mark.parametrize("form", FORMS)
def test_other_weights_are_found_however_signed(copy, form: str) -> None:
    """As a release of a package that computes something else would be: the files are whole, the answers are not."""
    path = copy(form)
    if form == "pruned":
        file = path / "model.safetensors"
        state = load_file(file)
        save_file({**state, "classifier.bias": state["classifier.bias"] + 1.0}, file, metadata={"format": "pt"})
    else:
        file = path / "model.onnx"
        model = onnx.load(file)
        (bias,) = (one for one in model.graph.initializer if one.name.endswith("classifier.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1), bias.name))
        onnx.save(model, file)
    sign(path, form, file.name)
    found = verify(path)
    (fault,) = found["faults"]
    assert "logits differ by 1.00e+00 from those it gave when it was written" in fault
    assert "\n" not in fault
    assert (found["ok"], found["max_abs_logit_diff"]) == (False, None)


def test_int8_may_differ_by_what_quantization_changed_and_no_more(copy) -> None:
    path = copy("int8")
    limit = json.loads((path / BOUND["int8"]).read_text())["quantized"]["logit_diff"]["random"]["max"]
    kept = load_file(path / EXPECTED_FILE)
    for part, ok in ((0.9, True), (1.1, False)):
        save_file({**kept, "logits": kept["logits"] + part * limit}, path / EXPECTED_FILE)
        sign(path, "int8", EXPECTED_FILE)
        assert verify(path)["ok"] is ok


@pytest.mark.parametrize("form", ["pruned", "onnx"])
def test_what_an_earlier_release_wrote_is_whole_and_the_rest_is_told(copy, form: str) -> None:
    path = copy(form)
    manifest = path / BOUND[form]
    value = json.loads(manifest.read_text())
    del value["sha256"][EXPECTED_FILE]
    manifest.write_text(json.dumps(value))
    (path / EXPECTED_FILE).unlink()
    found = verify(path)
    assert (found["ok"], found["max_abs_logit_diff"]) == (True, None)
    assert found["skipped"] == ["logits as when it was written: releases before 0.44 kept none"]


DAMAGE: dict[str, Callable[[Tensors], Tensors]] = {
    "no logits": lambda kept: {name: kept[name] for name in kept if name != "logits"},
    "no rows": lambda kept: {"logits": kept["logits"]},
    "empty": lambda kept: {name: value[:0] for name, value in kept.items()},
    "fewer": lambda kept: {**kept, "logits": kept["logits"][:1]},
    "one row": lambda kept: {**kept, "input_ids": kept["input_ids"][0]},
    "a word too far": lambda kept: {**kept, "input_ids": kept["input_ids"] + 10**6},
    "before the first word": lambda kept: {**kept, "input_ids": kept["input_ids"] - 10**6},
    "too many": lambda kept: {name: value.repeat(2, 1) for name, value in kept.items()},
    "few, too long": lambda kept: {name: value[:2].repeat(1, 600) for name, value in kept.items()},
    "too long": lambda kept: {name: value.repeat(1, 600) for name, value in kept.items()},
    "another mask": lambda kept: {**kept, "attention_mask": kept["attention_mask"][:, :5].contiguous()},
    "other types": lambda kept: {name: value.to(torch.bfloat16) for name, value in kept.items()},
    "no numbers": lambda kept: {**kept, "logits": kept["logits"] * float("nan")},
}


@pytest.mark.parametrize("form", ["pruned", "onnx"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_rows_that_were_damaged_are_a_fault(copy, form: str, damage: str) -> None:
    path = copy(form)
    save_file(DAMAGE[damage](load_file(path / EXPECTED_FILE)), path / EXPECTED_FILE)
    sign(path, form, EXPECTED_FILE)
    (fault,) = verify(path)["faults"]
    assert "\n" not in fault
    (path / EXPECTED_FILE).unlink()
    assert any("is missing, the directory is incomplete" in fault for fault in verify(path)["faults"])


def test_rows_are_as_long_as_a_model_takes(tmp_path: Path) -> None:
    model = tiny.build_classifier("bert", max_position_embeddings=8)
    asked: list[tuple[int, ...]] = []

    def answer(rows: Any) -> Any:
        asked.append(rows["input_ids"].shape)
        return np.zeros((3, 2), np.float32)

    write_expected(tmp_path, model, answer)
    assert asked == [(3, 8)]


@pytest.mark.parametrize("form", ["onnx", "int8"])
def test_openvino_is_asked_too(made, form: str) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    ran = CliRunner().invoke(app, ["verify", str(getattr(made, form)), "--runtime", "openvino", "--json"])
    found = json.loads(ran.stdout)
    assert (ran.exit_code, found["faults"]) == (0, [])
    assert 0 < found["max_abs_logit_diff"] < (1e-5 if form == "onnx" else 0.05)


@pytest.mark.parametrize("form", ["run", "pruned"])
def test_a_runtime_of_onnx_files_is_refused_elsewhere(made, form: str) -> None:
    with pytest.raises(UsageError, match="is no ONNX file; leave it out"):
        verify(getattr(made, form), runtime="openvino")
    ran = CliRunner().invoke(app, ["verify", str(getattr(made, form)), "--runtime", "openvino"])
    assert (ran.exit_code, len(ran.stderr.splitlines())) == (2, 1)
    with pytest.raises(UsageError, match="runtime is 'tensorrt'"):
        verify(made.onnx, runtime="tensorrt")


def test_a_runtime_that_is_not_installed_is_an_error_and_no_fault(made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "gatepress.in_openvino", raising=False)
    monkeypatch.delattr(gatepress, "in_openvino", raising=False)
    with pytest.raises(MissingExtraError, match=r"gatepress\[openvino\]"):
        verify(made.onnx, runtime="openvino")
