"""Whether a directory still matches its manifest: files, shapes, the base model, logits. No network."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gatepress.checkpoint import PROBE_FILE, RunManifest, dense_base, load_run, read_probe, read_run
from gatepress.config import DEFAULT_RUNTIME, Runtime, refuse, refuse_runtime, unknown_words
from gatepress.errors import ArtifactError, GatepressError, unreadable
from gatepress.expected import EXPECTED_FILE, difference_from_expected
from gatepress.files import ONNX_FILE, PRUNED_FILE, RUN_FILE
from gatepress.graph import check_graph, describe, read_graph
from gatepress.manifests import (
    ONNX_MODEL,
    Form,
    check_files,
    hashes_of,
    onnx_parts,
    read_manifest,
    tensor_shapes,
    written_form,
)
from gatepress.models import TOKENIZER_FILES, open_tokenizer, refuse_unfit
from gatepress.ondisk import base_of, offline
from gatepress.runners import COUNTED_TOKEN, Runner
from gatepress.runtime import module_of, open_runner

TRIED = (2, 8)  # rows and tokens that a model is tried on
_TRIED = f"logits of {TRIED[0]} x {TRIED[1]} tokens: finite"


@dataclass
class Findings:
    """What was checked and holds, what does not, and what could not be checked here."""

    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    difference: float | None = None  # of logits from those when it was written

    def check(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` and note the outcome; return its result, or None if it found a fault."""
        try:
            result = function(*arguments)
        except GatepressError as error:
            self.faults.append(str(error))
            return None
        except OSError as error:
            self.faults.append(f"{what}: {unreadable(error.filename or 'a file', error)}")
            return None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.faults.append(f"{what}: a field is missing or of a wrong kind ({error!r})")
            return None
        self.checked.append(what)
        return result

    def to_json(self) -> dict[str, Any]:
        """Return all of it, and whether there is no fault."""
        return {
            "ok": not self.faults,
            "checked": self.checked,
            "faults": self.faults,
            "skipped": self.skipped,
            "max_abs_logit_diff": self.difference,
        }


def verify(path: str | Path, *, runtime: Runtime = DEFAULT_RUNTIME) -> dict[str, Any]:
    """Check a run, a pruned directory, an ONNX directory or an .onnx file; return the `Findings` as JSON values.

    A model is run only if its files hold, a graph in `runtime`. Raises `ArtifactError` if it is none of these,
    `UsageError` for a runtime that has nothing to compute, and `MissingExtraError` if that is not installed.
    """
    path = Path(path)
    form = written_form(path)
    refuse(unknown_words(runtime=(runtime, Runtime)))
    refuse_runtime(runtime, path, form)
    module_of(runtime)  # or an error
    found = Findings()
    _VERIFIERS[form](path, found, runtime)
    return found.to_json()


def _run(path: Path, found: Findings, _runtime: Runtime) -> None:
    manifest = found.check(f"{RUN_FILE}: format and version", read_manifest, path / RUN_FILE)
    if manifest is None:
        return
    bound = [one for one in manifest.values() if isinstance(one, dict) and {"file", "sha256"} <= set(one)]
    _files(path, {one["file"]: one["sha256"] for one in bound} | (manifest.get("sha256") or {}), "train again", found)
    found.check(f"{PROBE_FILE}: header", _probe, path)
    found.check("tokenizer", open_tokenizer, path)
    run = None if found.faults else found.check(f"{RUN_FILE}: fields", read_run, path)
    if run is None:
        return
    if not _has_base(run):
        found.skipped.append(f"base model {run.settings.model}, shapes and logits: it is not on this disk")
        return
    model = found.check("base model: sha256, and the shapes of all that was trained on it", _load_offline, path)
    if model is not None:
        found.check(f"logits of {PROBE_FILE}: finite", _finite_on_probe, model, path)


def _has_base(run: RunManifest) -> bool:
    """Return whether everything that a run is built on is on this disk; what is broken there is a fault of loading."""
    try:
        return dense_base(run.settings, base_of) is not None
    except ArtifactError:
        return True


def _load_offline(path: Path) -> Any:
    with offline():
        return load_run(path)[0]


def _probe(path: Path) -> None:
    if "input_ids" not in tensor_shapes(path / PROBE_FILE):
        raise ArtifactError(f"{path / PROBE_FILE}: holds no rows; train again")


@torch.inference_mode()
def _finite_on_probe(model: Any, path: Path) -> None:
    _finite(model(**read_probe(path, model)).logits.float().numpy(), path / PROBE_FILE)


def _pruned(path: Path, found: Findings, runtime: Runtime) -> None:
    manifest = found.check(f"{PRUNED_FILE}: format and version", read_manifest, path / PRUNED_FILE)
    if manifest is None:
        return
    loaded = ("config.json", "model.safetensors")
    hashes = found.check(
        f"{PRUNED_FILE}: names what is loaded",
        *(hashes_of, manifest, path / PRUNED_FILE, loaded, "prune again"),
    )
    _files(path, hashes or {}, "prune again", found)
    found.check("model.safetensors: header, and all shapes against config.json", refuse_unfit, path)
    found.check("tokenizer", open_tokenizer, path)
    _answers(path, manifest, "prune again", found, runtime)


def _onnx(path: Path, found: Findings, runtime: Runtime) -> None:
    directory, file, named = onnx_parts(path)
    manifest: dict[str, Any] | None = None
    if named:
        manifest = found.check(f"{ONNX_FILE}: format and version", read_manifest, named)
        if manifest is None:
            return
        hashes = found.check(
            f"{ONNX_FILE}: names what is loaded",
            *(hashes_of, manifest, named, (ONNX_MODEL,), "export again"),
        )
        _files(directory, hashes or {}, "export again", found)
        if hashes and not hashes.keys() & set(TOKENIZER_FILES):
            found.skipped.append("tokenizer: the model was exported without one")
        else:
            found.check("tokenizer", open_tokenizer, directory)
    else:
        found.skipped.append(f"sha256 of {file.name}: no {ONNX_FILE} names it")
    if not found.faults:
        found.check(f"{file.name}: graph, weights beside it, inputs and operator set", _graph, file, manifest)
    _answers(path, manifest, "export again", found, runtime)


def _graph(file: Path, manifest: dict[str, Any] | None) -> None:
    """Compare a graph with its manifest, if it has one; `ArtifactError` if they differ."""
    model = read_graph(file)
    beside = check_graph(model, file.parent)
    if manifest is None:
        return
    hashes_of(manifest, file.parent / ONNX_FILE, sorted(beside), "export again")
    graph = describe(model)
    got = {"inputs": [one["name"] for one in graph["inputs"]], "opset": graph["opset"]}
    for key, value in got.items():
        if manifest[key] != value:
            raise ArtifactError(f"{file}: {key} is {value}, its manifest says {manifest[key]}; export again")


def _answers(path: Path, manifest: dict[str, Any] | None, remedy: str, found: Findings, runtime: Runtime) -> None:
    """Run a model whose files hold: on two rows, and on those that it was asked when it was written."""
    runner = None if found.faults else found.check(_TRIED, _finite_on_tokens, path, runtime)
    if runner is None or manifest is None:
        return
    if EXPECTED_FILE in (manifest.get("sha256") or {}):
        what = f"logits of {EXPECTED_FILE}: as when it was written"
        directory = path if path.is_dir() else path.parent
        found.difference = found.check(what, difference_from_expected, runner, directory, remedy)
    else:
        found.skipped.append("logits as when it was written: releases before 0.44 kept none")


def _finite_on_tokens(path: Path, runtime: Runtime) -> Runner:
    runner = open_runner(path, runtime=runtime)
    _finite(runner.logits({"input_ids": np.full(TRIED, COUNTED_TOKEN)}), path)
    return runner


def _files(path: Path, hashes: dict[Any, Any], remedy: str, found: Findings) -> None:
    for name, digest in hashes.items():
        found.check(f"{name}: sha256", check_files, path, [(name, digest)], remedy)


def _finite(logits: Any, where: Path) -> None:
    if not np.isfinite(logits).all():
        raise ArtifactError(f"{where}: logits are not finite numbers; write the directory again")


_VERIFIERS: dict[Form, Callable[[Path, Findings, Runtime], None]] = {"run": _run, "pruned": _pruned, "onnx": _onnx}
