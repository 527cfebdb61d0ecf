"""What makes a directory one of ours: its manifest, version and fields of that, the files it names. No torch here."""

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from gatepress.config import RUN_FILE, DataSettings, TrainSettings
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

_MANIFESTS: dict[Form, tuple[str, dict[str, Any]]] = {
    "run": (RUN_FILE, RUN_FORMAT),
    "pruned": (PRUNED_FILE, PRUNED_FORMAT),
    "onnx": (ONNX_FILE, ONNX_FORMAT),
}
REMEDIES: dict[Form, str] = {"run": "train again", "pruned": "prune again", "onnx": "export again"}
WEIGHTS = (".safetensors", ".onnx", ".data")  # read by others, who compare them themselves
MAX_NAME = 255  # characters that a file system takes
MAX_DEPTH = 32  # levels of a JSON value

# In this order: an ONNX directory has a config.json, and may lie in the directory of its source.
MARKS: tuple[tuple[str, Form], ...] = (
    (RUN_FILE, "run"),
    (PRUNED_FILE, "pruned"),
    (ONNX_FILE, "onnx"),
    (ONNX_MODEL, "onnx"),
)


# A schema is a leaf, a list of one schema, an object of schemas ("*": any other key), or (schema,), which may be null.
# A key may be missing, which whoever needs it finds; unknown keys are left alone.
Schema = Any

_LEAVES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: type(value) is int),
    "size": ("a whole number from 1 on", lambda value: type(value) is int and value > 0),
    "number": ("a number", lambda value: type(value) in (int, float)),
    "scalar": ("a text or a number", lambda value: value is None or isinstance(value, str | int | float)),
}
_HINTS = {str: "text", bool: "bool", int: "int", float: "number"}


def _all(names: str, schema: Schema) -> dict[str, Schema]:
    return dict.fromkeys(names.split(), schema)


def _schema_of(kind: type) -> dict[str, Schema]:
    """Return the schema of a settings class by its annotations."""
    return {name: _schema_of_hint(hint) for name, hint in typing.get_type_hints(kind).items()}


def _schema_of_hint(hint: Any) -> Schema:
    if dataclasses.is_dataclass(hint):
        return _schema_of(typing.cast("type", hint))
    inner = typing.get_args(hint)
    if type(None) in inner:
        return (_schema_of_hint(inner[0]),)
    return ["text"] if typing.get_origin(hint) is tuple else "text" if inner else _HINTS[hint]


_TEXTS, _COUNTS = {"*": "text"}, {"*": "int"}
_MATRIX = {"dense": ["size"], "live": ["int"], "kept": ["int"], **_all("gathered scattered", "bool")}
_LAYER = {
    "heads": ["int"],
    **_all("qk_width vo_width neurons", "int"),
    **_all("macs_left time_left", "number"),
    "matrices": {"*": _MATRIX},
}
_REPORT = {
    **_all("metric_name method granularity controller budget layout target", ("text",)),
    **_all("metric_value metric_value_fp32 metric_drop removed_of_budget train_seconds asked_sparsity", ("number",)),
    **_all("closed_fraction encoder_weights_removed encoder_macs_removed expected_time_left", ("number",)),
    "max_abs_logit_diff": ("number",),
    **_all("examples closed_gates total_gates total_params dense_params tokens epochs probe_rows", ("int",)),
    **_all("size_bytes size_bytes_fp32", ("int",)),
    "metrics_by_split": {"*": "number"},
    "curve": ([{"step": "int", **_all("metric_value closed_fraction", ("number",))}],),
    "plan": {"layers": [_LAYER]},
}
_TASK = {
    **_all("name metric label_column", "text"),
    **_all("text_columns validation_splits", ["text"]),
    "label_names": (["text"],),
}
_FILE = _all("file sha256", "text")
_SETTINGS = _schema_of(TrainSettings)
# Of runs, pruned and ONNX directories alike: what a key means does not hang on where it stands.
_MANIFEST: dict[str, Schema] = {
    **_REPORT,
    **_all("status source source_kind exporter dtype", "text"),
    **_all("step seed opset", "int"),
    "versions": _TEXTS,
    **_all("operators fused_operators", _COUNTS),
    **_all("sha256 base_sha256", (_TEXTS,)),
    "data_fingerprint": ("text",),
    "max_length": ("int",),
    "settings": _SETTINGS,
    "data": (_schema_of(DataSettings),),
    "task": (_TASK,),
    "report": _REPORT,
    "tensors": _FILE,
    "resume": {
        **_FILE,
        "learning_rates": ["number"],
        "gates_fixed": "bool",
        "train_seconds": "number",
        "peak_memory_bytes": "int",
    },
    "base": {"model": "text", "revision": ("text",)},
    "asked": {"*": "scalar"},
    "run": {"name": "text", "settings": _SETTINGS, "report": _REPORT},
    "inputs": ["text"],
    "macs": (_COUNTS,),
    "head_is_random": "bool",
}
_MANIFEST["source_manifest"] = (_MANIFEST,)
_CONFIG: dict[str, Schema] = {
    "model_type": "text",
    "architectures": (["text"],),
    "id2label": (_TEXTS,),
    "label2id": (_COUNTS,),
    **_all("max_position_embeddings pad_token_id", ("int",)),
    **_all("num_hidden_layers n_layers num_attention_heads n_heads", "size"),
    "gatepress": {
        "version": "int",
        "linears": {"*": {**_all("rows columns", "size"), **_all("gathered scattered", "bool")}},
        "attentions": {
            "*": {
                **_all("q k v", "text"),
                "o": ("text",),
                "heads": ["int"],
                **_all("qk_width vo_width", "size"),
                "scale": "number",
            }
        },
    },
}
# Never written into a configuration, and what they ask for is memory, other files, or code from elsewhere.
_UNWANTED = (
    "num_labels",
    "transformers_weights",
    "quantization_config",
    "fusion_config",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
)
_UNSOUND = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")  # control characters, halves of characters


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
    _check_fields(path, value, _MANIFEST)
    return value


def read_config(path: Path) -> dict[str, Any]:
    """Read a `config.json` that gatepress wrote; `ArtifactError` where a field is of a wrong kind or unwanted."""
    value = read_json(path)
    _check_fields(path, value, _CONFIG)
    unwanted = [name for name in _UNWANTED if value.get(name) is not None]
    if unwanted:
        raise ArtifactError(
            f"{path}: has {', '.join(unwanted)}, which gatepress never writes; remove it, or prune again"
        )
    if not all(name.isdecimal() for name in value.get("id2label") or ()):
        raise ArtifactError(f"{path}: id2label has keys that are no numbers; prune or export again")
    return value


def _check_fields(path: Path, value: dict[str, Any], schema: Schema) -> None:
    fault = next(_unsound(value), None) or next(_faults(value, schema, ""), None)
    if fault:
        raise ArtifactError(f"{path}: {fault}; it is damaged, or not written by gatepress")


def _unsound(value: Any, where: str = "it", depth: int = 0) -> Iterator[str]:
    """Yield what no field may hold: numbers that are not finite or beyond 64 bits, text that no terminal can show."""
    if depth > MAX_DEPTH:
        yield f"{where} is nested deeper than {MAX_DEPTH} levels"
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _unsound(key, f"a key of {where}")
            yield from _unsound(one, key, depth + 1)
    elif isinstance(value, list):
        for one in value:
            yield from _unsound(one, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, expected a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"{where} is a number beyond 64 bits"
    elif isinstance(value, str) and _UNSOUND.search(value):
        yield f"{where} holds a control character or half of a character"


def _faults(value: Any, schema: Schema, where: str) -> Iterator[str]:
    """Yield where a value is not what its schema says."""
    if isinstance(schema, tuple):
        if value is not None:
            yield from _faults(value, schema[0], where)
    elif isinstance(schema, str):
        name, fits = _LEAVES[schema]
        if not fits(value):
            yield f"{where} is {repr(value)[:80]}, expected {name}"
    elif not isinstance(value, type(schema)):
        yield f"{where} is {repr(value)[:80]}, expected {'an object' if isinstance(schema, dict) else 'a list'}"
    elif isinstance(schema, list):
        for one in value:
            yield from _faults(one, schema[0], where)
    else:
        for key, one in value.items():
            if (inner := schema.get(key, schema.get("*"))) is not None:
                yield from _faults(one, inner, f"{where}.{key}" if where else key)


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
        file = file_in(directory, name, remedy)
        if sha256_of(file) != digest:
            raise ArtifactError(f"{file}: content does not match its sha256, the file is corrupted; {remedy}")


def file_in(directory: Path, name: Any, remedy: str) -> Path:
    """Return the path of a file that a manifest names; `ArtifactError` where it is missing or lies elsewhere."""
    if not isinstance(name, str) or "\0" in name or Path(name).name != name:
        raise ArtifactError(f"{directory}: {name!r} is missing, only files in the directory count; {remedy}")
    if len(name) > MAX_NAME or not (directory / name).is_file():
        raise ArtifactError(f"{directory}: {name[:MAX_NAME]!r} is missing, the directory is incomplete; {remedy}")
    return directory / name


def check_beside(directory: Path, *names: str) -> None:
    """Compare with the manifest what lies beside the weights: `names`, or all of it, the tokenizer among it.

    Manifests of earlier releases name less, other directories have none: what is not named is not compared.
    Raises `ArtifactError` where a file that is named is missing or changed.
    """
    form = form_of(directory)
    if form is None or not directory.is_dir():
        return
    file, expected = _MANIFESTS[form]
    if not (directory / file).is_file():  # a graph alone
        return
    named = read_manifest(directory / file, expected).get("sha256") or {}
    bound = {name: digest for name, digest in named.items() if not name.endswith(WEIGHTS) or name in names}
    check_files(directory, [(name, bound[name]) for name in names or bound if name in bound], REMEDIES[form])


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape from the header of a safetensors file; no weights are read.

    Raises `ArtifactError` where it is missing or broken, a header that claims more than the file holds included.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not readable as safetensors ({error})") from None
    if not all(name.isprintable() for name in shapes):
        raise ArtifactError(f"{path}: names of tensors hold control characters; it is not written by gatepress")
    return shapes
