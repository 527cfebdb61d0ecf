"""How fast pruned models are, on runtimes that people deploy, against what they would use instead.

    python benchmarks/speed.py table       # what an index operation costs on this machine, per runtime
    python benchmarks/speed.py kernels     # odd widths, ways to pick columns, products together or apart
    python benchmarks/speed.py base        # RoBERTa-base shape, matrix gates, s = 0.3 on both axes, random
    python benchmarks/speed.py trained --run DIR    # the same for a trained run
    python benchmarks/speed.py structured  # half of the multiply-accumulates gone: how much of that is time
    python benchmarks/speed.py deberta     # the same in DeBERTa-v3-base's shape, and with all gates open
    python benchmarks/speed.py modernbert  # and in ModernBERT-base's
    python benchmarks/speed.py gte         # and in that of gte-base-en-v1.5
    python benchmarks/speed.py eurobert    # and in EuroBERT-210m's
    python benchmarks/speed.py qwen3       # and in Qwen3-0.6B's, 7 of its 28 layers
    python benchmarks/speed.py gemma3      # and in EmbeddingGemma's
    python benchmarks/speed.py bf16        # the same in torch on a CPU that multiplies bfloat16, against all else
    python benchmarks/speed.py openvino    # the same ONNX files in ONNX Runtime and in OpenVINO
    python benchmarks/speed.py grid        # is the chosen layout ever slower than a fixed one?
    python benchmarks/speed.py fusions     # what ONNX Runtime fuses in dense and in pruned graphs
    python benchmarks/speed.py collapse    # time and memory of prune, RoBERTa-base shape

Weights are random (how long a product takes does not depend on them), gates are closed at random, shapes are real.
Every comparison is one interleaved run and needs a quiet machine. `--work DIR` keeps models, and parts of the grid that
are done are not measured again. Results are written to `results` below `--work`, or where `--results` says.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from cells import parser
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from gatepress import latency
from gatepress.alternatives import run as against_alternatives
from gatepress.bench import endtoend, render
from gatepress.bench.record import Record
from gatepress.checkpoint import RunManifest, open_base
from gatepress.config import DataSettings, Granularity, Layout, Target, TrainSettings
from gatepress.export import export
from gatepress.files import replace_file, sha256_of
from gatepress.gates import Gate
from gatepress.inject import attach_gates_, gated_linear
from gatepress.machine import cpu_name
from gatepress.modeling_gatepress import pick
from gatepress.models import model_files, open_tokenizer
from gatepress.pruning import prune
from gatepress.resolve import resolve
from gatepress.runwriter import RunWriter
from gatepress.tasks.sources import load_rows
from gatepress.versions import MADE_WITH, versions

DEBERTA: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
QWEN3: dict[str, Any] = {
    "vocab_size": 32_000,  # of 151,936: words are looked up, which takes no time
    "hidden_size": 1024,
    "num_hidden_layers": 7,  # of 28: all of one shape
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "pad_token_id": 0,
}
GEMMA3: dict[str, Any] = {
    "vocab_size": 32_000,  # of 262,144
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 1152,
    "sliding_window": 512,
    "use_bidirectional_attention": True,
}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
SHAPES: dict[str, Any] = {
    "minilm": lambda: BertForSequenceClassification(
        BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    ),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(num_hidden_layers=4)),  # of 12: all of one shape
    "roberta-base": lambda: RobertaForSequenceClassification(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    ),
    "deberta-v3-base": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**DEBERTA)),
    "modernbert-base": lambda: ModernBertForSequenceClassification(ModernBertConfig(classifier_pooling="mean", **IDS)),
    "gte-base": lambda: transformers.GteForSequenceClassification(  # which earlier releases of transformers do not have
        transformers.GteConfig(vocab_size=30528, pad_token_id=0, type_vocab_size=0)
    ),
    "eurobert-210m": lambda: transformers.EuroBertForSequenceClassification(  # nor this one
        transformers.EuroBertConfig(pad_token_id=0, bos_token_id=2, eos_token_id=3, mask_token_id=4)
    ),
    "qwen3-0.6b": lambda: transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(**QWEN3)),
    "embeddinggemma": lambda: transformers.Gemma3TextForSequenceClassification(transformers.Gemma3TextConfig(**GEMMA3)),
}
OWN_ATTENTION = {
    "deberta": "deberta-v3-base",
    "modernbert": "modernbert-base",
    "gte": "gte-base",
    "eurobert": "eurobert-210m",
    "qwen3": "qwen3-0.6b",
    "gemma3": "embeddinggemma",
}
BATCHES, LENGTHS = (1, 8), (32, 128)
SPARSITIES = (0.1, 0.3, 0.5, 0.7)
REPETITIONS = 20
ROUNDS = 5  # of the grid
AGAIN = "auto, opened again"
FIXED: tuple[Layout, ...] = ("inner", "index")
GRID: dict[Target, bool] = {"torch-cpu": False, "ort-cpu": True, "ort-int8": True}  # whether ONNX Runtime computes it


def base_model(shape: str, work: Path) -> Path:
    """Write a model of a shape with random weights and a small word list, unless it is there; return its directory."""
    directory = work / f"base-{shape}"
    if not directory.exists():
        part = work / f"part-{shape}"  # a stopped sweep goes on: what is there under its name is whole
        torch.manual_seed(0)
        model: PreTrainedModel = SHAPES[shape]()
        model.save_pretrained(part)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(100))]
        (part / "vocab.txt").write_text("\n".join(words) + "\n")
        AutoTokenizer.from_pretrained(part, model_type="bert").save_pretrained(part)
        part.replace(directory)
    return directory


def random_run(shape: str, work: Path, *, granularity: Granularity, sparsity: float, heads: bool = False) -> Path:
    """Write a run directory whose gates are closed at random, `sparsity` of each vector; return it.

    Structured gates close alike in every head, or, with `heads`, whole heads.
    """
    run = work / f"run-{shape}-{granularity}{'-heads' if heads else ''}-{sparsity:g}"
    if run.exists():
        return run
    base = base_model(shape, work)
    rows = work / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"w{n} w{n + 1} w{n + 2},{n % 2}\n" for n in range(60)))
    data = DataSettings(train_file=str(rows), validation_file=str(rows), text_column="text", label_column="label")
    settings = TrainSettings(data=data, model=str(base), granularity=granularity, sparsity=sparsity, method="gates")
    loaded = load_rows(data)
    model = open_base(base, loaded.spec)
    attach_gates_(model, granularity=granularity, controller="importance")
    torch.manual_seed(0)
    heads_at = {id(gated_linear(model, layer, role)): layer for layer in resolve(model) for role in ("q", "o")}
    for module in model.modules():
        for gate in (getattr(module, name, None) for name in ("gate_in", "gate_out")):
            if not isinstance(gate, Gate):
                continue
            layer = heads_at.get(id(module)) if granularity == "structured" else None
            groups = layer.kv_heads if layer else 1
            gate.mask.copy_(closed_mask(gate.size, groups, sparsity, whole=heads))
    probe = {"input_ids": torch.randint(5, 90, (8, 16)), "attention_mask": torch.ones(8, 16, dtype=torch.long)}
    manifest = RunManifest(
        settings=settings,
        task=loaded.spec,
        status="finished",
        step=1,
        base_sha256=model_files(base),
        data_fingerprint=loaded.fingerprint,
        tensors={},
        report={},
        versions=versions(*MADE_WITH),
    )
    with RunWriter(run, tokenizer=open_tokenizer(base), probe=probe) as writer:
        writer.save(model.eval(), manifest)
    return run


def closed_mask(size: int, groups: int, sparsity: float, *, whole: bool) -> torch.Tensor:
    """Return a mask [size] with `sparsity` zeros: at random in each group, or whole groups from the last on."""
    mask = torch.ones(groups, size // groups)
    if whole and groups > 1:
        mask[round(groups * (1 - sparsity)) :] = 0
        return mask.flatten()
    gone = round(sparsity * mask.shape[1])
    for row in mask:
        row[torch.randperm(len(row))[:gone]] = 0
    return mask.flatten()


def table(work: Path, results: Path) -> None:
    """Measure the costs that layouts are chosen by."""
    del work
    measured = {target: latency.measure(target).to_json() for target in GRID}
    (results / "latency_tables.json").write_text(json.dumps(measured, indent=1) + "\n")


def kernels(work: Path, results: Path) -> None:
    """Time what the target's facts in `costs.TARGETS` stand on: odd widths, and two ways to pick columns."""
    del work
    rows: list[dict[str, Any]] = []
    fused = [("q alone", (384, 768)), ("q, k, v together", (1152, 768))]
    products = [("product", (out, 768)) for out in (1504, 1505, 1512, 1520)]
    products += [("product", (out, 1504)) for out in (538, 544)] + [
        (f"product, {name}", shape) for name, shape in fused
    ]
    random = np.random.default_rng(0)

    def add(what: str, runtime: Target, shape: tuple[int, int], tokens: int, call: latency.Call) -> None:
        ms = latency._fastest(call, 30)
        about = {"device_name": cpu_name(), "threads": torch.get_num_threads()}
        rows.append({"what": what, "runtime": runtime, "shape": shape, "tokens": tokens, "ms": round(ms, 4), **about})

    with torch.inference_mode():
        for tokens in (128, 1024):
            for what, (out, columns) in products:
                linear, x = torch.nn.Linear(columns, out), torch.randn(1, tokens, columns)
                add(what, "torch-cpu", (out, columns), tokens, partial(linear, x))
                weight = random.standard_normal((columns, out)).astype(np.float32)
                for target in ("ort-cpu", "ort-int8"):
                    call_of = latency._session([[[("MatMul", [weight], {})]]], columns, target)
                    add(what, target, (out, columns), tokens, call_of(tokens))
            kept = np.linspace(0, 767, 544).astype(np.int64)
            ways: dict[str, latency.Chain] = {
                "gather from the last axis": [("Gather", [kept], {"axis": -1})],
                "gather by rows of the transposed": latency._rows_moved(768, kept),
            }
            for what, chain in ways.items():
                add(what, "ort-cpu", (768, 544), tokens, latency._session([[chain]], 768, "ort-cpu")(tokens))
            x, index = torch.randn(1, tokens, 768), torch.from_numpy(kept)
            add("index_select from the last axis", "torch-cpu", (768, 544), tokens, partial(x.index_select, -1, index))
            add("gather from the last axis", "torch-cpu", (768, 544), tokens, partial(pick, x, index))
    (results / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")


def compare(run: Path, results: Path, name: str) -> None:
    """Time a run against everything else that could be deployed."""
    records = against_alternatives(run, batch_sizes=BATCHES, seq_lens=LENGTHS, repetitions=REPETITIONS)
    render.write(records, results / f"speed_{name}.json", force=True)


def forms_of(run: Path, target: Target, layouts: tuple[Layout, ...], tokens: int | None = None) -> dict[str, Path]:
    """Return the directories of a run's dense form and of each layout, as the target runs them; kept for others."""
    base = Path(json.loads((run / "gatepress_run.json").read_text())["settings"]["model"])
    sources = {"dense": base}
    for layout in layouts:
        what = f"{target}-{tokens or 'any'}" if layout == "auto" else "any"
        pruned = run.with_name(f"{layout}-{what}-{run.name}")
        if not pruned.exists():
            prune(run, pruned, layout=layout, target=target, tokens=tokens)
        sources[layout] = pruned
    if target == "torch-cpu":
        return sources
    return {name: _graph_of(source, "int8" if target == "ort-int8" else None) for name, source in sources.items()}


def _graph_of(source: Path, quantize: Literal["int8"] | None) -> Path:
    """Return the ONNX directory of a model; layouts with the same weights and configuration have one together."""
    same = "-".join(sha256_of(source / name)[:16] for name in ("model.safetensors", "config.json"))
    graph = source.with_name(f"{quantize or 'fp32'}-{same}")
    if not graph.exists():
        export(source, graph, quantize=quantize)
    return graph


def structured(work: Path, results: Path) -> None:
    """Time half of the multiply-accumulates gone, as dimensions of every head and as whole heads."""
    for shape in ("minilm", "roberta-base"):
        runs = {
            name: random_run(shape, work, granularity="structured", sparsity=0.5, heads=name == "heads")
            for name in ("dimensions", "heads")
        }
        targets = {"dense": forms_of(runs["heads"], "ort-cpu", ())["dense"]}
        targets |= {f"half, {name}": forms_of(run, "ort-cpu", ("auto",))["auto"] for name, run in runs.items()}
        records = endtoend.run(targets, batch_sizes=BATCHES, seq_lens=LENGTHS, repetitions=2 * REPETITIONS)
        render.write(records, results / f"speed_structured_{shape}.json", force=True)


def own_attention(what: str, work: Path, results: Path) -> None:
    """Time a family as transformers computes it, with all gates open, and with half of the multiply-accumulates gone.

    Its attention is computed by another class as soon as gates stand in it, open ones too.
    """
    shape = OWN_ATTENTION[what]
    targets: dict[str, Path] = {}
    for name, sparsity in (("all gates open", 0.0), ("half", 0.5)):
        run = random_run(shape, work, granularity="structured", sparsity=sparsity)
        for target in GRID:
            forms = forms_of(run, target, ("inner",))
            targets |= {f"dense, {target}": forms["dense"], f"{name}, {target}": forms["inner"]}
    records = endtoend.run(targets, batch_sizes=BATCHES, seq_lens=LENGTHS, repetitions=REPETITIONS)
    render.write(records, results / f"speed_{what}.json", force=True)


def bf16(work: Path, results: Path) -> None:
    """Time torch in float32 and in bfloat16 with half of the multiply-accumulates gone, against all else."""
    run = random_run("roberta-base", work, granularity="structured", sparsity=0.5)
    records = against_alternatives(
        run, precisions=("fp32", "bf16"), batch_sizes=BATCHES, seq_lens=LENGTHS[-1:], repetitions=REPETITIONS
    )
    render.write(records, results / "speed_bf16.json", force=True)


def openvino(work: Path, results: Path) -> None:
    """Time ONNX files, whole and with half of the multiply-accumulates gone, in both runtimes that compute them."""
    run = random_run("roberta-base", work, granularity="structured", sparsity=0.5)
    targets: dict[str, Path] = {}
    dtypes: dict[Target, str] = {"ort-cpu": "", "ort-int8": " int8"}
    for target, dtype in dtypes.items():
        forms = forms_of(run, target, ("auto",))
        targets |= {f"dense{dtype}": forms["dense"], f"half{dtype}": forms["auto"]}
    records = endtoend.run(
        targets,
        runtimes=("onnxruntime", "openvino"),
        precisions=("fp32", "bf16"),
        batch_sizes=BATCHES,
        seq_lens=LENGTHS,
        repetitions=REPETITIONS,
    )
    render.write(records, results / "speed_openvino.json", force=True)


def grid(work: Path, results: Path) -> None:
    """Time the layout chosen for each batch and length beside the fixed ones, for every sparsity, shape and runtime.

    Two sessions of one graph may differ by more than two layouts do, so every form is opened anew in each of
    `ROUNDS`, and the chosen one twice: what lies between these two is noise.
    """
    done = results / "speed_grid.json"
    rows = json.loads(done.read_text()) if done.exists() else []
    cells = itertools.product(("minilm", "mpnet"), SPARSITIES, GRID, BATCHES, LENGTHS)
    for shape, sparsity, target, batch, length in cells:
        key = {"encoder": shape, "sparsity_asked": sparsity, "target": target}
        if any({**key, "batch_size": batch, "seq_len": length}.items() <= row.items() for row in rows):
            continue
        run = random_run(shape, work, granularity="matrix", sparsity=sparsity)
        fixed = forms_of(run, target, FIXED)
        auto = forms_of(run, target, ("auto",), batch * length)["auto"]
        twin = next((name for name, form in fixed.items() if _weights(form) == _weights(auto)), None)
        timed = {name: form for name, form in fixed.items() if name != twin} | {"auto": auto, AGAIN: auto}
        rounds = [
            endtoend.run(timed, batch_sizes=(batch,), seq_lens=(length,), repetitions=REPETITIONS)
            for _ in range(ROUNDS)
        ]
        by_name = [{record.name: record for record in records} for records in rounds]
        rows.append({**key, "auto_is": twin, **_compared(by_name)})
        replace_file(done, json.dumps(rows, indent=1).encode() + b"\n")


def _compared(rounds: list[dict[str, Record]]) -> dict[str, Any]:
    """Return what one batch and length took: medians of each round, and `auto` in parts of what took turns with it."""
    auto = rounds[0]["auto"]
    facts = ("batch_size", "seq_len", "repetitions", "device_name", "threads", "versions", "timestamp")
    return {
        **{name: getattr(auto, name) for name in facts},
        "macs": {name: record.macs for name, record in rounds[0].items()},
        "ms": {name: [found[name].latency_ms_median for found in rounds] for name in rounds[0]},
        "auto_over": {
            name: [round(_paired(found["auto"], found[name]), 4) for found in rounds]
            for name in rounds[0].keys() - {"auto"}
        },
    }


def _paired(one: Record, other: Record) -> float:
    """Return the time of `one` in parts of that of `other`: in each pair of calls that took turns, then the median."""
    return statistics.median(a / b for a, b in zip(one.samples_ms, other.samples_ms, strict=True))


def _weights(form: Path) -> list[str]:
    """Return the sha256 of a form's weights or graph."""
    return [sha256_of(file) for file in sorted(form.glob("model.*"))]


def fusions(work: Path, results: Path) -> None:
    """Count what ONNX Runtime fuses in dense and in pruned graphs, as `export` reports it."""
    rows = []
    targets: tuple[Target, ...] = ("ort-cpu", "ort-int8")
    for target in targets:
        run = random_run("minilm", work, granularity="matrix", sparsity=0.3)
        for name, directory in forms_of(run, target, (*FIXED, "auto")).items():
            manifest = json.loads((directory / "gatepress_onnx.json").read_text())
            counted = {key: manifest[key] for key in ("dtype", "fused_operators", "operators")}
            rows.append({"encoder": "minilm", "layout": name, **counted})
    (results / "fusions.json").write_text(json.dumps(rows, indent=1) + "\n")


def collapse(work: Path, results: Path) -> None:
    """Measure time and memory of `gatepress prune` in a fresh process, RoBERTa-base shape."""
    run = random_run("roberta-base", work, granularity="matrix", sparsity=0.3)
    base = base_model("roberta-base", work)
    rows = []
    for layout in ("auto", "inner"):
        with tempfile.TemporaryDirectory(dir=work) as place:
            words = ["-m", "gatepress", "prune", str(run), "--layout", layout, "-o", f"{place}/pruned", "--quiet"]
            started = time.perf_counter()
            process = subprocess.Popen([sys.executable, *words])
            peak = {"bytes": 0}
            watcher = threading.Thread(target=_watch, args=(process, peak))
            watcher.start()
            code = process.wait()
            seconds = time.perf_counter() - started
            watcher.join()
            if code:
                raise SystemExit(f"prune exited with {code}")
        rows.append({"layout": layout, "seconds": round(seconds, 2), "peak_rss_bytes": peak["bytes"]})
    started = time.perf_counter()
    imported = subprocess.run(
        [sys.executable, "-c", "import gatepress.pruning; print(open('/proc/self/status').read())"],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - started
    result = {
        "shape": "roberta-base",
        "base_bytes": (base / "model.safetensors").stat().st_size,
        "rss_of_the_imports_alone_bytes": _high_water(imported.stdout),
        "seconds_of_the_imports_alone": round(seconds, 2),
        "runs": rows,
    }
    (results / "speed_collapse.json").write_text(json.dumps(result, indent=1) + "\n")


def _watch(process: "subprocess.Popen[bytes]", peak: dict[str, int]) -> None:
    """Keep the largest resident size of a process, looked up every few milliseconds."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):  # it has just ended
            peak["bytes"] = max(peak["bytes"], _high_water(status.read_text()))
        time.sleep(0.005)


def _high_water(status: str) -> int:
    """Return the largest resident size so far, in bytes, that a /proc status tells."""
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


OF_ITS_OWN: dict[str, Callable[[Path, Path], None]] = {
    **{one.__name__: one for one in (table, kernels, structured, bf16, openvino, grid, fusions, collapse)},
    **{what: partial(own_attention, what) for what in OWN_ATTENTION},
}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; only what is timed on several machines takes a suffix, only `trained` a run."""
    made = parser(__doc__)
    ways = made.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name in (*OF_ITS_OWN, "base", "trained"):
        way = ways.add_parser(name)
        way.add_argument("--work", type=Path, default=Path("work"), metavar="DIR", help="where models are kept")
        told = "where results are written; `results` in --work unless given"
        way.add_argument("--results", type=Path, metavar="DIR", help=told)
        if name not in OF_ITS_OWN:
            way.add_argument("--suffix", default="", help="of the result's name, for that of another machine")
        if name == "trained":
            way.add_argument("--run", type=Path, required=True, help="a run directory with matrix gates")
    return made.parse_args(words)


def main() -> None:
    """Run what was asked for."""
    options = parse()
    work = options.work.absolute()
    results = options.results or work / "results"
    for directory in (work, results):
        directory.mkdir(parents=True, exist_ok=True)
    if options.what == "trained":
        compare(options.run, results, f"trained{options.suffix}")
    elif options.what == "base":
        run = random_run("roberta-base", work, granularity="matrix", sparsity=0.3)
        compare(run, results, f"base{options.suffix}")
    else:
        OF_ITS_OWN[options.what](work, results)


if __name__ == "__main__":
    main()
