"""The example pipeline of the documentation, from nothing to a passed end and to each gate that fails."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import forks

PIPELINE = Path(__file__).parents[1] / "docs/pipeline.sh"


@pytest.fixture(scope="module")
def environment(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    files = tiny_task_files
    data = f"--train-file {files.train} --validation-file {files.validation} --text-column {files.text_column}"
    asked = {
        "MODEL": str(tiny_model_dir("bert")),
        "DATA": f"{data} --label-column {files.label_column}",
        "TRAIN": "--epochs 4 --batch-size 8 --max-length 32 --device cpu --learning-rate 2e-3",
        "MAX_DROP": "1",
        "MAX_INT8": "1",
        "MIN_SPEED": "0.01",  # a tiny model has no time to gain
    }
    with forks.serving(tmp_path_factory.mktemp("b")) as shell:
        yield {**shell, **asked}


def run(environment: dict[str, str], out: Path, **limits: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PIPELINE], env={**environment, "OUT": str(out), **limits}, capture_output=True, text=True, check=False
    )


def test_it_passes_and_fails_at_the_gate_that_is_not_met(environment: dict[str, str], tmp_path: Path) -> None:
    passed = run(environment, tmp_path / "passed")
    assert passed.returncode == 0, passed.stderr
    assert passed.stderr.splitlines()[-1] == f"passed: deploy {tmp_path}/passed/onnx/model.onnx"
    assert passed.stdout == ""
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "passed").glob("*.json")}
    assert set(results) == {"full", "press", "prune", "dense", "export", "quality", "speed"}
    assert results["press"]["closed_fraction"] == pytest.approx(0.5, abs=0.005)
    assert results["quality"]["metric_value_against"] == results["full"]["metric_value"]
    assert results["quality"]["metric_value"] == results["export"]["metric_value"]

    # What is there is not done again.
    (tmp_path / "passed/speed.json").unlink()
    slow = run(environment, tmp_path / "passed", MIN_SPEED="1000")
    assert slow.returncode == 1
    assert [line.partition(":")[0] for line in slow.stderr.splitlines()] == ["speed", "error"]
    assert "--fail-under" in slow.stderr

    # 97 % of the gates closed by a training that is too short to recover.
    for name in ("press", "prune", "export", "quality"):
        (tmp_path / f"passed/{name}.json").unlink()
    for name in ("run", "pruned", "onnx"):
        shutil.rmtree(tmp_path / "passed" / name)
    worse = run(environment, tmp_path / "passed", SPARSITY="0.97", MAX_DROP="0")
    assert worse.returncode == 1
    assert "expected at most --max-metric-drop 0" in worse.stderr.splitlines()[-1]
    assert not (tmp_path / "passed/quality.json").exists()


def test_int8_that_costs_too_much_ends_it(environment: dict[str, str], tmp_path: Path) -> None:
    """With a `gatepress` that answers at once, and refuses that one step as the real one does."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin/gatepress"
    stub.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--quantize*--max-metric-drop\\ 0.004*) echo "error: a drop" >&2; exit 1;; esac\n'
        'echo "{}"\n'
    )
    stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
    ended = run({**environment, "PATH": path}, tmp_path / "out", MAX_INT8="0.004")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: a drop"
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {"full.json", "press.json", "prune.json", "dense.json", "export.json.new"}
