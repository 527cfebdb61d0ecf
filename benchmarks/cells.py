"""What benchmarks of trainings share: they run the command line as a user would, cell by cell, and record each result.

A cell that is in the results already is not run again, and a run directory that is finished is not trained again, so a
stopped sweep goes on where it was. Results are written after every cell: below `--work`, so that whoever reproduces
them gets tables of their own, or where `--results` says.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch

from gatepress.config import Precision
from gatepress.errors import GatepressError
from gatepress.files import RUN_FILE, replace_file
from gatepress.machine import cpu_name, device_name
from gatepress.models import model_files

RESULTS = Path(__file__).parent / "results"  # the committed ones
EPOCHS = {"sst2": 3, "cola": 5, "stsb": 5, "rte": 8}  # tasks that small encoders can be tried on in minutes
MORE_EPOCHS = {  # of models so small that these take about as long: fraction removed from which on -> epochs
    0.75: {"sst2": 4, "cola": 6, "stsb": 6, "rte": 10},
    0.875: {"sst2": 4, "cola": 8, "stsb": 6, "rte": 12},
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
    """Run one command and return its JSON object; its progress goes to stderr as it comes. Exits where it fails."""
    command = [sys.executable, "-m", "gatepress", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    shown = " ".join(["gatepress", *command[3:]])
    try:
        value: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        code = done.returncode
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise SystemExit(f"{shown}: {end} before it printed a result") from None
    if done.returncode:
        raise SystemExit(f"{shown}: {value}")
    return value


class Once(argparse.Action):
    """An option that may be given once: of two, one would be ignored."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Keep the value; exit where there is another."""
        if getattr(namespace, self.dest) != self.default:
            parser.error(f"{option} is given twice, expected once")
        setattr(namespace, self.dest, values)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add(made: argparse.ArgumentParser, *names: str, tasks: Iterable[str] = TASKS) -> None:
    """Give a parser those of `OPTIONS` that a script makes use of; `--task` knows the `tasks`."""
    for name in names:
        known: dict[str, Any] = {"choices": tuple(tasks)} if name == "--task" else {}
        made.add_argument(name, **OPTIONS[name], **known)


def read(
    made: argparse.ArgumentParser,
    words: Sequence[str] | None = None,
    usual: Callable[[argparse.Namespace], dict[str, str]] = lambda _: {},
) -> argparse.Namespace:
    """Return the options of a command line, with the directory of the results; exits where one is missing.

    Models, where a script takes them, are name -> directory or hub id: the `usual` ones unless some are given, none
    where results are only rendered.
    """
    options = made.parse_args(words, argparse.Namespace(size="laptop"))  # which `paper.py` alone lets one choose
    if options.render:
        options.results = options.results or RESULTS
    elif "work" in options and options.work is None:
        made.error("--work is required, or --render alone")
    elif options.results is None and "work" not in options:
        made.error("--results is required, or --render alone")
    else:
        options.results = options.results or options.work / "results"
    if "models" in options:
        options.models = {} if options.render else dict(options.models) or usual(options)
        if not (options.models or options.render):
            made.error("--model is required, as NAME=DIRECTORY or NAME=HUB-ID, or --render alone")
    return options


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


OPTIONS: dict[str, dict[str, Any]] = {
    "--data-dir": {"type": Path, "metavar": "GLUE", "help": "GLUE files; from the hub unless given"},
    "--model": {"dest": "models", "action": "append", "default": [], "type": named, "metavar": "NAME=DIRECTORY|HUB-ID"},
    "--task": {"action": "append"},
    "--seed": {"action": "append", "type": int},
    "--epochs": {"type": count, "help": "default: those of the benchmark, else of gatepress train"},
    "--precision": {"default": "bf16", "choices": get_args(Precision)},
    "--device": {"default": "auto", "choices": ("auto", "cpu", "cuda")},
    "--work": {"type": Path, "metavar": "DIR", "help": "where runs are kept between starts"},
    "--results": {
        "type": Path,
        "metavar": "DIR",
        "help": "where the JSON and what is rendered from it are written; `results` in --work unless given, with "
        "--render the committed ones",
    },
    "--render": {"action": "store_true", "help": "only render the results that are there"},
}
OF_TRAINING = ("--data-dir", "--model", "--epochs", "--precision", "--device")
KEPT_IN = ("--work", "--results", "--render")


def data_of(options: argparse.Namespace) -> list[object]:
    """Return the words that say where rows are read from; none: the hub."""
    return [] if options.data_dir is None else ["--data-dir", options.data_dir]


def train(run: Path, name: str, model: str, words: Sequence[object], options: argparse.Namespace) -> dict[str, Any]:
    """Train one run unless it is there and finished, and return what it says of itself, with the command.

    Exits where the one that is there was trained otherwise than asked.
    """
    status = _status(run)
    trained_by, asked_for = (run.with_name(f"{run.name}.{what}.json") for what in ("machine", "asked"))
    asked = dict(itertools.pairwise(words))  # option -> the word behind it
    if status in ("training", "interrupted"):
        gatepress("train", "--resume", run)
    elif status != "finished":
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        replace_file(asked_for, json.dumps(asked, default=str).encode())
        gatepress("train", "--model", model, *data_of(options), *words, "-o", run)
    manifest = _manifest(run)
    report, settings = manifest["report"], manifest["settings"]
    if status != "finished":  # now: who collects the run later may be another machine
        replace_file(trained_by, json.dumps(machine(report["device"])).encode())
    found = {"--max-train-samples": settings["data"]["max_train_samples"]}
    found |= {f"--{name}": settings[name] for name in ("precision", "epochs", "seed", "sparsity")}
    other = {name: value for name, value in found.items() if name in asked and asked[name] != value}
    chosen = "--epochs" not in asked and asked_for.exists() and "--epochs" in json.loads(asked_for.read_text())
    other |= {"--epochs": settings["epochs"]} if chosen else {}
    if other:
        raise SystemExit(f"{run}: was trained with {other}, asked is {' '.join(map(str, words))}; remove it")
    if not _is_of(manifest["base_sha256"], model) or not (Path(model).is_dir() or settings["model"] == model):
        raise SystemExit(f"{run}: was trained from other weights than {model} has now; remove it")
    return {
        **{key: report[key] for key in COUNTED if key in report},
        **{
            key: settings[key]
            for key in ("granularity", "controller", "method", "lora_rank", "learning_rate", "distill", "precision")
        },
        "rotate_heads": settings.get("rotate_heads", False),
        **_start_of(manifest, Path(model)),
        "versions": manifest["versions"],
        **(json.loads(trained_by.read_text()) if trained_by.exists() else _of_unknown(report)),
        "command": f"{KEPT}gatepress train --model {name.upper()} --data-dir GLUE " + " ".join(map(str, words)),
    }


def _start_of(manifest: dict[str, Any], start: Path) -> dict[str, Any]:
    """Return the sha256 of the model below a run; if it started from a run, also that run's, and its metric."""
    if not (start / RUN_FILE).is_file():
        return {"base_sha256": manifest["base_sha256"]}
    finetuned = _manifest(start)
    return {
        "start_sha256": manifest["base_sha256"],
        "start_metric": finetuned["report"]["metric_value"],
        "base_sha256": finetuned["base_sha256"],
    }


_weights_of = cache(model_files)  # the models of a sweep are asked for in every cell


def _is_of(base_sha256: dict[str, str], model: str) -> bool:
    """Say whether these are the weights of a model directory; what is on the hub is taken to stay as it is."""
    return not Path(model).is_dir() or _weights_of(Path(model)).items() <= base_sha256.items()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what a cell says of the machine that trained it."""
    return {
        "device": device,
        "device_name": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }


def _of_unknown(report: dict[str, Any]) -> dict[str, Any]:
    """Return the same of a run that this machine may not have trained: nobody wrote it down."""
    return {**{key: report[key] for key in ("device",) if key in report}, "cpu": cpu_name(), "cores": os.cpu_count()}


def on_gpu(cell: dict[str, Any]) -> bool:
    """Say whether a cell was trained on a GPU; early ones do not tell, and were not."""
    return str(cell.get("device", "cpu")) != "cpu"


def trained_on(cell: dict[str, Any]) -> str:
    """Return what trained a cell, in words."""
    if on_gpu(cell):
        return str(cell.get("device_name", "a GPU"))
    if "threads" in cell:
        return f"{cell['threads']} thread{'s' if int(cell['threads']) > 1 else ''} of {cell['cpu']}"
    return f"{cell['cores']} cores of {cell['cpu']}"


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
    with _locked(path):
        return _keep(path, measured, render)


def put(path: Path, names: Sequence[str], done: dict[str, Any], render: Callable[[Any], str]) -> None:
    """Write one more cell to the JSON at `path` and its table beside it, in the place of one with its `names`."""
    key = tuple(done[name] for name in names)
    with _locked(path):  # read anew: another process may have added cells meanwhile, this one too
        others = [one for one in records_in(path) if tuple(one[name] for name in names) != key]
        _keep(path, [*others, done], render)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing a JSON while this one reads and writes it; they wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _keep(path: Path, measured: Any, render: Callable[[Any], str]) -> Any:
    if measured is not None:
        replace_file(path, (json.dumps(measured, indent=1) + "\n").encode())
    found = records_in(path)
    if not found:
        raise SystemExit(f"{path}: has no records, so there is nothing to render; run some first")
    replace_file(path.with_suffix(".md"), render(found).encode())
    return found


def draw_both(path: Path, draw_on: Callable[[Any], None]) -> None:
    """Write what `draw_on` makes of an empty figure beside `path`, as PNG and SVG."""
    from gatepress.bench.figures import drawn  # noqa: PLC0415 - tables need no matplotlib

    for suffix in ("png", "svg"):
        replace_file(path.with_suffix(f".{suffix}"), drawn(suffix, draw_on))


def sweep(  # noqa: PLR0913 - what is run, where it is kept, how it is shown
    path: Path,
    keys: Iterable[tuple[Any, ...]],
    names: Sequence[str],
    cell: Callable[[tuple[Any, ...]], dict[str, Any]],
    render: Callable[[list[dict[str, Any]]], str],
    *,
    draw: Callable[[list[dict[str, Any]], Any], None] | None = None,
    options: argparse.Namespace | None = None,
    anew: bool = False,
) -> None:
    """Run the cells whose key is not in the JSON at `path` yet, with `anew` all; keep it, table and figure up to date.

    One that fails does not stop the others, nor does one that is there but was trained otherwise than `options` say.
    Exits at the end where there were such, or where there is nothing to render.
    """
    asked = list(dict.fromkeys(keys))
    if asked:
        known = _keys(path, names)
        _tell(f"{path}: {sum(key in known for key in asked)} of {len(asked)} cells are there already")
    failed = []
    for key in asked:
        there = None if anew else _keys(path, names).get(key)
        try:
            if there is not None:
                _refuse_other(path, there, options)
                continue
            done = {**dict(zip(names, key, strict=True)), **cell(key)}
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the next cell may do; all are told of at the end
            if not isinstance(error, (GatepressError, SystemExit)):
                traceback.print_exc()
            failed.append(f"{' '.join(map(str, key))}: failed: {error or repr(error)}")
            _tell(failed[-1])
        else:
            put(path, names, done, render)
    if records_in(path) or not failed:
        found = keep(path, None, render)
        if draw:
            draw_both(path, lambda figure: draw(found, figure))
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {len(asked)} cells failed:", *failed]))


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _keys(path: Path, names: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {tuple(one[name] for name in names): one for one in records_in(path)}


def _refuse_other(path: Path, cell: dict[str, Any], options: argparse.Namespace | None) -> None:
    """Exit where a cell that is there was trained otherwise than the options say, as far as it tells."""
    asked = {name: getattr(options, name, None) for name in ("precision", "epochs")}
    other = {name: cell[name] for name, value in asked.items() if value is not None and cell.get(name, value) != value}
    if other:
        raise SystemExit(f"is in {path} with {other}; take it out, or ask for the same")
    model = getattr(options, "models", {}).get(cell.get("encoder"))
    if model and "base_sha256" in cell and not _is_of(cell["base_sha256"], model):
        raise SystemExit(f"is in {path} with other weights than {model} has now; take it out")


def records_in(path: Path) -> Any:
    """Return what a JSON of results holds; nothing if it is not there."""
    return json.loads(path.read_text()) if path.exists() else []


def _manifest(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / RUN_FILE).read_text())
    return value


def _status(run: Path) -> str | None:
    return _manifest(run)["status"] if (run / RUN_FILE).is_file() else None
