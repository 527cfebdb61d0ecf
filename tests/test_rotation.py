"""Heads are turned into the singular bases of their products: the model stays, and few dimensions hold most of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from conftest import TaskFiles
from forms import settings_for
from gatepress.checkpoint import load_run, read_run
from gatepress.config import DataSettings, TrainSettings
from gatepress.errors import ArtifactError, ParityError, UsageError
from gatepress.families import FAMILIES
from gatepress.files import RUN_FILE, sha256_of
from gatepress.gates import gates_of
from gatepress.inject import attach_gates_, gated_linear
from gatepress.resolve import Layer, resolve
from gatepress.rotation import bases_of, turn_
from gatepress.training import train

ModelDir = Callable[[str], Path]


def gated(family: str) -> Any:
    model = tiny.build_classifier(family, num_labels=3)
    attach_gates_(model, granularity="structured", controller="importance", rotate_heads=True)
    return model.eval()


def batches(family: str) -> list[dict[str, Tensor]]:
    return [tiny.random_batch(family, batch=8, length=16, seed=seed) for seed in range(4)]


def test_the_function_stays(family: str) -> None:
    model = gated(family)
    layers = resolve(model)
    before = model(**tiny.random_batch(family)).logits
    weights = {role: gated_linear(model, layers[0], role).base.weight.clone() for role in "qkvo"}
    bases = bases_of(model, batches(family))
    free = 1 if FAMILIES[family].paired else 2  # values and outputs; queries and keys, unless positions turn them
    assert len(bases) == free * len(layers)
    turn_(model, bases)
    torch.testing.assert_close(model(**tiny.random_batch(family)).logits, before, atol=1e-5, rtol=1e-5)
    for role, old in list(weights.items())[-2 * free :]:
        assert not torch.allclose(gated_linear(model, layers[0], role).base.weight, old, atol=1e-3), role


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if not row.paired])
def test_half_of_the_dimensions_hold_as_much_as_half_can(family: str) -> None:
    # Of all bases the singular one leaves the least of the scores out: compared by what single tokens ask of others.
    model = gated(family)
    layer, inputs = resolve(model)[0], batches(family)
    x = inputs_of(model, layer, inputs)
    before = [lost(*scores(model, layer, x), half) for half in (slice(None, None, 2), slice(layer.head_width // 2))]
    turn_(model, bases_of(model, inputs))
    q, k = scores(model, layer, x)
    after = lost(q, k, slice(layer.head_width // 2))
    for other in before:
        assert (after <= other * 1.001).all()
    lengths = q.pow(2).mean(1).sqrt() * k.pow(2).mean(1).sqrt()  # [heads, d]
    assert (lengths.diff() <= 1e-3 * lengths[:, :1]).all()
    torch.testing.assert_close(q.pow(2).mean(1), k.pow(2).mean(1), rtol=0.02, atol=1e-5)


def inputs_of(model: Any, layer: Layer, inputs: list[dict[str, Tensor]]) -> Tensor:
    """Return what the layer's queries see, [tokens, D]."""
    seen: list[Tensor] = []  # with what comes first: some families give it embeddings of positions too
    for batch in inputs:
        calls: list[Tensor] = []
        hook = gated_linear(model, layer, "q").register_forward_pre_hook(lambda _, given, of=calls: of.append(given[0]))
        model(**batch)
        hook.remove()
        seen.append(calls[0])
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, inputs, strict=True)])


def scores(model: Any, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys [heads, tokens, d]."""
    with torch.no_grad():
        both = [gated_linear(model, layer, role)(x) for role in ("q", "k")]
    q, k = (values.unflatten(1, (layer.heads, -1)).transpose(0, 1) for values in both)
    return q, k


def lost(q: Tensor, k: Tensor, kept: slice) -> Tensor:
    """Return what of all scores [tokens, tokens] the dimensions that are not kept hold, by head."""
    rest = torch.ones(q.shape[2], dtype=torch.bool)
    rest[kept] = False
    return (q[..., rest] @ k[..., rest].mT).pow(2).sum((1, 2))


def test_a_head_without_rank_stays_as_it_is() -> None:
    model = gated("bert")
    layer = resolve(model)[0]
    key = gated_linear(model, layer, "k").base
    with torch.no_grad():
        key.weight[: layer.head_width] = 0
        key.bias[: layer.head_width] = 0
    before = model(**tiny.random_batch("bert")).logits
    bases = bases_of(model, batches("bert"))
    turn_(model, bases)
    basis = gated_linear(model, layer, "q").gate_out.basis
    assert torch.equal(basis[0], torch.eye(layer.head_width))
    assert not torch.allclose(basis[1], torch.eye(layer.head_width))
    torch.testing.assert_close(model(**tiny.random_batch("bert")).logits, before, atol=1e-5, rtol=1e-5)


def test_heads_wider_than_what_they_read_stay_as_they_are() -> None:
    model: Any = tiny.build_classifier(
        "llama", hidden_size=6, num_attention_heads=2, num_key_value_heads=1, head_dim=12
    )
    attach_gates_(model, granularity="structured", controller="importance", rotate_heads=True)
    bases = bases_of(model.eval(), batches("llama"))
    assert bases
    assert all(torch.equal(basis, torch.eye(12).expand_as(basis)) for basis in bases.values())


@pytest.fixture(scope="module")
def settings(tiny_model_dir: ModelDir, tiny_task_files: TaskFiles) -> TrainSettings:
    return settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1, sparsity=0.5)


def bases_in(run: Path) -> dict[str, Tensor]:
    tensors = load_file(run / read_run(run).tensors["file"])
    return {name: value for name, value in tensors.items() if name.endswith(".basis")}


def test_a_run_keeps_its_bases_and_opens_in_them(settings: TrainSettings, tmp_path: Path) -> None:
    train(settings, tmp_path / "run")
    assert read_run(tmp_path / "run").settings.rotate_heads is True  # structured gates: unless told not to
    kept = bases_in(tmp_path / "run")
    assert kept
    model, _ = load_run(tmp_path / "run")
    found = {f"{name}.basis": gate.basis for name, gate in gates_of(model) if gate.basis is not None}
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], value) for name, value in kept.items())


def test_without_it_nothing_is_turned(settings: TrainSettings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(replace(settings, rotate_heads=False), run)
    assert bases_in(run) == {}
    layers = resolve(load_run(run)[0])
    base = load_file(Path(settings.model) / "model.safetensors")
    name = next(name for name in base if name.endswith(f"{layers[0].paths['q']}.weight"))
    assert torch.equal(gated_linear(load_run(run)[0], layers[0], "q").base.weight, base[name])


def test_a_run_of_an_earlier_release_is_opened_as_it_was_trained(settings: TrainSettings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(replace(settings, rotate_heads=False), run)
    manifest = json.loads((run / RUN_FILE).read_text())
    del manifest["settings"]["rotate_heads"]
    (run / RUN_FILE).write_text(json.dumps(manifest))
    assert read_run(run).settings.rotate_heads is False
    model, _ = load_run(run)
    assert all(gate.basis is None for _, gate in gates_of(model))


def test_a_basis_that_cannot_be_undone_is_refused(settings: TrainSettings, tmp_path: Path) -> None:
    train(settings, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / RUN_FILE).read_text())
    file = tmp_path / "run" / manifest["tensors"]["file"]
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith(".basis"))].zero_()
    save_file(tensors, file)
    manifest["tensors"]["sha256"] = sha256_of(file)
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="basis has no inverse; train again"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("rotated", [True, False])
def test_what_goes_on_from_a_run_has_its_heads(settings: TrainSettings, tmp_path: Path, *, rotated: bool) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(replace(settings, rotate_heads=rotated), first)
    train(replace(settings, start=str(first), sparsity=0.6), second)
    assert read_run(second).settings.rotate_heads is rotated
    assert bases_in(first).keys() == bases_in(second).keys()
    assert all(torch.equal(bases_in(first)[name], value) for name, value in bases_in(second).items())
    with pytest.raises(UsageError, match="was trained with --rotate-heads"):
        train(replace(settings, start=str(first), sparsity=0.6, rotate_heads=not rotated), tmp_path / "third")


def test_bases_that_change_the_model_are_refused(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, bases: dict[str, Tensor]) -> None:
        turn_(model, bases)
        gated_linear(model, resolve(model)[0], "q").base.weight.mul_(2)

    monkeypatch.setattr("gatepress.preparing.turn_", wrong)
    with pytest.raises(ParityError, match="--no-rotate-heads"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"matrices": ("down",)}),
        ("bert", {"granularity": "matrix", "matrices": ("up",), "gate_axes": "in"}),
        ("bert", {"granularity": "matrix", "matrices": ("q", "k"), "gate_axes": "in"}),
        ("llama", {"granularity": "matrix"}),  # heads of queries share values, and single dimensions of those cannot go
    ],
)
def test_it_is_refused_where_it_would_do_nothing(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    asked = settings_for(tiny_model_dir(family), tiny_task_files, epochs=1, **changes)
    with pytest.raises(UsageError, match="--rotate-heads is without effect"):
        train(replace(asked, rotate_heads=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(asked, tmp_path / "run")  # unless it is asked for, nothing is said


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"granularity": "heads"}, "--granularity heads has none"), ({"method": "lora"}, "--method lora has none")],
)
def test_gates_that_are_no_dimensions_of_heads_refuse_it(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        TrainSettings(data=DataSettings(task="demo"), rotate_heads=True, **changes)


@pytest.mark.parametrize(
    ("changes", "rotated"),
    [({}, True), ({"granularity": "matrix"}, False), ({"granularity": "heads"}, False), ({"method": "full"}, False)],
)
def test_structured_gates_have_it_unless_asked(changes: dict[str, Any], *, rotated: bool) -> None:
    settings = TrainSettings(data=DataSettings(task="demo"), **changes)
    assert settings.resolved("accuracy", finetuned=False).rotate_heads is rotated
    assert replace(settings, rotate_heads=False).resolved("accuracy", finetuned=False).rotate_heads is False
