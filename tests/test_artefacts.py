"""What an earlier release wrote is read for ever: directories under tests/artefacts, one for each format version.

Each was written by the command line of the release that began the version, on a tiny model; they are never written
again. `@HERE@` in a manifest stands for where they lie.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gatepress.config import TrainSettings
from gatepress.evaluation import evaluate
from gatepress.files import check_output
from gatepress.inspecting import inspect
from gatepress.models import read_tensors
from gatepress.pruning import prune
from gatepress.runtime import open_runner
from gatepress.training import resume, train
from gatepress.verifying import verify

HERE = Path(__file__).parent / "artefacts"
VERSIONS = sorted(path.name for path in HERE.iterdir())
RUN_OF = {  # whose probe rows the logits stand on
    "runs/structured": "structured",
    "runs/matrix": "matrix",
    "runs/heads": "heads",
    "runs/lora": "lora",
    "runs/stopped": "stopped",
    "pruned/inner": "structured",
    "pruned/index": "matrix",
    "onnx/fp32": "structured",
    "onnx/int8": "structured",
}


@pytest.fixture(scope="module", params=VERSIONS)
def old(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("old") / request.param
    shutil.copytree(HERE / request.param, directory)
    for path in directory.rglob("gatepress_*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("@HERE@", str(directory)), encoding="utf-8")
    return directory


@pytest.mark.parametrize("form", RUN_OF)
def test_logits_are_those_of_the_release_that_wrote_it(old, form):
    probe = read_tensors(old / "runs" / RUN_OF[form] / "probe.safetensors")
    logits = open_runner(old / form).logits({name: value.numpy() for name, value in probe.items()})
    wanted = np.array(json.loads((old / "logits.json").read_text())[form])
    tolerance = 0.05 if form.endswith("int8") else 1e-4  # roundings of 8 bits hang on the processor
    assert np.abs(logits - wanted).max() < tolerance


@pytest.mark.parametrize("form", RUN_OF)
def test_all_of_it_is_known_as_ours(old, form):
    check_output(old / form, force=True)  # which refuses to replace what others wrote


@pytest.mark.parametrize("form", RUN_OF)
def test_it_is_whole_and_can_be_described(old, form):
    assert verify(old / form)["ok"]
    assert inspect(old / form)["kind"] == form.split("/")[0].removesuffix("s")


@pytest.mark.parametrize("form", ["runs/structured", "pruned/inner", "onnx/fp32"])
def test_its_metric_is_measured_on_the_rows_that_it_names(old, form):
    assert evaluate(old / form)["metric_value"] == pytest.approx(
        json.loads((old / "runs/structured/gatepress_run.json").read_text())["report"]["metric_value"]
    )


@pytest.mark.parametrize("run", ["structured", "matrix", "heads"])
def test_a_run_is_pruned(old, run, tmp_path):
    report = prune(old / "runs" / run, tmp_path / "pruned")
    assert report["max_abs_logit_diff"] < 1e-4
    assert report["closed_fraction"] >= report["asked_sparsity"] == 0.5


def test_a_stopped_run_goes_on(old, tmp_path):
    run = shutil.copytree(old / "runs/stopped", tmp_path / "run")
    report = resume(run)
    assert report["closed_fraction"] == 0.5
    assert json.loads((run / "gatepress_run.json").read_text())["status"] == "finished"


def test_settings_mean_what_they_meant(old, tmp_path):
    settings = json.loads((old / "runs/structured/gatepress_run.json").read_text())["settings"]
    report = train(TrainSettings.from_json(settings), tmp_path / "again")
    assert report["closed_gates"] == 128
