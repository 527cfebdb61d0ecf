"""What DeBERTa has that no other family has: scores that hang on where tokens stand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from gatepress import models
from gatepress.collapse import cut, plan_model
from gatepress.errors import ModelError
from gatepress.gates import gates_of
from gatepress.inject import attach_gates_
from gatepress.modeling_gatepress import PrunedAttention, PrunedDisentangledAttention, _skewed
from gatepress.narrowing import quicken_
from gatepress.plan import PrunePlan
from gatepress.resolve import resolve
from gatepress.runners import TorchRunner

FAMILY = "deberta-v2"


@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pos_att_type": ["c2p"]},
        {"pos_att_type": "p2c"},
        {"pos_att_type": []},
        {"position_buckets": -1, "max_relative_positions": 4},  # fewer than tokens: those far away share one
        {"position_buckets": -1},
        {"norm_rel_ebd": "none", "position_biased_input": True},
        {"relative_attention": False},
        {"conv_kernel_size": 3},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "v3",
)
def test_pruned_attention_is_that_of_transformers(changes: dict[str, Any], length: int) -> None:
    model = tiny.build_classifier(FAMILY, num_labels=3, **changes)
    attach_gates_(model, granularity="structured", controller="importance")
    torch.manual_seed(0)
    for _, gate in gates_of(model):
        gate.mask.copy_((torch.rand(gate.size) < 0.6).float())
    pruned: Any = cut(model, plan_model(model, "inner"))
    assert isinstance(pruned.deberta.encoder.layer[0].attention.self, PrunedDisentangledAttention)
    batch = tiny.random_batch(FAMILY, batch=3, length=length)
    wanted = model(**batch, output_attentions=True)
    torch.testing.assert_close(pruned(**batch).logits, wanted.logits, atol=1e-5, rtol=1e-5)  # of one token, in the end
    given = pruned(**batch, output_attentions=True)
    torch.testing.assert_close(given.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(given.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("relative", "products"), [(True, 3), (False, 1)])
def test_only_products_that_run_count_as_multiply_accumulates(*, relative: bool, products: int) -> None:
    """What scores are divided by depends on the products that the configuration names, whether they run or not."""
    model = tiny.build_classifier(FAMILY, relative_attention=relative)
    layer, tokens = resolve(model)[0], 16
    attach_gates_(model, granularity="structured", controller="importance")
    dense = plan_model(model, "inner").layers[0].macs(tokens, dense=True)
    of_scores = tokens * (1 + 2 * (products - 1)) * layer.shapes["q"][0]
    of_values = tokens * layer.shapes["v"][0]
    assert dense == sum(math.prod(shape) for shape in layer.shapes.values()) + of_scores + of_values
    assert layer.scale == pytest.approx((3 * layer.head_width) ** -0.5)


@pytest.mark.parametrize("family", ["bert", FAMILY])
def test_all_layers_attend_quickly_from_the_first_step_on(family: str) -> None:
    model: Any = tiny.build_classifier(family)
    layers = attach_gates_(model, granularity="structured", controller="importance")
    batch = tiny.random_batch(family, length=9)
    wanted = model(**batch).logits
    quicken_(model, layers, first_token=False)
    attentions = [model.base_model.get_submodule(layer.attention) for layer in layers]
    assert [isinstance(one, PrunedAttention) for one in attentions] == [family == FAMILY] * tiny.LAYERS
    torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", [["c2p", "p2c"], ["c2p"], []])
def test_a_budget_of_multiply_accumulates_counts_products_with_positions(kinds: list[str]) -> None:
    """As torch's counter does: what each pair of a row's tokens takes, and each token."""
    model = tiny.build_classifier(FAMILY, pos_att_type=kinds)
    attach_gates_(model, granularity="structured", controller="importance")
    torch.manual_seed(0)

    def counted() -> tuple[PrunePlan, dict[str, int]]:
        plan = plan_model(model, "inner")
        pruned: Any = cut(model, plan)
        pruned.first_token_alone = False
        return plan, TorchRunner("pruned", "pruned", "cpu", None, 0, model=pruned).mac_terms

    _, whole = counted()
    for name, gate in gates_of(model):
        gate.mask.copy_((torch.rand(gate.size) < (0.3 if "query" in name else 0.8)).float())
    plan, left = counted()
    for tokens in (1, 8, 512):
        ratio = (left["token"] + tokens * left["pair"]) / (whole["token"] + tokens * whole["pair"])
        assert plan.removed("macs", tokens) == pytest.approx(1 - ratio)


def test_matrices_of_positions_alone_are_refused() -> None:
    model = tiny.build_classifier(FAMILY, share_att_key=False)
    with pytest.raises(ModelError, match=r"matrices without a role: .*pos_key_proj\.weight, .*pos_query_proj\.weight"):
        attach_gates_(model, granularity="structured", controller="importance")


def test_a_tokenizer_that_needs_sentencepiece_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spm.model").write_bytes(b"pieces")
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"its tokenizer is spm\.model without a .*; pip install sentencepiece$"):
        models.open_tokenizer(tmp_path)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (5, 1), (4, 4), (3, 6)])
def test_rows_are_shifted_against_each_other(rows: int, columns: int) -> None:
    x = torch.randn(2, rows, rows + columns)
    wanted = torch.stack([x[:, row, rows - 1 - row :][:, :columns] for row in range(rows)], dim=1)
    torch.testing.assert_close(_skewed(x, columns), wanted, atol=0, rtol=0)
