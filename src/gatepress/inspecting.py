"""What a directory is, where it comes from and what each layer keeps, from manifests, headers and gate masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatepress.card import metric_after
from gatepress.commands import commands_of, revision_of
from gatepress.config import TrainSettings
from gatepress.files import PRUNED_FILE, RUN_FILE
from gatepress.graph import describe, names_beside, read_graph
from gatepress.manifests import (
    ONNX_FORMAT,
    PRUNED_FORMAT,
    Form,
    file_in,
    heads_of,
    kept_of,
    onnx_parts,
    read_config,
    read_manifest,
    tensor_shapes,
    understood,
    written_form,
)

Facts = dict[str, Any]

# Keys taken from a report unchanged; docs/json-contract.md says what each means.
METRIC = ("metric_name", "metric_value", "metrics_by_split", "examples")
INT8 = ("metric_value_fp32", "metric_drop", "size_bytes_fp32")
TRAINED = ("method", "granularity", "controller", "budget", "removed_of_budget", "train_seconds")
GATES = ("asked_sparsity", "closed_gates", "total_gates", "closed_fraction")
REMOVED = ("encoder_weights_removed", "encoder_macs_removed", "total_params", "dense_params")
PRUNED = ("layout", "target", "expected_time_left", "max_abs_logit_diff")
EXPORTED = ("source", "source_kind", "dtype", "max_abs_logit_diff", "total_params", "fused_operators")


def inspect(path: str | Path) -> Facts:
    """Describe a run, a pruned directory, an ONNX directory or an .onnx file; no model is loaded.

    The keys are those of docs/json-contract.md. Raises `ArtifactError` if it is none of these or is broken.
    """
    path = Path(path)
    form = written_form(path)
    with understood(path):
        return {"kind": form, "directory": str(path), **_READERS[form](path)}


def _run(path: Path) -> Facts:
    manifest = read_manifest(path / RUN_FILE)
    report = manifest["report"]
    return {
        "status": manifest["status"],
        "step": manifest["step"],
        "task": manifest["task"]["name"],
        **measured(manifest),
        **_some(report, TRAINED, GATES, REMOVED),
        **_weights(file_in(path, manifest["tensors"]["file"], "train again")),
        "provenance": provenance(manifest),
        "commands": commands_of(manifest, path.resolve().name),
        "layers": _layers_of_run(path, manifest),
        "curve": report.get("curve"),
    }


def _layers_of_run(path: Path, manifest: Facts) -> list[Facts] | None:
    if not TrainSettings.from_json(manifest["settings"]).gated:
        return None
    from gatepress.ondisk import plan_of_run  # noqa: PLC0415 - torch takes seconds to import, and only runs need it

    found = plan_of_run(path)
    return found and [kept_of(layer.to_json(), found[1]) for layer in found[0].layers]


def _pruned(path: Path) -> Facts:
    manifest = read_manifest(path / PRUNED_FILE)
    report, run = manifest["report"], manifest.get("run", {}).get("report", {})
    heads = heads_of(read_config(path / "config.json"))
    return {
        "task": manifest["task"]["name"],
        **measured(manifest),
        **_some(run, TRAINED),
        **_some(report, GATES, REMOVED, PRUNED),
        **_weights(file_in(path, "model.safetensors", "prune again")),
        "provenance": provenance(manifest),
        "commands": commands_of(manifest, path.resolve().name),
        "layers": [kept_of(layer, heads) for layer in report["plan"]["layers"]],
        "curve": run.get("curve"),
    }


def _onnx(path: Path) -> Facts:
    directory, file, named = onnx_parts(path)
    model = read_graph(file)
    graph = describe(model)
    beside = (directory / name for name in names_beside(model))
    size = sum(one.stat().st_size for one in (file, *beside) if one.is_file())
    facts: Facts = {"size_bytes": size, "graph": graph}
    if named is None:
        return facts
    manifest = read_manifest(named)
    before = manifest.get("source_manifest") or {}
    plan = before.get("report", {}).get("plan")
    heads = heads_of(read_config(directory / "config.json")) if plan else 0
    return {
        "task": (manifest.get("task") or {}).get("name"),
        **measured(manifest),
        **_some(manifest, EXPORTED),
        **facts,
        "provenance": provenance(before) | {"versions": manifest["versions"]},
        "commands": commands_of(manifest, directory.resolve().name),
        "layers": [kept_of(layer, heads) for layer in plan["layers"]] if plan else None,
    }


_READERS: dict[Form, Callable[[Path], Facts]] = {"run": _run, "pruned": _pruned, "onnx": _onnx}


def measured(manifest: Facts) -> Facts:
    """Return the metric that a manifest stands for: its own, or that of the form whose function it computes."""
    form = manifest.get("format")
    if form == ONNX_FORMAT["format"]:
        own = manifest["dtype"] != "float32"
        return _some(manifest, METRIC, INT8) if own else measured(manifest.get("source_manifest") or {})
    if form != PRUNED_FORMAT["format"]:
        return _some(manifest.get("report", {}), METRIC)
    if metric_after(manifest) is None:
        return {"metric_name": manifest["task"]["metric"], "metric_value": None}
    return _some(manifest["run"]["report"], METRIC)


def provenance(manifest: Facts) -> Facts:
    """Return what a run or pruned manifest says about its origin; null where it says nothing."""
    settings = manifest.get("settings") or manifest.get("run", {}).get("settings") or {}
    report = manifest.get("run", manifest).get("report", {})
    base = manifest.get("base") or settings
    return {
        "model": base.get("model"),
        "revision": revision_of(base),
        **{key: manifest.get(key) for key in ("base_sha256", "data_fingerprint", "versions")},
        "seed": manifest.get("seed", settings.get("seed")),
        "settings": _effective(settings, report) if settings else None,
    }


def _effective(value: Facts, report: Facts) -> Facts:
    """Return the settings of a training, with its own choices where nothing was asked."""
    settings = TrainSettings.from_json(value)
    return {
        **settings.to_json(),
        "learning_rate": settings.rate,
        "lora_rank": settings.rank or None,
        "budget": settings.unit if settings.gated else None,
        "sparsity": settings.sparsity if settings.gated else 0.0,
        "epochs": report.get("epochs", settings.epochs),
        "max_length": report.get("tokens", settings.max_length),
    }


def _some(report: Facts, *groups: tuple[str, ...]) -> Facts:
    return {key: report[key] for group in groups for key in group if key in report}


def _weights(file: Path) -> Facts:
    """Return what a safetensors file holds, according to its header."""
    return {"size_bytes": file.stat().st_size, "tensors": len(tensor_shapes(file))}
