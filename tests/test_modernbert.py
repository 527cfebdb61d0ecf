"""What ModernBERT has that no other family has: one matrix of three, positions that turn, neurons of two rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, ModernBertForSequenceClassification

import tiny
from conftest import TaskFiles
from forms import collapse, save_run, settings_for
from gatepress import losses
from gatepress.budget import budget_of
from gatepress.checkpoint import load_run
from gatepress.config import DataSettings, TrainSettings
from gatepress.distill import hidden_distances
from gatepress.errors import UsageError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.gates import Gate, gates_of
from gatepress.inject import attach_gates_, gated_linear
from gatepress.methods import merge_, prepare_
from gatepress.modeling_gatepress import PrunedRotaryAttention, first_token_alone, split_
from gatepress.models import load_pruned
from gatepress.narrowing import narrow_, quicken_
from gatepress.pruning import prune
from gatepress.resolve import resolve
from gatepress.training import train

FAMILY = "modernbert"
HALF = tiny.HIDDEN // tiny.HEADS // 2
VARIANTS: list[dict[str, Any]] = [
    {},
    {"classifier_pooling": "mean"},
    {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
    {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 4},
    {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    },
]


def gated_model(closed: float = 0.4, granularity: Any = "structured", **changes: Any) -> Any:
    model = tiny.build_classifier(FAMILY, num_labels=3, **changes)
    attach_gates_(model, granularity=granularity, controller="importance")
    torch.manual_seed(0)
    for _, gate in gates_of(model):
        gate.mask.copy_((torch.rand(gate.size) >= closed).float())
    return model


@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes) or "usual")
def test_pruned_attention_is_that_of_transformers(changes: dict[str, Any], length: int) -> None:
    batch = tiny.random_batch(FAMILY, batch=3, length=length)
    real = batch["attention_mask"].bool()
    dense = tiny.build_classifier(FAMILY, num_labels=3, **changes)
    dense.set_attn_implementation("eager")
    wanted = dense(**batch, output_attentions=True)
    model = gated_model(0, **changes)
    torch.testing.assert_close(
        model(**batch).logits, wanted.logits, atol=1e-5, rtol=1e-5
    )  # taken apart, nothing closed
    pruned, plan = collapse(model, "inner")
    assert plan.removed_fraction == 0
    given = pruned(**batch, output_attentions=True)
    for mine, theirs in zip(given.attentions, wanted.attentions, strict=True):
        rows = real[:, None, :, None].expand_as(theirs)
        torch.testing.assert_close(mine[rows], theirs[rows], atol=1e-5, rtol=1e-5)

    model = gated_model(**changes)
    wanted = model(**batch)
    pruned, plan = collapse(model, "inner")
    assert plan.removed_fraction > 0.2
    assert isinstance(pruned.model.layers[0].attn, PrunedRotaryAttention)
    torch.testing.assert_close(pruned(**batch).logits, wanted.logits, atol=1e-5, rtol=1e-5)
    pruned.set_attn_implementation("eager")
    torch.testing.assert_close(pruned(**batch).logits, wanted.logits, atol=1e-5, rtol=1e-5)


def test_two_dimensions_that_positions_turn_together_close_together() -> None:
    model = gated_model()
    for layer in resolve(model):
        q = gated_linear(model, layer, "q").folded()[0].any(1).view(tiny.HEADS, 2, HALF)
        assert torch.equal(q[:, 0], q[:, 1])
        assert q.any()
        assert not q.all()


@pytest.mark.parametrize("changes", VARIANTS[:3], ids=lambda changes: "-".join(changes) or "usual")
def test_each_head_keeps_pairs_of_its_own(changes: dict[str, Any]) -> None:
    """Of the first head two pairs are left, of the second the other two, of the third one, of the last none."""
    model = gated_model(0, **changes)
    for layer in resolve(model):
        mask = gated_linear(model, layer, "q").gate_out.mask.view(tiny.HEADS, HALF)
        mask[0, :2] = mask[1, 2:] = mask[2, 1:] = mask[3] = 0
    batch = tiny.random_batch(FAMILY)
    wanted = model(**batch).logits
    pruned, plan = collapse(model, "inner")
    assert [layer.qk_width for layer in plan.layers] == [4, 4]
    assert pruned.model.layers[0].attn.pairs.tolist() == [2, 3, 0, 1, 0, 0, 0, 0]
    torch.testing.assert_close(pruned(**batch).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_neuron_goes_with_both_of_its_rows() -> None:
    model = gated_model(0)
    for layer in resolve(model):
        gated_linear(model, layer, "down").gate_in.mask[::4] = 0
    pruned, plan = collapse(model, "inner")
    kept = tiny.INTERMEDIATE * 3 // 4
    for layer in plan.layers:
        assert layer.matrices["up"].shape == (2 * kept, tiny.HIDDEN)
        assert layer.matrices["down"].shape == (tiny.HIDDEN, kept)
    batch = tiny.random_batch(FAMILY)
    torch.testing.assert_close(pruned(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("half", [0, 1])
def test_a_row_of_zeros_in_either_half_closes_a_neuron(half: int) -> None:
    model = gated_model(0, "matrix", mlp_bias=True)
    for layer in resolve(model):
        gated_linear(model, layer, "up").gate_out.mask[half * tiny.INTERMEDIATE :][:5] = 0
    pruned, plan = collapse(model, "inner")
    assert {len(layer.matrices["down"].columns) for layer in plan.layers} == {tiny.INTERMEDIATE - 5}
    batch = tiny.random_batch(FAMILY)
    torch.testing.assert_close(pruned(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_attention_to_what_is_near_differs_from_token_to_token_even_if_uniform() -> None:
    model = gated_model(0, layer_types=["sliding_attention", "sliding_attention"], classifier_pooling="mean")
    for layer in resolve(model):
        gated_linear(model, layer, "q").gate_out.mask.zero_()
    batch = tiny.random_batch(FAMILY, length=30)
    pruned, _ = collapse(model, "inner")
    assert all(one["uniform"] for one in pruned.config.gatepress["attentions"].values())
    torch.testing.assert_close(pruned(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("unit", ["gates", "weights", "macs"])
@pytest.mark.parametrize("granularity", ["structured", "heads"])
def test_what_is_asked_is_removed(granularity: Any, unit: Any, sparsity: float) -> None:
    """A gate counts for what goes with it: three rows and columns with a neuron, four with two turned dimensions."""
    model = gated_model(0, granularity, hidden_size=64, intermediate_size=256)
    settings = TrainSettings(
        DataSettings("sst2"), "model", sparsity=sparsity, granularity=granularity, budget=unit
    ).resolved("accuracy", finetuned=True)
    layers = resolve(model)
    budget = budget_of(model, layers, settings, steps=1, tokens=32)
    for vector in budget.vectors:
        vector.gate.score.uniform_(0.1, 1).mul_(vector.macs)
    budget.close(sparsity)
    _, plan = collapse(model, "inner")
    removed = plan.removed_fraction if unit == "gates" else plan.removed("weights" if unit == "weights" else "macs", 32)
    assert removed == pytest.approx(sparsity, rel=0.005)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("granularity", ["structured", "matrix", "heads"])
def test_training_goes_on_at_the_size_that_is_left(granularity: Any, pooling: str) -> None:
    model = gated_model(0.6, granularity, classifier_pooling=pooling, mlp_bias=True, attention_bias=True)
    layers = resolve(model)
    batch = tiny.random_batch(FAMILY, length=20)
    wanted = model(**batch).logits
    quicken_(model, layers, first_token=pooling == "cls")
    settings = TrainSettings(DataSettings("sst2"), "model", granularity=granularity).resolved(
        "accuracy", finetuned=True
    )
    narrow_(model, layers, budget_of(model, layers, settings, steps=1, tokens=32).vectors)
    narrow = gated_linear(model, layers[0], "up").narrow_weight
    assert narrow is not None
    assert len(narrow) < 2 * tiny.INTERMEDIATE
    with first_token_alone():
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-5, rtol=1e-5)


def test_one_matrix_is_taken_apart_once() -> None:
    model: Any = tiny.build_classifier(FAMILY, attention_bias=True)
    attention = model.model.layers[0].attn
    fused = attention.Wqkv
    split_(attention)
    split_(attention)
    assert not hasattr(attention, "Wqkv")
    assert torch.equal(torch.cat([getattr(attention, name).weight for name in "qkv"]), fused.weight)
    assert torch.equal(torch.cat([getattr(attention, name).bias for name in "qkv"]), fused.bias)


def test_rows_are_not_packed() -> None:
    """Releases of transformers that find flash attention take it unasked, and hand layers all rows as one."""
    model: Any = tiny.build_classifier(FAMILY)
    model.config._attn_implementation_internal = "flash_attention_2"
    attach_gates_(model, granularity="structured", controller="importance")
    assert model.config._attn_implementation == "sdpa"
    assert model(**tiny.random_batch(FAMILY)).logits.isfinite().all()


def test_the_stock_layout_has_one_matrix_again() -> None:
    model = gated_model(0, attention_bias=True)
    for layer in resolve(model):
        gated_linear(model, layer, "down").gate_in.mask[:20] = 0
    pruned, _ = collapse(model, "stock")
    assert type(pruned) is ModernBertForSequenceClassification
    assert pruned.config.intermediate_size == tiny.INTERMEDIATE - 20
    assert isinstance(pruned.model.layers[0].attn.Wqkv, nn.Linear)
    batch = tiny.random_batch(FAMILY)
    torch.testing.assert_close(pruned(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "lora-xs", "vera"])
def test_adapters_stand_on_the_one_matrix(method: Any) -> None:
    model: Any = tiny.build_classifier(FAMILY)
    batch = tiny.random_batch(FAMILY)
    wanted = model(**batch).logits
    settings = TrainSettings(DataSettings("sst2"), "model", method=method, lora_rank=4).resolved(
        "accuracy", finetuned=False
    )
    layers = prepare_(model, settings)
    assert hasattr(model.model.layers[0].attn.Wqkv, "merge")
    assert layers[0].shapes["k"] == (tiny.HIDDEN, tiny.HIDDEN)
    torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-2, rtol=0)
    merge_(model)
    assert type(model.model.layers[0].attn.Wqkv) is nn.Linear


def test_adapters_on_a_part_of_the_one_matrix_are_refused() -> None:
    settings = TrainSettings(DataSettings("sst2"), "model", method="lora", matrices=("q", "o")).resolved(
        "accuracy", finetuned=False
    )
    with pytest.raises(
        UsageError, match=r"--matrices is q,o, .*layers\.0\.attn\.Wqkv is one matrix of q, k, v; name all"
    ):
        prepare_(tiny.build_classifier(FAMILY), settings)


def as_on_the_hub(directory: Path, tiny_model_dir: Callable[[str], Path]) -> Path:
    """Write a model with the configuration that the first ModernBERT checkpoints have."""
    config = json.loads((tiny_model_dir(FAMILY) / "config.json").read_text())
    for name in ("layer_types", "rope_parameters", "dtype"):
        config.pop(name, None)
    config |= {
        "architectures": ["ModernBertForMaskedLM"],
        "classifier_pooling": "mean",
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "layer_norm_eps": 1e-05,
        "position_embedding_type": "absolute",
        "torch_dtype": "float32",
        "transformers_version": "4.48.0",
    }
    directory.mkdir()
    for file in tiny_model_dir(FAMILY).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_from_a_first_checkpoint_to_onnx(
    tmp_path: Path, tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles
) -> None:
    base = as_on_the_hub(tmp_path / "base", tiny_model_dir)
    settings = settings_for(base, tiny_task_files, epochs=3, sparsity=0.5)
    train(settings, tmp_path / "run")
    report = prune(tmp_path / "run", tmp_path / "pruned")
    assert report["closed_fraction"] == pytest.approx(0.5, abs=0.005)
    assert 0.47 < report["encoder_macs_removed"] < 0.51  # of a few heads a pair may close alone, and stays as zeros
    assert load_file(tmp_path / "pruned" / "model.safetensors")["model.layers.1.attn.pairs"].dtype == torch.int64
    export(tmp_path / "pruned", tmp_path / "onnx")
    gated, _ = load_run(tmp_path / "run")
    pruned: Any = load_pruned(tmp_path / "pruned")
    assert not pruned.first_token_alone
    batch = tiny.random_batch(FAMILY, length=30)
    with torch.inference_mode():
        torch.testing.assert_close(pruned(**batch).logits, gated(**batch).logits, atol=1e-5, rtol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert torch.equal(plain(**batch).logits, pruned(**batch).logits)
    headless: Any = AutoModel.from_pretrained(tmp_path / "pruned")
    assert headless(**batch).last_hidden_state.shape == (*batch["input_ids"].shape, tiny.HIDDEN)
    values = [evaluate(tmp_path / name)["metric_value"] for name in ("run", "pruned", "onnx")]
    assert values[0] == values[1] == values[2]


def test_biases_of_keys_stay_in_graphs(tmp_path: Path, tiny_task_files: TaskFiles) -> None:
    """They are turned by positions, so scores hang on them."""
    base = tiny.save_model(tiny.build_classifier(FAMILY, attention_bias=True, mlp_bias=True), FAMILY, tmp_path / "base")
    prune(save_run(tmp_path / "run", base, tiny_task_files), tmp_path / "pruned")
    assert export(tmp_path / "pruned", tmp_path / "onnx")["max_abs_logit_diff"] <= 1e-4
    names = {one.name for one in onnx.load(tmp_path / "onnx" / "model.onnx").graph.initializer}
    assert any(name.endswith("attn.k.bias") for name in names)
    assert not any(name.endswith("attn.v.bias") for name in names)


def test_dropout_stays_where_it_was() -> None:
    model = gated_model(0, attention_dropout=0.9).train()
    outputs: list[torch.Tensor] = []
    model.model.layers[0].attn.register_forward_hook(lambda _, __, given: outputs.append(given[0]))
    model(**tiny.random_batch(FAMILY))
    assert 0.8 < (outputs[0] == 0).float().mean() < 0.97


def test_what_is_turned_keeps_its_precision() -> None:
    model = gated_model().to(torch.bfloat16)
    pruned, _ = collapse(model.float(), "inner")
    pruned.to(torch.bfloat16)
    assert pruned(**tiny.random_batch(FAMILY)).logits.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pruned.float()(**tiny.random_batch(FAMILY)).logits.isfinite().all()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_of_the_last_layer_is_learnt_what_is_read(
    pooling: str, tmp_path: Path, tiny_task_files: TaskFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def distances(*states: Any, whole: bool) -> torch.Tensor:
        asked.append(whole)
        return hidden_distances(*states, whole=whole)

    monkeypatch.setattr(losses, "hidden_distances", distances)
    base = tiny.save_model(tiny.build_classifier(FAMILY, classifier_pooling=pooling), FAMILY, tmp_path / "base")
    train(settings_for(base, tiny_task_files, epochs=2, sparsity=0.5, distill=True), tmp_path / "run")
    assert set(asked) == {pooling == "mean"}


def test_gates_stand_before_rows_that_are_neighbours_or_apart() -> None:
    neighbours, apart = Gate(4, repeat=2), Gate(4, repeat=2, apart=2)
    z = torch.tensor([1.0, 2, 3, 4])
    assert neighbours.repeated(z).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert apart.repeated(z).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
