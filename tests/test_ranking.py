"""How high the passages of a query rank, as rerankers are measured: `--metric mrr@10` and `ndcg@10`."""

import importlib
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pytest
import torch

import tiny
from conftest import TaskFiles
from forms import data_settings, settings_for
from gatepress import batches
from gatepress.batches import make_loader, tokenize
from gatepress.config import DataSettings, Metric
from gatepress.errors import DataError
from gatepress.evaluation import evaluate, score
from gatepress.export import export
from gatepress.metrics import RANKED, compute_metric
from gatepress.models import open_tokenizer
from gatepress.pruning import prune
from gatepress.runtime import open_runner
from gatepress.tasks import TASKS
from gatepress.tasks.sources import load_rows
from gatepress.tasks.spec import METRICS
from gatepress.training import train

COLUMNS = ("query", "passage", "relevant")
QUERIES, PASSAGES = 12, 8


def pairs(seed: int, label: Callable[[bool], Any] = int) -> list[tuple[Any, ...]]:
    """Return passages of a few queries, in disorder; a passage is relevant by the word that it holds."""
    rows = tiny.made_up_rows(QUERIES * PASSAGES, ("calm", "wild"), seed)
    queries = [" ".join(tiny.FILLERS[n : n + 1 + n % 3]) for n in range(QUERIES)]
    made = [(queries[n // PASSAGES], text, label(name == "wild")) for n, (text, name) in enumerate(rows)]
    random.Random(seed).shuffle(made)
    return made


@pytest.fixture(scope="module")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    root = tmp_path_factory.mktemp("ranking")
    train_file, dev = (tiny.write_table(root / f"{name}.csv", COLUMNS, pairs(seed)) for seed, name in enumerate("td"))
    return TaskFiles(train_file, dev, *COLUMNS)


def asking(files: TaskFiles, metric: Metric) -> DataSettings:
    return replace(data_settings(files), metric=metric)


def test_ranks_are_what_they_are_called() -> None:
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 0])
    queries = np.array([0, 0, 1, 1, 1, 2, 2, 1])
    scores = np.array([[3.0], [2.0], [5.0], [1.0], [4.0], [9.0], [8.0], [-1.0]])
    # query 0: relevant at rank 2; query 1: at 2 and 3 of 4; query 2 has none
    assert compute_metric("mrr@10", scores, labels, queries) == pytest.approx((1 / 2 + 1 / 2) / 2)
    gain = [1 / math.log2(rank + 1) for rank in range(1, 5)]
    found = (gain[1] / gain[0] + (gain[1] + gain[2]) / (gain[0] + gain[1])) / 2
    assert compute_metric("ndcg@10", scores, labels, queries) == pytest.approx(found)
    two = np.concatenate([-scores, scores], axis=1) / 2  # the same answers as two outputs
    for name in ("mrr@10", "ndcg@10"):
        assert compute_metric(name, two, labels, queries) == compute_metric(name, scores, labels, queries)
    grades = np.array([2.0, 0.0, 1.0])
    best = 2 * gain[0] + 1 * gain[1]
    worst = compute_metric("ndcg@10", -grades[:, None], grades, np.zeros(3, int))
    assert worst == pytest.approx((1 * gain[1] + 2 * gain[2]) / best)
    assert compute_metric("ndcg@10", grades[:, None], grades, np.zeros(3, int)) == pytest.approx(1.0)


def test_a_relevant_passage_behind_the_tenth_counts_nothing_and_a_tie_is_lost() -> None:
    labels = np.eye(1, RANKED + 1, RANKED, dtype=int)[0]
    queries = np.zeros(RANKED + 1, int)
    falling = -np.arange(RANKED + 1.0)[:, None]
    assert (
        compute_metric("mrr@10", falling, labels, queries) == compute_metric("ndcg@10", falling, labels, queries) == 0
    )
    assert compute_metric("mrr@10", falling[1:], labels[1:], queries[1:]) == 1 / RANKED
    assert compute_metric("mrr@10", np.ones((3, 1)), np.array([1, 0, 0]), np.zeros(3, int)) == pytest.approx(1 / 3)
    for name in ("mrr@10", "ndcg@10"):  # nothing to rank
        assert compute_metric(name, falling, labels) == compute_metric(name, falling, 0 * labels, queries) == 0.0


def test_a_rank_is_that_of_each_query_alone_in_any_order() -> None:
    drawn = np.random.default_rng(0)
    queries, labels = drawn.integers(0, 20, 200), drawn.integers(0, 2, 200)
    scores = drawn.normal(size=(200, 1))
    order = drawn.permutation(200)
    for name in ("mrr@10", "ndcg@10"):
        value = compute_metric(name, scores, labels, queries)
        assert 0 < value < 1
        assert compute_metric(name, scores[order], labels[order], queries[order]) == pytest.approx(value)
        apart = scores + 100 * queries[:, None]  # what other queries get is nothing to this one
        assert compute_metric(name, apart, labels, queries) == pytest.approx(value)
        assert compute_metric("average_precision", apart, labels) != pytest.approx(value)


@pytest.mark.parametrize("metric", ["mrr@10", "ndcg@10"])
def test_the_rank_of_a_run_is_that_of_its_rows_as_they_lie_in_the_file_in_all_forms(
    metric: Metric, ranking: TaskFiles, tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    run, pruned, onnx = tmp_path / "run", tmp_path / "pruned", tmp_path / "onnx"
    settings = settings_for(tiny_model_dir("bert"), ranking, sparsity=0.5, epochs=1)
    report = train(replace(settings, data=asking(ranking, metric)), run)
    prune(run, pruned)
    export(pruned, onnx)
    runner, tokenizer = open_runner(run), open_tokenizer(run)
    rows = load_rows(data_settings(ranking)).validation["validation"]
    alone = []
    for row in rows:
        encoded = tokenizer([row["text"]], [row["text_pair"]], return_tensors="np")
        alone.append(runner.logits({name: value.astype(np.int64) for name, value in encoded.items()})[0])
    numbers = np.unique(rows["text"], return_inverse=True)[1]
    wanted = compute_metric(metric, np.stack(alone), np.array(rows["label"]), numbers)
    assert 0 < wanted < 1
    values = [evaluate(place, batch_size=size)["metric_value"] for place in (run, pruned, onnx) for size in (1, 7, 96)]
    assert [report["metric_value"], *values] == pytest.approx([wanted] * 10)


def test_two_splits_share_no_query(ranking: TaskFiles) -> None:
    rows = load_rows(asking(ranking, "mrr@10"))
    tokenizer = open_tokenizer(tiny.save_model(tiny.build_encoder("bert"), "bert", ranking.train.parent / "bert"))
    torch.manual_seed(0)
    weights = torch.randn(4096)

    def predict(inputs: dict[str, torch.Tensor]) -> Any:
        return weights[inputs["input_ids"]].sum(1, keepdim=True).numpy()

    loaders = {
        name: make_loader(tokenize(split, tokenizer, 24), tokenizer, 7, shuffle=False, seed=0)
        for name, split in (("one", rows.validation["validation"]), ("other", rows.train))
        if split is not None
    }
    told = score(predict, loaders, rows.spec)
    assert len(set(told["metrics_by_split"].values())) == 2
    assert told["metric_value"] == pytest.approx(np.mean([*told["metrics_by_split"].values()]))  # of as many queries
    assert told["examples"] == 2 * QUERIES * PASSAGES


@pytest.mark.parametrize(
    ("rows", "label", "told"),
    [
        ([("a", "x", 1), ("a", "y", 1), ("b", "z", 0)], int, "no query has passages of different labels"),
        ([("a", "x", 0.5), ("a", "y", -1.5)], lambda relevant: relevant + 0.5, "a label is -1.5, expected 0 or more"),
    ],
)
def test_rows_that_cannot_be_ranked_are_refused(
    rows: list[tuple[Any, ...]], label: Callable[[bool], Any], told: str, ranking: TaskFiles, tmp_path: Path
) -> None:
    dev = tiny.write_table(tmp_path / "dev.csv", COLUMNS, rows)
    fine = tiny.write_table(tmp_path / "train.csv", COLUMNS, pairs(0, label))
    files = replace(ranking, train=fine, validation=dev)
    data = asking(files, "ndcg@10")
    with pytest.raises(DataError, match=told):
        load_rows(replace(data, max_validation_samples=len(rows)))
    load_rows(replace(data, metric=None))


def test_every_metric_has_its_labels() -> None:
    assert set(METRICS) == set(get_args(Metric))
    assert all(task.metric in task.metrics for task in TASKS.values())


def test_queries_are_numbered_across_the_rows_that_are_tokenized_at_a_time(
    tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_CHUNK_ROWS", 3)
    texts = ["belu", "krat", "belu", "mirao", "krat", "belu", "zogg"]
    rows = datasets.Dataset.from_dict({"text": texts, "text_pair": ["anda"] * 7, "label": [0, 1] * 3 + [0]})
    table = batches.tokenize(rows, open_tokenizer(tiny_model_dir("bert")), 16)
    assert table["query"][:] == [0, 1, 0, 2, 1, 0, 3]
    assert table["label"][:] == [0, 1] * 3 + [0]


def test_the_first_relevant_passage_of_several_is_what_is_ranked() -> None:
    logits, labels = np.array([[3.0], [2.0], [1.0]]), np.array([1, 0, 1])
    assert compute_metric("mrr@10", logits, labels, np.zeros(3, dtype=int)) == 1
    assert compute_metric("mrr@10", -logits, labels, np.zeros(3, dtype=int)) == 1
    assert compute_metric("mrr@10", logits, 1 - labels, np.zeros(3, dtype=int)) == 1 / 2


@pytest.mark.parametrize("name", ["average_precision", "ndcg@10"])
def test_no_perfect_ranking_is_more_than_perfect(name: Metric) -> None:
    """Sums of parts round: some were 1.0000000000000002, and no schema says that metrics may be."""
    random_numbers = np.random.default_rng(0)
    for positives in range(1, 40):
        labels = np.array([1] * positives + [0] * 3)
        scores = random_numbers.random(len(labels)) + labels
        value = compute_metric(name, scores[:, None], labels, np.zeros(len(labels), int))
        assert 1 - 1e-9 < value <= 1
    sets = np.array([[1, 1]] * 20 + [[0, 0]] * 3)
    if name == "average_precision":
        assert compute_metric(name, sets + random_numbers.random((23, 2)) - 0.5, sets) <= 1


def test_nearness_ranks_passages_within_their_queries(
    ranking: TaskFiles, tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    nearness = importlib.import_module("nearness").nearness
    settings = settings_for(tiny_model_dir("bert"), ranking, sparsity=0.5, epochs=1)
    report = train(replace(settings, data=asking(ranking, "mrr@10")), tmp_path / "run")
    told = dict(nearness(tmp_path / "run"))
    assert told["validation"]["mrr@10"] == pytest.approx(report["metric_value"])
