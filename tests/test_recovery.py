"""One training, several sizes: other sparsities from the scores that a run keeps, and what brings accuracy back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from forms import settings_for
from gatepress import preparing, recovery, training
from gatepress.checkpoint import load_run, read_run
from gatepress.cli.app import app
from gatepress.config import BudgetUnit, Granularity
from gatepress.costs import analytic, save
from gatepress.errors import ArtifactError, UsageError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.files import sha256_of
from gatepress.losses import batch_loss
from gatepress.models import load_pruned
from gatepress.pruning import prune
from gatepress.recovery import prune_each
from gatepress.training import train

UNITS: list[BudgetUnit] = ["gates", "weights", "macs", "latency", "vectors"]


@pytest.fixture(scope="module")
def run(tiny_model_dir: Any, tiny_task_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recovery") / "run"
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.4, epochs=2), directory)
    return directory


@pytest.mark.parametrize("granularity", ["structured", "matrix", "heads"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_asked_budget_is_met_in_its_own_unit(
    unit: BudgetUnit, granularity: Granularity, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    settings = settings_for(
        tiny_model_dir("bert"), tiny_task_files, budget=unit, granularity=granularity, sparsity=0.5, epochs=1
    )
    report = train(settings, tmp_path / "run")
    coarse = 1 / 4 / tiny_heads(granularity)  # one head of a tiny model is a large part of it
    assert -1e-9 <= report["removed_of_budget"] - 0.5 <= max(0.005, coarse)
    cut = prune(tmp_path / "run", tmp_path / "pruned", layout="inner")
    assert cut["total_params"] == report["total_params"]
    if unit == "weights":
        assert 1 - cut["encoder_weights_removed"] == pytest.approx(1 - report["encoder_weights_removed"])


def tiny_heads(granularity: Granularity) -> int:
    return 8 if granularity == "heads" else 16


def test_a_run_is_pruned_to_any_sparsity(run: Path, tmp_path: Path) -> None:
    outputs = {sparsity: tmp_path / f"s{sparsity}" for sparsity in (0.2, 0.4, 0.7)}
    reports = prune_each(run, outputs)
    assert [report["closed_fraction"] for report in reports] == [pytest.approx(s, abs=0.005) for s in outputs]
    assert all(report["max_abs_logit_diff"] <= 1e-4 for report in reports)
    parameters = [report["total_params"] for report in reports]
    assert parameters == sorted(parameters, reverse=True)
    load_pruned(tmp_path / "s0.7")
    as_trained = prune(run, tmp_path / "same", layout="inner")
    again = prune(run, tmp_path / "again", layout="inner", sparsity=0.4)
    assert again["closed_gates"] == as_trained["closed_gates"]


def test_recovery_trains_what_was_cut_and_leaves_only_the_pruned_directory(run: Path, tmp_path: Path) -> None:
    (report,) = prune_each(run, {0.6: tmp_path / "small"}, recover_epochs=2)
    assert report["closed_fraction"] == pytest.approx(0.6, abs=0.005)
    assert report["recovery"]["epochs"] == 2
    assert evaluate(tmp_path / "small")["metric_value"] == report["recovery"]["metric_value"]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert f"# {run.name}-s0.6, pruned\n" in (tmp_path / "small/README.md").read_text()
    plain = prune(run, tmp_path / "plain", sparsity=0.6)
    assert plain["closed_gates"] == report["closed_gates"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "small"))
    assert not all(before[name].equal(after[name]) for name in before if before[name].shape == after[name].shape)


@pytest.mark.parametrize("changes", [{}, {"rotate_heads": False}, {"method": "gates", "distill": True}])
def test_a_finetuned_model_teaches_what_recovers(
    changes: dict[str, Any], tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", lora_rank=None, epochs=1)
    train(full, tmp_path / "full")
    pressed = settings_for(tmp_path / "full", tiny_task_files, sparsity=0.4, epochs=1, **changes)
    train(pressed, tmp_path / "run")
    finetuned, _ = load_run(tmp_path / "full")
    far: list[float] = []

    def watched(model: Any, batch: Any, spec: Any, teacher: Any, lesson: Any) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        far.append((teacher(inputs).logits - finetuned(**inputs).logits).abs().max().item())
        return batch_loss(model, batch, spec, teacher, lesson)

    monkeypatch.setattr(training, "batch_loss", watched)
    prune_each(tmp_path / "run", {0.6: tmp_path / "small"}, recover_epochs=1)
    assert far
    assert max(far) < 1e-4


def test_a_start_that_was_trained_otherwise_is_refused(
    run: Path, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, start=str(run), granularity="heads")
    with pytest.raises(UsageError, match="was trained with --granularity structured, this run asks for heads"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_on_a_model_that_is_not_here_is_told_before_anything_is_fetched(
    run: Path, tiny_task_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "load_rows", lambda *_: pytest.fail("it went on"))
    settings = replace(settings_for(Path("any"), tiny_task_files, start=str(run)), model="somebody/encoder")
    with pytest.raises(UsageError, match=r"was trained with --model /.*, this run asks for somebody/encoder"):
        train(settings, tmp_path / "run")


def test_a_start_follows_its_model_by_its_weights(
    run: Path, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(tiny_model_dir("bert"), tmp_path / "moved")
    settings = settings_for(elsewhere, tiny_task_files, start=str(run), sparsity=0.4, epochs=1)
    assert train(settings, tmp_path / "run")["closed_fraction"] == pytest.approx(0.4, abs=0.005)
    weights = load_file(elsewhere / "model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in weights.items()}, elsewhere / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ArtifactError, match=r"was trained on other weights of .* \(sha256 differs\)"):
        train(settings, tmp_path / "other")


def test_another_method_than_that_of_the_start_is_what_is_told(
    run: Path, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, start=str(run), method="full")
    with pytest.raises(UsageError, match=r"was trained with --method gates\+lora, this run asks for full"):
        train(settings, tmp_path / "run")


def test_recovery_is_on_the_rows_of_the_run(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = shutil.copyfile(tiny_task_files.train, tmp_path / "rows.csv")
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1, save_every=1)
    settings = replace(settings, data=replace(settings.data, train_file=str(rows)))
    train(settings, tmp_path / "run")
    manifest = json.loads((tmp_path / "run/gatepress_run.json").read_text())
    (tmp_path / "run/gatepress_run.json").write_text(json.dumps(manifest | {"status": "interrupted", "step": 3}))
    prune_each(tmp_path / "run", {0.5: tmp_path / "small"}, recover_epochs=1)
    assert "is not finished, what it holds is that of step 3" in caplog.text
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-40]))
    with pytest.raises(ArtifactError, match="the rows have changed since the run began"):
        prune_each(tmp_path / "run", {0.5: tmp_path / "other"}, recover_epochs=1)
    assert not (tmp_path / "other").exists()


def test_an_older_run_without_scores_still_prunes_but_not_to_another_sparsity(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in run.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((old / "gatepress_run.json").read_text())
    tensors = old / manifest["tensors"]["file"]
    state = {name: value for name, value in load_file(tensors).items() if not name.endswith(".score")}
    save_file(state, tensors)
    manifest["tensors"]["sha256"] = sha256_of(tensors)
    (old / "gatepress_run.json").write_text(json.dumps(manifest))
    assert prune(old, tmp_path / "pruned")["closed_gates"] == read_run(run).report["closed_gates"]
    with pytest.raises(ArtifactError, match="keeps no scores"):
        prune(old, tmp_path / "other", sparsity=0.2)
    with pytest.raises(ArtifactError, match="keeps no scores"):
        prune_each(old, {0.2: tmp_path / "other"}, recover_epochs=1)
    assert not (tmp_path / "other").exists()


def test_no_teacher_is_made_of_closed_gates(
    run: Path, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    """What a run that began with a pretrained model knew with open gates is not kept."""
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, start=str(run), distill=True)
    with pytest.raises(UsageError, match="--distill with --start has nobody to teach"):
        train(settings, tmp_path / "run")


@pytest.mark.parametrize(("asked", "made"), [("0.6,0.6", ["x"]), ("0.6,0.5", ["x-s0.5", "x-s0.6"])])
def test_a_sparsity_that_is_asked_twice_is_made_once(asked: str, made: list[str], run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prune", str(run), "--sparsity", asked, "-o", str(tmp_path / "x")])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    (told,) = (line for line in result.stderr.splitlines() if line.startswith("next: gatepress export "))
    assert Path(told.split()[-1]).is_dir()


def test_two_sparsities_do_not_share_a_directory(run: Path, tmp_path: Path) -> None:
    asked = ["--sparsity", "0.3,0.30000001", "-o", str(tmp_path / "x")]
    result = CliRunner().invoke(app, ["prune", str(run), *asked])
    assert result.exit_code == 2
    assert "too near to each other" in result.output
    assert not any(tmp_path.iterdir())


def test_two_sparsities_do_not_share_a_directory_in_python_either(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give each its own"):
        prune_each(run, {0.25: tmp_path / "one", 0.5: str(tmp_path / "other/../one")}, force=True)
    assert not (tmp_path / "one").exists()


def test_an_open_training_can_be_pruned_afterwards(tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path) -> None:
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.0, epochs=1), tmp_path / "run")
    assert prune(tmp_path / "run", tmp_path / "pruned", sparsity=0.3)["closed_fraction"] == pytest.approx(0.3, abs=5e-3)


def test_a_budget_that_cannot_be_reached_is_refused_at_once(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    settings = settings_for(
        tiny_model_dir("bert"), tiny_task_files, budget="weights", sparsity=0.9, matrices=("q", "k", "v", "o")
    )
    with pytest.raises(UsageError, match="all gates together reach only"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recover_epochs", [0, 1])
def test_sizes_of_which_one_cannot_be_had_are_refused_before_any_is_written(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path, recover_epochs: int
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, budget="macs", sparsity=0.5, epochs=1)
    train(settings, tmp_path / "run")
    with pytest.raises(UsageError, match="all gates together reach only"):
        prune_each(tmp_path / "run", {0.3: tmp_path / "a", 0.999: tmp_path / "b"}, recover_epochs=recover_epochs)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_open_model_teaches_the_one_that_closes(tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, distill=True, sparsity=0.5, epochs=3)
    report = train(settings, tmp_path / "run")
    assert [point["closed_fraction"] for point in report["curve"]] == [
        0,
        pytest.approx(0.45, abs=0.06),
        pytest.approx(0.5, abs=0.005),
    ]
    with pytest.raises(UsageError, match="--epochs is 3, expected more than the 3"):
        train(settings_for(tiny_model_dir("bert"), tiny_task_files, open_epochs=3), tmp_path / "none")


def test_scores_in_the_thousands_are_pruned_and_exported(
    tiny_model_dir: Any, tiny_regression_files: Any, tmp_path: Path
) -> None:
    """Their rounding is larger than that of logits, and says nothing against the smaller model."""
    run = tmp_path / "run"
    train(settings_for(tiny_model_dir("bert"), tiny_regression_files, sparsity=0.3, epochs=1), run)
    manifest = json.loads((run / "gatepress_run.json").read_text())
    tensors = run / manifest["tensors"]["file"]
    scaled = {name: value * (30_000 if "classifier" in name else 1) for name, value in load_file(tensors).items()}
    save_file(scaled, tensors)
    manifest["tensors"]["sha256"] = sha256_of(tensors)
    (run / "gatepress_run.json").write_text(json.dumps(manifest))
    assert prune(run, tmp_path / "pruned")["max_abs_logit_diff"] > 1e-4
    assert export(tmp_path / "pruned", tmp_path / "onnx")["max_abs_logit_diff"] > 1e-4


def test_recovery_goes_on_with_the_base_weights_of_the_run_only(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model_dir("bert"), tmp_path / "base")
    train(settings_for(base, tiny_task_files, epochs=1), tmp_path / "run")
    weights = load_file(base / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="was trained on other weights"):
        prune_each(tmp_path / "run", {0.5: tmp_path / "pruned"}, recover_epochs=1)
    assert not (tmp_path / "pruned").exists()


def test_a_run_without_gates_is_refused_before_it_is_trained_on(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path
) -> None:
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", epochs=1), tmp_path / "run")
    with pytest.raises(UsageError, match=f"^{tmp_path / 'run'}: was trained with --method full, which closes no gates"):
        prune_each(tmp_path / "run", {0.5: tmp_path / "pruned"}, recover_epochs=10_000)


def test_several_sparsities_on_the_command_line(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["prune", str(run), "-s", "0.2,0.5", "--layout", "inner", "-o", str(tmp_path / "x"), "--json"]
    )
    assert result.exit_code == 0, result.output
    reports = json.loads(result.stdout)["results"]
    assert [report["asked_sparsity"] for report in reports] == [0.2, 0.5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-s0.2", "x-s0.5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-s", "1.2"], "--sparsity is 1.2, expected a fraction"),
        (["-s", "a"], "--sparsity is 'a', expected numbers"),
        (["--recover-epochs", "1"], "--recover-epochs trains on at another sparsity"),
        (["-s", "0.2", "--recover-epochs", "-1"], "--recover-epochs is -1"),
        (["-s", "0.2,0.3", "--dry-run"], "--dry-run plans one size"),
        (["-s", "0.2", "--refit", "--dry-run"], "--dry-run plans one size"),
        (["--refit"], "--refit is for gates that are closed anew; give --sparsity"),
        (["-s", "0.2", "--refit", "--recover-epochs", "1"], "--refit is for what is not trained on"),
        (["-s", "0.2,0.3", "-o", "."], "-o is ., expected a name to which several sizes can be added"),
    ],
)
def test_wrong_sizes_are_one_line(options: list[str], message: str, run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prune", str(run), "-o", str(tmp_path / "x"), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_table_that_does_not_fit_is_told_before_the_training(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(recovery, "train", lambda *_, **__: pytest.fail("it was trained first"))
    save(analytic("cuda"), tmp_path / "cuda.json")
    with pytest.raises(UsageError, match="is of cuda, but --for is ort-cpu"):
        prune_each(run, {0.6: tmp_path / "x"}, recover_epochs=1, latency_table=tmp_path / "cuda.json")
    with pytest.raises(ArtifactError, match=r"typo\.json: no such file"):
        prune_each(run, {0.6: tmp_path / "x"}, recover_epochs=1, latency_table=tmp_path / "typo.json")


def test_what_was_pruned_when_it_was_stopped_is_told(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recovery, "train", stop)
    line = ["prune", str(run), "-s", "0.2,0.5", "--recover-epochs", "1", "-o", str(tmp_path / "x")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 130
    assert "interrupted; sizes that were complete by then, if any, are written" in result.stderr


def test_what_a_gpu_trained_recovers_without_one(run: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/gatepress_run.json"
    value = json.loads(path.read_text())
    value["settings"]["device"] = "cuda"
    path.write_text(json.dumps(value))
    assert prune_each(tmp_path / "run", {0.6: tmp_path / "x"}, recover_epochs=1)[0]["recovery"]["steps"] > 0
