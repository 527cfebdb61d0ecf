"""Families whose feed-forward part comes with two matrices on the way in, and which not every transformers has."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

import gatepress.auto  # noqa: F401 - registers the Auto classes
import tiny
from forms import collapse
from gatepress import modeling_gatepress
from gatepress.config import DataSettings, Layout, TrainSettings
from gatepress.errors import ModelError
from gatepress.families import FAMILIES
from gatepress.gates import gates_of
from gatepress.inject import attach_gates_, gated_linear
from gatepress.methods import merge_, prepare_
from gatepress.modeling_gatepress import GatedFeedForward
from gatepress.pruning import _write
from gatepress.resolve import known, model_class, resolve
from gatepress.runtime import open_runner

HALVED = [name for name in tiny.FAMILIES if FAMILIES[name].halves]
SCALED = {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}
VARIANTS: list[dict[str, Any]] = [{}, {"rope_parameters": SCALED}, {"num_attention_heads": 2}]

pytestmark = pytest.mark.skipif(not HALVED, reason="this release of transformers has none of these families")


def gated_model(family: str, **changes: Any) -> Any:
    model = tiny.build_classifier(family, **changes)
    attach_gates_(model, granularity="structured", controller="importance")
    torch.manual_seed(0)
    with torch.no_grad():
        for _, gate in gates_of(model):
            gate.mask.copy_(torch.rand_like(gate.mask) >= 0.4)
    return model


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tiny.random_batch(family)).logits


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes) or "usual")
@pytest.mark.parametrize("family", HALVED)
def test_one_product_takes_the_place_of_two(family: str, changes: dict[str, Any]) -> None:
    if family == "gemma3_text" and "rope_parameters" in changes and tiny.RELEASE < (5, 1):
        pytest.skip("this release wants the angles of local and of global layers apart")
    model = gated_model(family, **changes)
    for layer in resolve(model):
        gated_linear(model, layer, "down").gate_in.mask[:] = 1
        gated_linear(model, layer, "down").gate_in.mask[::4] = 0
    pruned, plan = collapse(model, "inner")
    kept = tiny.INTERMEDIATE * 3 // 4
    for layer, part in zip(plan.layers, pruned.base_model.layers, strict=True):
        assert isinstance(part.mlp, GatedFeedForward)
        assert layer.matrices["up"].shape == tuple(part.mlp.up.weight.shape) == (2 * kept, tiny.HIDDEN)
        assert layer.matrices["down"].shape == (tiny.HIDDEN, kept)
    torch.testing.assert_close(logits(pruned, family), logits(model, family), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["inner", "stock"])
@pytest.mark.parametrize("family", HALVED)
def test_files_have_the_names_of_the_classes_that_open_them(family: str, layout: Layout, tmp_path: Path) -> None:
    """Also where those of the hub are others, under which transformers would write a stock class."""
    pruned, _ = collapse(gated_model(family), layout)
    _write(pruned, tmp_path, layout)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(pruned.state_dict())
    assert any(name.endswith("mlp.up_proj.weight") for name in names) == (layout == "stock")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded, family), logits(pruned, family))


@pytest.mark.parametrize("method", ["lora", "lora-xs"])
@pytest.mark.parametrize("family", HALVED)
def test_adapters_stand_on_both_matrices_and_leave_them_apart(family: str, method: Any) -> None:
    model = tiny.build_classifier(family)
    names = {name for name, _ in model.named_parameters()}
    data = DataSettings(train_file="t.csv", validation_file="v.csv", text_column="text", label_column="label")
    prepare_(model, TrainSettings(data=data, model="m", method=method, matrices=("up",), lora_rank=2))
    mlp = model.base_model.layers[0].mlp
    assert all(hasattr(part, "get_base_layer") for part in (mlp.gate_proj, mlp.up_proj))
    assert not hasattr(mlp.down_proj, "get_base_layer")
    merge_(model)
    assert {name for name, _ in model.named_parameters()} == names


def test_a_checkpoint_that_names_code_of_its_own_is_opened_by_the_stock_classes(tmp_path: Path) -> None:
    family = HALVED[-1]
    model = tiny.build_classifier(family)
    tiny.save_model(model, family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "someone/code--configuration.Config",
        "AutoModel": "someone/code--modeling.Model",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    runner = open_runner(tmp_path)
    assert type(runner.model).__module__.startswith("transformers.")
    torch.testing.assert_close(logits(runner.model, family), logits(model, family))


def test_a_family_that_this_transformers_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(__version__="5.0.0", BertModel=transformers.BertModel)
    monkeypatch.setattr("gatepress.resolve.transformers", older)
    monkeypatch.setattr(modeling_gatepress, "transformers", older)
    assert not known(FAMILIES["gte"])
    with pytest.raises(ModelError, match=r"gte needs a newer release of transformers than 5\.0\.0"):
        model_class(FAMILIES["gte"])
    assert modeling_gatepress._classes("Gte") == {}
    monkeypatch.delitem(vars(modeling_gatepress), "GatepressGteModel", raising=False)
    with pytest.raises(ImportError, match="needs a release of transformers with GteModel, this is 5"):
        _ = modeling_gatepress.GatepressGteModel
    with pytest.raises(AttributeError, match="has no attribute 'GatepressGtModel'"):
        _ = modeling_gatepress.GatepressGtModel
