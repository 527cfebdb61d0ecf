"""What manifests say, in one shape for every kind of directory. JSON only: no weights, no torch."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from gatepress.bench.record import Record
from gatepress.bench.summary import Cell, absent
from gatepress.card import metric_after
from gatepress.commands import commands_of, revision_of, shown
from gatepress.errors import ArtifactError
from gatepress.files import RUN_FILE
from gatepress.manifests import (
    MANIFESTS,
    PRUNED_FORMAT,
    RUN_FORMAT,
    SWEEP_FILE,
    Form,
    form_of,
    heads_of,
    kept_of,
    read_config,
    read_manifest,
    understood,
)
from gatepress.schema import is_number

logger = logging.getLogger(__name__)

BYTES_A_PARAMETER = 4  # float32
SHORT = 12  # characters of a hash that people compare
# Numbers of an item -> their keys in the output of other commands.
COUNTED = {
    "asked": "asked_sparsity",
    "closed": "closed_fraction",
    "removed": "encoder_macs_removed",
    "params": "total_params",
    "dense_params": "dense_params",
}

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The metric and the gates at one step of a training."""

    step: float
    metric: float | None
    closed: float | None  # fraction of the gates


@dataclass(frozen=True)
class Kept:
    """What one layer keeps, each number beside that of the dense layer."""

    heads: tuple[int, int]
    qk_width: tuple[int, int]  # of a head
    vo_width: tuple[int, int]
    neurons: tuple[int, int]
    macs_left: float


@dataclass(frozen=True, kw_only=True)
class Item:
    """One model that the page is about; `None` is what its manifest does not say."""

    kind: str  # run, pruned, onnx, sweep
    name: str
    dtype: str = "float32"
    task: str | None = None
    metric_name: str | None = None
    metric: float | None = None
    spread: tuple[float, float] | None = None  # lowest and highest over seeds
    before: float | None = None  # the metric before, in the sense of `before_is`
    before_is: str = "gates open"
    asked: float | None = None  # sparsity
    closed: float | None = None  # fraction of the gates, counted
    removed: float | None = None  # of the encoder's multiply-accumulates
    params: float | None = None
    dense_params: float | None = None
    size_bytes: float | None = None  # of the files that hold it
    knee: bool = False
    absent: str = ""  # trainings of its sweep that failed or have not run
    timed: Record | None = None  # at the largest batch and length
    curve: tuple[Measured, ...] = ()
    layers: tuple[Kept, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Text that distinguishes it if a run and its later forms share a name."""
        words = [self.kind] if self.kind not in ("sweep", self.name) else []
        return " ".join([*words, self.name, *([self.dtype] if self.dtype != "float32" else [])])


@dataclass(frozen=True)
class Sheet:
    """Everything that one page is made of."""

    items: tuple[Item, ...]
    sweeps: tuple[tuple[Item, ...], ...]  # the items that are points of one picture
    records: tuple[tuple[Record, ...], ...]  # of each sweep and file, end to end


def read(directories: Iterable[Path], benches: Sequence[tuple[Path, Sequence[Record]]] = ()) -> Sheet:
    """Read every directory and attach what was timed.

    Raises `ArtifactError` on a directory of no known kind, and on a manifest or measurement that is not understood.
    Warns of measurements of which none is certainly of these models.
    """
    files = [_end_to_end(path, records) for path, records in benches]
    loose = [record for records in files for record in records]
    found = [(path, *_directory(path)) for path in directories]
    shared = Counter((item.kind, item.name) for _, items, _ in found for item in items)
    groups: list[tuple[Item, ...]] = []
    taken: set[str] = set()
    for path, items, records in found:
        timed = [
            _with_time(item, str(path), records or loose, alone=bool(records) or shared[item.kind, item.name] == 1)
            for item in items
        ]
        groups.append(tuple(_named_apart(item, taken) for item in timed))
    shown = [item.timed for group in groups for item in group]
    for (path, _), own in zip(benches, files, strict=True):
        if not any(record in own for record in shown):
            names = ", ".join(dict.fromkeys(record.name for record in own))
            logger.warning("%s: times no model of this page, but %s; the page shows it as it is", path, names)
    return Sheet(
        items=tuple(item for group in groups for item in group),
        sweeps=tuple(group for group in groups if group[0].kind == "sweep"),
        records=tuple(filter(None, [*(records for _, _, records in found), *files])),
    )


def number(value: Any) -> float | None:
    """Return a JSON value if it is a finite number, otherwise None."""
    return value if is_number(value) else None


def _directory(path: Path) -> tuple[tuple[Item, ...], tuple[Record, ...]]:
    """Return the models of one directory, and their timings."""
    if (path / SWEEP_FILE).is_file():
        with understood(path / SWEEP_FILE):
            return _of_sweep(read_manifest(path / SWEEP_FILE), path)
    form = form_of(path) if path.is_dir() else None
    if form is None:
        got = "holds no manifest" if path.is_dir() else "is a file" if path.exists() else "is not there"
        raise ArtifactError(f"{path}: {got}, expected a directory of gatepress train, prune, export or sweep")
    manifest = path / MANIFESTS[form]
    with understood(manifest):
        return (_READERS[form](read_manifest(manifest), path),), ()


def _with_time(item: Item, path: str, records: Sequence[Record], *, alone: bool) -> Item:
    """Return the item with its timing: a sweep names its points, a benchmark its directories.

    A benchmark names them by their last part, or by the whole path if two have the same. If several could be meant, of
    the records or of the items (this one is not `alone`), none is used.
    """
    own = [record for record in records if item.kind in ("sweep", record.kind)]
    meant = [record for record in own if record.name == path]
    if alone and not meant:
        meant = [record for record in own if Path(record.name).name == item.name]
    own = meant if len({record.name for record in meant}) == 1 else []
    return replace(item, timed=max(own, key=lambda one: (one.batch_size, one.seq_len or 0), default=None))


def _named_apart(item: Item, taken: set[str]) -> Item:
    """Return the item under a name that no other has."""
    names = (item.name if again == 1 else f"{item.name} ({again})" for again in count(1))
    found = next(one for one in (replace(item, name=name) for name in names) if one.label not in taken)
    taken.add(found.label)
    return found


def _end_to_end(path: Path, records: Sequence[Record]) -> tuple[Record, ...]:
    """Return the records of whole models; `ArtifactError` if there are none."""
    models = tuple(record for record in records if record.what == "endtoend")
    if not models:
        raise ArtifactError(
            f"{path}: times no models, expected what gatepress bench DIR... --output {path.name} writes"
        )
    return models


# --- each kind ------------------------------------------------------------------------------------


def _of_run(manifest: Manifest, path: Path) -> Item:
    report, settings, status = manifest["report"], manifest["settings"], manifest.get("status")
    unfinished = {} if status == "finished" else {"status": f"{status}, step {manifest.get('step')}"}
    return Item(
        kind="run",
        name=path.resolve().name,
        **_trained(manifest, report),
        metric=number(report.get("metric_value")),
        **_counted(report),
        size_bytes=_size(path, (manifest.get("tensors") or {}).get("file")),
        origin=_origin(manifest, settings["model"], revision_of(settings), settings["seed"]) | unfinished,
        commands=_commands(manifest, path),
    )


def _of_pruned(manifest: Manifest, path: Path) -> Item:
    report, base = manifest["report"], manifest["base"]
    return Item(
        kind="pruned",
        name=path.resolve().name,
        **_trained(manifest, (manifest.get("run") or {}).get("report") or {}),
        metric=number(metric_after(manifest)),
        **_counted(report),
        size_bytes=_size(path, "model.safetensors"),
        layers=_kept(report.get("plan") or {}, path),
        origin=_origin(manifest, base["model"], base["revision"], manifest["seed"]),
        commands=_commands(manifest, path),
    )


def _of_onnx(manifest: Manifest, path: Path) -> Item:
    source = manifest.get("source_manifest") or {}
    understand = _SOURCES.get(source.get("format"))
    known = understand(source, path) if understand else Item(kind="onnx", name="", task=_task(manifest)[0])
    own: dict[str, Any] = {
        "kind": "onnx",
        "name": path.resolve().name,
        "dtype": str(manifest.get("dtype")),
        "params": number(manifest.get("total_params")),
        "size_bytes": number(manifest.get("size_bytes")),
        "origin": {**known.origin, "versions": _versions(manifest)},
        "commands": _commands(manifest, path),
    }
    if manifest.get("quantize"):
        own |= {
            "metric": number(manifest.get("metric_value")),
            "before": number(manifest.get("metric_value_fp32")),
            "before_is": "float32",
            **_measured_by(manifest),
        }
    return replace(known, **own)


def _of_sweep(manifest: Manifest, path: Path) -> tuple[tuple[Item, ...], tuple[Record, ...]]:
    """Return one item for each point of the picture, in the order of the summary."""
    if not manifest["summary"]:
        raise ArtifactError(f"{path}: no training of this sweep is finished; go on with the same gatepress sweep")
    finished = [cell for cell in manifest["cells"] if cell["status"] == "finished"]
    lost = absent(manifest["cells"])
    return (
        tuple(replace(_point(row, finished, path), absent=lost) for row in manifest["summary"]),
        tuple(Record.from_json(value) for value in manifest["latency"]),
    )


def _point(row: dict[str, Any], finished: list[dict[str, Any]], path: Path) -> Item:
    """Return one point: medians from its row, curve and origin from the run of its first seed if that is there."""
    cells = [cell for cell in finished if all(cell[key] == row[key] for key in ("method", "sparsity"))]
    first = Cell(row["method"], row["sparsity"], cells[0]["seed"])
    run = path / "runs" / first.name
    known = Item(kind="sweep", name="")
    if (run / RUN_FILE).is_file():
        with understood(run / RUN_FILE):
            known = _of_run(read_manifest(run / RUN_FILE), run)
    least, most = number(row["metric_min"]), number(row["metric_max"])
    return replace(
        known,
        kind="sweep",
        name=first.point,
        task=str(row["task"]),
        metric_name=str(row["metric_name"]),
        metric=number(row["metric_median"]),
        spread=(least, most) if least is not None and most is not None and row["seeds"] > 1 else None,
        before=None,  # of one seed: a sweep is compared with its points without gates
        asked=number(row["sparsity"]),
        closed=number(cells[0].get("closed_fraction")),
        removed=number(row["encoder_macs_removed"]),
        params=number(row["total_params"]),
        knee=row["knee"] is True,
    )


_READERS: dict[Form, Callable[[Manifest, Path], Item]] = {"run": _of_run, "pruned": _of_pruned, "onnx": _of_onnx}
_SOURCES = {RUN_FORMAT["format"]: _of_run, PRUNED_FORMAT["format"]: _of_pruned}  # of exported models


# --- parts of a manifest --------------------------------------------------------------------------


def _trained(manifest: Manifest, report: dict[str, Any]) -> dict[str, Any]:
    """Return what training reports: the task, and the metric along the way."""
    curve = tuple(
        Measured(step, number(point.get("metric_value")), number(point.get("closed_fraction")))
        for point in report.get("curve") or ()
        if (step := number(point.get("step"))) is not None
    )
    opened = [point.metric for point in curve if point.closed == 0 and curve[-1].closed]
    task, metric = _task(manifest)
    return {"task": task, "metric_name": metric, "curve": curve, "before": opened[-1] if opened else None}


def _task(manifest: Manifest) -> tuple[str | None, str | None]:
    """Return the names of task and metric."""
    task = manifest.get("task") or {}
    name, metric = task.get("name"), task.get("metric")
    return str(name) if name else None, str(metric) if metric else None


def _measured_by(manifest: Manifest) -> dict[str, str | None]:
    """Return by which metric an int8 form was measured and, if other rows were named than its source's, on which."""
    asked, own = manifest.get("asked") or {}, manifest.get("data") or {}
    metric = str(manifest.get("metric_name") or "") or _task(manifest)[1]
    named = [str(asked[key]) for key in ("task", "validation_file") if asked.get(key)]
    if not named or str(Path(named[0]).absolute()) == own.get("validation_file"):
        return {"metric_name": metric}
    return {"metric_name": metric, "task": Path(named[0]).stem}


def _counted(report: dict[str, Any]) -> dict[str, Any]:
    return {name: number(report.get(key)) for name, key in COUNTED.items()}


def _size(path: Path, name: Any) -> int | None:
    file = path / Path(str(name)).name
    return file.stat().st_size if name and file.is_file() else None


def _kept(plan: dict[str, Any], path: Path) -> tuple[Kept, ...]:
    """Return what each layer keeps; empty if there is no configuration."""
    layers, config = plan.get("layers") or (), path / "config.json"
    if not layers or not config.is_file():
        return ()
    heads = heads_of(read_config(config))
    return tuple(
        Kept(
            heads=(one["heads"], one["dense_heads"]),
            qk_width=(one["qk_width"], one["dense_head_width"]),
            vo_width=(one["vo_width"], one["dense_head_width"]),
            neurons=(one["neurons"], one["dense_neurons"]),
            macs_left=float(one["macs_left"]),
        )
        for one in (kept_of(layer, heads) for layer in layers)
    )


def _origin(manifest: Manifest, model: str, revision: Any, seed: Any) -> dict[str, str]:
    """Return where a model comes from; a path of this machine is shown by its last part, a hash by its start."""
    hashes = manifest.get("base_sha256") or {}
    return {
        "base": shown(model) + (f" at {revision}" if revision else ""),
        "base sha256": ", ".join(f"{name} {str(digest)[:SHORT]}" for name, digest in hashes.items()),
        "data fingerprint": str(manifest.get("data_fingerprint") or "")[:SHORT],
        "seed": str(seed),
        "versions": _versions(manifest),
    }


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{package} {version}" for package, version in (manifest.get("versions") or {}).items())


def _commands(manifest: Manifest, path: Path) -> tuple[str, ...]:
    return tuple(commands_of(manifest, path.resolve().name, portable=True))
