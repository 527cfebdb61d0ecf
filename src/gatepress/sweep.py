"""Metric against latency, over sparsities, methods and seeds: the picture by which a sparsity is chosen.

Every training is a process of its own, so its peak memory is its own and its crash ends only itself.
`sweep.json` is written after each one and names everything that is finished, so a sweep that is started
again continues. Then the first seed of every point is pruned, exported and timed, all of them interleaved.
"""

import contextlib
import functools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gatepress import training
from gatepress.apart import DiedError, called
from gatepress.bench import endtoend
from gatepress.bench.record import Record
from gatepress.bench.render import drawing, markdown
from gatepress.bench.summary import Cell, density, summarize, table
from gatepress.bench.timing import computing_with
from gatepress.checkpoint import RunManifest, dense_base, located, read_run
from gatepress.config import (
    DEFAULT_TARGET,
    METHODS,
    Method,
    Target,
    TrainSettings,
    refuse,
    refuse_below,
    refuse_single,
    spelled,
    unknown_words,
)
from gatepress.costs import TARGETS
from gatepress.errors import ArtifactError, ModelError, OutputError, UsageError
from gatepress.export import export
from gatepress.files import (
    RUN_FILE,
    check_output,
    explained,
    json_text,
    lock,
    read_json,
    refuse_held,
    refuse_others,
    release,
    replace_file,
    temporary_directory,
)
from gatepress.hub import commit_of, locate_model
from gatepress.manifests import SWEEP_FILE, SWEEP_FORMAT, check_beside, read_manifest, understood
from gatepress.models import model_files
from gatepress.ondisk import stands_on
from gatepress.progress import NoProgress, Progress
from gatepress.pruning import prune
from gatepress.resume import refuse_other
from gatepress.runners import max_tokens
from gatepress.tasks.sources import load_rows

logger = logging.getLogger(__name__)

# Chosen by each training unless given.
LEFT_OPEN = (
    *("lora_rank", "lora_matrices", "closing", "epochs", "learning_rate", "distill", "hidden_weight", "rotate_heads"),
    "commit",
)
OF_CELLS = ("method", "sparsity", "commit")  # of its trainings, not of a sweep
GRID = ("methods", "sparsities", "seeds")  # may grow; the rest of a training must stay for figures to be comparable
TIMING = ("target", "batch_sizes", "seq_lens", "repetitions", "threads")  # may change: everything is timed anew
SUMMARY = ("sweep.md", "sweep.png", "sweep.svg")  # a table, and the same as pictures
KEPT = (
    *("task", "metric_name", "metric_value", "examples", "closed_fraction", "encoder_macs_removed"),
    *("total_params", "trainable_params", "train_seconds", "peak_memory_bytes"),
)


def run(  # noqa: PLR0913 - every option of the command is one
    settings: TrainSettings,
    output: str | Path,
    *,
    methods: Sequence[Method],
    sparsities: Sequence[float],
    seeds: int = 1,
    target: Target = DEFAULT_TARGET,
    batch_sizes: Sequence[int] = (1, 8),
    seq_lens: Sequence[int] = (32, 128),
    repetitions: int = endtoend.REPETITIONS,
    threads: int | None = None,
    plot: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train methods x sparsities x seeds, time what can be deployed of them, write it all to `output`.

    A method without gates is trained once per seed. Seeds count up from `settings.seed`; the method and sparsity of
    `settings` do not matter. What `output` holds of the same sweep is kept and not repeated: methods, sparsities and
    seeds are added to it; `force` starts over. A training that fails is reported in its cell, except the first, whose
    error is raised. `plot` None: if matplotlib is installed. Returns what `sweep.json` holds; docs/json-contract.md
    lists it. Raises `UsageError` on wrong arguments and on a sweep with other settings, `OutputError` on a directory
    that is not a sweep, and what the steps raise.
    """
    progress, output = progress or NoProgress(), Path(output)
    refuse(unknown_words(**{"for": (target, Target)}))
    refuse_single(methods=methods, sparsities=sparsities, batch_sizes=batch_sizes, seq_lens=seq_lens)
    if not force:
        settings = _spelled_as_before(settings, output / SWEEP_FILE)
    asked = _cells(settings, methods, sparsities, seeds)
    measuring: dict[str, Any] = {
        "batch_sizes": list(batch_sizes),
        "seq_lens": list(seq_lens),
        "repetitions": repetitions,
        "threads": threads,
    }
    endtoend.check(device=TARGETS[target].device, prefix="bench-", **measuring)
    if plot:
        drawing()  # a missing matplotlib is reported at once: a sweep takes hours
    train = {key: value for key, value in settings.absolute().to_json().items() if key not in OF_CELLS}
    grid = {"methods": list(methods), "sparsities": list(sparsities), "seeds": seeds}
    if force:
        refuse_held(output / "runs", (*settings.reads, *stands_on(settings)))
        _refuse_foreign(output / "runs")
    fresh = not output.exists()
    sweep = _Sweep(output, asked, _as_json({"train": train, **grid, "target": target, **measuring}))
    before, done = _before(output, sweep.settings, force=force), dict[Cell, RunManifest]()
    if not force:
        sweep.timed, sweep.records = _timed(before)
        known = {cell: _trained_as(settings, cell) for cell in _finished_cells(before, output / SWEEP_FILE)} | asked
        done = {cell: run for cell, how in known.items() if (run := _finished(sweep.run_dir(cell), how))}
        sweep.wanted = {cell: how for cell, how in known.items() if cell in done or cell in asked}
        if len(done) < len(sweep.wanted):
            _refuse_changed({sweep.run_dir(cell): run for cell, run in done.items()})
        sweep.reports = {cell: run.report for cell, run in done.items()}
    settings = _of_one_commit(settings, done.values())
    sweep.wanted = {cell: replace(how, commit=settings.commit) for cell, how in sweep.wanted.items()}
    longest = max_tokens(read_json(_located(settings) / "config.json"))
    endtoend.refuse_longer(settings.model, longest, max(seq_lens))
    if force and not fresh:
        load_rows(settings.data, embeds=settings.embed)  # what is there goes only if the rows can be had
    with _claimed(output, runs=force):
        try:
            sweep.save()
            if force:
                shutil.rmtree(output / "runs", ignore_errors=True)
            sweep.train(progress)
        except BaseException:
            if fresh and not any(output.glob(f"runs/*/{RUN_FILE}")):  # nothing to continue from
                shutil.rmtree(output, ignore_errors=True)
            raise
        sweep.time(progress)
        result = sweep.to_json()
        _write_summary(output, result, plot=plot)
    return {**result, "output_dir": str(output)}


@contextlib.contextmanager
def _claimed(output: Path, *, runs: bool) -> Iterator[None]:
    """Hold the directory of a sweep; `OutputError` if another process holds it or, with `runs`, one of its runs."""
    with explained(output):
        output.mkdir(parents=True, exist_ok=True)
    claim = lock(output)
    try:
        for run_dir in output.glob("runs/*/") if runs else ():
            release(lock(run_dir))
        yield
    finally:
        release(claim)


def _refuse_foreign(runs: Path) -> None:
    """Raise `OutputError` if beside or in the runs of a sweep there is what it did not write."""
    cells = [path for path in runs.glob("*") if Cell.named(path.name)]
    for directory in cells:
        refuse_others(directory)
    refuse_others(runs, known=[path.name for path in cells])


def _write_summary(output: Path, result: dict[str, Any], *, plot: bool | None) -> None:
    """Write the table of a sweep, and its pictures if they are asked for or matplotlib is installed."""
    told, *pictures = (output / name for name in SUMMARY)
    replace_file(told, markdown(table(result)).encode())
    drawn = plot is not False and find_spec("matplotlib")
    for picture in pictures:
        if drawn:
            from gatepress.bench import tradeoff  # noqa: PLC0415 - matplotlib is an extra, not always there

            replace_file(picture, tradeoff.draw(result, picture.suffix[1:]))
        else:
            picture.unlink(missing_ok=True)  # it shows other points than the table has


@dataclass
class _Sweep:
    """What is asked for, what was asked for before and is finished, and what is known so far."""

    output: Path
    wanted: dict[Cell, TrainSettings]
    settings: dict[str, Any]
    reports: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    failures: dict[Cell, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    timed: dict[str, Any] = field(default_factory=dict)  # those of `settings` that `records` were measured with

    def run_dir(self, cell: Cell) -> Path:
        """Return the directory in which a cell is trained."""
        return self.output / "runs" / cell.name

    def train(self, progress: Progress) -> None:
        """Train what is not finished yet."""
        missing = [cell for cell in self.wanted if cell not in self.reports]
        if not missing:
            return
        for name in SUMMARY:  # a table and pictures without these would be of another sweep
            (self.output / name).unlink(missing_ok=True)
        progress.start(len(missing), "trainings")
        try:
            for cell in missing:
                progress.advance(0, now=cell.name)
                try:
                    self.reports[cell] = train_apart(self.wanted[cell], self.run_dir(cell))
                except Exception as error:  # whatever ends one training, the others are not to blame
                    if not self.reports:  # or all of them fail: wrong columns, no such model
                        raise
                    self.failures[cell] = " ".join(str(error).split()) or type(error).__name__
                    logger.warning("%s failed: %s", cell.name, self.failures[cell])
                self.save()
                progress.advance(1)
        finally:
            progress.finish()

    def time(self, progress: Progress) -> None:
        """Time one model for each point against the densest, unless exactly these are timed already.

        Until all of them are, what was measured before stays.
        """
        asked = _timing(self.settings)
        measuring = {key: value for key, value in asked.items() if key != "target"}
        target: Target = asked["target"]
        points: dict[str, Cell] = {}
        for cell in sorted(filter(self.reports.__contains__, self.wanted), key=density):
            points.setdefault(cell.point, cell)
        if self.timed == asked and {record.name for record in self.records} == set(points):
            return
        with temporary_directory() as root:
            progress.start(len(points), "building what is timed")
            try:
                built = {}
                with computing_with(measuring["threads"]):  # layouts are chosen for the threads that are timed
                    for name, cell in points.items():
                        built[name] = _build(self.run_dir(cell), cell, Path(root), target, progress)
                        progress.advance(1, built=name)
            finally:
                progress.finish()
            self.records = endtoend.run(built, device=TARGETS[target].device, progress=progress, **measuring)
        self.timed = asked
        self.save()

    def save(self) -> None:
        """Write `sweep.json` as things are now."""
        replace_file(self.output / SWEEP_FILE, json_text(self.to_json()).encode())

    def to_json(self) -> dict[str, Any]:
        """Return everything that is known as plain JSON values."""
        return {
            **SWEEP_FORMAT,
            "settings": {**self.settings, **self.timed},
            "cells": [self._cell(cell) for cell in self.wanted],
            "latency": [record.to_json(samples=False) for record in self.records],
            "summary": summarize(self.reports, self.records),
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        report = self.reports.get(cell)
        status = "finished" if report is not None else "failed" if cell in self.failures else "missing"
        facts = {"method": cell.method, "sparsity": cell.sparsity, "seed": cell.seed, "status": status}
        if report is None:
            return {**facts, "error": self.failures.get(cell)}
        return {**facts, "run_dir": f"runs/{cell.name}", **{key: report.get(key) for key in KEPT}}


# --- trainings ------------------------------------------------------------------------------------


def train_apart(settings: TrainSettings, output: Path) -> dict[str, Any]:
    """Train in a fresh process and return the report; raise what training raises there, `ModelError` if it dies."""
    try:
        report: dict[str, Any] = called(train_or_resume, settings, output)
    except DiedError as error:
        raise ModelError(
            f"{output}: its training ended without a word (exit code {error}; -9 is what a machine "
            "out of memory does); lower --batch-size or --max-length, and run the same command again"
        ) from None
    return report


def _cells(
    settings: TrainSettings, methods: Sequence[Method], sparsities: Sequence[float], seeds: int
) -> dict[Cell, TrainSettings]:
    """Return the requested cells, seed by seed, each with its training: the first seed makes a whole picture."""
    refuse_below(1, seeds=seeds)
    refuse([f"--{name} is empty" for name, given in (("method", methods), ("sparsity", sparsities)) if not given])
    wanted = {}
    for seed in range(settings.seed, settings.seed + seeds):
        for method in methods:
            dense = Cell(method, 0.0, seed)
            for sparsity in sparsities if _trained_as(settings, dense).gated else (0.0,):
                cell = Cell(method, sparsity, seed)
                wanted[cell] = _trained_as(settings, cell)
    if len({cell.name for cell in wanted}) < len(wanted):
        raise UsageError("--sparsity names fractions too near to each other for a run each; round them")
    return wanted


def _trained_as(settings: TrainSettings, cell: Cell) -> TrainSettings:
    """Return the settings that a cell is trained with."""
    own: dict[str, Any] = {"method": cell.method, "sparsity": cell.sparsity, "seed": cell.seed}
    return replace(settings, **_meaningless(cell.method, settings), **own).absolute()


def _of_one_commit(settings: TrainSettings, finished: Iterable[RunManifest]) -> TrainSettings:
    """Return settings that name the commit of the hub which finished trainings had, or if there is none, today's.

    Whatever its owner puts on the hub meanwhile, the trainings of a sweep can be compared.
    """
    asked = settings.absolute()
    there = next((commit for run in finished if (commit := run.settings.commit)), None)
    return replace(settings, commit=there or commit_of(asked.model, located(asked)))


def _located(settings: TrainSettings) -> Path:
    """Return the directory of the dense model, also below a run; raises what `locate_model` raises."""
    return dense_base(settings, located)


def _meaningless(method: Method, settings: TrainSettings) -> dict[str, Any]:
    """Return unset values for what means nothing to a method: the methods of a sweep share one set of options."""
    spec = METHODS.get(method)
    unset: dict[str, Any] = {}
    if spec and not spec.gated:
        unset |= {
            "data": replace(settings.data, unlabelled_file=None),
            "distill": False,
            "hidden_weight": None,
            "open_epochs": None,
            "closing": None,
            "rotate_heads": None,
        }
    if spec and not spec.rank:
        unset |= {"lora_rank": None}
    if spec and not (spec.gated and spec.rank):
        unset |= {"lora_matrices": None}
    return unset


def _finished(directory: Path, wanted: TrainSettings) -> RunManifest | None:
    """Return the manifest of a finished run; `UsageError` if it was trained with other settings."""
    try:
        manifest = read_run(directory)
        if manifest.status == "finished":
            check_beside(directory, *manifest.sha256)
    except ArtifactError:
        return None  # not there, or broken: it is trained again
    there = _as_json(manifest.settings.to_json())
    unasked = {name: there[name] for name in LEFT_OPEN if getattr(wanted, name) is None}  # a run says what it chose
    unasked["match_shares"] = wanted.matches(manifest.task.metric)  # otherwise figures would not compare
    _refuse_other(directory, there, {**_as_json(wanted.to_json()), **unasked})
    return manifest if manifest.status == "finished" else None


def _refuse_changed(runs: dict[Path, RunManifest]) -> None:
    """Raise `ArtifactError` if rows or base have changed since runs finished: what is added must be comparable."""
    fingerprint = functools.cache(lambda data, embed: load_rows(data, embeds=embed).fingerprint)
    located_once = functools.cache(locate_model)
    weights = functools.cache(model_files)
    for directory, run in runs.items():
        where = located_once(run.settings.model, run.settings.revision, commit=run.settings.commit)
        base = weights(where, embeds=run.settings.embed)
        rows = fingerprint(run.settings.data, run.settings.embed)
        refuse_other(directory, run, replace(run, data_fingerprint=rows, base_sha256=base))


def train_or_resume(settings: TrainSettings, output: Path) -> dict[str, Any]:
    """Train a cell, from where it was stopped if it was; its settings have been compared before."""
    try:
        stopped = bool(read_run(output).resume)
    except ArtifactError as error:
        try:
            check_output(output, force=True)
        except OutputError:
            raise OutputError(f"{error}; remove {output}, and run the same command again") from None
        stopped = False
    return training.resume(output) if stopped else training.train(settings, output, force=True)


def _before(output: Path, settings: dict[str, Any], *, force: bool) -> dict[str, Any]:
    """Return what the sweep in `output` says about itself, or {} if there is none; refuse the place of another one."""
    if not output.is_dir():
        check_output(output, force=True)  # a file, or a link to nothing, is none that can be added to
        return {}
    try:
        found = read_manifest(output / SWEEP_FILE)
    except ArtifactError as error:
        raise OutputError(f"{output}: exists and holds no sweep ({error}); choose another with -o") from None
    if not force:
        _refuse_other(output, found.get("settings", {}), settings)
    return found


def _spelled_as_before(settings: TrainSettings, path: Path) -> TrainSettings:
    """Leave out the metric if the sweep at `path` was made without naming one, and by itself took the same."""
    try:
        before = read_manifest(path)
        with understood(path):
            named = before["settings"]["train"]["data"].get("metric")
            chosen = {cell["metric_name"] for cell in before["cells"] if cell["status"] == "finished"}
    except ArtifactError:  # there is none, or it is refused where all of it is read
        return settings
    same = named is None and chosen == {settings.data.metric}
    return replace(settings, data=replace(settings.data, metric=None)) if same else settings


def _finished_cells(before: dict[str, Any], path: Path) -> list[Cell]:
    """Return the cells that are finished according to the sweep manifest at `path`."""
    with understood(path):
        cells = [one for one in before.get("cells") or () if one["status"] == "finished" and one["method"] in METHODS]
        return [Cell(one["method"], float(one["sparsity"]), int(one["seed"])) for one in cells]


def _timing(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that measurements depend on."""
    return {key: settings.get(key) for key in TIMING}


def _timed(before: dict[str, Any]) -> tuple[dict[str, Any], list[Record]]:
    """Return what a sweep has measured, and with which settings; nothing if it has not."""
    try:
        records = [Record.from_json(value) for value in before.get("latency") or []]
    except (ArtifactError, TypeError, AttributeError):  # damaged, or of another release: timed anew
        records = []
    return (_timing(before.get("settings", {})) if records else {}), records


def _refuse_other(where: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise `UsageError` naming the first setting that differs.

    One that a release did not have yet has its default; if that leaves the choice to each run, the runs say it.
    """
    found, asked = dict(_flat(there)), dict(_flat(here))
    for key in [*asked, *found]:
        was = found.get(key, getattr(TrainSettings, key, None))
        if key in (*GRID, *TIMING) or (key not in found and was is None):
            continue
        if was != asked.get(key):
            made = f"without {spelled(key)}" if was is None else f"with {spelled(key)} {was}"
            now = "none" if asked.get(key) is None else asked[key]
            raise UsageError(
                f"{where}: was made {made}, asked is {now}; "
                "ask for the same, choose another -o, or start over with --force"
            )


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` as it will be read back."""
    read: dict[str, Any] = json.loads(json_text(value))
    return read


# --- latency --------------------------------------------------------------------------------------


def _build(run_dir: Path, cell: Cell, root: Path, target: Target, progress: Progress) -> Path:
    """Write what would be deployed of a run on `target`, and return where it is."""
    source = run_dir
    if cell.gated:
        source = root / f"{cell.name}-pruned"
        prune(run_dir, source, target=target, progress=progress)
    facts = TARGETS[target]
    if facts.runtime == "torch":
        return source
    directory = root / f"{cell.name}-onnx"
    export(source, directory, quantize="int8" if facts.int8 else None, measure=False)
    return directory
