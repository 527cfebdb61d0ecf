"""Damage what gatepress wrote, at random, and see what its readers make of it.

    python tests/fuzz.py --cases 20000 --jobs 2 -o fuzz.json
    python tests/fuzz.py --case pruned-index/forged/1234      # one case again, with all that is known of it

A case is a kind of artefact, a mode and a seed. Where a file is `corrupt`, manifests keep their hashes: a reader ends
in one `GatepressError`, or its result equals that of the untouched artefact bit for bit. Where it is `forged`, hashes
are written anew, as an attacker would: a reader ends in one `GatepressError` or in any result. In both, nothing else
is raised, no process dies, nothing takes longer than `LIMIT_S` or wants more than `MEMORY` beyond what reading takes.
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from damage import Draw, damage

LIMIT_S = 20.0
MEMORY = 2 << 30  # bytes
WORN = 1000  # cases after which a process is replaced, so that none is blamed for what others left behind
FAILURES = ("crashed", "hung", "memory", "differs")
OUTCOMES = ("refused", "equal", "accepted", *FAILURES)
RUN_KINDS = ("run", "run-matrix")
PRUNED_KINDS = ("pruned-inner", "pruned-index", "pruned-stock")
ONNX_KINDS = ("onnx", "onnx-external", "onnx-int8")
BARE_KINDS = ("bare", "bare-external")
KINDS = (*RUN_KINDS, *PRUNED_KINDS, *ONNX_KINDS, *BARE_KINDS)
TEXTS = ["anda krat belu", "zogg!", "mirao tolen 42 \u00e9"]

Reader = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """What is damaged, whether its hashes follow, and the seed of the damage."""

    kind: str
    mode: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.mode}/{self.seed}"

    @classmethod
    def named(cls, name: str) -> "Case":
        kind, mode, seed = name.split("/")
        return cls(kind, mode, int(seed))


@dataclass(frozen=True)
class Outcome:
    """How a case ended: the worst of its readers."""

    case: Case
    outcome: str
    reader: str = ""
    detail: str = ""
    damage: list[str] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)  # of processor time


def cases(count: int, seed: int) -> list[Case]:
    """Return cases of all kinds in turn; a file without a manifest has no hashes that could stay."""
    rows = [(kind, mode) for kind in KINDS for mode in ("corrupt", "forged") if (kind, mode[0]) not in _HASHLESS]
    return [Case(*rows[number % len(rows)], seed + number) for number in range(count)]


_HASHLESS = {(kind, "c") for kind in BARE_KINDS}


# --- artefacts


def make_artefacts(root: Path) -> Path:
    """Write one artefact of every kind below `root`, and the base model of the runs."""
    import torch
    import transformers
    from safetensors.torch import save_file

    import tiny
    from forms import save_run
    from gatepress import export, tracing
    from gatepress.files import sha256_of
    from gatepress.pruning import prune

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    header = ("text", "label")
    files = SimpleNamespace(
        train=tiny.write_table(root / "train.csv", header, tiny.made_up_rows(64, seed=1)),
        validation=tiny.write_table(root / "validation.csv", header, tiny.made_up_rows(32, seed=2)),
        text_column="text",
        text_pair_column=None,
        label_column="label",
    )
    base = tiny.save_model(tiny.build_encoder("bert"), "bert", root / "base")
    run = save_run(root / "run", base, files)
    matrix = save_run(root / "run-matrix", base, files, granularity="matrix")
    state = matrix / "state-00000001.safetensors"
    save_file({"optimizer.classifier.bias.step": torch.tensor(1.0), "teacher.x": torch.ones(3, 4)}, state)
    manifest = json.loads((matrix / "gatepress_run.json").read_text())
    numbers = {"learning_rates": [1e-3], "gates_fixed": False, "train_seconds": 1.0, "peak_memory_bytes": 1}
    manifest |= {"status": "training", "resume": {"file": state.name, "sha256": sha256_of(state), **numbers}}
    (matrix / "gatepress_run.json").write_text(json.dumps(manifest))
    for layout, source in (("inner", run), ("index", matrix), ("stock", run)):
        prune(source, root / f"pruned-{layout}", layout=layout)
    export.export(root / "pruned-inner", root / "onnx")
    export.export(root / "pruned-inner", root / "onnx-int8", quantize="int8", measure=False)
    limit, tracing.EXTERNAL_DATA_BYTES = tracing.EXTERNAL_DATA_BYTES, 0
    try:
        export.export(root / "pruned-index", root / "onnx-external")
    finally:
        tracing.EXTERNAL_DATA_BYTES = limit
    for kind, source in (("bare", "onnx-int8"), ("bare-external", "onnx-external")):
        (root / kind).mkdir()
        for file in (root / source).glob("model.onnx*"):  # under their names: the graph names its weights
            shutil.copyfile(file, root / kind / file.name)
    return root


# --- readers: each takes what a user would name


def read_logits(path: Path) -> Any:
    import numpy as np

    from gatepress.runtime import open_runner

    ids = np.random.default_rng(0).integers(5, 100, (3, 9))
    mask = (np.arange(9) < np.array([[9], [6], [2]])).astype(np.int64)
    return open_runner(path).logits({"input_ids": ids, "attention_mask": mask}).tobytes()


def read_pruned(path: Path) -> Any:
    from gatepress.models import load_pruned

    return sum(float(value.double().sum()) for value in load_pruned(path).state_dict().values()).hex()


def read_tokens(path: Path) -> Any:
    from gatepress.models import open_tokenizer

    tokenizer = open_tokenizer(path)
    cut = tokenizer(TEXTS, truncation=True, max_length=7, padding=False)
    return [tokenizer(TEXTS)["input_ids"], cut["input_ids"], tokenizer.pad_token_id]


def read_state(path: Path) -> Any:
    from gatepress import resume
    from gatepress.checkpoint import read_run

    manifest = read_run(path)
    return sorted(resume.read_state(path, manifest)) if manifest.status == "training" else None


def read_verified(path: Path) -> None:
    from gatepress.errors import ArtifactError
    from gatepress.files import json_text
    from gatepress.verifying import verify

    found = verify(path)
    json_text(found).encode()
    for fault in found["faults"]:
        _one_line(fault)
    if not found["ok"]:
        raise ArtifactError(found["faults"][0])


def read_inspected(path: Path) -> None:
    from gatepress.cli.inspect import tables
    from gatepress.files import json_text
    from gatepress.inspecting import inspect

    found = inspect(path)
    json_text(found).encode()
    tables(json.loads(json_text(found)), drawn=True)


Readers = dict[str, tuple[Reader, tuple[str, ...]]]  # and the kinds that they read
READERS: Readers = {
    "logits": (read_logits, KINDS),
    "load_pruned": (read_pruned, PRUNED_KINDS),
    "tokens": (read_tokens, (*RUN_KINDS, *PRUNED_KINDS, *ONNX_KINDS)),
    "state": (read_state, RUN_KINDS),
    "verify": (read_verified, KINDS),
    "inspect": (read_inspected, KINDS),
}


def place_of(kind: str, directory: Path) -> Path:
    """Return what a user names: a directory, or a graph in it that nothing describes."""
    return directory / "model.onnx" if kind in BARE_KINDS else directory


# --- the oracle


def judge(case: Case, directory: Path, readers: Readers, untouched: dict[str, Any]) -> Outcome:
    """Let every reader of a case's kind read a damaged artefact; return the worst of what comes of it."""
    from gatepress.errors import GatepressError

    ended = {"equal" if case.mode == "corrupt" else "accepted": ""}
    for name, (reader, kinds) in readers.items():
        if case.kind not in kinds:
            continue
        try:
            result = reader(place_of(case.kind, directory))
        except GatepressError as error:
            if wants_memory(error):
                return Outcome(case, "memory", name, str(error))
            try:
                _one_line(str(error))
            except ValueError as unclear:
                return Outcome(case, "crashed", name, str(unclear))
            ended["refused"] = str(error)[:300]
        except BaseException as error:  # noqa: BLE001 - whatever else comes is what is looked for, panics in Rust too
            what = "memory" if wants_memory(error) else "crashed"
            return Outcome(case, what, name, "".join(traceback.format_exception(error)[-6:])[-2500:])
        else:
            if case.mode == "corrupt" and result != untouched[name]:
                return Outcome(case, "differs", name)
    *_, (outcome, detail) = ended.items()
    return Outcome(case, outcome, detail=detail)


def wants_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it came from, is that of memory that could not be had."""
    words = "bad_alloc|bad allocation|(ailed to|Unable to|annot|can't) allocate|AllocateRaw|std::length"
    while error is not None:
        if isinstance(error, MemoryError) or re.search(words, str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(text: str) -> None:
    """Raise where a message is not one line that any terminal can show."""
    if not text.strip() or "\n" in text or "\x1b" in text:
        raise ValueError(f"the message is not one line: {text[:300]!r}")
    text.encode()  # a lone surrogate raises a ValueError


# --- processes


def _work(connection: Any, artefacts: Path, readers: Readers) -> None:
    """Answer cases until the connection closes."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch

    torch.set_num_threads(1)
    untouched = {
        kind: {name: read(place_of(kind, artefacts / kind)) for name, (read, kinds) in readers.items() if kind in kinds}
        for kind in KINDS
    }
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    connection.send(None)
    with contextlib.suppress(EOFError), tempfile.TemporaryDirectory(dir=artefacts) as place:
        while True:
            case = connection.recv()
            begun = time.process_time()
            directory = Path(place) / case.kind
            done = damage(Draw(case.name), artefacts / case.kind, directory, forged=case.mode == "forged")
            outcome = judge(case, directory, readers, untouched[case.kind])
            shutil.rmtree(directory)
            connection.send(replace(outcome, damage=done, seconds=time.process_time() - begun))


class _Worker:
    """One process and the case that it works on."""

    def __init__(self, artefacts: Path, readers: Readers) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gatepress.verifying", "gatepress.inspecting", "gatepress.export"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, artefacts, readers), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(300):
            raise RuntimeError("a process did not start")
        try:
            self.connection.recv()
        except EOFError:
            raise RuntimeError("a reader fails on what nobody touched") from None
        self.case: Case | None = None
        self.done = 0

    def give(self, case: Case, limit: float) -> None:
        self.case, self.deadline = case, time.monotonic() + limit
        self.connection.send(case)

    def answer(self) -> Outcome:
        """Return what came of the case; where the process is dead, of what."""
        case, self.case, self.done = self.case, None, self.done + 1
        assert case
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            self.done = WORN
            return Outcome(case, "crashed", detail=signal.Signals(-code).name if code < 0 else f"exit code {code}")
        return outcome

    def stop(self) -> None:
        self.connection.close()  # which ends it, unless it hangs
        self.process.join(0 if self.case else 5)
        self.process.kill()
        self.process.join()


def run_cases(
    todo: Iterable[Case],
    artefacts: Path,
    *,
    jobs: int = 1,
    readers: Readers = READERS,
    limit: float = LIMIT_S,
) -> Iterator[Outcome]:
    """Yield the outcome of each case, in the order in which they end."""
    left = iter(todo)
    workers: list[_Worker] = []
    try:
        while True:
            while len(workers) < jobs and (case := next(left, None)):
                workers.append(_Worker(artefacts, readers))
                workers[-1].give(case, limit)
            if not workers:
                return
            wait([worker.connection for worker in workers], timeout=0.5)
            for worker in list(workers):
                if worker.connection.poll():
                    yield worker.answer()
                elif time.monotonic() > worker.deadline:
                    yield Outcome(worker.case, "hung", detail=f"longer than {limit:g} s")
                    worker.done = WORN
                else:
                    continue
                following = next(left, None) if worker.done < WORN else None
                if following:
                    worker.give(following, limit)
                else:
                    worker.stop()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.stop()


# --- the command line


def summary(outcomes: list[Outcome], seconds: float, **asked: Any) -> dict[str, Any]:
    """Return counts by kind, mode and outcome, the failures themselves, and what they stand on."""
    counts = Counter((one.case.kind, one.case.mode, one.outcome) for one in outcomes)
    packages = ("gatepress", "torch", "transformers", "tokenizers", "safetensors", "onnx", "onnxruntime")
    return {
        "cases": len(outcomes),
        **asked,
        "seconds": round(seconds, 1),
        "processor_seconds": round(sum(one.seconds for one in outcomes), 1),
        "longest_processor_seconds": round(max((one.seconds for one in outcomes), default=0.0), 2),
        "limit_seconds": LIMIT_S,
        "limit_bytes": MEMORY,
        "outcomes": {name: sum(one.outcome == name for one in outcomes) for name in OUTCOMES},
        "by_kind": {
            kind: {
                mode: {name: counts[kind, mode, name] for name in OUTCOMES if counts[kind, mode, name]}
                for mode in ("corrupt", "forged")
                if any(key[:2] == (kind, mode) for key in counts)
            }
            for kind in KINDS
        },
        "failures": [told(one) for one in outcomes if one.outcome in FAILURES],
        "versions": {"python": platform.python_version(), **{one: importlib.metadata.version(one) for one in packages}},
        "machine": platform.machine(),
    }


def told(one: Outcome) -> dict[str, Any]:
    """Return a failure with the command that shows it again."""
    return {**asdict(one), "case": one.case.name, "again": f"python tests/fuzz.py --case {one.case.name}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=Case.named, action="append", help="KIND/MODE/SEED, instead of --cases")
    parser.add_argument("-o", "--output", type=Path, help="FILE.json")
    options = parser.parse_args()
    import conftest  # noqa: F401 - the environment of the tests

    begun, outcomes, shown = time.monotonic(), [], 0.0
    with tempfile.TemporaryDirectory(prefix="gatepress-fuzz-") as place:
        artefacts = make_artefacts(Path(place))
        for one in run_cases(options.case or cases(options.cases, options.seed), artefacts, jobs=options.jobs):
            outcomes.append(one)
            if one.outcome in FAILURES or options.case:
                sys.stderr.write(f"{json.dumps(told(one), indent=1)}\n")
            if time.monotonic() > shown + 10:
                shown = time.monotonic()
                counts = Counter(one.outcome for one in outcomes)
                sys.stderr.write(f"{len(outcomes)} cases in {shown - begun:.0f} s: {dict(counts)}\n")
    report = summary(outcomes, time.monotonic() - begun, seed=options.seed, jobs=options.jobs)
    text = json.dumps(report, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return int(any(one.outcome in FAILURES for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
