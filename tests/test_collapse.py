"""Masked = collapsed = reloaded, for every family, granularity and layout."""

import copy
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import gatepress.auto  # noqa: F401 - registers the Auto classes
import tiny
from forms import collapse
from gatepress.collapse import cut, parameters_of, plan_model
from gatepress.config import Granularity, Layout
from gatepress.errors import ModelError
from gatepress.families import FAMILIES, ROLES
from gatepress.gates import GatedLinear, counted, gates_of
from gatepress.inject import attach_gates_, gated_linear
from gatepress.modeling_gatepress import GATHER_FROM, pick
from gatepress.pruning import _write
from gatepress.resolve import model_class, resolve

GRANULARITIES: list[Granularity] = ["structured", "matrix", "heads"]
LAYOUTS: list[Layout] = ["auto", "inner", "index", "paper", "stock"]
TAKE_NO_PAIRS = {"mpnet", "deberta-v2", *(["modernbert"] if tiny.RELEASE < (5, 1) else [])}  # no mask of query and key


def gated_model(
    family: str, granularity: Granularity, closed: float = 0.4, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Return a tiny gated model with fractional gates, some of them closed, and a low-rank update."""
    model = tiny.build_classifier(family, num_labels=3, **changes)
    attach_gates_(model, granularity=granularity, controller="importance", lora_rank=2)
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GatedLinear):
                module.lora_b.normal_(std=0.1)
        for _, gate in gates_of(model):
            gate.mu.uniform_(0.1, 0.7)
            gate.mask.copy_(torch.rand_like(gate.mask) >= closed)
    return model.eval()


@torch.inference_mode()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    return model(**tiny.random_batch(family)).logits


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (1, 1, 5)])
@pytest.mark.parametrize("threads", [1, GATHER_FROM])
def test_any_shape_is_picked_from_with_any_number_of_threads(shape: tuple[int, ...], threads: int) -> None:
    x, index = torch.randn(shape, requires_grad=True), torch.tensor([4, 0, 6, 2, 5])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        picked = pick(x, index, zeros=2)
    finally:
        torch.set_num_threads(before)
    zero = x.new_zeros(shape[:-1])
    assert torch.equal(picked, torch.stack([x[..., 4], x[..., 0], zero, x[..., 2], zero], -1))
    picked.sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 0, 1, 0, 1]).expand(shape))


@pytest.mark.parametrize(("granularity", "layout"), list(itertools.product(GRANULARITIES, LAYOUTS)))
def test_collapsed_and_reloaded_equal_gated_and_hold_what_the_plan_counts(
    family: str, granularity: Granularity, layout: Layout, tmp_path: Path
) -> None:
    model = gated_model(family, granularity)
    wanted = logits(model, family)
    pruned, plan = collapse(model, layout)
    torch.testing.assert_close(logits(pruned, family), wanted, atol=1e-5, rtol=0)
    assert torch.equal(logits(model, family), wanted)  # the gated model is left as it was
    _write(pruned, tmp_path, layout)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded, family), logits(pruned, family))
    assert 0 < plan.removed_fraction < 1
    base = pruned.base_model
    paths = {path for layer in resolve(pruned) for role in ROLES for path in layer.held_in(role)}
    held = sum(value.numel() for name, value in base.named_parameters() if name.removesuffix(".weight") in paths)
    assert held == plan.kept_weights
    assert plan.dense_weights == sum(layer.weights for layer in resolve(model))
    dense_parameters = parameters_of(tiny.build_classifier(family, num_labels=3))
    assert parameters_of(pruned) == dense_parameters - plan.removed_parameters


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_open_gates_remove_nothing_and_change_nothing(family: str, granularity: Granularity) -> None:
    dense = tiny.build_classifier(family, num_labels=3)
    wanted = logits(dense, family)
    attach_gates_(dense, granularity=granularity, controller="importance")
    rounding = 0 if FAMILIES[family].halves is None else 1e-5  # activations of two joined matrices lie apart in memory
    torch.testing.assert_close(logits(dense.eval(), family), wanted, atol=rounding, rtol=0)
    pruned, plan = collapse(dense, "inner")
    assert plan.removed_fraction == 0
    torch.testing.assert_close(logits(pruned, family), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("granularity", "layout"), list(itertools.product(GRANULARITIES, LAYOUTS)))
def test_a_model_with_every_gate_closed_still_runs(family: str, granularity: Granularity, layout: Layout) -> None:
    model = gated_model(family, granularity, closed=1.1)
    pruned, _ = collapse(model, layout)
    torch.testing.assert_close(logits(pruned, family), logits(model, family), atol=1e-5, rtol=0)


def test_structured_sparsity_is_all_removed(family: str) -> None:
    """Half the gates of every head and of the neurons: half of the encoder's weights are gone."""
    model = gated_model(family, "structured", closed=0)
    for name, gate in gates_of(model):
        inner = gate.mask if ".down" in name else gate.mask.view(tiny.HEADS, -1)
        inner[..., : inner.shape[-1] // 2] = 0
    _, plan = collapse(model, "inner")
    assert plan.removed_fraction == 0.5


def test_closed_heads_leave_with_their_queries_keys_and_values(family: str) -> None:
    model = gated_model(family, "heads", closed=0)
    width = tiny.HIDDEN // tiny.HEADS
    for layer in resolve(model):
        gated_linear(model, layer, "o").gate_in.mask[[0, 3] if layer.group == 1 else [0]] = 0
        gated_linear(model, layer, "down").gate_in.mask[::3] = 0
    total, closed = counted(gate for _, gate in gates_of(model))
    pruned, plan = collapse(model, "inner")
    torch.testing.assert_close(logits(pruned, family), logits(model, family), atol=1e-5, rtol=0)
    for layer in plan.layers:
        group = layer.matrices["q"].dense_shape[0] // layer.matrices["k"].dense_shape[0]
        assert (layer.heads, layer.qk_width, layer.vo_width) == ([1, 2] if group == 1 else [2, 3], width, width)
        shapes = {role: matrix.shape for role, matrix in layer.matrices.items()}
        assert shapes["q"] == shapes["o"][::-1] == (2 * width, tiny.HIDDEN)
        assert shapes["k"] == shapes["v"] == (2 * width // group, tiny.HIDDEN)
    assert plan.removed_fraction == pytest.approx(closed / total)  # nothing is padded, nothing stays behind


def test_a_head_without_queries_attends_uniformly_and_one_without_values_goes(family: str) -> None:
    model = gated_model(family, "structured", closed=0)
    width = tiny.HIDDEN // tiny.HEADS
    for layer in resolve(model):
        gated_linear(model, layer, "q").gate_out.mask[: width // layer.at_once("q")] = 0
        gated_linear(model, layer, "o").gate_in.mask[-width:] = 0
    pruned, plan = collapse(model, "inner")
    assert all(layer.heads == list(range(tiny.HEADS - resolve(model)[0].group)) for layer in plan.layers)
    torch.testing.assert_close(logits(pruned, family), logits(model, family), atol=1e-5, rtol=0)


def test_uniform_attention_is_computed_once_for_all_tokens(family: str) -> None:
    """Without queries every token gets the same, unless families add a bias of their own to scores, or decode."""
    model = gated_model(family, "structured")
    first, second = resolve(model)
    gated_linear(model, first, "q").gate_out.mask.zero_()
    wanted = logits(model, family)
    pruned, plan = collapse(model, "inner")
    torch.testing.assert_close(logits(pruned, family), wanted, atol=1e-5, rtol=0)

    assert [plan.layers[0].matrices[role].weights for role in ("q", "k")] == [0, 0]
    attentions = [pruned.base_model.get_submodule(layer.attention) for layer in (first, second)]
    assert [one.gatepress["uniform"] for one in attentions] == [True, False]
    assert [getattr(one, one.gatepress["q"]) is None for one in attentions] == [True, False]
    lengths = []
    for one in attentions:
        one.register_forward_hook(lambda _, __, given: lengths.append(given[0].shape[1]))
    length = tiny.random_batch(family)["input_ids"].shape[1]
    pruned.first_token_alone = False
    logits(pruned, family)
    assert lengths == [length if family in ("mpnet", *tiny.DECODERS) else 1, length]

    pruned.set_attn_implementation("eager")
    for asked in ({"output_attentions": True}, {}):  # in the call, then by the configuration
        with torch.inference_mode():
            whole = pruned(**tiny.random_batch(family), **asked)
        assert {one.shape[-2:] for one in whole.attentions} == {(length, length)}
        torch.testing.assert_close(whole.logits, wanted, atol=1e-5, rtol=0)
        pruned.config.output_attentions = True


def embedder_without_queries(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the body of a gated model that has no queries in its first layer, and the pruned one's."""
    model = gated_model(family, "structured")
    gated_linear(model, resolve(model)[0], "q").gate_out.mask.zero_()
    pruned, _ = collapse(model, "inner")
    pruned.first_token_alone = False
    return model.base_model, pruned.base_model


def test_uniform_attention_reads_the_same_on_whichever_side_padding_is(family: str) -> None:
    model, pruned = embedder_without_queries(family)
    ids = torch.randint(5, 50, (1, 9))
    padded = {
        "input_ids": torch.cat([torch.ones(1, 4, dtype=ids.dtype), ids], 1),
        "attention_mask": torch.tensor([[0] * 4 + [1] * 9]),
    }
    with torch.inference_mode():
        wanted, got = (one(**padded).last_hidden_state[:, 4:] for one in (model, pruned))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES} - TAKE_NO_PAIRS))
def test_uniform_attention_obeys_masks_that_differ_from_token_to_token(family: str) -> None:
    """As of texts that are packed into one row."""
    facts = tiny.build_config(family).to_dict()
    undropped = {name: 0.0 for name, value in facts.items() if "dropout" in name and isinstance(value, float)}
    model = gated_model(family, "structured", **undropped)
    gated_linear(model, resolve(model)[0], "q").gate_out.mask.zero_()
    pruned, _ = collapse(model, "inner")
    ids, mask = torch.randint(5, 50, (1, 12)), torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    mask[..., :6, :6] = mask[..., 6:, 6:] = True
    with torch.inference_mode():
        wanted, got, flat = (
            one(input_ids=ids, attention_mask=seen, output_hidden_states=True).hidden_states[-1]
            for one, seen in ((model, mask), (pruned, mask), (pruned, torch.ones(1, 12)))
        )
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert (flat - got).abs().max() > 0.01

    with torch.inference_mode():  # below the head, where nobody tells layers what masks say
        bodies = [one.base_model(input_ids=ids, attention_mask=mask).last_hidden_state for one in (model, pruned)]
    torch.testing.assert_close(*bodies, atol=1e-5, rtol=0)
    if not pruned.supports_gradient_checkpointing:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that all releases of transformers have
        pruned.gradient_checkpointing_enable()
    for seen in (mask, torch.ones(1, 12)):  # layers are computed again from outside the model's forward
        pruned.train()(input_ids=ids, attention_mask=seen).logits.sum().backward()


def test_a_traced_model_takes_any_number_of_rows_and_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, _ = collapse(gated_model(family, "matrix"), "index")
    monkeypatch.setattr(torch, "get_num_threads", lambda: GATHER_FROM)
    names = ("input_ids", "attention_mask")
    shapes = ((4, 12), (2, 7), (1, 20))
    given = [(torch.randint(5, 50, shape), torch.ones(shape, dtype=torch.int64)) for shape in shapes]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of much
        traced = torch.jit.trace(Logits(pruned), given[0], check_trace=False)
        for inputs in given:
            wanted = pruned(**dict(zip(names, inputs, strict=True))).logits
            torch.testing.assert_close(traced(*inputs), wanted, atol=1e-5, rtol=0)


class Logits(torch.nn.Module):
    """A model as what traces it wants one: tensors in, a tensor out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def test_uniform_attention_of_version_1_is_read(family: str) -> None:
    """Its heads had one query/key dimension each, of zeros alone."""
    model = gated_model(family, "structured")
    first = resolve(model)[0]
    gated_linear(model, first, "q").gate_out.mask.zero_()
    pruned, _ = collapse(model, "inner")
    config = copy.deepcopy(pruned.config)
    assert config.gatepress["version"] == 2
    part = config.gatepress["attentions"][first.attention]
    width = first.at_once("q")
    whole = {"columns": tiny.HIDDEN, "gathered": False, "scattered": False}
    rows = {role: width * len(part["heads"]) * first.sharing(role) // first.group for role in ("q", "k")}
    config.gatepress["version"], part["qk_width"] = 1, width
    config.gatepress["linears"] |= {first.paths[role]: {"rows": rows[role], **whole} for role in ("q", "k")}
    before = type(pruned)(config)
    odd = before.load_state_dict(pruned.state_dict(), strict=False)
    assert not odd.unexpected_keys
    for name in odd.missing_keys:
        before.state_dict()[name].zero_()
    assert {name.split(".")[-1] for name in odd.missing_keys} <= {"weight", "bias", "pairs"}
    torch.testing.assert_close(logits(before.eval(), family), logits(pruned, family), atol=1e-6, rtol=0)


def test_versions_say_what_is_needed_to_read_them() -> None:
    """What older releases can read keeps their version."""
    pruned, _ = collapse(gated_model("bert", "structured"), "inner")
    assert pruned.config.gatepress["version"] == 1
    pruned.config.gatepress["version"] = 3
    with pytest.raises(ValueError, match=r"config\.gatepress has version 3, this file reads 1 and 2"):
        type(pruned)(pruned.config)


@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES} - {*tiny.DECODERS}))
def test_the_last_layer_computes_the_first_token_alone_unless_others_are_read(family: str) -> None:
    pruned, _ = collapse(gated_model(family, "structured"), "inner")
    inputs = tiny.random_batch(family)
    length = inputs["input_ids"].shape[1]
    lengths: list[int] = []
    last = pruned.base_model.get_submodule(resolve(pruned)[-1].path)
    last.register_forward_hook(
        lambda _, __, given: lengths.append((given if isinstance(given, Tensor) else given[0]).shape[1])
    )

    def computed(run: Callable[[], Any]) -> tuple[int, Any]:
        lengths.clear()
        result = run()
        return lengths[0], result

    pruned.first_token_alone = False
    tokens, whole = computed(lambda: pruned(**inputs, output_hidden_states=True, output_attentions=True))
    assert tokens == length
    assert computed(lambda: pruned(**inputs))[0] == length
    pruned.first_token_alone = True
    tokens, narrow = computed(lambda: pruned(**inputs))
    assert tokens == 1
    torch.testing.assert_close(narrow.logits, whole.logits, atol=1e-5, rtol=0)
    assert computed(lambda: pruned(inputs["input_ids"], inputs["attention_mask"]))[0] == 1  # given by place

    for asked in ("output_hidden_states", "output_attentions"):
        tokens, told = computed(lambda asked=asked: pruned(**inputs, **{asked: True}))
        assert tokens == length
        torch.testing.assert_close(told.logits, whole.logits, atol=1e-5, rtol=0)
    assert computed(lambda: pruned.base_model(**inputs))[0] == length
    assert computed(lambda: pruned.train()(**inputs))[0] == length
    pruned.eval().config.output_hidden_states = True
    tokens, told = computed(lambda: pruned(**inputs))
    assert tokens == told.hidden_states[-1].shape[1] == length
    real = inputs["attention_mask"].bool()  # where nothing near is a token, kernels give what they like
    torch.testing.assert_close(told.hidden_states[-1][real], whole.hidden_states[-1][real], atol=1e-5, rtol=0)


def test_calls_that_read_different_tokens_may_run_at_once_and_after_one_that_failed() -> None:
    """But for hidden states: transformers before 5.2 gives calls those of each other, of dense models too."""
    pruned, _ = collapse(gated_model("bert", "structured"), "inner")
    inputs = tiny.random_batch("bert")
    wanted = logits(pruned, "bert")
    with pytest.raises(IndexError):
        pruned(input_ids=inputs["input_ids"] + 10**6)
    states = pruned.base_model(**inputs)[0]
    assert states.shape[1] == inputs["input_ids"].shape[1]

    apart = tiny.RELEASE >= (5, 2)

    def ask(number: int) -> bool:
        whole = pruned(**inputs, output_hidden_states=number % 2 == 0)
        right = whole.hidden_states[-1].shape == whole.hidden_states[0].shape if number % 2 == 0 and apart else True
        return right and torch.allclose(whole.logits, wanted, atol=1e-6)

    def ask_for_all(_: int) -> bool:
        return torch.allclose(pruned.base_model(**inputs)[0], states, atol=1e-6)

    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(ask, range(64)), threads.map(ask_for_all, range(64))
        assert all(itertools.chain(*answers))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_other_threads_make_meanwhile_is_not_empty(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of the smaller model is left empty."""
    wanted, made = logits(pressed := gated_model(family, "structured"), family), []

    def asked_meanwhile(*args: Any, **options: Any) -> Any:
        pruned_class = model_class(*args, **options)

        class Watched(pruned_class):  # type: ignore[misc, valid-type]
            def __init__(self, config: Any) -> None:
                with ThreadPoolExecutor(1) as other:
                    made.append(other.submit(torch.nn.Linear, 2, 2).result())
                super().__init__(config)

        return Watched

    monkeypatch.setattr("gatepress.collapse.model_class", asked_meanwhile)
    pruned = cut(pressed, plan_model(pressed, "auto"))
    assert [one.weight.device.type for one in made] == ["cpu"]
    assert {one.device.type for one in itertools.chain(pruned.parameters(), pruned.buffers())} == {"cpu"}
    torch.testing.assert_close(logits(pruned, family), wanted, atol=1e-5, rtol=0)


def test_a_forward_of_its_own_reads_all_tokens() -> None:
    pruned, _ = collapse(gated_model("bert", "structured"), "inner")

    class Mean:
        def forward(self: Any, **inputs: Tensor) -> Tensor:
            return self.base_model(**inputs)[0].mean(1)

    class Mixed(Mean, type(pruned)):  # type: ignore[misc]
        pass

    class Inherited(Mixed):
        pass

    inputs = tiny.random_batch("bert")
    wanted = pruned.base_model(**inputs)[0].mean(1)
    for kind in (Mixed, Inherited):
        pruned.__class__ = kind
        torch.testing.assert_close(pruned(**inputs), wanted)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_offloaded_computes_the_same(family: str) -> None:
    """As `device_map="auto"` does with layers for which a GPU is too small: hooks bring weights for each call."""
    pruned, _ = collapse(gated_model(family, "structured"), "inner")
    wanted = logits(pruned, family)
    stock = tiny.build_classifier(family)
    try:
        logits(cpu_offload(stock, execution_device=torch.device("cpu")), family)
    except RuntimeError:
        pytest.skip(f"transformers' own {family} does not run offloaded")
    got = logits(cpu_offload(pruned, execution_device=torch.device("cpu")), family)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_how_tokens_are_pooled_may_change_after_loading() -> None:
    model = gated_model("modernbert", "structured")
    pruned, _ = collapse(model, "inner")
    for pooling in ("mean", "cls"):
        model.config.classifier_pooling = pruned.config.classifier_pooling = pooling
        torch.testing.assert_close(logits(pruned, "modernbert"), logits(model, "modernbert"), atol=1e-5, rtol=0)


def test_a_feed_forward_part_in_chunks_of_tokens_computes_all_of_them() -> None:
    gated = gated_model("bert", "structured")
    wanted = logits(gated, "bert")
    gated.config.chunk_size_feed_forward = 3
    pruned, _ = collapse(gated, "inner")
    torch.testing.assert_close(logits(pruned, "bert"), wanted, atol=1e-5, rtol=0)


def test_a_pruned_model_compiles_without_a_break(family: str) -> None:
    pruned, _ = collapse(gated_model(family, "matrix"), "index")
    torch.compiler.reset()  # all families share code, of which torch compiles eight forms in one process
    compiled = torch.compile(pruned, fullgraph=True, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(
            compiled(**tiny.random_batch(family)).logits, logits(pruned, family), atol=1e-6, rtol=0
        )


def test_eager_and_fused_attention_agree(family: str) -> None:
    pruned, _ = collapse(gated_model(family, "structured"), "inner")
    fused = logits(pruned, family)
    with torch.inference_mode():
        inputs = tiny.random_batch(family)
        if family != "mpnet":  # has one implementation only
            pruned.set_attn_implementation("eager")
        torch.testing.assert_close(pruned(**inputs).logits, fused, atol=1e-5, rtol=0)


def test_an_activation_that_moves_zero_is_refused() -> None:
    model = tiny.build_classifier("bert", hidden_act="sigmoid")
    attach_gates_(model, granularity="structured", controller="importance")
    with pytest.raises(ModelError, match="'sigmoid' does not map 0 to 0"):
        collapse(model, "inner")


def test_a_process_without_gatepress_loads_pruned_models(tmp_path: Path) -> None:
    """Our layouts by `trust_remote_code`, the stock layout with no code at all."""
    for family, layout in itertools.product(tiny.FAMILIES, LAYOUTS):
        directory = tmp_path / f"{family}@{layout}"
        pruned, _ = collapse(gated_model(family, "matrix"), layout)
        directory.mkdir()
        _write(pruned, directory, layout)
        batch = tiny.random_batch(family)
        torch.save({"inputs": batch, "logits": logits(pruned, family)}, directory / "wanted.pt")
    script = """
import sys, pathlib, torch
sys.modules["gatepress"] = None  # importing it now fails
from transformers import AutoModelForSequenceClassification as Auto
for directory in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    wanted = torch.load(directory / "wanted.pt")
    model = Auto.from_pretrained(directory, trust_remote_code=not directory.name.endswith("@stock"))
    with torch.inference_mode():
        got = model(**wanted["inputs"]).logits
    assert torch.allclose(got, wanted["logits"], atol=1e-6), directory
    try:
        if not directory.name.endswith("@stock"):
            Auto.from_pretrained(directory, trust_remote_code=False)
            raise SystemExit("loaded without code: random weights?")
    except ValueError as error:
        assert "trust_remote_code" in str(error)
print("all equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "all equal", done.stderr[-2000:]


def test_pipelines_and_trainer_accept_a_pruned_model(tmp_path: Path) -> None:
    pruned, _ = collapse(gated_model("bert", "structured"), "inner")
    directory = tmp_path / "pruned"
    directory.mkdir()
    _write(pruned, directory, "inner")
    tiny.build_tokenizer(tiny.BY_FAMILY["bert"]).save_pretrained(directory)
    classify = pipeline("text-classification", model=str(directory), device="cpu")
    assert classify("anda boro krat")[0]["label"].startswith("LABEL_")
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    rows = [{"input_ids": [2, 60, 61, 3], "labels": label} for label in (0, 1, 2, 1)]
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_gatepress.py").is_file()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again.eval(), "bert"), logits(model.eval(), "bert"))
