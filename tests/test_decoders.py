"""Decoders with a head or as embedders: tokens see earlier ones alone, the last is read, and heads may norm inside."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from conftest import TaskFiles
from forms import collapse, gated_model, save_run, settings_for
from gatepress.embedding import embedding_of, write_modules
from gatepress.errors import ModelError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.gates import Gate, SharedGate
from gatepress.inject import gated_linear
from gatepress.models import load_pruned
from gatepress.pruning import prune
from gatepress.resolve import resolve
from gatepress.runtime import open_runner
from gatepress.tracing import write_onnx
from gatepress.training import train

NORMED = "qwen3"  # norms queries and keys within heads
GROUP, WIDTH = 2, tiny.HIDDEN // tiny.HEADS
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"head_dim": 2 * WIDTH}),
    ("qwen3", {"num_key_value_heads": 1, "attention_bias": False}),
    ("qwen3", {"num_key_value_heads": tiny.HEADS}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"head_dim": 2 * WIDTH}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gemma3_text", {"head_dim": 2 * WIDTH, "num_key_value_heads": 1, "sliding_window": 4}),
    ("gemma3_text", {"attention_bias": True, "layer_types": ["full_attention", "full_attention"]}),
]

HALVES = "each saving of this release halves how far local layers see"

pytestmark = pytest.mark.skipif(NORMED not in tiny.FAMILIES, reason="this release of transformers has no such family")


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(**(inputs or tiny.random_batch(NORMED))).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("silent", [False, True], ids=["asking", "uniform"])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_no_token_sees_a_later_one(family: str, silent: bool, implementation: str) -> None:  # noqa: FBT001 - a case
    model = gated_model(family)
    if silent:
        gated_linear(model, resolve(model)[0], "q").gate_out.mask.zero_()
    pruned, _ = collapse(model, "inner")
    pruned.set_attn_implementation(implementation)
    ids = torch.randint(5, 50, (2, 12))
    with torch.inference_mode():
        whole = pruned.base_model(ids).last_hidden_state
        start = pruned.base_model(ids[:, :7]).last_hidden_state
        wanted = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(start, whole[:, :7], atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, wanted, atol=1e-5, rtol=0)
    if silent:  # and scores of 0 are not those of all tokens alike
        attended = pruned.base_model(ids, output_attentions=True).attentions[0]
        assert not attended.triu(1).any()


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_padding_may_be_on_either_side(family: str) -> None:
    pruned, _ = collapse(gated_model(family), "inner")
    ids, pad = torch.randint(5, 50, (1, 9)), torch.zeros(1, 4, dtype=torch.int64)
    real, wanted = torch.ones_like(ids), logits(pruned, input_ids=ids)
    for order in (1, -1):
        row = torch.cat([ids, pad][::order], 1)
        mask = torch.cat([real, pad][::order], 1)
        torch.testing.assert_close(logits(pruned, input_ids=row, attention_mask=mask), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("granularity", ["structured", "matrix"])
def test_pruned_models_compute_what_gated_ones_do(family: str, granularity: Any, changes: dict[str, Any]) -> None:
    if "use_bidirectional_attention" in changes and tiny.RELEASE < (5, 16):
        pytest.skip(HALVES)
    model = gated_model(family, granularity, **changes)
    pruned, plan = collapse(model, "paper" if granularity == "matrix" else "inner")
    assert plan.removed_fraction > 0.2
    for length in (1, 2, 12, 40):
        batch = tiny.random_batch(family, length=length)
        torch.testing.assert_close(logits(pruned, **batch), logits(model, **batch), atol=1e-5, rtol=1e-5)


def test_normed_queries_and_keys_have_one_gate() -> None:
    """A norm counts every dimension of a key, so one that the query lost must be lost to the key as well."""
    model = gated_model(NORMED, closed=0)
    for layer in resolve(model):
        own, shared = (gated_linear(model, layer, role).gate_out for role in ("q", "k"))
        assert isinstance(own, Gate)
        assert isinstance(shared, SharedGate)
        assert shared.gate is own
        own.mask[[0, WIDTH // 2 + 2]] = 0
        assert (shared.values() == 0).sum() == 4
        assert (own.values() == 0).sum() == 4 * GROUP
    assert not any(".k_proj.gate_out" in name for name in model.state_dict())
    pruned, plan = collapse(model, "inner")
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-5, rtol=0)
    for layer in plan.layers:
        assert layer.matrices["q"].shape == (tiny.HEADS * (WIDTH - 2), tiny.HIDDEN)
        assert layer.matrices["k"].shape == (tiny.HEADS * (WIDTH - 2) // GROUP, tiny.HIDDEN)


def test_a_normed_dimension_that_only_one_side_lost_stays() -> None:
    model = gated_model(NORMED, granularity="matrix", closed=0)
    for layer in resolve(model):
        for role, lost in (("q", slice(0, 3)), ("k", slice(4, 7))):
            gated_linear(model, layer, role).gate_out.mask[lost] = 0
    pruned, plan = collapse(model, "inner")
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-5, rtol=0)
    assert [layer.qk_width for layer in plan.layers] == [WIDTH] * tiny.LAYERS


def test_importance_is_that_of_both_sides() -> None:
    model = gated_model(NORMED, closed=0)
    gate = gated_linear(model, resolve(model)[0], "q").gate_out
    gate.mu.requires_grad_(True)
    model(**tiny.random_batch(NORMED)).logits.square().sum().backward()
    of_both = gate.mu.grad.clone()
    gate.mu.grad = None
    gated_linear(model, resolve(model)[0], "k").gate_out = None
    model(**tiny.random_batch(NORMED)).logits.square().sum().backward()
    assert (of_both - gate.mu.grad).abs().max() > 1e-3 * of_both.abs().max()


def test_what_a_directory_says_of_decoding_does_no_harm(tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    """Real ones keep keys for a next token, and only their tokenizer knows what padding is."""
    model = tiny.build_classifier(NORMED, use_cache=True, pad_token_id=None)
    base = tiny.save_model(model, NORMED, tmp_path / "base")
    assert open_runner(base).logits({name: one.numpy() for name, one in tiny.random_batch(NORMED).items()}).shape == (
        4,
        2,
    )
    run, pruned, onnx = tmp_path / "run", tmp_path / "pruned", tmp_path / "onnx"
    report = train(settings_for(base, tiny_task_files, sparsity=0.5, epochs=1), run)
    prune(run, pruned)
    export(pruned, onnx)
    values = [evaluate(place)["metric_value"] for place in (run, pruned, onnx)]
    assert values == pytest.approx([report["metric_value"]] * 3)
    small = load_pruned(pruned)
    assert small.config.pad_token_id == AutoTokenizer.from_pretrained(base).pad_token_id
    assert not small.config.use_cache
    shipped = AutoModelForSequenceClassification.from_pretrained(pruned, trust_remote_code=True)
    batch = tiny.random_batch(NORMED)
    assert torch.equal(logits(shipped, **batch), logits(small, **batch))
    with pytest.raises(ValueError, match="keeps nothing for a next token; leave out use_cache"):
        small(**batch, use_cache=True)


def test_an_embedder_of_last_tokens_is_one_in_every_form(tiny_regression_files: TaskFiles, tmp_path: Path) -> None:
    base = tiny.save_model(tiny.build_encoder(NORMED), NORMED, tmp_path / "base")
    embedding = {"pooling": "lasttoken", "normalize": True}
    write_modules(base, embedding, tiny.HIDDEN)
    assert embedding_of(base) == embedding
    run, pruned, onnx = (
        save_run(tmp_path / "run", base, tiny_regression_files, embed=True),
        tmp_path / "p",
        tmp_path / "o",
    )
    prune(run, pruned)
    export(pruned, onnx)
    tokens = AutoTokenizer.from_pretrained(base)(
        ["anda boro belu", "cito", "hilu ivo"], padding=True, return_tensors="np"
    )
    wanted = SentenceTransformer(str(pruned), trust_remote_code=True).encode(["anda boro belu", "cito", "hilu ivo"])
    for place in (run, pruned, onnx):
        np.testing.assert_allclose(open_runner(place).logits(dict(tokens)), wanted, atol=1e-5)


@pytest.mark.parametrize("said", [3, -1, 10**6], ids=["another", "none", "too-large"])
def test_padding_is_what_the_tokenizer_pads_with(
    said: int, tiny_task_files: TaskFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the head would read padding, and an answer would depend on the rows beside it."""
    base = tiny.save_model(tiny.build_classifier(NORMED), NORMED, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": said}))
    runner = open_runner(base)
    assert f"pad_token_id is {said} by its configuration and 0 by its tokenizer, which is taken" in caplog.text
    batch = {name: one.numpy() for name, one in tiny.random_batch(NORMED).items()}
    length = int(batch["attention_mask"][-1].sum())
    alone = {name: one[-1:, :length] for name, one in batch.items()}
    np.testing.assert_allclose(runner.logits(batch)[-1:], runner.logits(alone), atol=1e-5)
    train(settings_for(base, tiny_task_files, sparsity=0.5, epochs=1), tmp_path / "run")
    prune(tmp_path / "run", tmp_path / "pruned")
    assert load_pruned(tmp_path / "pruned").config.pad_token_id == 0


def test_padding_without_an_embedding_is_told(tmp_path: Path) -> None:
    base = tiny.save_model(tiny.build_classifier(NORMED), NORMED, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(
        ModelError, match=r"base: its tokenizer pads with token \d+, its embeddings are of \d+; set another"
    ):
        open_runner(base)


def test_a_head_that_cannot_find_the_last_token_of_a_batch_is_not_exported(tmp_path: Path) -> None:
    model = tiny.build_classifier(NORMED, pad_token_id=None)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"base: has no padding token, so texts cannot share a batch; set pad_token"):
        export(tmp_path / "base", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_layers_that_see_near_tokens_alone_may_lose_all_queries(tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    """Their last token may then see nothing but what is masked, which `prune` must not compare."""
    model = tiny.build_classifier("mistral", sliding_window=3)
    base = tiny.save_model(model, "mistral", tmp_path / "base")
    prune(save_run(tmp_path / "run", base, tiny_task_files, silent=True), tmp_path / "pruned")
    assert [one["uniform"] for one in load_pruned(tmp_path / "pruned").config.gatepress["attentions"].values()] == [
        True,
        False,
    ]


def test_angles_that_depend_on_the_length_of_a_text_are_those_of_short_ones_in_a_graph(tmp_path: Path) -> None:
    scaled = {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 2.0}
    pruned, _ = collapse(gated_model("llama", rope_parameters=scaled), "inner")
    write_onnx(pruned, tmp_path / "model.onnx")
    assert pruned.base_model.rotary_emb.rope_type == "dynamic"
    batch = tiny.random_batch("llama", batch=2, length=tiny.MAX_TOKENS)
    got = open_runner(tmp_path / "model.onnx").logits({name: one.numpy() for name, one in batch.items()})
    np.testing.assert_allclose(got, logits(pruned, **batch).numpy(), atol=1e-4)


ALL_SEEN = {"use_bidirectional_attention": True, "sliding_window": 6}


@pytest.mark.skipif(tiny.RELEASE < (5, 16), reason=HALVES)
def test_tokens_may_all_see_each_other(tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    """In texts longer than local layers see, before and after a model is saved and pruned."""
    model = tiny.build_classifier("gemma3_text", **ALL_SEEN)
    base = tiny.save_model(model, "gemma3_text", tmp_path / "base")
    ids = torch.randint(5, 50, (2, 30))
    states = [model.base_model(one).last_hidden_state for one in (ids, torch.cat([ids[:, :-1], ids[:, :1]], 1))]
    assert (states[0] - states[1])[:, 20].abs().max() > 1e-3
    prune(save_run(tmp_path / "run", base, tiny_task_files), tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "onnx")
    batch = tiny.random_batch("gemma3_text", length=40)
    rows = {name: one.numpy() for name, one in batch.items()}
    wanted = open_runner(tmp_path / "run").logits(rows)
    assert np.abs(wanted - open_runner(base).logits(rows)).max() > 0.01  # what was drawn shows
    for place in ("pruned", "onnx"):
        np.testing.assert_allclose(open_runner(tmp_path / place).logits(rows), wanted, atol=1e-5)
    assert load_pruned(tmp_path / "pruned").config.sliding_window == model.config.sliding_window == 4


def test_a_configuration_that_changes_when_it_is_saved_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_model(tiny.build_classifier("gemma3_text", **ALL_SEEN), "gemma3_text", tmp_path / "base")
    if "to_dict" in vars(transformers.Gemma3TextConfig):  # not in releases before 5.16
        monkeypatch.delattr(transformers.Gemma3TextConfig, "to_dict")
    with pytest.raises(ModelError, match=r"see \d+ others to each side, and \d+ once transformers .* has saved it"):
        open_runner(base)


def test_heads_without_biases_cannot_be_moved(tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    base = tiny.save_model(tiny.build_classifier(NORMED), NORMED, tmp_path / "base")
    with pytest.raises(ModelError, match="ends without a bias to move; train with --no-match-shares"):
        train(settings_for(base, tiny_task_files, match_shares=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
