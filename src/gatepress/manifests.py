"""What makes a directory one of ours: its manifest, the version of that, the files it names. No torch here."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from gatepress.config import RUN_FILE
from gatepress.errors import ArtifactError
from gatepress.files import read_json, sha256_of

PRUNED_FILE = "gatepress_pruned.json"
ONNX_FILE = "gatepress_onnx.json"
ONNX_MODEL = "model.onnx"
SWEEP_FILE = "sweep.json"
RUN_FORMAT = {"format": "gatepress-run", "version": 1}
PRUNED_FORMAT = {"format": "gatepress-pruned", "version": 1}
ONNX_FORMAT = {"format": "gatepress-onnx", "version": 1}
SWEEP_FORMAT = {"format": "gatepress-sweep", "version": 1}

Form = Literal["run", "pruned", "onnx"]

# In this order: an ONNX directory has a config.json, and may lie in the directory of its source.
MARKS: tuple[tuple[str, Form], ...] = (
    (RUN_FILE, "run"),
    (PRUNED_FILE, "pruned"),
    (ONNX_FILE, "onnx"),
    (ONNX_MODEL, "onnx"),
)


def form_of(path: Path) -> Form | None:
    """Tell what gatepress wrote by the files that are there, or by the suffix .onnx; None: neither."""
    if path.suffix == ".onnx" and not path.is_dir():
        return "onnx"
    return next((form for name, form in MARKS if (path / name).is_file()), None)


def written_form(path: Path) -> Form:
    """Return what `form_of` tells; `ArtifactError` where that is nothing."""
    form = form_of(path)
    if form is None or not path.exists():
        got = "holds none of their manifests" if path.is_dir() else "is a file" if path.exists() else "is not there"
        raise ArtifactError(f"{path}: {got}, expected a run, a pruned or an ONNX directory, or an .onnx file")
    return form


def read_manifest(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Read a manifest of the `expected` format and version; `ArtifactError` on any other."""
    value = read_json(path)
    if value.get("format") != expected["format"]:
        raise ArtifactError(f"{path}: format is {value.get('format')!r}, expected {expected['format']!r}")
    if value.get("version") != expected["version"]:
        raise ArtifactError(
            f"{path}: version {value.get('version')!r}, this gatepress reads {expected['version']}; upgrade gatepress"
        )
    return value


def hashes_of(manifest: Mapping[str, Any], path: Path, loaded: Sequence[str], remedy: str) -> dict[str, Any]:
    """Return file name -> sha256 of the manifest at `path`; `ArtifactError` where one that is `loaded` is missing."""
    hashes = manifest.get("sha256")
    named = hashes if isinstance(hashes, dict) else {}
    lost = [name for name in loaded if name not in named]
    if lost:
        raise ArtifactError(f"{path}: names no sha256 of {', '.join(lost)}; {remedy}")
    return named


def check_files(directory: Path, named: Iterable[tuple[Any, Any]], remedy: str) -> None:
    """Compare files with the (name, sha256) of a manifest; `ArtifactError` where one is missing or changed."""
    for name, digest in named:
        if not isinstance(name, str) or Path(name).name != name:
            raise ArtifactError(f"{directory}: {name!r} is missing, only files in the directory count; {remedy}")
        if not (directory / name).is_file():
            raise ArtifactError(f"{directory}: {name!r} is missing, the directory is incomplete; {remedy}")
        if sha256_of(directory / name) != digest:
            raise ArtifactError(
                f"{directory / name}: content does not match its sha256, the file is corrupted; {remedy}"
            )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape from the header of a safetensors file; no weights are read.

    Raises `ArtifactError` where it is missing or broken, a header that claims more than the file holds included.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not readable as safetensors ({error})") from None
