"""What benchmarks of trainings share: the command line run as a user would, cell by cell, and what a cell says.

A cell that stands in the results is not run again, and a run directory that is finished is not trained again, so a
stopped sweep goes on where it was. Results are written after every cell.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from gatepress.config import Precision
from gatepress.files import replace_file
from gatepress.machine import cpu_name

RESULTS = Path(__file__).parent / "results"
EPOCHS = {"sst2": 3, "cola": 5, "stsb": 5, "rte": 8}  # tasks that small encoders can be tried on in minutes
MORE_EPOCHS = {  # of models so small that these take about as long: fraction removed from which on -> epochs
    0.75: {"sst2": 4, "cola": 8, "stsb": 6, "rte": 10},
    0.875: {"sst2": 4, "cola": 8, "stsb": 8, "rte": 12},
}
TASKS = tuple(EPOCHS)
MAX_ROWS = 10_000  # training rows
ROWS = ("--max-train-samples", MAX_ROWS)
FULL = ("--method", "full")
MEMORY = (  # environment that trades memory for time on a CPU (notes/kernels.md): commands say so
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    *(f"MALLOC_{name}_" for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")),
)
KEPT = "".join(f"{name}={os.environ[name]} " for name in MEMORY if name in os.environ)
COUNTED = (
    *("metric_name", "metric_value", "examples", "asked_sparsity", "budget", "total_gates", "closed_gates"),
    *("removed_of_budget", "encoder_macs_removed", "dense_params", "total_params", "trainable_params"),
    *("train_examples", "epochs", "steps", "train_seconds", "peak_memory_bytes", "curve"),
)


def gatepress(*words: object) -> dict[str, Any]:
    """Run one command and return its JSON object; its progress goes to stderr as it comes."""
    command = [sys.executable, "-m", "gatepress", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    value: dict[str, Any] = json.loads(done.stdout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {value}")
    return value


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all trainings have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data-dir", type=Path, metavar="GLUE", help="GLUE files; from the hub unless given")
    made.add_argument("--model", action="append", default=[], type=named, metavar="NAME=DIRECTORY|HUB-ID")
    made.add_argument("--task", action="append")
    made.add_argument("--seed", action="append", type=int)
    made.add_argument("--epochs", type=count, help="default: those of the benchmark, else of gatepress train")
    made.add_argument("--work", type=Path, help="where runs are kept between starts")
    made.add_argument("--precision", default="bf16", choices=get_args(Precision))
    made.add_argument("--device", default="cpu")
    made.add_argument("--render", action="store_true", help="only render the results that are there")
    return made


def models_of(options: argparse.Namespace, others: dict[str, str] | None = None) -> dict[str, str]:
    """Return name -> directory or hub id, `others` unless some are given; none where results are only rendered."""
    models = {} if options.render else dict(options.model) or others or {}
    if not (models or options.render):
        raise SystemExit("no model: give --model NAME=DIRECTORY, or --render for the table of what was measured")
    return models


def named(text: str) -> tuple[str, str]:
    """Read NAME=DIRECTORY or NAME=HUB-ID."""
    name, _, model = text.partition("=")
    if not (name and model):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected NAME=DIRECTORY or NAME=HUB-ID")
    return name, model


def count(text: str) -> int:
    """Read a number that is 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected 1 or more")
    return value


def train(run: Path, name: str, model: str, words: Sequence[object], options: argparse.Namespace) -> dict[str, Any]:
    """Train one run unless it is there and finished, and return what it says of itself, with the command.

    Exits where the one that is there was trained otherwise than asked.
    """
    status = _status(run)
    if status in ("training", "interrupted"):
        gatepress("train", "--resume", run)
    elif status != "finished":
        shutil.rmtree(run, ignore_errors=True)
        where = [] if options.data_dir is None else ["--data-dir", options.data_dir]
        gatepress("train", "--model", model, *where, *words, "-o", run)
    manifest = json.loads((run / "gatepress_run.json").read_text())
    report, settings = manifest["report"], manifest["settings"]
    asked = dict(itertools.pairwise(words))  # option -> the word behind it
    found = {"--max-train-samples": settings["data"]["max_train_samples"]}
    found |= {f"--{name}": settings[name] for name in ("precision", "epochs", "seed", "sparsity")}
    other = {name: value for name, value in found.items() if name in asked and asked[name] != value}
    if other:
        raise SystemExit(f"{run}: was trained with {other}, asked is {' '.join(map(str, words))}; remove it")
    return {
        **{key: report[key] for key in COUNTED if key in report},
        **{
            key: settings[key]
            for key in ("granularity", "controller", "method", "lora_rank", "learning_rate", "distill", "precision")
        },
        "rotate_heads": settings.get("rotate_heads", False),
        "versions": manifest["versions"],
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "command": f"{KEPT}gatepress train --model {name.upper()} --data-dir GLUE " + " ".join(map(str, words)),
    }


def run_of(encoder: str, task: str, seed: int, words: Sequence[object], options: argparse.Namespace) -> Path:
    """Return where the run of a cell is kept: by what is trained, so that whatever else asks for the same finds it."""
    named = "_".join(str(word).strip("-<>").replace(",", "") for word in words)
    run: Path = options.work / f"{encoder}-{task}-{seed}-{named}"
    return run


def is_finished(run: Path) -> bool:
    """Say whether a run directory holds a training that came to its end."""
    return _status(run) == "finished"


def pressed_epochs(task: str, removed: float) -> int | None:
    """Return for how long a finetuned model is pressed, or finetuned again behind a cut.

    It should take about as long as full finetuning, so there are more where less of the encoder is left.
    """
    smaller = [epochs for least, epochs in MORE_EPOCHS.items() if removed >= least]
    return (smaller or [EPOCHS])[-1].get(task)


def common(options: argparse.Namespace, epochs: int | None = None) -> tuple[object, ...]:
    """Return the words that all trainings of a benchmark have; with so many `epochs` unless others are asked."""
    epochs = options.epochs or epochs
    return ("--precision", options.precision, "--device", options.device, *(("--epochs", epochs) if epochs else ()))


def keep(path: Path, measured: Any, render: Callable[[Any], str]) -> Any:
    """Write what was `measured` to `path` as JSON and its table beside it; None: the table only. Return the JSON."""
    if measured is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(measured, indent=1) + "\n").encode())
    found = _read(path)
    if not found:
        raise SystemExit(f"{path}: has no records, so there is nothing to render; run some first")
    replace_file(path.with_suffix(".md"), render(found).encode())
    return found


def draw_both(path: Path, draw_on: Callable[[Any], None]) -> None:
    """Write what `draw_on` makes of an empty figure beside `path`, as PNG and SVG."""
    from gatepress.bench.figures import drawn  # noqa: PLC0415 - tables need no matplotlib

    for suffix in ("png", "svg"):
        replace_file(path.with_suffix(f".{suffix}"), drawn(suffix, draw_on))


def sweep(
    path: Path,
    keys: Iterable[tuple[Any, ...]],
    names: Sequence[str],
    cell: Callable[[tuple[Any, ...]], dict[str, Any]],
    render: Callable[[list[dict[str, Any]]], str],
) -> list[dict[str, Any]]:
    """Run the cells whose key is not in the JSON at `path` yet; keep it and the table beside it up to date."""
    for key in keys:
        if key in {tuple(one[name] for name in names) for one in _read(path)}:
            continue
        done = {**dict(zip(names, key, strict=True)), **cell(key)}
        # Read anew: another process may have added cells meanwhile, this one too.
        others = [one for one in _read(path) if tuple(one[name] for name in names) != key]
        keep(path, [*others, done], render)
    there: list[dict[str, Any]] = keep(path, None, render)
    return there


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else []


def _status(run: Path) -> str | None:
    manifest = run / "gatepress_run.json"
    return json.loads(manifest.read_text())["status"] if manifest.is_file() else None
