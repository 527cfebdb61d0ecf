"""Layouts that are chosen: exact whatever they cost, never dearer than a fixed one, and told why."""

import itertools
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

import forms
import tiny
from forms import collapse
from gatepress import costs, latency, pruning
from gatepress.cli.app import app
from gatepress.collapse import cut, live_parts, plan_model
from gatepress.config import Target
from gatepress.costs import TARGETS, Costs, Entry, analytic
from gatepress.errors import ArtifactError, DeviceError, UsageError
from gatepress.gates import gates_of
from gatepress.inject import gated_linear
from gatepress.plan import chooses
from gatepress.pruning import prune
from gatepress.recovery import prune_each
from gatepress.resolve import resolve
from test_collapse import gated_model, logits

HERE: list[Target] = ["ort-cpu", "ort-int8", "torch-cpu"]


def priced(moved: float, target: Target = "ort-cpu") -> Costs:
    """Return costs in which moving one number takes as long as `moved` multiply-accumulates."""
    entries = [
        replace(entry, ms=entry.ms * moved / TARGETS[target].macs_per_moved) if entry.op != "product" else entry
        for entry in analytic(target).entries
    ]
    return Costs(target, "made up", tuple(entries))


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize("moved", [1e-6, 5.0, 1e6])
def test_whatever_is_chosen_computes_the_same(family: str, target: Target, moved: float) -> None:
    model = gated_model(family, "matrix")
    wanted = logits(model, family)
    pruned, _ = collapse(model, "auto", priced(moved, target))
    torch.testing.assert_close(logits(pruned, family), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", get_args(Target))
def test_index_operations_depend_on_what_they_cost_whatever_widths_kernels_like(target: Target) -> None:
    model = gated_model("bert", "matrix", closed=0.6)  # as much as leaves something out of widths that are rounded up
    free, dear = (plan_model(model, "auto", priced(moved, target)) for moved in (1e-6, 1e6))
    picking = [
        [matrix.gathered or matrix.scattered for layer in plan.layers for matrix in layer.matrices.values()]
        for plan in (free, dear)
    ]
    assert any(picking[0])
    assert not any(picking[1])


def test_index_operations_are_taken_where_they_are_free_and_left_where_they_are_dear() -> None:
    model = gated_model("bert", "matrix")
    free, dear = (plan_model(model, "auto", priced(moved)) for moved in (1e-6, 1e6))
    index, inner = (plan_model(model, layout) for layout in ("index", "inner"))
    for layout, auto in ((index, free), (inner, dear)):
        assert [layer.matrices for layer in auto.layers] == [layer.matrices for layer in layout.layers]


@pytest.mark.parametrize("target", [name for name, facts in TARGETS.items() if facts.multiple == 1])
def test_the_choice_is_never_expected_to_be_slower_than_a_fixed_layout(family: str, target: Target) -> None:
    model = gated_model(family, "matrix")
    prices = priced(3.0, target)
    auto, *fixed = (plan_model(model, layout, prices).time_left for layout in ("auto", "inner", "index", "paper"))
    assert auto <= min(fixed) + costs.WORTH


def test_widths_are_those_that_the_target_likes(family: str) -> None:
    model = gated_model(family, "matrix")
    for layer in plan_model(model, "auto", analytic("torch-cpu")).layers:
        assert layer.qk_width == layer.vo_width
        neurons = len(layer.matrices["up"].rows)
        assert neurons % TARGETS["torch-cpu"].multiple == 0 or neurons == tiny.INTERMEDIATE


def test_the_layout_of_the_paper_propagates_nothing(family: str) -> None:
    model = gated_model(family, "matrix")
    wanted = logits(model, family)
    pruned, plan = collapse(model, "paper")
    torch.testing.assert_close(logits(pruned, family), wanted, atol=1e-5, rtol=0)
    for layer in plan.layers:
        assert all(matrix.shape == matrix.live for matrix in layer.matrices.values())
        assert layer.heads == list(range(tiny.HEADS))


def test_without_any_value_dimension_one_head_of_zeros_stands_in(family: str) -> None:
    model = gated_model(family, "structured", closed=0)
    wanted = resolve(model)
    for layer in wanted:
        gated_linear(model, layer, "o").gate_in.mask.zero_()
    expected = logits(model, family)
    pruned, plan = collapse(model, "inner")
    assert {(len(layer.heads), layer.qk_width, layer.vo_width) for layer in plan.layers} == {(wanted[0].group, 0, 1)}
    torch.testing.assert_close(logits(pruned, family), expected, atol=1e-5, rtol=0)


def test_what_is_gone_takes_no_time() -> None:
    """Where a call costs more than what it multiplies, queries and keys that are gone are a third of all calls."""
    entries = [replace(entry, ms=1000 + entry.ms / 1e6) for entry in analytic("ort-cpu").entries]
    model = gated_model("bert", "structured", closed=0)
    gated_linear(model, resolve(model)[0], "q").gate_out.mask.zero_()
    _, plan = collapse(model, "inner", Costs("ort-cpu", "made up", tuple(entries)))
    assert [layer.time_left for layer in plan.layers] == pytest.approx([4 / 6, 1], rel=1e-3)


def test_a_consumed_model_gives_its_matrices_back(family: str) -> None:
    model = gated_model(family, "matrix")
    wanted = logits(model, family)
    pruned = cut(model, plan_model(model, "auto"), consume=True)
    torch.testing.assert_close(logits(pruned, family), wanted, atol=1e-5, rtol=0)
    layers = resolve(pruned)
    assert layers
    assert all(module.base.weight.numel() == 0 for module in model.modules() if hasattr(module, "gate_in"))


@pytest.mark.parametrize(
    ("role", "side", "widths"),
    [
        ("q", "gate_out", {"qk": tiny.HIDDEN // tiny.HEADS - 1}),
        ("k", "gate_out", {"qk": tiny.HIDDEN // tiny.HEADS - 1}),
        ("v", "gate_out", {"vo": tiny.HIDDEN // tiny.HEADS - 1}),
        ("o", "gate_in", {"vo": tiny.HIDDEN // tiny.HEADS - 1}),
        ("up", "gate_out", {"neurons": tiny.INTERMEDIATE - 1}),
        ("down", "gate_in", {"neurons": tiny.INTERMEDIATE - 1}),
    ],
)
def test_what_is_closed_on_one_side_is_gone_on_the_other(role: str, side: str, widths: dict[str, int]) -> None:
    """What a query's dimension is asked by, a value's is read by, and a neuron: each needs both of its matrices."""
    model = gated_model("bert", "matrix", closed=0)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(torch.where(parameter == 0, 0.01, 0.0))  # biases of a fresh model are 0, and would close too
    for layer in resolve(model):
        mask = getattr(gated_linear(model, layer, role), side).mask
        mask.view(1 if role in ("up", "down") else tiny.HEADS, -1)[:, 3] = 0
    wanted = logits(model, "bert")
    pruned, plan = collapse(model, "inner")
    torch.testing.assert_close(logits(pruned, "bert"), wanted, atol=1e-5, rtol=0)
    whole = {"qk": tiny.HIDDEN // tiny.HEADS, "vo": tiny.HIDDEN // tiny.HEADS, "neurons": tiny.INTERMEDIATE}
    qk, vo, neurons = ({**whole, **widths}[name] for name in ("qk", "vo", "neurons"))
    for layer in plan.layers:
        shapes = {name: matrix.shape for name, matrix in layer.matrices.items()}
        assert shapes["q"] == shapes["k"] == (qk * tiny.HEADS, tiny.HIDDEN)
        assert (shapes["v"], shapes["o"]) == ((vo * tiny.HEADS, tiny.HIDDEN), (tiny.HIDDEN, vo * tiny.HEADS))
        assert (shapes["up"], shapes["down"]) == ((neurons, tiny.HIDDEN), (tiny.HIDDEN, neurons))


def test_only_zeros_on_the_residual_side_leave_a_choice() -> None:
    structured, matrix = gated_model("bert", "structured"), gated_model("bert", "matrix")
    opened = gated_model("bert", "matrix", closed=0)
    for _, gate in gates_of(opened):
        assert gate.mask.all()
    without = gated_model("bert", "structured")  # queries in one layer: nothing of them is left to choose for
    gated_linear(without, resolve(without)[0], "q").gate_out.mask.zero_()
    answers = [chooses(live_parts(model, resolve(model))) for model in (structured, matrix, opened, without)]
    assert answers == [False, True, False, False]


def test_the_plan_says_what_was_there_what_is_kept_and_what_it_should_gain() -> None:
    plan = plan_model(gated_model("bert", "matrix"), "auto", priced(1e-6)).to_json()
    assert json.loads(json.dumps(plan)) == plan
    assert (plan["target"], plan["costs"]) == ("ort-cpu", "made up")
    for layer in plan["layers"]:
        assert 0 < layer["time_left"] <= layer["macs_left"] + 0.01
        q, up = layer["matrices"]["q"], layer["matrices"]["up"]
        assert q["gathered"]
        assert q["kept"][1] == q["live"][1] < q["dense"][1]
        assert up["kept"][0] <= up["live"][0]


# --- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", get_args(Target))
def test_a_table_survives_its_file(target: Target, tmp_path: Path) -> None:
    table = replace(analytic(target), source="some processor", about={"threads": 2})
    costs.save(table, tmp_path / "table.json")
    read = costs.read(tmp_path / "table.json")
    assert (read.target, read.source, read.entries, read.about) == (
        target,
        "some processor",
        table.entries,
        {"threads": 2},
    )


def test_predictions_pass_through_what_was_measured() -> None:
    table = analytic("ort-cpu")
    for entry in table.entries:
        assert table.milliseconds(entry.op, entry.shape) == pytest.approx([entry.ms], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "expected 'gatepress-latency' version 2"),
        ({"version": 1}, "expected 'gatepress-latency' version 2"),
        ({"target": "tpu"}, "target is 'tpu', expected one of ort-cpu"),
        ({"target": ["ort-cpu"]}, r"target is \['ort-cpu'\], expected one of ort-cpu"),
        ({"entries": []}, "no product on|every operation|need at least"),
        ({"entries": [{"op": "product"}]}, "not a latency table"),
        ({"entries": [{"op": "add", "tokens": 1, "shape": [1, 1], "ms": 1.0}]}, "op is 'add'"),
        ({"entries": [{"op": "product", "tokens": 1, "shape": [1, -1], "ms": 1.0}]}, "is no size"),
        ({"entries": [{"op": "product", "tokens": 1, "shape": [1, 10**9], "ms": 1.0}]}, "is no size"),
        ({"entries": [{"op": "product", "tokens": 1, "shape": [1, 1], "ms": 0}]}, "expected a positive number"),
        ({"entries": [{"op": "product", "tokens": 1, "shape": [1, 1], "ms": 1.0}]}, "no gather on 1 tokens"),
        ({"entries": 3}, "not a latency table"),
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, object], text: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(analytic("ort-cpu").to_json() | change))
    with pytest.raises(ArtifactError, match=text):
        costs.read(file)


def test_a_table_of_another_target_is_refused(tmp_path: Path) -> None:
    costs.save(analytic("torch-cpu"), tmp_path / "table.json")
    with pytest.raises(UsageError, match="is of torch-cpu, but --for is ort-cpu"):
        latency.for_target("ort-cpu", tmp_path / "table.json")


# --- measured here --------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure next to nothing, into an empty cache."""
    monkeypatch.setattr(latency, "TOKENS", (4, 8))
    monkeypatch.setattr(latency, "PRODUCTS", ((16, 16), (32, 16)))
    monkeypatch.setattr(latency, "MOVED", ((16, 8),))
    monkeypatch.setattr(latency, "REPEATS", 2)
    monkeypatch.setattr(latency, "STEADY", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("target", HERE)
def test_every_operation_is_measured_and_the_table_is_kept(target: Target) -> None:
    table = latency.for_target(target)
    assert {(entry.op, entry.tokens) for entry in table.entries} == {
        (op, tokens) for op in get_args(costs.Op) for tokens in (4, 8)
    }
    assert latency.for_target(target).entries == table.entries  # no second measurement could be the same
    assert costs.read(latency.cache_file(target)).entries == table.entries


@pytest.mark.usefixtures("few")
def test_bench_measures_a_table_that_prune_reads(tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    result = CliRunner().invoke(app, ["bench", "--latency-table", "torch-cpu", "-o", str(file), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(file.read_text())
    assert latency.for_target("torch-cpu", file).about["threads"] == torch.get_num_threads()
    again = CliRunner().invoke(app, ["bench", "--latency-table", "torch-cpu", "-o", str(file)])
    assert again.exit_code != 0
    assert "exists already" in again.output


@pytest.mark.usefixtures("few")
def test_a_broken_cache_is_measured_again_and_one_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = latency.cache_file("torch-cpu")
    kept.parent.mkdir(parents=True)
    kept.write_text("{")
    assert latency.for_target("torch-cpu").source != "analytic"
    assert costs.read(kept)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert latency.for_target("torch-cpu").entries


@pytest.mark.usefixtures("few")
def test_a_cache_that_nobody_may_look_into_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that runs as another user than the one whose home it has."""
    stat = os.stat

    def refused(path: Any, *args: Any, **options: Any) -> Any:
        if "latency" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    monkeypatch.setattr(costs, "save", lambda *_: None)
    assert latency.for_target("torch-cpu").entries


def test_the_cache_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tmp_path in latency.cache_file("torch-cpu").parents


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_another_machine_is_planned_for_by_estimates() -> None:
    assert latency.for_target("cuda").source == "analytic"
    with pytest.raises(DeviceError, match="torch sees none"):
        latency.measure("cuda")


def test_nothing_is_measured_where_nothing_hangs_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir, tiny_task_files
) -> None:
    def fail(*_args: object) -> None:
        raise AssertionError("measured")

    run = forms.save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files)
    monkeypatch.setattr(pruning, "for_target", fail)
    report = prune(run, tmp_path / "pruned")
    assert report["plan"]["costs"] == "analytic"
    assert report["expected_time_left"] < 1


def test_a_shipped_table_decides(tmp_path: Path, tiny_model_dir, tiny_task_files) -> None:
    run = forms.save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files, granularity="matrix")
    found = {}
    for name, moved in (("free", 1e-6), ("dear", 1e6)):
        costs.save(priced(moved), tmp_path / f"{name}.json")
        plan = prune(run, tmp_path / name, latency_table=tmp_path / f"{name}.json", dry_run=True)["plan"]
        found[name] = indexed(plan)
    assert found == {"free": True, "dear": False}
    assert not (tmp_path / "free").exists()


def test_entries_of_one_operation_are_enough_for_a_prediction() -> None:
    moves: list[tuple[costs.Op, tuple[int, int]]] = [("gather", (3, 2)), ("again", (3, 2)), ("scatter", (2, 3))]
    entries = (Entry("product", 1, (2, 3), 6.0), *(Entry(op, 1, shape, 1.0) for op, shape in moves))
    assert Costs("ort-cpu", "made up", entries).matrix((4, 6), (2, 3)) < 1


@pytest.mark.parametrize("target", ["ort-cpu", "ort-int8"])
def test_queries_keys_and_values_pick_together_what_one_of_them_would_not(target: Target) -> None:
    model = gated_model("bert", "matrix")
    layers = zip(*(plan_model(model, layout).layers for layout in ("inner", "index")), strict=True)
    saved = [[a.matrices[role].weights - b.matrices[role].weights for role in ("q", "k", "v")] for a, b in layers]
    dear = 1.2 * max(itertools.chain(*saved))
    assert dear < min(map(sum, saved))
    # One gather takes more than a matrix saves and less than three do; further ones from the same input are free.
    entries = [entry for entry in priced(1e6, target).entries if entry.op != "gather"]
    entries = [replace(entry, ms=1e-9) if entry.op == "again" else entry for entry in entries]
    entries += [Entry("gather", 1, (a, b), dear) for a in (1, 100, 1000) for b in (1, 100, 1000)]
    for layer in plan_model(model, "auto", Costs(target, "made up", tuple(entries))).layers:
        together = [layer.matrices[role].gathered for role in ("q", "k", "v")]
        assert together == [TARGETS[target].picks_share] * 3


def test_the_choice_is_made_for_the_tokens_of_a_call(tmp_path: Path, tiny_model_dir, tiny_task_files) -> None:
    # An index operation that takes a fixed time pays on many tokens and not on few.
    entries = [entry for entry in priced(1e-6).entries if entry.op == "product"]
    products = [replace(entry, tokens=n, ms=entry.ms * n) for entry in entries for n in (1, 1000)]
    moves = [
        replace(entry, tokens=n, ms=1e4) for entry in priced(1.0).entries if entry.op != "product" for n in (1, 1000)
    ]
    table = Costs("ort-cpu", "made up", (*products, *moves))
    costs.save(table, tmp_path / "table.json")
    run = forms.save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files, granularity="matrix")
    plans = {
        tokens: prune(run, tmp_path / "p", latency_table=tmp_path / "table.json", tokens=tokens, dry_run=True)["plan"]
        for tokens in (1, 1000, None)
    }
    assert {tokens: plan["tokens"] for tokens, plan in plans.items()} == {tokens: tokens for tokens in plans}
    assert not indexed(plans[1])
    assert indexed(plans[1000])
    between = [
        replace(table, tokens=tokens).milliseconds("product", (16, 16)).item() for tokens in (1, 400, 1000, 9999)
    ]
    assert between == sorted(between)
    assert between[1] == pytest.approx(0.4 * between[2], rel=0.01)
    assert between[3] == between[2]  # beyond the table its last count stands


def indexed(plan: dict[str, Any]) -> bool:
    return any(part["gathered"] for layer in plan["layers"] for part in layer["matrices"].values())


def test_no_call_has_less_than_one_token(tmp_path: Path, tiny_model_dir, tiny_task_files) -> None:
    run = forms.save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files)
    with pytest.raises(UsageError, match="--tokens is 0, expected 1 or more"):
        prune(run, tmp_path / "pruned", tokens=0)
    with pytest.raises(UsageError, match="--tokens is 0, expected 1 or more"):  # before anything is trained
        prune_each(run, {0.5: tmp_path / "pruned"}, recover_epochs=1, tokens=0)
    assert not (tmp_path / "pruned").exists()


def test_a_matrix_costs_its_own_index_operations() -> None:
    """Gathers are from the width of the dense input, scatters from what is kept to the dense output."""
    sides = (16, 32, 64, 128)
    entries = [Entry("product", 1, (a, b), 1.0) for a in sides for b in sides]
    for a in sides:
        for b in sides:
            # [width, kept] of a gather, [kept, width] of a scatter; each hangs on another side than the other one
            entries += [Entry("gather", 1, (a, b), float(a)), Entry("again", 1, (a, b), float(a))]
            entries.append(Entry("scatter", 1, (a, b), float(b)))
    costs = Costs("ort-cpu", "made up", tuple(entries))
    dense, kept = (64, 128), (16, 32)
    assert costs.matrix(dense, kept) == pytest.approx(1)
    assert costs.matrix(dense, kept, gathered="gather") == pytest.approx(1 + 128)
    assert costs.matrix(dense, kept, gathered="again") == pytest.approx(1 + 128)
    assert costs.matrix(dense, kept, scattered=True) == pytest.approx(1 + 64)


def test_a_fit_is_as_near_to_short_times_as_to_long_ones() -> None:
    """Errors count by what they are a part of: a long product must not decide what a short one takes."""
    true = {(a, b): (a * b) ** 0.8 for a in (16, 64, 256, 1024) for b in (16, 64, 256, 1024)}
    entries = [Entry("product", 1, shape, time) for shape, time in true.items()]
    entries += [one for one in analytic("ort-cpu").entries if one.op != "product"]
    costs = Costs("ort-cpu", "made up", tuple(entries))
    off = [abs(float(costs.milliseconds("product", shape)[0]) / time - 1) for shape, time in true.items()]
    assert max(off) < 1
