"""Benchmarks: what is timed, in which order, what a record says, and how records are written and drawn."""

import csv
import dataclasses
import gc
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import tiny
from conftest import TaskFiles
from forms import settings_for
from gatepress import bench, machine
from gatepress.bench import endtoend, figures, matmul, render, tables, timing
from gatepress.bench.record import MAX_SAMPLES, Record, latencies, relative_to
from gatepress.config import DataSettings
from gatepress.errors import (
    ArtifactError,
    DeviceError,
    MissingExtraError,
    ModelError,
    OutputError,
    UsageError,
)
from gatepress.machine import cpu_name
from gatepress.models import open_tokenizer
from gatepress.progress import NoProgress
from gatepress.runners import TorchRunner
from gatepress.runtime import open_runner

SMALL = {"repetitions": 3, "warmup": 1, "threads": 1}


def record(**changes):
    values = {
        "what": "endtoend",
        "name": "dense",
        "kind": "model",
        "runtime": "torch",
        "device": "cpu",
        "device_name": "made-up processor",
        "threads": 2,
        "dtype": "float32",
        "batch_size": 8,
        "seq_len": 128,
        "warmup": 3,
        "versions": {"torch": "2.13.0"},
        "size_bytes": 90_000_000,
        **latencies([3.0, 1.0, 2.0]),
    }
    return Record(**{**values, **changes})


def endtoend_records():
    dense = record()
    pruned = record(name="pruned|x", kind="pruned", **latencies([1.0, 0.5, 1.5]))
    onnx = record(name="onnx/" + "x" * 80, kind="onnx", runtime="onnxruntime", **latencies([0.5]))
    return [relative_to(one, dense) for one in (dense, pruned, onnx)]


@pytest.fixture(scope="module")
def matmul_records():
    return matmul.run([(24, 16), (8, 12)], [0.0, 0.5, 0.9], tokens=4, **SMALL)


# --- one weight ----------------------------------------------------------------------------------


def test_three_products_for_each_shape_refer_to_the_dense_one(matmul_records):
    kinds = [one.kind for one in matmul_records]
    assert kinds == ["dense", *["index", "closure"] * 3] * 2
    assert len({one.name for one in matmul_records}) == len(matmul_records)
    for one in matmul_records:
        assert one.baseline == f"dense {one.shape[0]}x{one.shape[1]}"
        assert (one.repetitions, one.warmup, one.threads, len(one.samples_ms)) == (3, 1, 1, 3)
        assert one.latency_ms_min <= one.latency_ms_p10 <= one.latency_ms_median <= one.latency_ms_p90
    assert matmul_records[0].relative_time_factor == 1
    assert matmul_records[0].relative_reduction_percent == 0


def test_macs_are_counted_from_the_columns_that_stay(matmul_records):
    assert [one.macs for one in matmul_records[:7]] == [4 * 24 * k for k in (16, 16, 16, 8, 8, 2, 2)]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.999])
def test_the_timed_products_are_those_of_the_weight_with_closed_columns(sparsity):
    dense, index, closure = matmul._products((12, 16), [sparsity], 5, torch.device("cpu"), 0)
    x, weight = dense.call.args
    kept = index.call.args[1]
    assert index.kept == len(kept) == max(1, round(16 * (1 - sparsity)))
    gate = torch.zeros(16).index_fill(0, kept, 1.0)
    expected = x @ (weight * gate).T
    torch.testing.assert_close(index.call(), expected)
    torch.testing.assert_close(closure.call(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": [1.0]}, "--sparsity is 1, expected a fraction"),
        ({"sparsities": [float("nan")]}, "--sparsity is nan"),
        ({"sparsities": []}, "--sparsity is empty"),
        ({"shapes": [(0, 8)]}, "--shape is 0x8"),
        ({"shapes": []}, "--shape is empty"),
        ({"repetitions": 0}, "--repetitions is 0, expected 1 or more"),
        ({"tokens": 0, "threads": -1}, "--tokens is 0, expected 1 or more; --threads is -1"),
        ({"warmup": -1}, "--warmup is -1, expected 0 or more"),
        ({"device": "tpu"}, "--device is 'tpu', expected auto, cpu or cuda"),
    ],
)
def test_wrong_requests_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        matmul.run(**{**SMALL, **changes})


def test_the_same_sparsity_twice_is_timed_once():
    assert len(matmul.run([(8, 8), (8, 8)], [0.5, 0.5], tokens=2, **SMALL)) == 3


# --- timing --------------------------------------------------------------------------------------


def test_calls_take_turns_in_blocks_that_open_untimed():
    log, timed = [], []

    def measure(call, times):
        for _ in range(times):
            call()
        timed.append((log[-1], times))
        return [1.0] * times

    samples = timing.interleave(
        {name: lambda name=name: log.append(name) for name in "AB"},
        measure,
        repetitions=3,
        warmup=1,
        block=2,
        progress=NoProgress(),
        description="",
    )
    assert "".join(log) == "AB" + "AAA" + "BBB" + "BB" + "AA"
    assert timed == [("A", 2), ("B", 2), ("B", 1), ("A", 1)]
    assert {name: len(values) for name, values in samples.items()} == {"A": 3, "B": 3}


def test_untimed_calls_go_on_until_the_machine_has_settled(monkeypatch):
    calls = []
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: 2_000_000 * len(calls))  # each call takes 2 ms
    timing._settle(lambda: calls.append(None), 9)
    assert len(calls) == 5
    timing._settle(lambda: calls.append(None), 0)
    assert len(calls) == 6


def test_the_machine_is_left_as_it_was_also_after_an_interrupt():
    threads = torch.get_num_threads()
    assert gc.isenabled()

    def interrupted():
        with timing.undisturbed(threads + 1) as active:
            assert active == threads + 1
            assert not gc.isenabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gc.isenabled()
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()


def test_cuda_without_a_card_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for run in (lambda: matmul.run(device="cuda"), lambda: endtoend.run(["demo"], device="cuda")):
        with pytest.raises(DeviceError, match=r"no CUDA device .* use --device cpu"):
            run()


def test_cuda_is_timed_by_events_around_each_call(monkeypatch):
    clock = iter(range(100))

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return other.at - self.at

    waits = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    measure = timing.cuda_events(torch.device("cuda"))
    assert measure(lambda: next(clock), 3) == [2.0, 2.0, 2.0]
    assert waits == [torch.device("cuda")]


# --- whole models --------------------------------------------------------------------------------


@dataclass
class FakeRunner:
    """Does nothing, and remembers what it was given."""

    name: str
    log: list
    tokenizer_dir: Path | None = None
    longest: int = 1_000
    max_tokens: int | None = None
    kind: str = "pruned"
    device: str = "cpu"
    runtime: str = "torch"
    input_names: tuple = ("input_ids", "attention_mask")
    dtype: str = "float32"
    num_labels: int = 2
    embeds: bool = False
    parameters: int | None = 10
    size_bytes: int = 40
    seen: list = field(default_factory=list)

    @property
    def takes_precision(self):
        return self.runtime == "torch"

    def macs(self, batch, length):
        return batch * length * length

    def prepare(self, batch):
        self.seen.append(batch)
        return batch

    def run(self, prepared):
        self.log.append(self.name)
        if prepared["input_ids"].shape[1] > self.longest:
            raise IndexError("index out of range in self\nmore lines")

    def synchronize(self):
        pass


@pytest.fixture
def fakes(monkeypatch):
    """Return a function that makes `open_runner` answer with the given runners, and the opening calls."""

    def install(*runners):
        calls, left = [], list(runners)

        def open_runner(target, **options):
            calls.append((target, {**options, "threads": torch.get_num_threads()}))  # what a session takes too
            return left.pop(0)

        monkeypatch.setattr(endtoend, "open_runner", open_runner)
        monkeypatch.setattr(endtoend, "SETTLE_MS", 0.0)
        return calls

    return install


def test_targets_take_turns_on_the_same_inputs(fakes):
    log = []
    runners = [FakeRunner(name, log) for name in ("a", "b", "c")]
    opened = fakes(*runners)
    records = endtoend.run(["x/a", "x/b", "x/c"], batch_sizes=[1, 2], seq_lens=[4], **SMALL)
    assert [(one.batch_size, one.seq_len, one.name) for one in records] == [
        (batch, 4, name) for batch in (1, 2) for name in "abc"
    ]
    assert {one.baseline for one in records} == {"a"}
    assert [target for target, _ in opened] == ["x/a", "x/b", "x/c"]
    assert all(options["threads"] == 1 for _, options in opened)
    for batches in zip(*(runner.seen for runner in runners), strict=True):
        for batch in batches:
            np.testing.assert_array_equal(batch["input_ids"], batches[0]["input_ids"])
            assert batch["attention_mask"].all()
    cell = "abc" + "abc" + "aaaa" + "bbbb" + "cccc"  # fitting, warm-up, one block with its untimed call
    assert "".join(log) == cell * 2


def test_every_runtime_gets_the_same_number_of_threads_unasked(fakes):
    opened = fakes(FakeRunner("a", []))
    records = endtoend.run(["a"], batch_sizes=[1], seq_lens=[4], repetitions=1, warmup=0)
    assert opened[0][1]["threads"] == records[0].threads == torch.get_num_threads()


@pytest.mark.parametrize("threads", [0, -1, 1_025, 5_000_000_000])
def test_as_many_threads_as_no_machine_starts_are_refused(threads: int) -> None:
    with pytest.raises(UsageError, match=f"--threads is {threads}, expected 1 to 1,024"):
        endtoend.run(["a"], threads=threads)


def test_names_tell_targets_apart(fakes):
    fakes(*(FakeRunner(name, []) for name in ("x", "x", "x", "y")))
    records = endtoend.run(["runs/x", "onnx/x", "onnx/x", "y"], batch_sizes=[1], seq_lens=[2], **SMALL)
    assert [one.name for one in records] == ["runs/x", "onnx/x", "onnx/x (2)", "y"]


def test_names_can_be_given(fakes):
    opened = fakes(FakeRunner("x", []), FakeRunner("x", []))
    records = endtoend.run({"before": "a", "after": "b"}, batch_sizes=[1], seq_lens=[2], **SMALL)
    assert [one.name for one in records] == ["before", "after"]
    assert [target for target, _ in opened] == ["a", "b"]


def test_records_say_how_much_is_computed_and_in_which_type(fakes):
    fakes(FakeRunner("a", []), FakeRunner("b", [], dtype="int8"))
    records = endtoend.run(["a", "b"], batch_sizes=[2], seq_lens=[4, 8], **SMALL)
    assert [one.macs for one in records] == [2 * 16, 2 * 16, 2 * 64, 2 * 64]
    assert [one.dtype for one in records] == ["float32", "int8"] * 2


def test_torch_models_are_timed_in_each_precision_and_files_once(fakes):
    opened = fakes(FakeRunner("a", []), FakeRunner("b", [], runtime="onnxruntime"), FakeRunner("a", []))
    records = endtoend.run(["a", "b"], batch_sizes=[1], seq_lens=[4], precisions=["fp32", "bf16"], **SMALL)
    assert [one.name for one in records] == ["a", "a bf16", "b"]
    assert [(target, options["precision"]) for target, options in opened] == [
        ("a", "fp32"),
        ("b", "fp32"),
        ("a", "bf16"),
    ]


def test_files_alone_take_no_precision(fakes):
    fakes(FakeRunner("b", [], runtime="onnxruntime"))
    with pytest.raises(UsageError, match="--precision means nothing to ONNX files"):
        endtoend.run(["b"], batch_sizes=[1], seq_lens=[4], precisions=["bf16"], **SMALL)


def test_a_shape_that_does_not_fit_is_one_clear_line(fakes):
    fakes(FakeRunner("short", [], longest=8))
    with pytest.raises(ModelError, match=r"^short: cannot run batch 1 x length 16 \(index out of.*--seq-len$"):
        endtoend.run(["short"], batch_sizes=[1], seq_lens=[4, 16], **SMALL)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": []}, "nothing to time"),
        ({"batch_sizes": [0]}, "--batch-size is 0, expected 1 or more"),
        ({"seq_lens": []}, "--seq-len is empty"),
        ({"repetitions": 0}, "--repetitions is 0"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"max_length": 0}, "--max-length is 0"),
    ],
)
def test_wrong_grids_are_refused_before_anything_is_opened(changes, message):
    with pytest.raises(UsageError, match=message):
        endtoend.run(**{"targets": ["nowhere"], **SMALL, **changes})


def test_a_task_is_timed_as_passes_over_all_its_rows(fakes, tiny_task_files, tiny_classifier_dir, tmp_path):
    files = tiny_task_files
    data = DataSettings(
        train_file=str(files.train),
        validation_file=str(files.validation),
        text_column=files.text_column,
        label_column=files.label_column,
    )
    log = []
    runner = FakeRunner("a", log, tokenizer_dir=tiny_classifier_dir("bert"), max_tokens=9)
    fakes(runner)
    (one,) = endtoend.run(["a"], data=data, batch_sizes=[10], repetitions=2, warmup=1)
    assert (one.examples, one.seq_len, one.max_length, one.repetitions) == (96, None, 9, 2)
    assert one.task
    assert len(runner.seen) == 10
    assert sum(len(batch["input_ids"]) for batch in runner.seen) == 96
    assert max(batch["input_ids"].shape[1] for batch in runner.seen) == 9
    assert all("labels" not in batch for batch in runner.seen)
    assert len(log) == 10 * (1 + 1 + 2)  # fitting, warm-up, two timed passes
    assert one.macs == sum(batch["input_ids"].shape[0] * batch["input_ids"].shape[1] ** 2 for batch in runner.seen)

    tokenizer = open_tokenizer(tiny_classifier_dir("bert"))
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(tmp_path / "short")
    fakes(FakeRunner("a", log, tokenizer_dir=tmp_path / "short"))
    assert endtoend.run(["a"], data=data, batch_sizes=[10], repetitions=1)[0].max_length == 7

    fakes(FakeRunner("file.onnx", []))
    with pytest.raises(ModelError, match=r"^file.onnx: no tokenizer beside it, .* \(--task, --validation-file\) need"):
        endtoend.run(["file.onnx"], data=data, batch_sizes=[8], **SMALL)


def test_a_real_model_against_itself(tiny_classifier_dir):
    target = str(tiny_classifier_dir("bert"))
    records = endtoend.run([target, target], batch_sizes=[2], seq_lens=[8, 16], **SMALL)
    assert [one.seq_len for one in records] == [8, 8, 16, 16]
    assert all((one.kind, one.runtime, one.device_name) == ("model", "torch", cpu_name()) for one in records)
    assert all(one.latency_ms_min > 0 and one.size_bytes > 0 and one.parameters for one in records)
    with pytest.raises(ModelError, match="takes at most 160 tokens, the asked sequence length is 5000"):
        endtoend.run([target], batch_sizes=[1], seq_lens=[5000], **SMALL)


# --- multiply-accumulates ------------------------------------------------------------------------


def test_macs_of_a_small_bert_are_those_on_paper(tiny_classifier_dir):
    h, i, labels = tiny.HIDDEN, tiny.INTERMEDIATE, 3
    token = tiny.LAYERS * (4 * h * h + 2 * h * i)  # four matrices of attention, two of the feed-forward part
    pair = tiny.LAYERS * 2 * h  # scores, and what they weigh
    row = h * h + h * labels  # pooler and classifier
    runner = open_runner(tiny_classifier_dir("bert", labels))
    assert runner.mac_terms == {"token": token, "pair": pair, "row": row}
    assert runner.macs(3, 17) == 3 * (17 * token + 17 * 17 * pair + row)


ANGLES = 0 if tiny.RELEASE >= (5, 19) else 17 * tiny.HIDDEN // tiny.HEADS // 2  # before 5.19 they were products
ONCE = {
    "deberta-v2": tiny.LAYERS * 2 * 16 * tiny.HIDDEN**2,  # queries and keys of 2 x 8 positions
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ANGLES),
    **dict.fromkeys(("modernbert", "gemma3_text"), 2 * ANGLES),  # those of local and of global layers
}


def test_macs_are_what_rows_add_to_a_pass(family, tiny_classifier_dir):
    runner = open_runner(tiny_classifier_dir(family))
    runner.model.requires_grad_(False)
    # not by `plain_attention`: before transformers 5.7 the fused attention of ModernBERT stays, whose products torch
    # does not count
    runner.model.config._attn_implementation = "eager"
    counted = {}
    for rows in (2, 5):
        with FlopCounterMode(display=False) as counter:
            runner.run(runner.prepare({"input_ids": np.full((rows, 17), 7)}))
        counted[rows] = counter.get_total_flops() // 2
    assert runner.macs(3, 17) == counted[5] - counted[2]
    once = counted[2] - runner.macs(2, 17)  # whatever the rows
    assert once == ONCE.get(family, 0)


def test_macs_of_another_form_are_not_known(tiny_classifier_dir, monkeypatch):
    runner = open_runner(tiny_classifier_dir("bert"))
    monkeypatch.setattr(TorchRunner, "_counted", lambda _self, rows, length: rows * length**3)
    assert runner.macs(1, 8) is None


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("flags : fpu avx2 sha_ni", "Fast 9 (AVX2)"),
        ("flags : fpu avx2 avx512f avx512_vnni", "Fast 9 (AVX-512 VNNI)"),
        ("Features : fp asimd asimddp", "Fast 9 (NEON dot product)"),
        ("flags : fpu", "Fast 9"),
    ],
)
def test_processors_of_one_model_are_told_apart_by_their_instructions(flags, name, tmp_path, monkeypatch):
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor : 0\nmodel name : Fast 9\n{flags}\n")
    monkeypatch.setattr(machine, "_CPUINFO", told)
    assert machine.cpu_name() == name


def test_statistics_are_of_all_samples_and_few_are_kept():
    found = latencies([float(value) for value in range(1, 10_002)])
    assert found["repetitions"] == 10_001
    assert found["latency_ms_median"] == 5_001
    assert found["latency_ms_p10"] == pytest.approx(1_001)
    assert found["latency_ms_p90"] == pytest.approx(9_001)
    assert 0.9 * MAX_SAMPLES < len(found["samples_ms"]) <= MAX_SAMPLES
    assert latencies([2.0])["latency_ms_p90"] == 2


def test_twice_as_fast_is_a_factor_of_two_and_half_the_time():
    fast = relative_to(record(name="fast", **latencies([1.0])), record())
    assert (fast.relative_time_factor, fast.relative_reduction_percent, fast.baseline) == (2, 50, "dense")


def test_the_last_of_each_cell_is_held_to_the_factor():
    fast = [relative_to(one, record()) for one in (record(), record(name="x", **latencies([1.0])))]
    slow = [dataclasses.replace(one, seq_len=32) for one in (fast[0], fast[1], relative_to(record(name="y"), fast[0]))]
    assert tables.too_slow([*fast, *slow], 1.0) == []
    assert tables.too_slow([*fast, *slow], 2.0) == [slow[-1]]
    assert tables.too_slow([*fast, *slow], 2.1) == [fast[-1], slow[-1]]


def test_records_survive_json(matmul_records):
    for one in [*matmul_records, *endtoend_records()]:
        assert Record.from_json(json.loads(json.dumps(one.to_json()))) == one
        assert Record.from_json(one.to_json(samples=False)) == dataclasses.replace(one, samples_ms=())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "version 2, this gatepress reads version 1"),
        ({"format_version": None}, "version None"),
        ({"what": "else"}, "what is 'else', expected one of endtoend, matmul"),
        ({"name": 3}, "name is 3, expected a text"),
        ({"latency_ms_median": "fast"}, "latency_ms_median is 'fast', expected a number"),
        ({"latency_ms_median": float("nan")}, "latency_ms_median is nan, expected a finite number"),
        ({"latency_ms_median": 10**400}, "latency_ms_median is a number beyond 64 bits"),
        ({"latency_ms_median": 1e301}, r"latency_ms_median is 1e\+301, expected a number"),
        ({"repetitions": True}, "repetitions is True, expected a whole number"),
        ({"shape": [1]}, "shape has length 1, expected 2"),
        ({"shape": []}, "shape has length 0, expected 2"),
        ({"shape": [1, 2, 3]}, "shape has length 3, expected 2"),
        ({"shape": [1, "2"]}, "shape is '2', expected a whole number"),
        ({"samples_ms": [1.0, None]}, "samples_ms is None, expected a number"),
        ({"versions": {"torch": 2}}, r"versions\.torch is 2, expected a text"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"baseline": "dense\x1b[31m"}, "baseline holds a control character"),
        ({"versions": {"torch\n": "2"}}, "a key of versions holds a control character"),
    ],
)
def test_malformed_records_are_refused(change, message):
    with pytest.raises(ArtifactError, match=message):
        Record.from_json({**record().to_json(), **change})


def test_incomplete_records_are_refused():
    with pytest.raises(ArtifactError, match="latency_ms_min"):
        Record.from_json({k: v for k, v in record().to_json().items() if k != "latency_ms_min"})
    with pytest.raises(ArtifactError, match="expected a JSON object, got list"):
        Record.from_json([])


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_records_are_written_and_read_back(tmp_path, matmul_records, suffix):
    path = tmp_path / f"result{suffix}"
    render.write(matmul_records, path)
    assert render.read(path) == matmul_records


def test_csv_has_a_row_for_each_record_without_samples(tmp_path, matmul_records):
    render.write(matmul_records, tmp_path / "result.CSV")
    with (tmp_path / "result.CSV").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [one.name for one in matmul_records]
    assert rows[0]["shape"] == "24x16"
    assert "torch=" in rows[0]["versions"]
    assert "samples_ms" not in rows[0]


def test_markdown_says_what_was_measured_where(tmp_path, matmul_records):
    render.write([*matmul_records, *endtoend_records()], tmp_path / "result.md")
    text = (tmp_path / "result.md").read_text()
    assert text.count("\n| --- ") == 3  # one table for each weight, one for the models
    assert "weight 24 x 16, 4 tokens" in text
    assert "batch 8 x 128 tokens on made-up processor, 2 threads, float32, median of 1 to 3 repetitions" in text
    assert "| pruned\\|x | pruned | torch | 1.00 ms | 0.600 to 1.40 |  | 90.0 MB | 2.00x |" in text


def test_tables_show_work_and_type_where_they_are_known_and_differ():
    (plain,) = tables.tables(endtoend_records())
    assert {"dtype", "GMACs"}.isdisjoint(plain.columns)
    dense = record(macs=1_234_000_000, parameters=22_700_000)
    (table,) = tables.tables([relative_to(one, dense) for one in (dense, record(name="q", dtype="int8"))])
    assert table.columns[: table.left] == ["target", "kind", "runtime", "dtype"]
    assert [dict(zip(table.columns, row, strict=True))["GMACs"] for row in table.rows] == ["1.23", ""]
    assert table.rows[0][table.columns.index("params")] == "22.7 M"
    assert "2 threads, float32 and int8, median" in table.title


@pytest.mark.parametrize("value", [0.0123, 0.123, 1.23, 12.3, 99.94])
def test_milliseconds_have_three_digits(value):
    assert len(tables.three_digits(value).replace(".", "").lstrip("0")) == 3
    assert float(tables.three_digits(value)) == pytest.approx(value, rel=1e-2)


def test_long_times_are_whole_milliseconds():
    assert [tables.three_digits(value) for value in (99.96, 123.4, 12345.6)] == ["100", "123", "12,346"]
    (table,) = tables.tables([relative_to(record(macs=2_224_000_000_000), record())])
    assert "2,224" in table.rows[0]


@pytest.mark.parametrize(
    ("write", "suffix"),
    [(render.write, ".json"), (render.plot, ".png"), (render.plot, ".svg")],
)
def test_what_is_there_already_is_kept_unless_forced(tmp_path, write, suffix):
    path = tmp_path / f"old{suffix}"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"exists already; .* --force"):
        write(endtoend_records(), path)
    assert path.read_text() == "old"
    write(endtoend_records(), path, force=True)
    assert path.read_bytes() != b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("call", "name", "error", "message"),
    [
        (
            render.check_report,
            "x.xlsx",
            UsageError,
            r"--output is .*x.xlsx, expected a name that ends in .json",
        ),
        (render.check_report, "x", UsageError, "--output is"),
        (render.check_plot, "x.pdf", UsageError, r"--plot is .*x.pdf, expected .* .png, .svg"),
        (render.read, "x.csv", UsageError, "read from .json and .jsonl only"),
        (render.read, "x.json", ArtifactError, "no such file"),
        (render.read, "x.jsonl", ArtifactError, "not readable"),
    ],
)
def test_wrong_files_are_refused(tmp_path, call, name, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path / name)


def test_a_directory_is_no_report(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        render.write(endtoend_records(), tmp_path / "x.json", force=True)


# --- plots ---------------------------------------------------------------------------------------


def test_lines_are_labelled_with_what_they_save(tmp_path, matmul_records):
    render.plot(matmul_records, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in (
        "time of one product (ms)",
        "columns removed (%)",
        "weight 24 x 16",
        cpu_name(),
        "1 thread",
    ):
        assert words in text
    render.plot(matmul_records, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == text
    render.plot(matmul_records, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_point_is_in_the_picture():
    dense = record(what="matmul", kind="dense", shape=(4, 4), seq_len=8, sparsity=0.0)
    most = record(what="matmul", kind="index", shape=(4, 4), seq_len=8, sparsity=0.99)
    figure = Figure()
    figures._lines(figure, [[dense, relative_to(most, dense)]])
    assert figure.axes[0].get_xlim()[1] > 99


def test_bars_are_labelled_with_their_factor(tmp_path):
    render.plot(endtoend_records(), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in (
        "time of one batch (ms)",
        "batch 8 x 128 tokens",
        "2.00x",
        "ONNX Runtime",
        "made-up processor",
    ):
        assert words in text


@pytest.mark.parametrize("name", ["us$_$x", "$LR-$SEED"])
def test_names_are_no_formulas(name, tmp_path):
    dense = record(name=name)
    render.plot([relative_to(one, dense) for one in (dense, record(name="b"))], tmp_path / "a.svg")
    assert name in (tmp_path / "a.svg").read_text()


def test_bars_tell_types_apart(tmp_path):
    dense = record()
    render.plot([relative_to(one, dense) for one in (dense, record(name="q", dtype="int8"))], tmp_path / "a.svg")
    assert "int8" in (tmp_path / "a.svg").read_text()


def test_mixed_records_are_not_drawn_together(tmp_path, matmul_records):
    with pytest.raises(UsageError, match="one kind of benchmark"):
        render.plot([*matmul_records, *endtoend_records()], tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "gatepress.bench.figures", raising=False)
    monkeypatch.delattr(bench, "figures", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'gatepress\[plot\]'"):
        render.check_plot(tmp_path / "a.png")


def test_what_is_computed_is_not_known_where_a_part_of_it_is_not() -> None:
    known: list[int | None] = [100, None]
    batch = {"input_ids": np.ones((1, 2), dtype=np.int64)}
    runner: Any = SimpleNamespace(
        max_tokens=None,
        prepare=lambda one: one,
        run=lambda one: one,
        synchronize=lambda: None,
        macs=lambda *_: known.pop(),
    )
    cell: Any = SimpleNamespace(seq_len=None, batches=lambda _: [batch, batch])
    assert endtoend._timed("one", runner, cell).macs is None


def test_a_pass_cuts_texts_at_what_the_shortest_of_the_models_takes(
    tiny_classifier_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    short = Path(shutil.copytree(tiny_classifier_dir("bert"), tmp_path / "short"))
    file = short / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 5}))
    data = replace(settings_for(short, tiny_task_files).data, max_validation_samples=8)
    for targets in ([tiny_classifier_dir("bert"), short], [short, tiny_classifier_dir("bert")]):
        records = endtoend.run(targets, data=data, batch_sizes=[4], repetitions=1, warmup=0)
        assert [one.max_length for one in records] == [5, 5]
