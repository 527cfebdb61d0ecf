"""A run that is killed at any moment goes on to the very end that it would have come to."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from conftest import TaskFiles
from forms import settings_for
from gatepress import preparing, runwriter, training
from gatepress.checkpoint import read_run
from gatepress.cli.app import app
from gatepress.config import TrainSettings
from gatepress.embedding import write_modules
from gatepress.errors import ArtifactError, ModelError, OutputError
from gatepress.files import RUN_FILE, lock, read_json, release, replace_file
from gatepress.progress import NoProgress
from gatepress.pruning import prune
from gatepress.resume import uninterrupted
from gatepress.runwriter import RunWriter
from gatepress.tasks.sources import load_rows
from gatepress.training import resume, train

ModelDir = Callable[[str], Path]

EPOCH, STEPS = 8, 24  # 256 rows in batches of 32, three times
TIMES = ("train_seconds", "peak_memory_bytes", "output_dir", "curve")
WAYS = {
    "gates+lora": {},
    "penalty": {"method": "gates", "controller": "penalty", "granularity": "matrix"},
    "macs": {"budget": "macs", "precision": "bf16"},
    "distill": {"distill": True},
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "vera": {"method": "vera", "lora_rank": 8},
}


class KilledError(Exception):
    """Stands for SIGKILL: nothing of gatepress catches it."""


class StopAt(NoProgress):
    """Ends a training behind one of its steps."""

    def __init__(self, step, error=KilledError):
        self.step, self.error, self.now = step, error, 0

    def start(self, total, description):
        assert description == "training"
        self.now = STEPS - total

    def advance(self, steps=1, **_figures):
        self.now += steps
        if self.now == self.step:
            raise self.error


def stopped(settings: TrainSettings, output: Path, step: int, error: type[BaseException] = KilledError) -> Path:
    with pytest.raises(error):
        train(settings, output, progress=StopAt(step, error))
    return output


def told(directory: Path) -> dict[str, Any]:
    """Return all that a run directory says, without times."""
    manifest = json.loads((directory / RUN_FILE).read_text())
    curve = [{key: value for key, value in point.items() if key not in TIMES} for point in manifest["report"]["curve"]]
    report = {key: value for key, value in manifest["report"].items() if key not in TIMES}
    settings = {key: value for key, value in manifest["settings"].items() if key != "save_every"}
    return {**manifest, "report": report, "settings": settings, "curve": curve, "files": sorted(names(directory))}


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def assert_same(one: Path, other: Path) -> None:
    first, second = (load_file(path / read_run(path).tensors["file"]) for path in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert told(one) == told(other)


@pytest.fixture(scope="module")
def settings(tiny_model_dir: ModelDir, tiny_task_files: TaskFiles) -> TrainSettings:
    return settings_for(tiny_model_dir("bert"), tiny_task_files, batch_size=32, save_every=3)


@pytest.fixture(scope="module")
def whole(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not stopped; to be compared with, never changed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(settings, path)
    return path


@pytest.fixture
def half(settings: TrainSettings, tmp_path: Path) -> Path:
    """A run that was killed in its first epoch, behind a checkpoint."""
    return stopped(settings, tmp_path / "run", 5)


@pytest.mark.parametrize("way", WAYS)
def test_killed_again_and_again_it_ends_in_the_same(
    way: str, tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(**changes: Any) -> TrainSettings:
        return settings_for(tiny_model_dir("bert"), tiny_task_files, batch_size=32, **WAYS[way], **changes)

    def cut_off(path: Path, data: bytes, **told: Any) -> None:
        if path.name == RUN_FILE and (path.parent / f"state-{2 * EPOCH:08d}.safetensors").exists():
            raise KilledError
        replace_file(path, data, **told)

    train(settings(), tmp_path / "whole")
    run = stopped(settings(save_every=3), tmp_path / "run", 5)
    for step in (EPOCH + 1, 14):
        with pytest.raises(KilledError):
            resume(run, progress=StopAt(step))
    with monkeypatch.context() as patch:
        patch.setattr("gatepress.runwriter.replace_file", cut_off)
        with pytest.raises(KilledError):  # at the end of an epoch, with all but the manifest written
            resume(run)
    assert read_run(run).step == 2 * EPOCH - 1
    for step in (20, STEPS):  # while it recovers, and before its last checkpoint
        with pytest.raises(KilledError):
            resume(run, progress=StopAt(step))
    resume(run)
    assert_same(run, tmp_path / "whole")


def test_a_killed_process_goes_on_in_another(settings: TrainSettings, whole: Path, tmp_path: Path) -> None:
    data = settings.data
    options = ["--train-file", data.train_file, "--validation-file", data.validation_file, "--text-column", "text"]
    options += ["--label-column", "label", "--model", settings.model, "--epochs", "3", "--batch-size", "32"]
    options += ["--max-length", "32", "--lr", "2e-3", "--device", "cpu", "--save-every", "2", "-o", "run"]
    command = [sys.executable, "-m", "gatepress", "train"]
    with subprocess.Popen([*command, *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("epoch 1: "):
                break
        process.send_signal(signal.SIGKILL)
    assert read_run(tmp_path / "run").status == "training"
    done = subprocess.run(
        [*command, "--resume", "run", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["curve"][0]["step"] == EPOCH
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [5, EPOCH])
def test_an_interrupted_run_goes_on_where_it_was(
    step: int, settings: TrainSettings, whole: Path, tmp_path: Path
) -> None:
    run = stopped(settings, tmp_path / "run", step, KeyboardInterrupt)
    assert (read_run(run).status, read_run(run).step) == ("interrupted", step)
    resume(run)
    assert_same(run, whole)


def test_what_was_stopped_before_it_was_measured_has_the_same_metric(
    tiny_model_dir: ModelDir, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    """To the last digit of a correlation: what has closed is left out of what measures it, too."""
    model = shutil.copytree(tiny_model_dir("qwen3"), tmp_path / "model")
    write_modules(model, {"pooling": "lasttoken", "normalize": True}, tiny.HIDDEN)
    settings = settings_for(model, tiny_regression_files, batch_size=32, embed=True)
    settings = replace(settings, data=replace(settings.data, max_train_samples=128))  # each text is a row
    train(settings, tmp_path / "whole")
    for step in (EPOCH, 2 * EPOCH, STEPS):
        run = stopped(settings, tmp_path / str(step), step, KeyboardInterrupt)
        assert read_run(run).step == step
        resume(run)
        assert_same(run, tmp_path / "whole")


def test_without_steps_between_there_is_a_checkpoint_at_each_epoch(
    settings: TrainSettings, whole: Path, tmp_path: Path
) -> None:
    sparse = replace(settings, save_every=None)
    run = stopped(sparse, tmp_path / "run", 2 * EPOCH - 1)
    assert read_run(run).step == EPOCH
    resume(run)
    assert_same(run, whole)


def test_what_an_older_release_began_has_as_many_epochs_as_it_was_to_have(half: Path, whole: Path) -> None:
    path = half / RUN_FILE
    manifest = json.loads(path.read_text())
    manifest["settings"]["epochs"] = None  # chosen by rows and batches then, and told by the report alone
    path.write_text(json.dumps(manifest))
    resume(half)
    assert_same(half, whole)


def test_what_a_gpu_began_goes_on_without_one(half: Path, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    path = half / RUN_FILE
    manifest = json.loads(path.read_text())
    manifest["settings"]["device"] = "cuda"
    path.write_text(json.dumps(manifest))
    assert resume(half)["steps"] == read_run(half).step
    assert "the run was trained on cuda, which is not here" in caplog.text


def test_loading_is_part_of_a_training(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, late = time.perf_counter, [0]

    def slow(*given: Any, **named: Any) -> Any:
        late[0] = 1_000
        return load_rows(*given, **named)

    monkeypatch.setattr(preparing, "load_rows", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    assert train(settings, tmp_path / "run")["train_seconds"] >= 1_000


def test_seconds_add_up(half: Path) -> None:
    path = half / RUN_FILE
    manifest = json.loads(path.read_text())
    manifest["resume"] |= {"train_seconds": 1000.0, "peak_memory_bytes": 10**15}
    path.write_text(json.dumps(manifest))
    report = resume(half)
    assert 1000 < report["train_seconds"] < 2000
    assert report["peak_memory_bytes"] == 10**15


@pytest.mark.parametrize("epoch", [1, 3])
def test_an_interrupt_need_not_wait_until_all_is_measured(
    epoch: int, settings: TrainSettings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of validation rows behind an epoch: what the epoch learned is written, and measured when it goes on."""
    measure, calls = training.evaluate_model, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == epoch:
            signal.raise_signal(signal.SIGINT)
        return measure(*args, **options)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(training, "evaluate_model", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(settings, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    found = read_run(tmp_path / "run")
    assert (found.status, found.step, len(found.report["curve"])) == ("interrupted", epoch * EPOCH, epoch - 1)
    assert resume(tmp_path / "run")["metric_value"] == read_run(whole).report["metric_value"]
    assert_same(tmp_path / "run", whole)


def test_an_interrupt_waits_for_the_end_of_a_step() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    through = []

    @uninterrupted()
    def step() -> None:
        signal.raise_signal(signal.SIGINT)
        through.append(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            step()
        assert through == [1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("distill", [False, True])
def test_a_run_that_started_from_another_needs_it_no_more(
    settings: TrainSettings, tiny_classifier_dir: Callable[..., Path], tmp_path: Path, *, distill: bool
) -> None:
    settings = replace(settings, model=str(tiny_classifier_dir("bert")), distill=distill)
    train(settings, tmp_path / "first")
    later = replace(settings, start=str(tmp_path / "first"), sparsity=0.5)
    train(later, tmp_path / "whole")
    run = stopped(later, tmp_path / "run", 11)
    shutil.rmtree(tmp_path / "first")
    resume(run)
    assert_same(run, tmp_path / "whole")


# --- what lies about -----------------------------------------------------------------------------


def test_a_run_that_is_finished_is_left_as_it_is(whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    result = CliRunner().invoke(app, ["train", "--resume", str(whole), "--json"])
    assert result.exit_code == 0
    assert "is finished" in result.stderr
    assert json.loads(result.stdout)["metric_value"] == told(whole)["report"]["metric_value"]
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize(
    "changed", [{"method": None}, {"method": "magic"}, {"closed_gates": None, "total_gates": 5}, {"curve": None}]
)
def test_a_report_that_somebody_changed_is_shown_as_far_as_it_goes(
    changed: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    manifest = read_json(run / RUN_FILE)
    manifest["report"] = {key: value for key, value in {**manifest["report"], **changed}.items() if value is not None}
    (run / RUN_FILE).write_text(json.dumps(manifest))
    result = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout


def test_a_run_whose_curve_is_gone_goes_on(half: Path, whole: Path) -> None:
    manifest = read_json(half / RUN_FILE)
    del manifest["report"]["curve"]
    (half / RUN_FILE).write_text(json.dumps(manifest))
    resume(half)
    assert told(half)["report"]["metric_value"] == told(whole)["report"]["metric_value"]


def test_what_killed_writes_leave_is_cleared_away(half: Path, whole: Path) -> None:
    for name in ("gates-00000007.safetensors", ".state-00000008.safetensors.abc", f".{RUN_FILE}.abc"):
        (half / name).write_bytes(b"half of it")
    resume(half)
    assert_same(half, whole)


def test_what_was_staged_by_a_killed_run_confuses_no_other(
    settings: TrainSettings, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / ".run.new.abc").mkdir()
    (tmp_path / ".run.new.abc" / RUN_FILE).write_text("{")
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", whole)
    assert sorted(names(tmp_path)) == [".run.new.abc", "run"]


def test_a_run_that_was_stopped_can_be_pruned(half: Path, tmp_path: Path) -> None:
    assert prune(half, tmp_path / "pruned")["max_abs_logit_diff"] <= 1e-4


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--epochs", "3"], "--epochs"),
        (["--seed", "0"], "--seed"),  # the default, but given
        (["-o", "elsewhere", "--no-train-biases"], "--no-train-biases, --output"),
        (["--task", "demo"], "--task"),
    ],
)
def test_other_settings_beside_resume_are_refused(given: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["train", "--resume", "run", "--quiet", *given])
    assert result.exit_code == 2
    expected = f"error: --resume goes on with the run's own settings, but {named} came with it; drop it"
    assert result.stderr.splitlines()[-1] == expected


def test_a_spoilt_state_is_refused(half: Path) -> None:
    (state,) = half.glob("state-*")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="does not match its sha256"):
        resume(half)
    state.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        resume(half)


def test_a_run_without_a_state_is_refused(half: Path) -> None:
    path = half / RUN_FILE
    manifest = json.loads(path.read_text())
    del manifest["resume"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="keeps no state to go on from"):
        resume(half)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"has no {RUN_FILE}"):
        resume(tmp_path)


@pytest.mark.parametrize("what", ["rows", "weights"])
def test_other_rows_or_another_base_are_refused(
    what: str, tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    base, rows = shutil.copytree(tiny_model_dir("bert"), tmp_path / "base"), tmp_path / "train.csv"
    shutil.copy(tiny_task_files.train, rows)
    settings = settings_for(base, tiny_task_files, batch_size=32)
    settings = replace(settings, data=replace(settings.data, train_file=str(rows)))
    run = stopped(settings, tmp_path / "run", EPOCH + 1)
    if what == "rows":
        rows.write_text(rows.read_text().replace("krat", "zogg", 1))
    else:
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    before = told(run)
    with pytest.raises(ArtifactError, match=f"the {what}.* have changed since the run began"):
        resume(run)
    assert told(run) == before


@pytest.mark.parametrize("way", ["resumed", "replaced"])
def test_a_run_that_is_training_is_left_alone(
    way: str, settings: TrainSettings, half: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def another(path: Path, data: bytes, **told: Any) -> None:
        replace_file(path, data, **told)
        if path.parent == half and not tried:
            with pytest.raises(OutputError, match="another gatepress is training into it") as error:
                resume(half) if way == "resumed" else train(settings, half, force=True)
            tried.append(str(error.value))

    monkeypatch.setattr("gatepress.runwriter.replace_file", another)
    resume(half)
    assert tried
    assert_same(half, whole)


# --- what must not be written over ---------------------------------------------------------------


def test_a_checkpoint_of_numbers_is_not_replaced_by_one_without(settings, whole, tmp_path, monkeypatch):
    """The loss is read every five steps; what is written in between is looked at."""
    step = training._step

    def broken(job, batch):
        loss = step(job, batch)
        if job.step == 5:
            with torch.no_grad():
                next(one for one in job.gated.parameters() if one.requires_grad).fill_(torch.nan)
        return loss

    monkeypatch.setattr(training, "_step", broken)
    with pytest.raises(ModelError, match=r"no number at step 6; try a smaller --learning-rate"):
        train(settings, tmp_path / "run")
    assert read_run(tmp_path / "run").step == 3
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_half_of_a_checkpoint_does_not_stay(settings, tmp_path, monkeypatch):
    write = RunWriter._write

    def full(writer, kind, step, tensors):
        if (kind, step) == ("state", 6):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, kind, step, tensors)

    monkeypatch.setattr(RunWriter, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        train(settings, tmp_path / "run")
    kept = sorted(name for name in names(tmp_path / "run") if name.startswith(("gates", "state")))
    assert kept == ["gates-00000003.safetensors", "state-00000003.safetensors"]


def test_a_first_checkpoint_that_cannot_be_written_is_told_of_the_run(settings, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runwriter, "save_file", lambda _, file: full() if "gates" in Path(file).name else None)
    monkeypatch.setattr(runwriter, "sha256_of", lambda _: "")
    with pytest.raises(OutputError, match="No space left") as raised:
        train(settings, tmp_path / "run")
    assert str(raised.value).startswith(f"{tmp_path / 'run' / 'gates-00000003.safetensors'}: cannot write")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_trains_is_not_read(half, monkeypatch):
    monkeypatch.setattr(training, "prepared", lambda *_, **__: pytest.fail("it was prepared first"))
    held = lock(half)
    try:
        with pytest.raises(OutputError, match="another gatepress"):
            resume(half)
    finally:
        release(held)
