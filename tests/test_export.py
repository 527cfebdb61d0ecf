"""ONNX Runtime = torch, for every family, form and granularity; and nothing is kept where it is not."""

import functools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

import tiny
from forms import PROBE_ROWS, save_run
from gatepress import export as exporting
from gatepress import tracing
from gatepress.agreement import LONGEST_TRIED, compare, random_batches
from gatepress.checkpoint import load_run
from gatepress.config import Granularity, Layout
from gatepress.errors import ArtifactError, ModelError, OutputError, ParityError, UsageError
from gatepress.export import export
from gatepress.models import load_pruned, save_tokenizer
from gatepress.pruning import prune
from gatepress.runtime import open_runner
from gatepress.tracing import FUSED, operators, write_onnx
from gatepress.verifying import verify

# None of these is among the shapes that export itself compares.
UNSEEN = [(1, 2), (2, 1), (3, 11), (7, 40)]


@pytest.fixture(scope="module")
def bert(tiny_classifier_dir, tmp_path_factory) -> SimpleNamespace:
    """One exported classifier, for the tests that only look at it."""
    source = tiny_classifier_dir("bert", 3)
    output = tmp_path_factory.mktemp("bert") / "onnx"
    return SimpleNamespace(source=source, output=output, result=export(source, output))


@pytest.fixture(scope="module")
def dense_operators(tmp_path_factory) -> Callable[[str], dict[str, int]]:
    """Return family -> what ONNX Runtime makes of its dense model, exported in the same way."""

    @functools.cache
    def counted(family: str) -> dict[str, int]:
        file = tmp_path_factory.mktemp("dense") / "model.onnx"
        write_onnx(tiny.build_classifier(family), file)
        return operators(file, {name: value.numpy() for name, value in tiny.random_batch(family).items()})

    return counted


def agree_on_unseen_shapes(model: torch.nn.Module, directory: Path, family: str) -> None:
    """Compare in a session of ONNX Runtime's defaults, as a user without gatepress would, and in OpenVINO."""
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    in_openvino = open_runner(directory, runtime="openvino") if find_spec("openvino") else None
    for rows, length in UNSEEN:
        batch = tiny.random_batch(family, rows, length, seed=rows)
        with torch.inference_mode():
            wanted = model(**batch).logits
        got = session.run(["logits"], {name: batch[name].numpy() for name in names})[0]
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4, rtol=0)
        if in_openvino:
            got = in_openvino.logits({name: one.numpy() for name, one in batch.items()})
            np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4, rtol=0)


def assert_last_layer_is_of_one_token(pruned: Path, macs: dict[str, int], family: str) -> None:
    """The head reads the first token: of the last layer, all but keys and values are computed for it alone."""
    runner = open_runner(pruned)
    assert runner.mac_terms == macs  # torch leaves out the same
    if family in tiny.DECODERS:  # whose head reads the last token, and all are computed
        return
    runner.model.first_token_alone = False
    whole = replace(runner).mac_terms
    matrices = json.loads((pruned / "gatepress_pruned.json").read_text())["report"]["plan"]["layers"][-1]["matrices"]
    once = sum(math.prod(matrices[role]["kept"]) for role in ("q", "o", "up", "down"))
    queries = matrices["q"]["kept"][0]
    group = matrices["q"]["dense"][0] // matrices["k"]["dense"][0]
    products = queries + group * matrices["v"]["kept"][0]  # scores, and what they weigh
    # With positions: L + 1 products of one query and of each of L keys, in place of 2 L of each.
    positions = queries if family == "deberta-v2" else 0
    assert macs == {
        "token": whole["token"] - once + products + 2 * positions,
        "pair": whole["pair"] - products - 3 * positions,
        "row": whole["row"] + once + positions,
    }


PRE_NORM = ("modernbert", "eurobert")
ONE_ATTENTION = ("roberta", "xlm-roberta", "electra")  # with BERT
EXPORTED = [
    (family, granularity)
    for family in tiny.DISTINCT
    for granularity in ("structured", *(() if family in ONE_ATTENTION else ("matrix", "heads")))
]


@pytest.mark.parametrize("family", tiny.DISTINCT)
def test_a_run_is_exported_as_torch_computes_it(
    family: str, tiny_model_dir: Callable[[str], Path], tiny_task_files, tmp_path: Path
) -> None:
    """Each family with one of the granularities: an export takes seconds."""
    structured = tiny.FAMILIES.index(family) % 2 or family in ONE_ATTENTION
    granularity: Granularity = "structured" if structured else "matrix"
    run = save_run(tmp_path / "run", tiny_model_dir(family), tiny_task_files, granularity=granularity)
    result = export(run, tmp_path / "onnx")
    assert result["source_kind"] == "run"
    assert result["shapes"][-1]["rows"] == PROBE_ROWS  # the run's own rows are compared as well
    agree_on_unseen_shapes(load_run(run)[0], tmp_path / "onnx", family)


def exported_as_torch_computes_it(run: Path, layout: Layout, family: str) -> dict[str, Any]:
    """Write `pruned` and `onnx` beside a run, assert what holds of every family, and return the result."""
    pruned, output = run.with_name("pruned"), run.with_name("onnx")
    prune(run, pruned, layout=layout)
    result = export(pruned, output)
    assert result["source_kind"] == "pruned"
    assert result["max_abs_logit_diff"] <= 1e-4
    assert verify(output)["max_abs_logit_diff"] <= 1e-5
    assert len({(shape["rows"], shape["length"]) for shape in result["shapes"]}) >= 3
    assert any(shape["padding"] for shape in result["shapes"])
    assert "Pad" not in result["operators"]  # zeros of closed outputs are computed
    agree_on_unseen_shapes(load_pruned(pruned), output, family)
    assert_last_layer_is_of_one_token(pruned, result["macs"], family)
    pruned_manifest = json.loads((pruned / "gatepress_pruned.json").read_text())
    manifest = json.loads((output / "gatepress_onnx.json").read_text())
    assert all(manifest[key] == pruned_manifest[key] for key in ("task", "data", "max_length"))
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == family  # other tools know the family, not its pruned class
    assert not {"auto_map", "gatepress"} & set(config)
    assert "gatepress_" not in json.dumps(config)
    return result


@pytest.mark.parametrize(("family", "granularity"), EXPORTED)
def test_a_pruned_directory_is_exported_with_all_fusions(  # noqa: PLR0913, PLR0917 - fixtures
    family: str,
    granularity: Granularity,
    tiny_model_dir: Callable[[str], Path],
    dense_operators: Callable[[str], dict[str, int]],
    tiny_task_files,
    tmp_path: Path,
) -> None:
    """As torch computes it, and ONNX Runtime fuses all that it fuses in the dense model of the family."""
    run = save_run(tmp_path / "run", tiny_model_dir(family), tiny_task_files, granularity=granularity)
    result = exported_as_torch_computes_it(run, "index" if granularity == "matrix" else "inner", family)
    dense, ran, fused = dense_operators(family), result["operators"], result["fused_operators"]
    assert all(fused.get(name, 0) >= dense[name] for name in dense if name in FUSED), (dense, fused)
    twice = int(family in PRE_NORM)  # what keys read in the last layer is normed before them, and the first token
    norm = "SimplifiedLayerNormalization" if family in ("eurobert", "qwen3", "gemma3_text") else "LayerNormalization"
    assert fused[norm] - twice == dense[norm] >= 2 * tiny.LAYERS
    if family == "deberta-v2":
        # It adds shapes up as well, and positions are multiplied with keys: these need their biases.
        graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
        biased = {one.name.rsplit(".", 2)[-2] for one in graph.initializer if one.name.endswith(".bias")}
        assert (biased & {"key_proj", "value_proj"}) == {"key_proj"}
        products = {"MatMul": 7 * tiny.LAYERS, "FusedMatMul": 3 * tiny.LAYERS, "Gemm": 2}  # none makes positions' own
        assert products.items() <= ran.items()
        return
    # of values, and of keys that positions do not turn
    biases = {
        **dict.fromkeys(("modernbert", "eurobert", "gemma3_text"), 0),
        **dict.fromkeys(("gte", "jina_embeddings_v3", "qwen3"), 1),
    }.get(family, 2)
    assert ran["Add"] == dense["Add"] - biases * tiny.LAYERS


def test_uniform_attention_is_exported_as_torch_computes_it(
    family: str, tiny_model_dir: Callable[[str], Path], tiny_task_files, tmp_path: Path
) -> None:
    """One that is computed once for all tokens, in the layer before the last."""
    run = save_run(tmp_path / "run", tiny_model_dir(family), tiny_task_files, silent=True)
    exported_as_torch_computes_it(run, "auto", family)
    pruned = load_pruned(tmp_path / "pruned")
    assert [one["uniform"] for one in pruned.config.gatepress["attentions"].values()] == [True, False]


def test_axes_are_named_and_free(bert) -> None:
    graph = onnx.load(bert.output / "model.onnx").graph
    for one in graph.input:
        assert [axis.dim_param for axis in one.type.tensor_type.shape.dim] == ["batch", "length"]
    batch, labels = graph.output[0].type.tensor_type.shape.dim
    assert (batch.dim_param, labels.dim_value) == ("batch", 3)


def test_graph_has_whole_operators_and_no_notes(bert) -> None:
    """What runtimes fuse or compute at once is one node; where it was exported is nobody's business."""
    graph = onnx.load(bert.output / "model.onnx").graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["LayerNormalization"] == 2 * tiny.LAYERS + 1
    assert operators["Gelu"] == operators["Softmax"] == tiny.LAYERS
    assert not graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    content = (bert.output / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def test_operators_are_those_of_the_optimized_graph(bert, tmp_path: Path) -> None:
    """Residual sums stay apart from layer norms: on a CPU the fused operator is slower than the two."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(bert.output / "model.onnx", options, providers=["CPUExecutionProvider"])
    counted = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert bert.result["operators"] == counted
    assert "SkipLayerNormalization" not in counted
    fused = {"BiasGelu": 2, "FusedMatMul": 2, "LayerNormalization": 5, "FusedGemm": 1}
    assert bert.result["fused_operators"] == fused


def test_tokenizer_lies_beside_the_graph(bert) -> None:
    text = "anda boro belu"
    assert AutoTokenizer.from_pretrained(bert.output)(text) == AutoTokenizer.from_pretrained(bert.source)(text)


def test_settings_of_a_tokenizer_name_what_it_hands_to_the_model(tmp_path: Path) -> None:
    """They must not hang on a class that some releases of transformers pick by a model type unknown to them."""
    tokenizer = tiny.build_tokenizer(tiny.BY_FAMILY["bert"])
    tokenizer.init_kwargs.pop("model_input_names", None)  # as where the class says it
    save_tokenizer(tokenizer, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]


def test_result_says_what_was_written(bert) -> None:
    assert bert.result["output_dir"] == str(bert.output)
    assert bert.result["size_bytes"] == (bert.output / "model.onnx").stat().st_size
    assert bert.result["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert bert.result["total_params"] == open_runner(bert.source).parameters
    assert {file.name for file in bert.output.iterdir()} == {
        "model.onnx",
        "gatepress_onnx.json",
        "expected.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [({"opset": 11}, "--opset is 11"), ({"max_diff": float("nan")}, "--max-diff is nan")],
)
def test_options_out_of_range_are_refused(options, words, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        export("no-such-model", tmp_path / "onnx", **options)


def test_an_operator_set_that_is_too_new_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UsageError, match=r"^--opset is 99, of which torch makes no graph that ONNX Runtime loads"):
        exporting._opened(tmp_path / "model.onnx", 99)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        exporting._opened(tmp_path / "model.onnx", None)


def test_a_graph_of_another_operator_set_than_was_asked_for_is_told(bert, tmp_path: Path, monkeypatch) -> None:
    """The exporter leaves a graph as it is where it cannot convert it."""
    monkeypatch.setattr(exporting, "write_onnx", lambda _model, file, **_: shutil.copy(bert.output / file.name, file))
    made = exporting.opset_of(onnx.load(bert.output / "model.onnx"))
    with pytest.raises(UsageError, match=f"^--opset is 17, of which torch makes a graph of {made}; give {made}"):
        export(bert.source, tmp_path / "onnx", opset=17)
    assert not list(tmp_path.iterdir())
    assert export(bert.source, tmp_path / "onnx", opset=made)["opset"] == made


def test_disagreement_keeps_nothing_and_harms_nothing(bert, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(exporting, "write_onnx", lambda _model, file, **_: shutil.copy(bert.output / file.name, file))
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "gatepress_onnx.json").write_text("kept")
    with pytest.raises(ParityError, match="nothing was written"):
        export(bert.source, tmp_path / "onnx", force=True, max_diff=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert (tmp_path / "onnx" / "gatepress_onnx.json").read_text() == "kept"


def test_graph_with_a_frozen_axis_is_refused(bert, tmp_path: Path, monkeypatch) -> None:
    """A graph that answers with the wrong shape, or not at all, never passes the comparison."""

    def freeze(_model, file, *, opset=None) -> None:
        assert opset is None
        graph = onnx.load(bert.output / "model.onnx")
        for one in graph.graph.input:
            one.type.tensor_type.shape.dim[0].dim_value = 2
        onnx.save(graph, file)

    monkeypatch.setattr(exporting, "write_onnx", freeze)
    with pytest.raises(ParityError, match="cannot run 1 x 1 tokens"):
        export(bert.source, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_output_that_exists_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--force"):
        export("no-such-model", tmp_path)


def test_a_forward_that_somebody_else_put_on_a_norm_is_exported_and_stays(tmp_path: Path) -> None:
    model = tiny.build_classifier("eurobert").eval()
    norms = [part for part in model.modules() if type(part).__name__.endswith("RMSNorm")]
    of_its_class = norms[0].forward
    norms[0].forward = hooked = lambda x: of_its_class(x) * 2
    write_onnx(model, tmp_path / "model.onnx")
    assert [vars(norm).get("forward") for norm in norms] == [hooked, *[None] * (len(norms) - 1)]
    rows = {name: value.numpy() for name, value in tiny.random_batch("eurobert", 3, 7).items()}
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(value) for name, value in rows.items()}).logits.numpy()
    np.testing.assert_allclose(open_runner(tmp_path / "model.onnx").logits(rows), expected, atol=1e-4)


def test_onnx_is_no_source(bert, tmp_path: Path) -> None:
    for source in (bert.output, bert.output / "model.onnx"):
        with pytest.raises(UsageError, match="is ONNX already"):
            export(source, tmp_path / "onnx")


def test_what_torch_cannot_export_is_one_line_and_leaves_the_model_alone(tmp_path: Path, monkeypatch) -> None:
    def fail(*_args, **_options) -> None:
        raise RuntimeError("an operator is unknown\nand a page of details")

    model = tiny.build_classifier("bert")
    before = model.config._attn_implementation
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"cannot export it to ONNX \(an operator is unknown\)"):
        write_onnx(model, tmp_path / "model.onnx")
    assert model.config._attn_implementation == before


def test_large_models_keep_their_weights_in_a_file_of_their_own(
    tiny_model_dir, tmp_path: Path, monkeypatch, capfd
) -> None:
    """With the oldest operator set, of an encoder without a head, and without a word on stdout."""
    monkeypatch.setattr(tracing, "EXTERNAL_DATA_BYTES", 0)
    result = export(tiny_model_dir("distilbert"), tmp_path / "onnx", opset=17)
    assert (result["opset"], result["head_is_random"]) == (17, True)
    assert capfd.readouterr().out == ""
    weights = tmp_path / "onnx" / "model.onnx.data"
    assert result["size_bytes"] > weights.stat().st_size > (tmp_path / "onnx" / "model.onnx").stat().st_size
    manifest = json.loads((tmp_path / "onnx" / "gatepress_onnx.json").read_text())
    assert set(manifest["sha256"]) >= {"model.onnx", "model.onnx.data"}
    opened = open_runner(tmp_path / "onnx")
    assert (opened.size_bytes, opened.head_is_random) == (result["size_bytes"], True)


def write_own_class(source: Path, signature: str, call: str) -> Path:
    """Give a BERT classifier a class of its own, in code beside it, that turns the signs of its logits."""
    (source / "mine.py").write_text(
        "from transformers import BertForSequenceClassification\n\n\n"
        "class Mine(BertForSequenceClassification):\n"
        f"    def forward(self, {signature}):\n"
        f"        given = super().forward({call})\n"
        "        given.logits = -given.logits\n"
        "        return given\n"
    )
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "mine.Mine"}
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_code_of_a_model_runs_only_where_it_is_trusted(tiny_classifier_dir, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_classifier_dir("bert", 3), tmp_path / "mine")
    names = "input_ids", "attention_mask", "token_type_ids"
    signature = ", ".join(f"{name}=None" for name in names)
    source = write_own_class(copied, signature, ", ".join(f"{name}={name}" for name in names))
    batch = {name: value.numpy() for name, value in tiny.random_batch("bert").items()}
    logits = {}
    for trusted in (False, True):
        export(source, tmp_path / f"onnx-{trusted}", trust_remote_code=trusted)
        logits[trusted] = open_runner(tmp_path / f"onnx-{trusted}").logits(batch)
    assert np.abs(logits[True]).max() > 1e-2
    np.testing.assert_allclose(logits[True], -logits[False], atol=1e-5)


def test_a_tokenizer_with_code_of_its_own_stays_where_it_is(tiny_classifier_dir, tmp_path: Path, caplog) -> None:
    """Nobody who reads what gatepress wrote is asked to run code."""
    source = shutil.copytree(tiny_classifier_dir("bert", 3), tmp_path / "mine")
    (source / "words.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Words(PreTrainedTokenizerFast): pass\n"
    )
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "words.Words"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    export(source, tmp_path / "onnx", trust_remote_code=True)
    assert "its tokenizer has code of its own, so none is written beside the graph" in caplog.text
    assert not list((tmp_path / "onnx").glob("tokenizer*"))
    assert verify(tmp_path / "onnx")["ok"]


@pytest.mark.parametrize("labels", [{"0": 0, "1": 1, "2": 2}, {"0": "a", "1": "b", "2": 2.5}])
def test_labels_that_are_no_texts_are_written_as_texts(labels, tiny_classifier_dir, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_classifier_dir("bert", 3), tmp_path / "numbers")
    config = json.loads((source / "config.json").read_text())
    config |= {"id2label": labels, "label2id": {str(name): str(key) for key, name in labels.items()}}
    (source / "config.json").write_text(json.dumps(config))
    export(source, tmp_path / "onnx")
    assert open_runner(tmp_path / "onnx").label_names == tuple(map(str, labels.values()))
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["label2id"] == {
        str(name): number for number, name in enumerate(labels.values())
    }


def test_a_forward_that_names_no_inputs_is_refused(tiny_classifier_dir, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_classifier_dir("bert", 3), tmp_path / "passing")
    source = write_own_class(copied, "*args, **kwargs", "*args, **kwargs")
    with pytest.raises(ModelError, match="Mine: its forward takes args, kwargs, expected input_ids"):
        export(source, tmp_path / "onnx", trust_remote_code=True)


def test_forms_are_compared_on_the_longest_text_that_both_take() -> None:
    runner: Any = SimpleNamespace(model=tiny.build_classifier("bert"), max_tokens=tiny.MAX_TOKENS)
    shapes = {batch["input_ids"].shape for batch in random_batches(runner)}
    assert (1, tiny.MAX_TOKENS) in shapes
    assert (1, LONGEST_TRIED) in {
        batch["input_ids"].shape
        for batch in random_batches(SimpleNamespace(model=runner.model, max_tokens=None))  # type: ignore[arg-type]
    }
    assert {rows for rows, _ in shapes} > {1}
    assert any((batch["attention_mask"] == 0).any() for batch in random_batches(runner))


def test_logits_that_are_fewer_than_rows_do_not_agree() -> None:
    there: Any = SimpleNamespace(logits=lambda _: np.zeros((4, 2)))
    for shape in ((1, 2), (4, 1), (1, 1)):
        here: Any = SimpleNamespace(logits=lambda _, shape=shape: np.zeros(shape))
        with pytest.raises(ParityError, match="logits of 4 x 2 tokens are"):
            compare(there, here, [{"input_ids": np.zeros((4, 2), dtype=int)}], 1.0)
