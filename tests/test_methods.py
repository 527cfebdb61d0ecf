"""Other ways to learn a task in the same loop: each trains what it says, reloads as what it was, and exports."""

import inspect
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, RobertaConfig
from typer.testing import CliRunner

import tiny
from forms import settings_for
from gatepress.checkpoint import load_run, open_base, read_run
from gatepress.cli.app import app
from gatepress.config import HIDDEN_WEIGHT, METHODS, DataSettings, GateAxes, Method, TrainSettings
from gatepress.errors import ModelError, UsageError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.gates import GatedLinear
from gatepress.heads import is_finetuned, tell_of_head
from gatepress.inject import attach_gates_
from gatepress.methods import kept, merge_, prepare_, trained
from gatepress.pruning import prune
from gatepress.runtime import open_runner
from gatepress.training import train

OTHERS: list[Method] = ["full", "lora", "lora-fa", "vera", "lora-xs"]
ROBERTA_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
ATTENTION = ("q", "k", "v", "o")
SETTINGS = TrainSettings(data=DataSettings(task="demo"), train_biases=False, train_layer_norms=False)
SETTINGS_OF_VERA = replace(SETTINGS, method="vera", lora_rank=4)


def test_every_method_has_a_row() -> None:
    assert set(METHODS) == set(inspect.get_annotations(TrainSettings)["method"].__args__)


@pytest.mark.parametrize("method", OTHERS)
def test_what_another_method_trained_reloads_as_a_dense_model(
    family: str, method: Method, tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any
) -> None:
    settings = settings_for(tiny_model_dir(family), tiny_task_files, method=method, epochs=1)
    if METHODS[method].rank:
        settings = replace(settings, lora_rank=4)
    report = train(settings, tmp_path / "run")
    assert report["encoder_macs_removed"] == report["closed_gates"] == report["total_gates"] == 0
    assert evaluate(tmp_path / "run")["metric_value"] == report["metric_value"]
    model, _ = load_run(tmp_path / "run")
    dense = tiny.build_classifier(family)
    assert {name: value.shape for name, value in model.state_dict().items() if "classifier" not in name} == {
        name: value.shape for name, value in dense.state_dict().items() if "classifier" not in name
    }
    with pytest.raises(UsageError, match="closes no gates"):
        prune(tmp_path / "run", tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("method", OTHERS)
def test_merging_changes_no_logit(method: Method) -> None:
    torch.manual_seed(0)
    settings = replace(SETTINGS, method=method, lora_rank=4 if METHODS[method].rank else None)
    model = tiny.build_classifier("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = tiny.random_batch("bert")
    prepare_(model, settings)
    with torch.no_grad():
        for kind, group in trained(model, settings).items():
            for parameter in group.values() if kind == "low_rank" else []:
                parameter.normal_(std=0.3)
        wanted = model.eval()(**batch).logits
        merge_(model)
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
    after = model.state_dict()
    assert set(after) == set(before)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == (0 if method == "full" else 6 * tiny.LAYERS)  # the six matrices, and no bias


def test_lora_xs_starts_as_the_pretrained_model_and_trains_r_by_r_numbers() -> None:
    model = tiny.build_classifier("bert").eval()
    batch = tiny.random_batch("bert")
    with torch.no_grad():
        before = model(**batch).logits
        settings = replace(SETTINGS, method="lora-xs", lora_rank=3)
        prepare_(model, settings)
        torch.testing.assert_close(model(**batch).logits, before, atol=1e-3, rtol=1e-3)
    group = trained(model, settings)["low_rank"]
    assert {tuple(parameter.shape) for parameter in group.values()} == {(3, 3)}
    assert len(group) == 6 * tiny.LAYERS


def test_a_run_of_adapters_holds_no_base_weight_and_shared_projections_once(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any
) -> None:
    train(
        settings_for(tiny_model_dir("bert"), tiny_task_files, method="vera", lora_rank=4, epochs=1),
        tmp_path / "run",
    )
    tensors = load_file(tmp_path / "run" / read_run(tmp_path / "run").tensors["file"])
    assert not [name for name in tensors if "base_layer" in name or "embeddings" in name]
    assert len([name for name in tensors if "vera_A" in name]) == 1


def test_projections_of_vera_are_drawn_by_the_seed() -> None:
    drawn = []
    for seed in (0, 1, 1):
        model = tiny.build_classifier("bert")
        prepare_(model, replace(SETTINGS_OF_VERA, seed=seed))
        drawn.append(next(value for name, value in kept(model, SETTINGS_OF_VERA).items() if "vera_A" in name))
    assert not torch.equal(*drawn[:2])
    assert torch.equal(*drawn[1:])


def test_the_a_of_lora_fa_stays_as_it_was_drawn() -> None:
    model = tiny.build_classifier("bert")
    settings = replace(SETTINGS, method="lora-fa")
    prepare_(model, settings)
    group = trained(model, settings)["low_rank"]
    assert group
    assert all("lora_B" in name for name in group)
    assert any("lora_A" in name for name in kept(model, settings))  # drawn at random, so it is kept


def test_a_full_run_exports(tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any) -> None:
    report = train(settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", epochs=1), tmp_path / "run")
    assert report["trainable_params"]["total"] == report["total_params"]
    assert export(tmp_path / "run", tmp_path / "onnx")["max_abs_logit_diff"] <= 1e-4


@pytest.mark.parametrize(
    ("sizes", "changes", "counted"),
    [
        ({}, {"method": "gates"}, {"gates": 165_888}),
        (ROBERTA_LARGE, {"method": "gates"}, {"gates": 442_368}),
        ({}, {"method": "gates", "gate_axes": "out", "matrices": ATTENTION}, {"gates": 36_864}),
        (ROBERTA_LARGE, {"method": "gates", "gate_axes": "out", "matrices": ATTENTION}, {"gates": 98_304}),
        ({}, {"gate_axes": "out", "lora_rank": 8}, {"gates": 82_944, "low_rank": 1_327_104}),
        (ROBERTA_LARGE, {"gate_axes": "out", "lora_rank": 8}, {"gates": 221_184, "low_rank": 3_538_944}),
        ({}, {"gate_axes": "out", "matrices": ATTENTION, "lora_rank": 8}, {"gates": 36_864, "low_rank": 589_824}),
        ({}, {"method": "gates", "train_biases": True}, {"gates": 165_888, "biases": 82_944}),
        ({}, {"method": "gates", "train_biases": True, "matrices": ATTENTION}, {"gates": 73_728, "biases": 36_864}),
        ({}, {"lora_rank": 64}, {"gates": 165_888, "low_rank": 10_616_832}),
        ({}, {"lora_rank": 8, "lora_matrices": ("o", "down")}, {"gates": 165_888, "low_rank": 516_096}),
        ({}, {"method": "lora"}, {"low_rank": 1_327_104}),
        (ROBERTA_LARGE, {"method": "lora"}, {"low_rank": 3_538_944}),
        ({}, {"method": "lora-fa"}, {"low_rank": 663_552}),
        ({}, {"method": "lora-xs", "lora_rank": 25}, {"low_rank": 45_000}),
    ],
)
def test_trained_numbers_of_the_variants(
    sizes: dict[str, int], changes: dict[str, Any], counted: dict[str, int]
) -> None:
    settings = replace(SETTINGS, granularity="matrix", controller="penalty", **changes)
    with init_empty_weights():
        model = AutoModelForSequenceClassification.from_config(RobertaConfig(**sizes))
        with pytest.MonkeyPatch.context() as patch:  # no numbers, so no singular values of them
            patch.setattr(torch.linalg, "svd", _shapes_of_svd)
            prepare_(model, settings)
    found = {kind: sum(p.numel() for p in group.values()) for kind, group in trained(model, settings).items()}
    head = found.pop("head")
    assert {kind: number for kind, number in found.items() if number} == counted
    assert sizes or head == 592_130


def _shapes_of_svd(matrix: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rank = min(matrix.shape)
    return tuple(
        torch.empty(*shape, device="meta") for shape in ((len(matrix), rank), (rank,), (rank, matrix.shape[1]))
    )


def test_low_rank_stands_where_it_is_asked_for_and_what_it_left_out_keeps_its_gates() -> None:
    model = tiny.build_classifier("bert")
    prepare_(model, replace(SETTINGS, lora_rank=2, lora_matrices=("o", "down")))
    gated = {name: module for name, module in model.named_modules() if isinstance(module, GatedLinear)}
    assert len(gated) == 6 * tiny.LAYERS
    updated = [name for name, module in gated.items() if module.lora_a is not None]
    assert len(updated) == 2 * tiny.LAYERS
    assert all(name.endswith("output.dense") for name in updated)


def test_a_run_goes_on_with_the_low_rank_that_it_was_begun_with(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any
) -> None:
    few = settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1, sparsity=0.25, lora_matrices=("o", "up"))
    few = replace(few, lora_rank=3)
    report = train(few, tmp_path / "run")
    assert read_run(tmp_path / "run").settings.lora_matrices == ("o", "up")
    assert evaluate(tmp_path / "run")["metric_value"] == report["metric_value"]
    again = replace(few, start=str(tmp_path / "run"), sparsity=0.5, lora_matrices=None, lora_rank=None)
    train(again, tmp_path / "again")
    there = read_run(tmp_path / "again").settings
    assert (there.lora_matrices, there.lora_rank) == (("o", "up"), 3)
    assert prune(tmp_path / "again", tmp_path / "pruned")["max_abs_logit_diff"] <= 1e-4
    with pytest.raises(UsageError, match="was trained with --lora-matrices"):
        train(replace(again, lora_matrices=("o",)), tmp_path / "other")
    with pytest.raises(UsageError, match="was trained with --lora-rank 3, this run asks for 8"):
        train(replace(again, lora_rank=8), tmp_path / "other")


@pytest.mark.parametrize("axes", ["in", "out"])
def test_gates_on_one_side_only(axes: GateAxes) -> None:
    model = tiny.build_classifier("bert")
    attach_gates_(model, granularity="matrix", controller="penalty", axes=axes)
    gated = [name for name, _ in model.named_modules() if name.endswith(("gate_in", "gate_out"))]
    assert len(gated) == 6 * tiny.LAYERS
    assert all(name.endswith(f"gate_{axes}") for name in gated)


def test_matrices_that_take_no_part_are_as_they_were() -> None:
    model = tiny.build_classifier("bert")
    settings = replace(SETTINGS, matrices=ATTENTION, train_biases=True, lora_rank=2)
    prepare_(model, settings)
    names = [name for group in trained(model, settings).values() for name in group]
    assert not [
        name for name in names if "intermediate" in name or (".output.dense" in name and "attention" not in name)
    ]
    assert [name for name in names if "attention.output.dense.base.bias" in name]


def test_lora_xs_of_more_than_a_matrix_holds_is_refused(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, method="lora-xs", lora_rank=tiny.HIDDEN + 1)
    with pytest.raises(UsageError, match=f"--lora-rank is {tiny.HIDDEN + 1}, expected at most {tiny.HIDDEN}, the"):
        train(settings, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrices": ()}, "--matrices is ''"),
        ({"matrices": ("q", "x")}, "--matrices is 'q,x', expected some of q,k,v,o,up,down"),
        ({"gate_axes": "in"}, "--gate-axes in goes with --granularity matrix"),
        ({"method": "lora", "distill": True}, "--distill teaches a model whose gates close"),
        ({"method": "lora", "hidden_weight": 1.0}, "--hidden-weight weighs what a teacher computes, --method lora"),
        ({"distill": False, "hidden_weight": 1.0}, "--hidden-weight weighs what a teacher computes, --no-distill"),
        ({"hidden_weight": -1.0}, "--hidden-weight is -1.0, expected a number from 0 on"),
        ({"method": "gates", "lora_rank": 8}, "--lora-rank means nothing to --method gates"),
        ({"lora_matrices": ("o", "x")}, "--lora-matrices is 'o,x', expected some of q,k,v,o,up,down"),
        ({"lora_matrices": ("o", "q"), "matrices": ("o", "up")}, "--lora-matrices is 'o,q', expected some of o,up"),
        ({"lora_matrices": ()}, "--lora-matrices is ''"),
        ({"method": "gates", "lora_matrices": ("o",)}, "--lora-matrices means nothing to --method gates, which has"),
        ({"method": "full", "lora_matrices": ("o",)}, "--lora-matrices means nothing to --method full, which has no"),
        ({"method": "lora", "lora_matrices": ("o",)}, "--lora-matrices means nothing to --method lora, --matrices"),
        ({"method": "prune"}, "--method is 'prune', expected one of gates"),
        ({"method": "prune", "lora_matrices": ("o",)}, "--method is 'prune', expected one of gates"),
        ({"budget": "flops"}, "--budget is 'flops', expected one of gates"),
        ({"open_epochs": -1}, "--open-epochs is -1"),
        ({"open_epochs": 1, "start": "runs/before"}, "--open-epochs says nothing to --start"),
        ({"closing": 0.0}, "--closing is 0.0, expected a fraction above 0 and of at most 1"),
        ({"closing": 1.5}, "--closing is 1.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SETTINGS, **changes)


def test_gates_that_would_stand_nowhere_are_refused() -> None:
    model: nn.Module = tiny.build_classifier("bert")
    with pytest.raises(UsageError, match="structured gates stand on q, o, down"):
        attach_gates_(model, granularity="structured", controller="importance", matrices=("k", "up"))


@pytest.mark.parametrize(
    ("finetuned", "changes", "taught"),
    [
        (True, {}, True),
        (True, {"distill": False}, False),
        (True, {"method": "gates"}, False),
        (True, {"method": "full"}, False),
        (True, {"start": "runs/before"}, True),
        (False, {}, False),
        (False, {"distill": True}, True),
    ],
)
def test_a_finetuned_model_teaches_unless_it_is_told_not_to(
    *, finetuned: bool, changes: dict[str, Any], taught: bool
) -> None:
    settings = replace(SETTINGS, method="gates+lora", lora_rank=None)
    resolved = replace(settings, **changes).resolved("accuracy", finetuned=finetuned)
    assert resolved.distill is taught
    assert resolved.hidden_weight == (HIDDEN_WEIGHT if taught else None)
    if taught:
        assert replace(resolved, hidden_weight=0.0).resolved("accuracy", finetuned=finetuned).hidden_weight == 0
        return
    with pytest.raises(UsageError, match="--hidden-weight weighs what a teacher computes"):
        replace(settings, **changes, hidden_weight=0.0).resolved("accuracy", finetuned=finetuned)


@pytest.mark.parametrize("distill", [True, False])
def test_what_an_older_release_began_goes_on_with_its_weight_of_hidden_states(*, distill: bool) -> None:
    old = replace(SETTINGS, method="gates+lora", distill=distill).resolved("accuracy", finetuned=True).to_json()
    del old["hidden_weight"]
    assert TrainSettings.from_json(old).hidden_weight == (1.0 if distill else None)


@pytest.mark.parametrize("method", ["gates+lora", "gates", "lora"])
def test_what_an_older_release_began_has_low_rank_wherever_it_has_gates(method: Method) -> None:
    old = replace(SETTINGS, method=method, matrices=("o", "up")).resolved("accuracy", finetuned=True).to_json()
    del old["lora_matrices"]
    assert TrainSettings.from_json(old).lora_matrices == (("o", "up") if method == "gates+lora" else None)


def test_manifests_from_before_there_were_methods_are_read() -> None:
    old = SETTINGS.to_json()
    for name in ("method", "budget", "gate_axes", "matrices", "distill", "open_epochs", "closing", "start"):
        del old[name]
    assert TrainSettings.from_json({**old, "lora_rank": 0}).method == "gates"
    read = TrainSettings.from_json({**old, "lora_rank": 4, "controller": "penalty"})
    assert (read.method, read.rank, read.unit, read.closing) == ("gates+lora", 4, "vectors", 0.6)
    assert read.distill is False  # going on, it stays what it was


@pytest.mark.parametrize(("sparsity", "rate"), [(0.5, 5e-4), (0.75, 5e-4), (0.8, 1e-3), (0.875, 1e-3)])
def test_where_little_of_a_finetuned_model_is_left_it_learns_at_a_higher_rate(sparsity: float, rate: float) -> None:
    asked = replace(SETTINGS, method="gates+lora", sparsity=sparsity)
    assert asked.resolved("accuracy", finetuned=True).learning_rate == rate
    assert asked.resolved("accuracy", finetuned=False).learning_rate == METHODS["gates+lora"].learning_rate
    assert replace(asked, learning_rate=2e-4).resolved("accuracy", finetuned=True).learning_rate == 2e-4


def test_gates_close_in_a_model_that_was_finetuned_and_it_teaches_itself(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any
) -> None:
    full = settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", epochs=4)
    before = train(full, tmp_path / "full")
    settings = settings_for(tmp_path / "full", tiny_task_files, sparsity=0.5, epochs=3, learning_rate=1e-5)
    report = train(settings, tmp_path / "run")
    assert report["curve"][0]["closed_fraction"] > 0  # no epoch is needed to learn the task first
    assert report["dense_params"] == before["total_params"]
    resolved = read_run(tmp_path / "run").settings
    assert (resolved.lora_rank, resolved.learning_rate) == (32, 1e-5)  # more rank in a finetuned model
    assert resolved.closing == 0.35  # and more steps behind the closing
    assert resolved.distill is True
    assert read_run(tmp_path / "full").settings.lora_rank is None
    assert evaluate(tmp_path / "run")["metric_value"] == report["metric_value"]
    assert prune(tmp_path / "run", tmp_path / "pruned")["max_abs_logit_diff"] <= 1e-4
    with pytest.raises(ModelError, match="was trained with gates"):
        train(replace(settings, model=str(tmp_path / "run")), tmp_path / "again")


def test_a_run_that_is_not_finished_is_no_base(tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", epochs=1)
    train(settings, tmp_path / "full")
    manifest = tmp_path / "full" / "gatepress_run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "status": "interrupted"}))
    with pytest.raises(ModelError, match=r"is not finished; end it first: gatepress train --resume"):
        train(replace(settings, method="gates", model=str(tmp_path / "full")), tmp_path / "pressed")


def test_a_run_upon_a_run_counts_the_bytes_of_all_its_weights(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any
) -> None:
    settings = replace(settings_for(tiny_model_dir("bert"), tiny_task_files, method="lora", epochs=1), lora_rank=2)
    train(settings, tmp_path / "lora")
    pressed = settings_for(tmp_path / "lora", tiny_task_files, method="gates", epochs=1)
    train(pressed, tmp_path / "pressed")
    files = [*tiny_model_dir("bert").glob("*.safetensors")]
    files += [path for run in ("lora", "pressed") for path in (tmp_path / run).glob("gates-*")]
    assert open_runner(tmp_path / "pressed").size_bytes == sum(path.stat().st_size for path in files)


def test_a_finetuned_head_is_kept_and_one_in_another_order_refused(
    tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Any, caplog: Any
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", epochs=4)
    train(settings, tmp_path / "full")
    model, manifest = load_run(tmp_path / "full")
    model.save_pretrained(tmp_path / "finetuned")
    opened = open_base(tmp_path / "finetuned", manifest.task)
    assert is_finetuned(tmp_path / "finetuned", manifest.task)
    assert not is_finetuned(tiny_model_dir("bert"), manifest.task)
    three = replace(manifest.task, label_names=(*(manifest.task.label_names or ()), "another"))
    assert not is_finetuned(tmp_path / "finetuned", three)
    assert torch.equal(opened.state_dict()["classifier.weight"], model.state_dict()["classifier.weight"])
    config = json.loads((tmp_path / "finetuned" / "config.json").read_text())
    with caplog.at_level("WARNING"):
        tell_of_head(tmp_path / "finetuned", manifest.task)
        assert "are taken for" not in caplog.text
        (tmp_path / "finetuned" / "config.json").write_text(json.dumps({**config, "id2label": {"1": "b", "0": "a"}}))
        tell_of_head(tmp_path / "finetuned", manifest.task)
    assert f"are a, b; they are taken for {', '.join(manifest.task.label_names)}" in caplog.text
    config["id2label"] = dict(enumerate(reversed(manifest.task.label_names)))
    (tmp_path / "finetuned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stand in another order"):
        open_base(tmp_path / "finetuned", manifest.task)


def test_the_command_that_presses_a_finetuned_model_can_be_copied(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: Any, tmp_path: Path
) -> None:
    runner, short = CliRunner(), ["--epochs", "1", "--device", "cpu"]
    options = [*tiny_task_files.options(), "--max-length", "32", *short, "--method", "full"]
    base, run = str(tiny_model_dir("bert")), str(tmp_path / "a run")
    done = runner.invoke(app, ["train", *options, "--model", base, "-o", run])
    assert done.exit_code == 0, done.output
    [line] = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    assert f"gatepress export '{run}'" in line
    name, *words = shlex.split(line.partition("press it: ")[2])
    assert (name, words[words.index("--max-length") + 1]) == ("gatepress", "32")
    pressed = runner.invoke(app, [*words, *short, "--json", "-o", str(tmp_path / "pressed")])
    assert pressed.exit_code == 0, pressed.output
    assert json.loads(pressed.stdout)["asked_sparsity"] == 0.5
