"""A run stays with the commit of the hub that it was trained on, whatever is put there later."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import TaskFiles
from forms import data_settings
from gatepress import sweep, training
from gatepress.checkpoint import load_run, read_run
from gatepress.commands import commands_of
from gatepress.config import TrainSettings
from gatepress.errors import ArtifactError, HubError
from gatepress.hub import commit_of, locate_model
from gatepress.inspecting import provenance
from gatepress.pruning import prune
from gatepress.recovery import prune_each
from gatepress.runtime import open_runner

NAME = "someone/encoder"
FIRST, SECOND = "1" * 40, "2" * 40


class Cache:
    """A cache of the hub, in which the branch `main` of one model moves."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.base = root / f"models--{NAME.replace('/', '--')}", base

    def push(self, commit: str, scale: float) -> Path:
        """Add a commit whose weights are those of the base times `scale`; from now on it is what main means."""
        directory = self.root / "snapshots" / commit
        shutil.copytree(self.base, directory)
        weights = directory / "model.safetensors"
        save_file({name: value * scale for name, value in load_file(weights).items()}, weights, {"format": "pt"})
        (self.root / "refs").mkdir(exist_ok=True)
        (self.root / "refs" / "main").write_text(commit, encoding="utf-8")
        return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[[str], Path]) -> Cache:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    cache = Cache(tmp_path / "cache", tiny_model_dir("bert"))
    cache.push(FIRST, 1.0)
    return cache


@pytest.fixture
def settings(tiny_task_files: TaskFiles) -> TrainSettings:
    data = replace(data_settings(tiny_task_files), max_train_samples=32, max_validation_samples=24)
    return TrainSettings(data=data, model=NAME, lora_rank=2, epochs=1, max_length=24, device="cpu")


def test_what_a_run_can_do_it_can_after_its_base_was_replaced(cache: Cache, settings: TrainSettings, tmp_path: Path):
    run = tmp_path / "run"
    training.train(settings, run)
    before = open_runner(str(run)).model.state_dict()
    cache.push(SECOND, 2.0)
    assert read_run(run).settings.commit == FIRST
    after = open_runner(str(run)).model.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    prune(run, tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned/gatepress_pruned.json").read_text())["base"] == {
        "model": NAME,
        "revision": FIRST,
    }
    prune_each(run, {0.5: tmp_path / "smaller"}, recover_epochs=1)
    training.train(replace(settings, start=str(run), sparsity=0.5), tmp_path / "further")
    assert read_run(tmp_path / "further").settings.commit == FIRST
    training.train(settings, tmp_path / "anew")
    assert read_run(tmp_path / "anew").settings.commit == SECOND


def test_a_directory_of_its_name_is_not_in_the_way(cache: Cache, settings: TrainSettings, tmp_path: Path):
    training.train(settings, tmp_path / "run")
    assert cache.root.is_dir()
    (tmp_path / NAME).mkdir(parents=True)
    load_run(tmp_path / "run")


def test_a_stopped_training_goes_on_from_its_own_base(
    cache: Cache, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    longer = replace(settings, epochs=2)
    training.train(longer, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(training, "_end_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train(longer, tmp_path / "run")
    cache.push(SECOND, 2.0)
    training.resume(tmp_path / "run")
    whole, run = (load_file(path / read_run(path).tensors["file"]) for path in (tmp_path / "whole", tmp_path / "run"))
    assert all(value.equal(run[name]) for name, value in whole.items())


def test_a_sweep_is_of_one_commit(
    cache: Cache, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also if its owner replaces the model between two of its trainings, or before seeds are added."""
    monkeypatch.setattr(sweep, "train_apart", sweep.train_or_resume)
    asked = partial(sweep.run, settings, tmp_path / "sweep", methods=["gates+lora"], sparsities=[0.0])
    timed: dict[str, Any] = {"target": "torch-cpu", "batch_sizes": [1], "seq_lens": [8], "repetitions": 1}
    asked(**timed)
    cache.push(SECOND, 2.0)
    asked(**timed, seeds=2)
    found = {path.name: read_run(path).settings.commit for path in (tmp_path / "sweep/runs").iterdir()}
    assert found == {"gates+lora-s0-seed0": FIRST, "gates+lora-s0-seed1": FIRST}


def test_a_run_that_names_no_commit_finds_what_the_hub_has(cache: Cache, settings: TrainSettings, tmp_path: Path):
    """Those of releases up to 0.46."""
    training.train(settings, tmp_path / "run")
    path = tmp_path / "run/gatepress_run.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["commit"]
    path.write_text(json.dumps(manifest))
    load_run(tmp_path / "run")
    cache.push(SECOND, 2.0)
    with pytest.raises(ArtifactError, match="was trained on other weights of 'someone/encoder'"):
        load_run(tmp_path / "run")


def test_a_commit_that_is_nowhere_is_told(cache: Cache, settings: TrainSettings, tmp_path: Path):
    training.train(settings, tmp_path / "run")
    cache.push(SECOND, 2.0)
    shutil.rmtree(cache.root / "snapshots" / FIRST)
    with pytest.raises(HubError, match="the model that it was trained on is missing; someone/encoder: not cached here"):
        load_run(tmp_path / "run")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", [NAME, f"{NAME}@main"])
def test_commands_ask_for_the_commit(settings: TrainSettings, tmp_path: Path, name: str):
    training.train(replace(settings, model=name), tmp_path / "run")
    manifest = read_run(tmp_path / "run").to_json()
    assert provenance(manifest)["revision"] == FIRST
    [line] = commands_of(manifest, "run")
    assert f" --model {NAME} --revision {FIRST} " in line
    assert "--commit" not in line


def test_only_names_of_the_hub_have_a_commit(cache: Cache):
    snapshot = locate_model(NAME)
    assert commit_of(NAME, snapshot) == FIRST
    assert commit_of(f"{NAME}@main", snapshot) == FIRST
    assert commit_of(str(snapshot), snapshot) is None
    assert commit_of("demo", cache.base) is None
    assert locate_model(f"{NAME}@main", commit=FIRST) == snapshot
