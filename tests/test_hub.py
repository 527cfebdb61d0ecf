"""A model's name becomes a directory with safetensors, or one clear line."""

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from transformers import PreTrainedModel

from conftest import TaskFiles
from forms import save_run
from gatepress.config import DataSettings
from gatepress.errors import GatepressError, HubError, ModelError, OutputError, UsageError
from gatepress.hub import locate_model
from gatepress.pruning import prune
from gatepress.runtime import open_runner
from gatepress.tasks.sources import load_rows


def model_directory(path: Path, weights: str = "model.safetensors", config: str = '{"model_type": "bert"}') -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(config, encoding="utf-8")
    (path / weights).write_bytes(b"weights")
    return path


def refused(name: str, kind: type[GatepressError], revision: str | None = None) -> str:
    with pytest.raises(kind) as caught:
        locate_model(name, revision)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_local_directory_is_itself(tmp_path: Path):
    directory = model_directory(tmp_path / "model")
    assert locate_model(str(directory)) == directory


def test_a_home_directory_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = model_directory(tmp_path / "model")
    assert locate_model("~/model") == directory


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str):
    directory = model_directory(tmp_path / "model", weights=name)
    message = refused(str(directory), ModelError)
    assert "pickles" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [("{", "not readable as JSON"), ("[]", "got list"), ("[" * 100_000, "not readable as JSON")],
)
def test_a_configuration_that_is_none(tmp_path: Path, config: str, expected: str):
    directory = model_directory(tmp_path / "model", config=config)
    assert expected in refused(str(directory), ModelError)


def test_directories_that_are_no_model(tmp_path: Path):
    assert "has no config.json" in refused(str(tmp_path), ModelError)
    assert "is not there" in refused(str(tmp_path / "gone"), ModelError)
    assert "is not there" in refused("./gone", ModelError)
    assert "is not there" in refused("models/of/mine", ModelError)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert "has no *.safetensors" in refused(str(tmp_path), ModelError)
    assert "is a file" in refused(str(tmp_path / "config.json"), ModelError)


def test_a_revision_belongs_to_the_hub(tmp_path: Path):
    directory = model_directory(tmp_path / "model")
    assert "drop --revision" in refused(str(directory), UsageError, revision="main")
    assert "drop --revision" in refused("demo", UsageError, revision="main")


def test_the_hub_out_of_reach_is_told_soon_and_names_the_ways_out():
    started = time.monotonic()
    message = refused("somebody/some-model", HubError)
    assert time.monotonic() - started < 15
    for way in ("a directory that is here", "demo", "HF_HOME"):
        assert way in message


def test_a_cached_copy_serves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--somebody--some-model"
    directory = model_directory(root / "snapshots" / ("1" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("1" * 40)
    assert locate_model("somebody/some-model").resolve() == directory.resolve()


def test_what_is_fetched_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A download may take minutes."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def download(repo_id: str, **_options: Any) -> str:
        return str(model_directory(cache / "models--somebody--some-model" / "snapshots" / repo_id.partition("/")[0]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with caplog.at_level("INFO", "gatepress"):
        locate_model("somebody/some-model")
    assert caplog.messages == [f"somebody/some-model: asking the hub for it; what comes is kept in {cache}"]
    caplog.clear()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_a, **_o: str(next(cache.glob("models--*/snapshots/*")))
    )
    with caplog.at_level("INFO", "gatepress"):
        locate_model("somebody/some-model")
    assert not caplog.messages


def test_no_pickle_no_code_and_of_folders_only_parts_of_an_embedder_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = model_directory(tmp_path / "snapshot")
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("somebody/some-model", "v1") == directory
    files = ["config.json", "model.safetensors", "vocab.txt", "merges.txt", "spiece.model", "1_Pooling/config.json"]
    unwanted = ["pytorch_model.bin", "tf_model.h5", "modeling.py", "onnx/config.json", "a/model.safetensors"]

    def kept() -> list[str]:
        patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
        return list(huggingface_hub.utils.filter_repo_objects(files + unwanted, **patterns))

    assert kept() == files
    assert (asked["repo_id"], asked["revision"]) == ("somebody/some-model", "v1")
    locate_model("somebody/some-model", code=True)
    assert kept() == [*files, "modeling.py"]


@pytest.mark.parametrize(
    ("name", "revision", "asked"),
    [("a/b", None, None), ("a/b", "v1", "v1"), ("a/b@v1", None, "v1"), ("b@refs/pr/3", None, "refs/pr/3")],
)
def test_a_hub_id_may_name_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, revision: str | None, asked: str | None
):
    directory, calls = model_directory(tmp_path / "snapshot"), []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo_id, **options: calls.append((repo_id, options["revision"])) or str(directory),
    )
    assert locate_model(name, revision) == directory
    assert calls == [(name.partition("@")[0], asked)]


def test_a_revision_is_named_once(tmp_path: Path):
    assert "names a revision of the hub twice" in refused("a/b@v1", UsageError, revision="v2")
    assert "by @ and says none" in refused("a/b@", UsageError)
    assert "--revision is empty" in refused("a/b", UsageError, revision="")
    directory = model_directory(tmp_path / "a@b")
    assert locate_model(str(directory)) == directory


ANSWER = SimpleNamespace(headers={}, request=None)


def answered(status: int) -> Exception:
    """Return what the client raises if the hub gives such an answer and the cache has no copy."""
    error = errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
    answer = SimpleNamespace(headers={}, request=None, status_code=status)
    error.__cause__ = errors.HfHubHTTPError(str(status), response=answer)
    return error


class ReadError(Exception):
    """What the client's transport raises of a connection that ended early."""


@pytest.mark.parametrize(
    ("raised", "kind", "expected"),
    [
        (errors.RepositoryNotFoundError("404", response=ANSWER), ModelError, "check the spelling"),
        (errors.GatedRepoError("401", response=ANSWER), ModelError, "HF_TOKEN"),
        (errors.RevisionNotFoundError("404", response=ANSWER), ModelError, "no revision 'v1'"),
        (errors.HFValidationError("name"), ModelError, "check the spelling"),
        (errors.HfHubHTTPError("500", response=ANSWER), HubError, "point HF_HOME at a cache"),
        (answered(403), HubError, "the hub answers HTTP 403; set HF_TOKEN to a token that may read it, or check the"),
        (answered(429), HubError, "the hub answers HTTP 429; wait, or set HF_TOKEN: it has had too many requests, or"),
        (answered(503), HubError, "not cached here and the hub answers HTTP 503; try again later, or check the path"),
        (ReadError("cut"), HubError, "the transfer from the hub broke off; run the same command again"),
        (OSError("Consistency check failed: 2 of 4"), HubError, "the transfer from the hub broke off; run the same"),
        (errors.OfflineModeIsEnabled("offline"), HubError, "the hub cannot be reached; check the path"),
        (errors.OfflineModeIsEnabled("offline"), HubError, "point HF_HOME at a cache"),
        (TimeoutError("slow"), HubError, "point HF_HOME at a cache"),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "HF_HOME"),
        (PermissionError(errno.EPERM, "Operation not permitted"), OutputError, "HF_HOME"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), OutputError, "HF_HOME"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_answers_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, raised, kind, expected):
    def download(*_args, **_options):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refused("somebody/some-model", kind, revision="v1")
    assert message.startswith("somebody/some-model: ")
    assert expected in message


def test_a_name_that_is_no_id_is_refused():
    assert "check the spelling" in refused("no such model!", ModelError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "--model is empty, expected a directory, owner/name on the hub, or demo"),
        (" ", "--model is empty"),
        ("@v1", "@v1: names a revision and no model, expected owner/name@v1"),
        ("https://hub.example/owner/name", "https://hub.example/owner/name: is an address, expected a directory"),
    ],
)
def test_what_names_no_model_is_told(name: str, expected: str):
    assert refused(name, UsageError).startswith(expected)


def test_rows_that_a_mirror_lacks_have_other_ways(monkeypatch: pytest.MonkeyPatch):
    def download(*_args: Any, **_options: Any) -> None:
        raise errors.RepositoryNotFoundError("404", response=ANSWER)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HubError, match="the hub has no such dataset, or gives it to others only; use --data-dir"):
        load_rows(DataSettings(task="rte"))


def test_a_broken_copy_in_the_cache_can_be_fetched_again(tmp_path: Path):
    directory = model_directory(tmp_path / "models--a--b" / "snapshots" / ("1" * 40))
    with pytest.raises(ModelError, match=f"; delete {tmp_path}/models--a--b, and it is fetched again"):
        open_runner(str(directory))


def test_only_pickles_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text(json.dumps({}), encoding="utf-8")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_o: str(tmp_path))
    message = refused("somebody/some-model", ModelError)
    assert message.startswith("somebody/some-model: has no *.safetensors")


def test_kernels_of_the_hub_are_never_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles
):
    """transformers fetches them by default since 5.25 and runs them on GPUs; they are code."""
    asked: list[Any] = []
    load = PreTrainedModel.from_pretrained.__func__

    def spy(cls: type[PreTrainedModel], *args: Any, **options: Any) -> Any:
        asked.append(options.get("use_kernels"))
        return load(cls, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))
    base = tiny_model_dir("bert")
    run = save_run(tmp_path / "run", base, tiny_task_files)
    prune(run, tmp_path / "pruned")
    for target in (base, run, tmp_path / "pruned"):
        asked.clear()
        open_runner(str(target))
        assert asked, target
        assert all(used is False for used in asked), target
