"""Embedders (`--embed`): one vector a text in every form, as sentence-transformers has it, learnt without labels."""

import copy
import json
import logging
import math
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr
from sentence_transformers import SentenceTransformer
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

import gatepress
import tiny
from conftest import TaskFiles
from forms import data_settings, save_run, settings_for
from gatepress import alternatives, sweep, training
from gatepress.bench import endtoend
from gatepress.checkpoint import load_run, open_base
from gatepress.config import DataSettings, Layout, TrainSettings
from gatepress.distill import Lesson
from gatepress.embedding import embedding_of, is_embedder, write_modules
from gatepress.errors import ArtifactError, DataError, ModelError, OutputError, UsageError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.gates import counted, gates_of
from gatepress.losses import batch_loss
from gatepress.models import open_pruned
from gatepress.pruning import prune
from gatepress.recovery import prune_each
from gatepress.runtime import open_runner
from gatepress.tasks import TASKS, TaskSpec
from gatepress.tasks.sources import load_rows
from gatepress.training import resume, train
from gatepress.verifying import verify

TEXTS = ("anda boro belu", "cito duma efra fuli gano krat", "hilu", "ivo jela kapo lumi mado neri opal peta")
NORMALIZED = ("Transformer", "Pooling", "Normalize")
BY_ONE_NAME = {"embedding_dimension": tiny.HIDDEN, "pooling_mode": "cls", "include_prompt": True}
OF_THE_LAST = {**BY_ONE_NAME, "pooling_mode": "lasttoken"}

Make = Callable[..., Path]


def old_pooling(mode: str) -> dict[str, Any]:
    """Return a pooling as sentence-transformers wrote it before one key named the mode."""
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    return {"word_embedding_dimension": tiny.HIDDEN, **{f"pooling_mode_{one}": one == mode for one in modes}}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return (family, parts, pooling) -> directory of a tiny encoder in the files of sentence-transformers."""
    root, made = tmp_path_factory.mktemp("embedders"), {}

    def directory(
        family: str = "bert", parts: tuple[str, ...] = NORMALIZED, pooling: dict[str, Any] | None = None
    ) -> Path:
        pooling = pooling or old_pooling("mean_tokens")
        key = (family, parts, str(pooling))
        if key not in made:
            made[key] = tiny.save_model(tiny.build_encoder(family), family, root / f"{family}-{len(made)}")
            modules = [
                {
                    "idx": n,
                    "name": str(n),
                    "path": f"{n}_{part}" if n else "",
                    "type": f"sentence_transformers.models.{part}",
                }
                for n, part in enumerate(parts)
            ]
            (made[key] / "modules.json").write_text(json.dumps(modules))
            (made[key] / "1_Pooling").mkdir()
            (made[key] / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        return made[key]

    return directory


@pytest.fixture(scope="module")
def trained(embedder: Make, tiny_regression_files: TaskFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    train(embedding(embedder(), tiny_regression_files), directory)
    return directory


def embedding(model: Path, files: TaskFiles, **changes: Any) -> TrainSettings:
    options = {"embed": True, "sparsity": 0.5, "epochs": 2, "lora_rank": 4, **changes}
    return settings_for(model, files, **options)


def vectors_of(directory: Path, texts: tuple[str, ...] = TEXTS, **options: Any) -> np.ndarray[Any, Any]:
    tokens = AutoTokenizer.from_pretrained(directory)(list(texts), padding=True, return_tensors="np")
    return open_runner(directory, **options).logits(dict(tokens))


@pytest.mark.parametrize("parts", [NORMALIZED, NORMALIZED[:2]])
@pytest.mark.parametrize(
    "pooling",
    [old_pooling("mean_tokens"), old_pooling("cls_token"), BY_ONE_NAME, old_pooling("lasttoken"), OF_THE_LAST],
)
def test_a_vector_is_pooled_as_its_directory_says(embedder: Make, parts: tuple[str, ...], pooling: Any) -> None:
    directory = embedder("bert", parts, pooling)
    tokens = AutoTokenizer.from_pretrained(directory)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(directory).eval()(**tokens).last_hidden_state
    rows = [row[: mask.sum()] for row, mask in zip(hidden, tokens["attention_mask"], strict=True)]
    first = pooling.get("pooling_mode") == "cls" or pooling.get("pooling_mode_cls_token")
    last = pooling.get("pooling_mode") == "lasttoken" or pooling.get("pooling_mode_lasttoken")
    wanted = torch.stack([row[0] if first else row[-1] if last else row.mean(0) for row in rows])
    if parts == NORMALIZED:
        wanted = functional.normalize(wanted)
    assert open_runner(directory).embeds
    np.testing.assert_allclose(vectors_of(directory), wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(vectors_of(directory), SentenceTransformer(str(directory)).encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("family", tiny.DISTINCT)
def test_every_form_gives_one_vector(
    family: str, embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", embedder(family), tiny_regression_files, embed=True)
    wanted = vectors_of(run)
    assert wanted.shape == (len(TEXTS), tiny.HIDDEN)
    assert np.abs(wanted - vectors_of(embedder(family))).max() > 0.01  # what was drawn shows
    layouts: tuple[Layout, ...] = ("inner", "index")
    for layout in layouts:
        pruned = tmp_path / layout
        report = prune(run, pruned, layout=layout)
        assert report["encoder_weights_removed"] > 0.2
        np.testing.assert_allclose(vectors_of(pruned), wanted, atol=1e-5)
        for trusted in ({"trust_remote_code": True}, {}):  # open_runner has made the classes known
            served = SentenceTransformer(str(pruned), **trusted)
            np.testing.assert_allclose(served.encode(TEXTS), wanted, atol=1e-5)
    model = gatepress.load_pruned(tmp_path / "inner")
    assert sum(p.numel() for p in model.parameters()) == report["total_params"]
    export(tmp_path / "inner", tmp_path / "onnx")
    np.testing.assert_allclose(vectors_of(tmp_path / "onnx"), wanted, atol=1e-5)
    graph = open_runner(tmp_path / "onnx")
    assert (graph.embeds, graph.num_labels) == (True, tiny.HIDDEN)
    if find_spec("openvino"):
        np.testing.assert_allclose(vectors_of(tmp_path / "onnx", runtime="openvino"), wanted, atol=1e-5)


def test_narrower_stock_layers_load_without_any_code(
    embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    settings = embedding(embedder(), tiny_regression_files, matrices=("up", "down"), granularity="structured")
    train(settings, tmp_path / "run")
    prune(tmp_path / "run", tmp_path / "pruned", layout="stock")
    assert not list((tmp_path / "pruned").glob("*.py"))
    served = SentenceTransformer(str(tmp_path / "pruned"))
    np.testing.assert_allclose(served.encode(TEXTS), vectors_of(tmp_path / "run"), atol=1e-5)


def test_one_metric_in_every_form_whatever_the_batches(trained: Path, tmp_path: Path) -> None:
    prune(trained, tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "onnx")
    report = json.loads((trained / "gatepress_run.json").read_text())["report"]
    assert report["examples"] == 96
    assert report["train_examples"] == 2 * 256  # texts
    assert abs(report["closed_gates"] - report["total_gates"] / 2) <= 1
    for directory, size in ((trained, 7), (tmp_path / "pruned", 32), (tmp_path / "onnx", 96)):
        measured = evaluate(directory, batch_size=size)
        assert measured["metric_value"] == pytest.approx(report["metric_value"], abs=1e-5)
        assert measured["examples"] == 96
    smaller = export(tmp_path / "pruned", tmp_path / "int8", quantize="int8")
    assert smaller["metric_value_fp32"] == pytest.approx(report["metric_value"], abs=1e-5)
    assert smaller["quantized"]["logit_diff"]["probe"]["max"] > 0


def test_the_metric_is_that_of_cosines(embedder: Make, tmp_path: Path) -> None:
    directory = embedder(parts=NORMALIZED[:2])
    texts = [[text for text, _ in tiny.made_up_rows(40, seed=seed)] for seed in (1, 2)]  # of many lengths
    first, second = (vectors_of(directory, tuple(one)) for one in texts)
    alike = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    scores = alike + np.random.default_rng(0).normal(scale=0.1, size=40)
    rows = zip(*texts, scores.tolist(), strict=True)
    file = tiny.write_table(tmp_path / "dev.csv", ("first", "second", "score"), rows)
    data = data_settings(TaskFiles(file, file, "first", "second", "score"))
    for batch_size in (3, 100):
        measured = evaluate(directory, data=data, batch_size=batch_size)
        assert measured["metric_value"] == pytest.approx(pearsonr(alike, scores).statistic, abs=1e-6)


def test_open_gates_change_no_vector_and_closed_ones_are_made_up_for(
    embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    train(embedding(embedder(), tiny_regression_files, sparsity=0, epochs=1), tmp_path / "open")
    whole = vectors_of(embedder())
    assert np.abs(vectors_of(tmp_path / "open") - whole).max() < 0.02
    idle = {"learning_rate": 1e-9, "gate_learning_rate": 1e-9}
    for name, rates in (("taught", {}), ("idle", idle)):
        assert train(embedding(embedder(), tiny_regression_files, epochs=6, **rates), tmp_path / name)["closed_gates"]
    apart = [float(np.square(vectors_of(tmp_path / name) - whole).mean()) for name in ("taught", "idle")]
    assert apart[0] < 0.6 * apart[1]


def test_what_costs_no_vector_anything_closes_first(
    embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    """Although an embedder starts as its own teacher, from which nothing is any distance away."""
    model = tiny.build_encoder("bert")
    last = tiny.LAYERS - 1
    with torch.no_grad():
        weight = model.get_submodule(f"encoder.layer.{last}.output.dense").weight
        weight[:, ::2] = 0  # neurons that nobody hears
    base = shutil.copytree(embedder(), tmp_path / "base")
    model.save_pretrained(base)
    alone = {"method": "gates", "lora_rank": None}  # a low rank would hear them
    settings = embedding(base, tiny_regression_files, granularity="structured", matrices=("up", "down"), **alone)
    unheard = weight.shape[1] // 2
    train(replace(settings, sparsity=unheard / (tiny.LAYERS * weight.shape[1])), tmp_path / "run")
    masks = [gate.mask for _, gate in gates_of(load_run(tmp_path / "run")[0])]
    assert sum(int((mask == 0).sum()) for mask in masks) == unheard
    assert masks[last][::2].sum() <= 1  # one was closed at random, to begin with


def test_an_embedder_learns_from_its_first_step(
    embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    step = training._step

    def stopping(job: Any, batch: Any) -> Any:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(batch)
        return step(job, batch)

    monkeypatch.setattr(training, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(embedding(embedder(), tiny_regression_files, granularity="structured"), tmp_path / "run")
    gates = [gate for _, gate in gates_of(load_run(tmp_path / "run")[0])]
    total, closed = counted(gates)
    assert 0 < closed < 0.02 * total
    scores = torch.cat([gate.score for gate in gates])
    assert (scores > 0).float().mean() > 0.9


@pytest.mark.parametrize(("family", "most"), [("bert", "5GB"), ("qwen3", "5GB"), ("bert", "20KB")])
def test_what_transformers_saved_anew_pools_as_before(
    family: str, most: str, embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    start = embedder(family, NORMALIZED, old_pooling("lasttoken" if family == "qwen3" else "cls_token"))
    prune(save_run(tmp_path / "run", start, tiny_regression_files, embed=True), tmp_path / "pruned")
    model, anew = gatepress.load_pruned(tmp_path / "pruned"), tmp_path / "anew"
    for _ in range(2):  # also over what is there
        model.save_pretrained(anew, max_shard_size=most)
    AutoTokenizer.from_pretrained(tmp_path / "pruned").save_pretrained(anew)
    assert len(list(anew.glob("*.safetensors"))) > 1 or most == "5GB"
    wanted = vectors_of(tmp_path / "pruned")
    np.testing.assert_array_equal(vectors_of(anew), wanted)
    np.testing.assert_allclose(SentenceTransformer(str(anew)).encode(TEXTS), wanted, atol=1e-5)
    export(anew, tmp_path / "onnx")
    np.testing.assert_allclose(vectors_of(tmp_path / "onnx"), wanted, atol=1e-5)


def test_an_embedder_is_pickled_and_copied(trained: Path, tmp_path: Path) -> None:
    prune(trained, tmp_path / "pruned")
    model = gatepress.load_pruned(tmp_path / "pruned")
    ids = torch.arange(5, 13)[None]
    told = f"import sys, pickle; print(type(pickle.load(open({str(tmp_path / 'model')!r}, 'rb'))).__name__)"
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [type(model).__name__], done.stderr
    for again in (pickle.loads((tmp_path / "model").read_bytes()), copy.deepcopy(model)):  # noqa: S301 - our own
        with torch.inference_mode():
            assert torch.equal(again(ids).logits, model(ids).logits)


def test_every_token_of_the_last_layer_is_asked_for() -> None:
    states = [torch.randn(4, 5, 8) for _ in range(3)]
    given = SimpleNamespace(logits=torch.randn(4, 8), hidden_states=states)
    inputs = {"input_ids": torch.full((4, 5), 7), "attention_mask": torch.ones(4, 5, dtype=torch.long)}
    batch = {**inputs, "labels": torch.full((4,), math.nan)}
    lesson = Lesson(torch.tensor([7]), None, hidden_weight=2.0, all_tokens=True)  # there are no words to exchange

    def loss(**changes: Any) -> float:
        wanted = SimpleNamespace(**{**vars(given), **changes})
        spec = replace(TASKS["stsb"], embeds=True)
        return float(batch_loss(lambda **_: given, batch, spec, lambda _: wanted, lesson))  # type: ignore[arg-type]

    assert loss() == 0
    for layer in (1, 2):
        moved = [state.clone() for state in states]
        moved[layer][2, 3] += 1
        assert loss(hidden_states=moved) > 0
    apart = given.logits + 0.1
    assert loss(logits=apart) == pytest.approx(0.01 / float(apart.var()), rel=1e-4)


def test_labels_of_training_rows_are_not_read(embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path) -> None:
    lines = tiny_regression_files.train.read_text().splitlines()
    numbers = [line.rpartition(",")[2] for line in lines[1:]]
    random.Random(0).shuffle(numbers)
    texts = [line.rpartition(",")[0] for line in lines]
    others = [",".join(pair) for pair in zip(texts, [lines[0].rpartition(",")[2], *numbers], strict=True)]
    trainings = {"labels": lines, "others": others, "none": texts}
    for name, content in trainings.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(content) + "\n")
        files = replace(tiny_regression_files, train=tmp_path / f"{name}.csv")
        train(embedding(embedder(), files, epochs=1), tmp_path / name)
    states = [load_file(next((tmp_path / name).glob("gates-*"))) for name in trainings]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_training_rows_may_be_single_texts(embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path) -> None:
    rows = [(text,) for text, _ in tiny.made_up_rows(48)]
    files = replace(tiny_regression_files, train=tiny.write_table(tmp_path / "texts.csv", ("first",), rows))
    assert train(embedding(embedder(), files, epochs=1), tmp_path / "run")["train_examples"] == 48
    missing = replace(tiny_regression_files, train=tiny.write_table(tmp_path / "odd.csv", ("second",), rows))
    with pytest.raises(DataError, match="no column 'first'"):
        train(embedding(embedder(), missing, epochs=1), tmp_path / "other")


def test_a_stopped_training_goes_on_to_the_same_end(
    embedder: Make, tiny_regression_files: TaskFiles, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = training._step, []

    def stopping(job: Any, batch: Any) -> Any:
        taken.append(1)
        if len(taken) == 40:
            raise KeyboardInterrupt
        return step(job, batch)

    monkeypatch.setattr(training, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(embedding(embedder(), tiny_regression_files), tmp_path / "run")
    monkeypatch.undo()
    resume(tmp_path / "run")
    one, other = (load_file(next(run.glob("gates-*"))) for run in (trained, tmp_path / "run"))
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_other_sparsities_recover_behind_the_same_teacher(trained: Path, tmp_path: Path) -> None:
    targets = {0.25: tmp_path / "quarter", 0.75: tmp_path / "most"}
    reports = prune_each(trained, targets, recover_epochs=1)
    for asked, report in zip(targets, reports, strict=True):
        assert report["closed_fraction"] == pytest.approx(asked, abs=0.01)
        assert report["recovery"]["metric_name"] == "pearson"
    plain = prune_each(trained, {0.75: tmp_path / "plain"})[0]
    assert plain["closed_gates"] == reports[1]["closed_gates"]
    whole = vectors_of(Path(json.loads((trained / "gatepress_run.json").read_text())["settings"]["model"]))
    apart = [np.square(vectors_of(tmp_path / name) - whole).mean() for name in ("most", "plain")]
    assert apart[0] < apart[1]


def test_what_is_cut_elsewhere_is_fitted_to_the_whole_embedder(trained: Path, tmp_path: Path) -> None:
    """Of all tokens of the last layer, which its vectors are the mean of."""
    for name, refit in (("fitted", True), ("plain", False)):
        prune_each(trained, {0.75: tmp_path / name}, refit=refit)
    whole = vectors_of(Path(json.loads((trained / "gatepress_run.json").read_text())["settings"]["model"]))
    apart = [np.square(vectors_of(tmp_path / name) - whole).mean() for name in ("fitted", "plain")]
    assert apart[0] < apart[1]


def test_a_sweep_of_an_embedder_begins_at_the_whole_one_and_goes_on(
    embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "train_apart", sweep.train_or_resume)
    settings = embedding(embedder(), tiny_regression_files, epochs=1)
    times: dict[str, Any] = {
        "target": "torch-cpu",
        "batch_sizes": [1],
        "seq_lens": [8],
        "repetitions": 2,
        "plot": False,
    }
    first = sweep.run(settings, tmp_path / "sweep", methods=["gates+lora"], sparsities=[0], **times)
    whole = evaluate(embedder(), data=data_settings(tiny_regression_files))["metric_value"]
    assert first["cells"][0]["metric_value"] == pytest.approx(whole, abs=0.01)
    file = tmp_path / "sweep" / "sweep.json"
    written = json.loads(file.read_text())
    del written["settings"]["train"]["weight_decay"]  # as if it had been made before there was one
    file.write_text(json.dumps(written))
    more = sweep.run(settings, tmp_path / "sweep", methods=["gates+lora"], sparsities=[0, 0.5], **times)
    assert [row["sparsity"] for row in more["summary"]] == [0, 0.5]
    with pytest.raises(UsageError, match="was made with --embed True, asked is False"):
        sweep.run(replace(settings, embed=False), tmp_path / "sweep", methods=["gates+lora"], sparsities=[0.5], **times)


def test_passages_rank_by_cosine(embedder: Make, tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [
        (" ".join(tiny.FILLERS[query : query + 3]), " ".join(draw.sample(tiny.FILLERS, 4)), passage == 0)
        for query in range(6)
        for passage in range(5)
    ]
    draw.shuffle(rows)
    file = tiny.write_table(tmp_path / "dev.csv", ("query", "passage", "relevant"), [(*r[:2], int(r[2])) for r in rows])
    files = TaskFiles(file, file, "query", "passage", "relevant")
    first, second = (vectors_of(embedder(), tuple(row[n] for row in rows)) for n in (0, 1))
    alike = (first * second).sum(1)
    wanted = []
    for query in {row[0] for row in rows}:
        own = [(float(score), row[2]) for score, row in zip(alike, rows, strict=True) if row[0] == query]
        wanted.append(1 / (1 + [relevant for _, relevant in sorted(own, reverse=True)].index(True)))
    measured = evaluate(embedder(), data=replace(data_settings(files), metric="mrr@10"), batch_size=4)
    assert measured["metric_value"] == pytest.approx(np.mean(wanted))
    assert evaluate(embedder(), data=data_settings(files))["metric_name"] == "average_precision"


def test_what_serves_it_is_told_its_length_and_its_prompts(
    embedder: Make, tiny_regression_files: TaskFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = shutil.copytree(embedder(), tmp_path / "base")
    prompts = {"prompts": {"query": "hilu: ", "document": "ivo: "}, "default_prompt_name": "query"}
    (base / "config_sentence_transformers.json").write_text(json.dumps({"__version__": {}, **prompts}))
    (base / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 77, "do_lower_case": False}))
    with caplog.at_level(logging.WARNING):
        train(embedding(base, tiny_regression_files, epochs=1, max_length=20), tmp_path / "run")
    assert "default prompt 'hilu: '" in caplog.text
    prune(tmp_path / "run", tmp_path / "pruned")
    served = SentenceTransformer(str(tmp_path / "pruned"), trust_remote_code=True)
    assert served.max_seq_length == 77
    assert {name: served.prompts[name] for name in prompts["prompts"]} == prompts["prompts"]
    assert served.default_prompt_name == "query"
    named = json.loads((tmp_path / "pruned" / "gatepress_pruned.json").read_text())["sha256"]
    assert {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"} <= named.keys()


def test_the_card_says_how_it_is_loaded(trained: Path, tmp_path: Path) -> None:
    prune(trained, tmp_path / "pruned")
    text = (tmp_path / "pruned" / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in text
    assert f"a vector of {tiny.HIDDEN} numbers" in text
    assert 'SentenceTransformer("DIR", trust_remote_code=True)' in text
    assert "AutoModelForSequenceClassification" not in text


def test_the_dense_model_beside_a_run_is_an_embedder_too(trained: Path, tmp_path: Path) -> None:
    alternatives._write_dense(trained, tmp_path / "dense", longest=32)
    model = json.loads((trained / "gatepress_run.json").read_text())["settings"]["model"]
    np.testing.assert_allclose(vectors_of(tmp_path / "dense"), vectors_of(Path(model)), atol=1e-6)


def test_a_pass_over_rows_is_one_over_their_texts(
    embedder: Make, tiny_regression_files: TaskFiles, tiny_classifier_dir: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {"data": data_settings(tiny_regression_files), "batch_sizes": [32], "repetitions": 1}
    (record,) = endtoend.run([embedder()], warmup=0, **options)
    assert record.examples == 2 * 96
    with pytest.raises(ModelError, match="time models of one kind"):
        endtoend.run([embedder(), tiny_classifier_dir("bert", 1)], **options)


@pytest.mark.parametrize("task", [None, "rte"])  # rte's first class is the one that fits, which no metric takes
def test_rows_of_any_kind_are_timed(
    task: str | None, embedder: Make, tiny_task_files: TaskFiles, tiny_glue_dir: Path
) -> None:
    data = DataSettings(task=task, data_dir=str(tiny_glue_dir)) if task else data_settings(tiny_task_files)
    (record,) = endtoend.run([embedder()], data=data, batch_sizes=[32], repetitions=1, warmup=0)
    assert record.examples == (2 * 64 if task else 96)


def test_a_start_may_have_learned_from_pairs_with_other_labels(
    embedder: Make, trained: Path, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    """Its labels are those of the pairs that measure it; a vector has none."""
    rows = [(first, second, int(score > 2)) for first, second, score in tiny.made_up_pairs(48, seed=2)]
    file = tiny.write_table(tmp_path / "dev.csv", ("first", "second", "score"), rows)
    settings = embedding(embedder(), replace(tiny_regression_files, validation=file), epochs=1, start=str(trained))
    report = train(settings, tmp_path / "run")
    assert report["metric_name"] == "average_precision"
    assert report["closed_fraction"] == pytest.approx(0.5, abs=0.01)


def test_an_encoder_without_modules_averages_its_tokens(tiny_model_dir: Callable[[str], Path]) -> None:
    assert embedding_of(tiny_model_dir("bert")) == {"pooling": "mean", "normalize": False}
    assert not is_embedder(tiny_model_dir("bert"))  # a head can be trained on it as well
    spec = replace(TASKS["stsb"], embeds=True)
    assert open_base(tiny_model_dir("bert"), spec)(torch.tensor([[2, 40, 3]])).logits.shape == (1, tiny.HIDDEN)


@pytest.mark.parametrize(
    ("parts", "pooling", "told"),
    [
        (("Transformer", "Pooling", "Normalize", "Dense"), old_pooling("mean_tokens"), "made of .*Dense.* expected"),
        (("Transformer", "Pooling", "LayerNorm"), old_pooling("mean_tokens"), "made of .*LayerNorm.* expected"),
        (("Transformer",), old_pooling("mean_tokens"), "made of Transformer, expected"),
        (NORMALIZED, old_pooling("max_tokens"), "pools tokens by .*max.* expected one of mean, cls"),
        (NORMALIZED, {**old_pooling("max_tokens"), "pooling_mode_cls_token": True}, "pools tokens by"),
        (NORMALIZED, {"pooling_mode": "weightedmean"}, "pools tokens by weightedmean"),
        (NORMALIZED, {"pooling_mode": ["mean", "cls"]}, "pools tokens by"),
    ],
)
def test_what_is_pooled_otherwise_is_refused(  # noqa: PLR0913, PLR0917 - fixtures and cases
    embedder: Make, parts: tuple[str, ...], pooling: Any, told: str, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=told):
        train(embedding(embedder("bert", parts, pooling), tiny_regression_files), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[1]",
        '[{"path": "", "type": "a.Transformer"}, {"path": "../x", "type": "a.Pooling"}]',
        '[{"path": ""}]',
    ],
)
def test_a_list_of_parts_that_is_none_is_refused(embedder: Make, content: str) -> None:
    directory = embedder("bert", NORMALIZED, {"pooling_mode": "mean"})
    before = (directory / "modules.json").read_text()
    (directory / "modules.json").write_text(content)
    try:
        with pytest.raises(ModelError):
            embedding_of(directory)
    finally:
        (directory / "modules.json").write_text(before)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "full", "lora_rank": None}, "drop --method full"),
        ({"distill": False}, "drop --no-distill"),
        ({"open_epochs": 1}, "drop --open-epochs"),
    ],
)
def test_an_embedder_learns_from_itself_alone(
    embedder: Make, tiny_regression_files: TaskFiles, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        embedding(embedder(), tiny_regression_files, **changes)


def test_rows_that_compare_no_two_texts_are_refused(tiny_task_files: TaskFiles, tiny_glue_dir: Path) -> None:
    with pytest.raises(UsageError, match="--text-pair-column"):
        load_rows(data_settings(tiny_task_files), embeds=True)
    named = data_settings(tiny_task_files)
    glue = {"train_file": None, "validation_file": None, "text_column": None, "label_column": None}
    with pytest.raises(UsageError, match="3 classes"):
        load_rows(replace(named, **glue, task="mnli", data_dir=str(tiny_glue_dir)), embeds=True)
    rows = load_rows(replace(named, **glue, task="mrpc", data_dir=str(tiny_glue_dir)), embeds=True)
    assert rows.spec.metric == "average_precision"
    with pytest.raises(UsageError, match="--metric is accuracy, expected one of average_precision"):
        load_rows(replace(named, **glue, task="mrpc", data_dir=str(tiny_glue_dir), metric="accuracy"), embeds=True)


def test_any_pairs_will_do_to_measure_by(trained: Path, tiny_glue_dir: Path, tmp_path: Path) -> None:
    named = evaluate(trained, data=DataSettings(task="mrpc", data_dir=str(tiny_glue_dir)))
    assert (named["task"], named["metric_name"]) == ("mrpc", "average_precision")
    rows = [(text, text.split()[0], label) for text, label in tiny.made_up_rows(32)]
    file = tiny.write_table(tmp_path / "dev.csv", ("query", "passage", "relevant"), rows)
    own = evaluate(trained, data=DataSettings(validation_file=str(file)))
    assert (own["metric_name"], own["examples"]) == ("average_precision", 32)
    ranked = evaluate(trained, data={"metric": "spearman"})
    assert (ranked["task"], ranked["metric_name"]) == ("train", "spearman")


def test_models_of_two_kinds_are_not_compared(
    embedder: Make, trained: Path, tiny_classifier_dir: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="compare two of a kind"):
        evaluate(trained, against=tiny_classifier_dir("bert", 1))
    assert evaluate(trained, against=embedder())["metric_drop"] < 0.2
    with pytest.raises(ModelError, match="was trained with gates"):
        train(replace(load_run(trained)[1].settings, model=str(trained)), tmp_path / "run")


def test_a_manifest_from_before_embedders_is_read() -> None:
    value = TASKS["stsb"].to_json()
    assert TaskSpec.from_json({key: one for key, one in value.items() if key != "embeds"}) == TASKS["stsb"]
    with pytest.raises(ArtifactError, match="embeds is malformed"):
        TaskSpec.from_json({**value, "embeds": "yes"})


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ({"pooling": 3}, r"embedding\.pooling"),
        ({"normalize": "no"}, r"embedding\.normalize"),
        ({"prompts": [1]}, r"embedding\.prompts"),
        ({"pooling": "max"}, "pools tokens by max"),
    ],
)
def test_a_configuration_that_was_changed_is_refused(
    trained: Path, tmp_path: Path, field: dict[str, Any], told: str
) -> None:
    prune(trained, tmp_path / "pruned")
    file = tmp_path / "pruned" / "config.json"
    config = json.loads(file.read_text())
    config["embedding"] |= field
    file.write_text(json.dumps(config))
    with pytest.raises((ArtifactError, ModelError), match=told):
        open_pruned(tmp_path / "pruned")


def test_how_vectors_are_compared_is_handed_on(embedder: Make, tmp_path: Path) -> None:
    base = shutil.copytree(embedder(), tmp_path / "base")
    (base / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": "dot"}))
    embedding = embedding_of(base)
    assert embedding["similarity_fn_name"] == "dot"
    (tmp_path / "out").mkdir()
    assert "config_sentence_transformers.json" in write_modules(tmp_path / "out", embedding, 8)
    assert json.loads((tmp_path / "out/config_sentence_transformers.json").read_text()) == {"similarity_fn_name": "dot"}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_graph_has_the_tokens_that_others_pool_themselves(
    trained: Path, tmp_path: Path, quantize: Literal["int8"] | None
) -> None:
    export(trained, tmp_path / "onnx", quantize=quantize, measure=False)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "onnx")(list(TEXTS), padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    assert [one.name for one in session.get_outputs()] == ["sentence_embedding", "last_hidden_state"]
    vectors, hidden = session.run(None, {one.name: tokens[one.name] for one in session.get_inputs()})
    np.testing.assert_array_equal(vectors, vectors_of(tmp_path / "onnx"))
    # The parts that the directory names, behind the graph's tokens.
    parts = [part["path"] for part in json.loads((tmp_path / "onnx/modules.json").read_text())]
    assert parts == ["", "1_Pooling", "2_Normalize"]
    assert json.loads((tmp_path / "onnx/1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"]
    mask = tokens["attention_mask"][:, :, None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(vectors, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-6)


def test_what_was_written_before_may_be_replaced(trained: Path, tmp_path: Path) -> None:
    for _ in range(2):
        prune(trained, tmp_path / "pruned", force=True)
        export(tmp_path / "pruned", tmp_path / "onnx", force=True)
    assert verify(tmp_path / "onnx")["ok"]
    (tmp_path / "pruned" / "1_Pooling" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="which gatepress did not write"):
        prune(trained, tmp_path / "pruned", force=True)


def test_a_pooling_beside_what_is_no_embedder_is_somebody_elses(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files)
    prune(run, tmp_path / "pruned")
    (tmp_path / "pruned" / "1_Pooling").mkdir()
    (tmp_path / "pruned" / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="holds 1_Pooling, which gatepress did not write"):
        prune(run, tmp_path / "pruned", force=True)
