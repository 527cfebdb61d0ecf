"""The card of a pruned directory: numbers of its manifest, front matter that the hub reads, ways to load that work."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from forms import save_run, settings_for
from gatepress.card import card
from gatepress.config import DataSettings
from gatepress.pruning import prune
from gatepress.tasks import TASKS
from gatepress.training import train


@pytest.fixture(scope="module")
def pruned(tiny_model_dir: Any, tiny_task_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cards")
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.4, epochs=1), root / "run")
    prune(root / "run", root / "pruned")
    return root / "pruned"


@pytest.fixture
def manifest(pruned: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((pruned / "gatepress_pruned.json").read_text())
    return value


def front_matter(text: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return value


def test_the_card_comes_from_the_manifest_alone(pruned: Path, manifest: dict[str, Any]) -> None:
    assert (pruned / "README.md").read_text(encoding="utf-8") == card(manifest)


def test_the_numbers_are_those_of_the_manifest(manifest: dict[str, Any]) -> None:
    text, report, run = card(manifest), manifest["report"], manifest["run"]["report"]
    assert text.count(f"{run['metric_value']:.4f}") >= 2
    for number in ("dense_params", "total_params", "closed_gates", "total_gates"):
        assert f"{report[number]:,}" in text
    for fraction in ("asked_sparsity", "closed_fraction", "encoder_weights_removed"):
        assert f"{report[fraction]:.2%}" in text
    for known in (manifest["data_fingerprint"], *manifest["base_sha256"].values()):
        assert known in text


def test_the_hub_reads_the_front_matter(manifest: dict[str, Any]) -> None:
    front = front_matter(card(manifest))
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["gatepress", "pruned"]
    assert not {"license", "base_model", "datasets"} & set(front)  # a directory and files are no names of the hub
    (result,) = ModelCard(card(manifest)).data.eval_results or []
    assert result.metric_value == manifest["run"]["report"]["metric_value"]
    assert result.metric_type == "accuracy"


@pytest.mark.parametrize("task", [name for name in TASKS if name != "demo"])
def test_models_and_rows_of_the_hub_are_linked(manifest: dict[str, Any], task: str) -> None:
    manifest["task"] = TASKS[task].to_json()
    manifest["data"] = manifest["run"]["settings"]["data"] = DataSettings(task=task).__dict__
    manifest["base"] = {"model": "FacebookAI/roberta-base", "revision": "main"}
    front = front_matter(card(manifest))
    assert front["base_model"] == "FacebookAI/roberta-base"
    assert front["datasets"] == ["nyu-mll/glue"]
    assert front["model-index"][0]["results"][0]["dataset"]["config"] == task
    manifest["data"] = {**manifest["data"], "data_dir": "/home/me/glue"}
    manifest["run"]["settings"]["data"] = manifest["data"]
    text = card(manifest)
    assert "datasets" not in front_matter(text)
    assert "--data-dir glue" in text


@pytest.mark.parametrize(("name", "shown"), [("cola_s0.5-a", "cola_s0.5-a"), ("a *b* <i>", "`a *b* <i>`")])
def test_a_name_is_no_markup(manifest: dict[str, Any], name: str, shown: str) -> None:
    manifest["run"]["name"] = name
    text = card(manifest)
    assert f"\n# {shown}, pruned\n" in text
    assert front_matter(text)["model-index"][0]["name"] == f"{name}, pruned"


def test_no_place_of_this_machine_is_told(pruned: Path, manifest: dict[str, Any]) -> None:
    text = card(manifest)
    places = [manifest["base"]["model"], *(value for value in manifest["data"].values() if str(value).startswith("/"))]
    assert len(places) == 3
    assert [place for place in (*places, str(pruned.parent)) if str(place) in text] == []


def test_a_metric_that_was_not_measured_is_not_told(manifest: dict[str, Any]) -> None:
    manifest["asked"]["sparsity"] = 0.7
    text = card(manifest)
    assert "not measured" in text
    assert "--sparsity 0.7" in text
    assert "model-index" not in front_matter(text)


@pytest.mark.parametrize("layout", ["auto", "stock"])
def test_the_ways_to_load_work(layout: Any, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", tiny_model_dir("distilbert"), tiny_task_files)
    prune(run, tmp_path / "pruned", layout=layout)
    text = (tmp_path / "pruned/README.md").read_text(encoding="utf-8")
    ways = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(ways) == (2 if layout == "stock" else 3)
    script = "\n".join(ways).replace('"DIR"', repr(str(tmp_path / "pruned")))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "span"), [("calm", "`calm`"), ("<b>a`b*", "``<b>a`b*``"), ("`", "`` ` ``"), ("a, b | c", "`a, b | c`")]
)
def test_names_are_shown_as_they_are(manifest: dict[str, Any], name: str, span: str) -> None:
    manifest["task"]["label_names"] = [name, "wild"]
    assert f"Classes: {span}, `wild`." in card(manifest)
