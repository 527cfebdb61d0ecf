"""What makes a directory one of ours: its manifest, its version and fields, the files it names. No torch here."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from gatepress.config import DataSettings, TrainSettings
from gatepress.errors import ArtifactError, ModelError, UsageError
from gatepress.families import FAMILIES
from gatepress.files import ONNX_FILE, PROJECTION, PRUNED_FILE, RUN_FILE, expanded, read_json, sha256_of
from gatepress.hub import refuse_misspelt
from gatepress.schema import Schema, check_fields, every, schema_of

ONNX_MODEL = "model.onnx"
SWEEP_FILE = "sweep.json"
RUN_FORMAT = {"format": "gatepress-run", "version": 1}
PRUNED_FORMAT = {"format": "gatepress-pruned", "version": 1}
ONNX_FORMAT = {"format": "gatepress-onnx", "version": 1}
SWEEP_FORMAT = {"format": "gatepress-sweep", "version": 1}

Form = Literal["run", "pruned", "onnx"]

MANIFESTS: dict[Form, str] = {"run": RUN_FILE, "pruned": PRUNED_FILE, "onnx": ONNX_FILE}
FORMATS = {RUN_FILE: RUN_FORMAT, PRUNED_FILE: PRUNED_FORMAT, ONNX_FILE: ONNX_FORMAT, SWEEP_FILE: SWEEP_FORMAT}
REMEDIES: dict[Form, str] = {"run": "train again", "pruned": "prune again", "onnx": "export again"}
# the only files in folders that count
_OF_PROJECTION = re.compile(PROJECTION.pattern + r"/(config\.json|model\.safetensors)")
WEIGHTS = (".safetensors", ".onnx", ".data")  # read by others, who compare them themselves
HEADS = tuple(dict.fromkeys(family.heads_attribute for family in FAMILIES.values()))  # their names in a config.json
MAX_NAME = 255  # characters that a file system takes

# In this order: an ONNX directory has a config.json, and may lie in the directory of its source.
MARKS: tuple[tuple[str, Form], ...] = (*((name, form) for form, name in MANIFESTS.items()), (ONNX_MODEL, "onnx"))

_TEXTS, _COUNTS = {"*": "text"}, {"*": "int"}
_MATRIX = {"dense": ["size"], "live": ["int"], "kept": ["int"], **every("gathered scattered", "bool")}
_LAYER = {
    "heads": ["int"],
    **every("qk_width vo_width neurons", "int"),
    **every("macs_left time_left", "number"),
    "matrices": {"*": _MATRIX},
}
_REPORT = {
    **every("metric_name method granularity controller budget layout target", ("text",)),
    **every("metric_value metric_value_fp32 metric_drop removed_of_budget train_seconds asked_sparsity", ("number",)),
    **every("closed_fraction encoder_weights_removed encoder_macs_removed expected_time_left", ("number",)),
    "max_abs_logit_diff": ("number",),
    **every("examples closed_gates total_gates total_params dense_params tokens epochs probe_rows", ("int",)),
    **every("size_bytes size_bytes_fp32", ("int",)),
    "metrics_by_split": {"*": "number"},
    "class_offsets": ["number"],
    "curve": ([{"step": "int", **every("metric_value closed_fraction", ("number",))}],),
    "plan": {"layers": [_LAYER]},
}
_TASK = {
    **every("name metric label_column", "text"),
    **every("text_columns validation_splits", ["text"]),
    "label_names": (["text"],),
    **every("embeds multi_label", "bool"),
}
_FILE = every("file sha256", "text")
_SETTINGS = schema_of(TrainSettings)
# Shared by runs, pruned and ONNX directories: a key means the same wherever it appears.
_MANIFEST: dict[str, Schema] = {
    **_REPORT,
    **every("status source source_kind exporter dtype", "text"),
    **every("step seed opset", "int"),
    "versions": _TEXTS,
    **every("operators fused_operators", _COUNTS),
    **every("sha256 base_sha256", (_TEXTS,)),
    "data_fingerprint": ("text",),
    "max_length": ("int",),
    "settings": _SETTINGS,
    "data": (schema_of(DataSettings),),
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
    **every("max_position_embeddings pad_token_id", ("int",)),
    **every("num_hidden_layers n_layers", "size"),
    **dict.fromkeys(HEADS, "size"),
    "embedding": {
        **every("pooling default_prompt_name similarity_fn_name", "text"),
        "normalize": "bool",
        "max_seq_length": "int",
        "prompts": _TEXTS,
    },
    "sentence_transformers": {"activation_fn": "text"},
    "gatepress": {
        "version": "int",
        "linears": {"*": {**every("rows columns", "size"), **every("gathered scattered", "bool")}},
        "attentions": {
            "*": {
                **every("q k v", "text"),
                "o": ("text",),
                "heads": ["int"],
                "qk_width": "int",  # 0 if there are no queries
                "vo_width": "size",
                "group": "size",  # left out if it is 1
                "scale": "number",
                "uniform": "bool",
            }
        },
    },
}
# Never written into a configuration: these ask for memory, other files, or code from elsewhere.
_UNWANTED = (
    "num_labels",
    "transformers_weights",
    "quantization_config",
    "fusion_config",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
)


def form_of(path: Path) -> Form | None:
    """Return what gatepress wrote, judging by the files that are there or by the suffix .onnx; None: neither."""
    if path.suffix == ".onnx" and not path.is_dir():
        return "onnx"
    return next((form for name, form in MARKS if (path / name).is_file()), None)


def written_form(path: Path) -> Form:
    """Return what `form_of` returns; `ArtifactError` if that is nothing."""
    form = form_of(path)
    if form is None or not path.exists():
        got = "holds none of their manifests" if path.is_dir() else "is a file" if path.exists() else "is not there"
        raise ArtifactError(f"{path}: {got}, expected a run, a pruned or an ONNX directory, or an .onnx file")
    return form


def model_form(target: str) -> Form | None:
    """Return what `form_of` returns for the name of a model; None also if it is demo, or left to the hub.

    Raises `ModelError` if a directory holds no model, or a graph is not there, and what `files.expanded` raises.
    """
    if target == "demo":
        return None
    path = expanded(target)
    form = form_of(path)
    if form == "onnx" and not (file := onnx_parts(path)[1]).is_file():
        raise ModelError(f"{file}: no such file, expected an ONNX model; export one with gatepress export")
    if form is None and path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(
            f"{path}: holds no model; expected {RUN_FILE} (gatepress train), "
            f"{PRUNED_FILE} (gatepress prune), {ONNX_MODEL} (gatepress export), "
            "or config.json with *.safetensors (transformers)"
        )
    return form


def refuse_absent(*targets: str | None) -> None:
    """Raise what opening each of these models would, as far as its name and files show: torch need not be there yet."""
    for target in filter(None, targets):
        if model_form(target) is None:
            refuse_misspelt(target)


def refuse_onnx(source: str | Path) -> None:
    """Raise `UsageError` if what is to be exported is ONNX already."""
    if model_form(str(source)) == "onnx":
        raise UsageError(f"{source}: is ONNX already; give the directory that it was exported from")


def run_file(directory: Path) -> Path:
    """Return the manifest of a run directory; `ArtifactError` if it has none."""
    path = directory / RUN_FILE
    if not path.is_file():
        lacks = f"has no {RUN_FILE}" if directory.exists() else "is not there"
        raise ArtifactError(f"{directory}: {lacks}, expected a run directory written by `gatepress train`")
    return path


def onnx_parts(path: Path) -> tuple[Path, Path, Path | None]:
    """Return directory, graph and manifest of an ONNX directory or .onnx file; None: no manifest names the graph."""
    directory, file = (path, path / ONNX_MODEL) if path.is_dir() else (path.parent, path)
    named = directory / ONNX_FILE
    return directory, file, named if file.name == ONNX_MODEL and named.is_file() else None


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turn errors from a manifest that lacks a field, or has one of another kind, into one `ArtifactError`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(
            f"{path}: a field is missing or of a wrong kind ({error!r}); it was changed after it was written, make it "
            "again"
        ) from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest of the format and version that its file name stands for; `ArtifactError` on any other."""
    value, expected = read_json(path), FORMATS[path.name]
    if value.get("format") != expected["format"]:
        raise ArtifactError(f"{path}: format is {value.get('format')!r}, expected {expected['format']!r}")
    if value.get("version") != expected["version"]:
        raise ArtifactError(
            f"{path}: version {value.get('version')!r}, this gatepress reads {expected['version']}; upgrade gatepress"
        )
    check_fields(path, value, _MANIFEST)
    return value


def read_config(path: Path) -> dict[str, Any]:
    """Read a `config.json` that gatepress wrote; `ArtifactError` if a field is of a wrong kind or unwanted."""
    value = read_json(path)
    check_fields(path, value, _CONFIG)
    unwanted = [name for name in _UNWANTED if value.get(name) is not None]
    if unwanted:
        raise ArtifactError(
            f"{path}: has {', '.join(unwanted)}, which gatepress never writes; remove it, or prune again"
        )
    if not all(name.isdecimal() for name in value.get("id2label") or ()):
        raise ArtifactError(f"{path}: id2label has keys that are no numbers; prune or export again")
    return value


def hashes_of(manifest: Mapping[str, Any], path: Path, loaded: Sequence[str], remedy: str) -> dict[str, Any]:
    """Return file name -> sha256 of the manifest at `path`; `ArtifactError` if one that is `loaded` is missing."""
    hashes = manifest.get("sha256")
    named = hashes if isinstance(hashes, dict) else {}
    lost = [name for name in loaded if name not in named]
    if lost:
        raise ArtifactError(f"{path}: names no sha256 of {', '.join(lost)}; {remedy}")
    return named


def check_files(directory: Path, named: Iterable[tuple[Any, Any]], remedy: str) -> None:
    """Compare files with the (name, sha256) of a manifest; `ArtifactError` if one is missing or changed."""
    for name, digest in named:
        if isinstance(name, str) and _OF_PROJECTION.fullmatch(name):
            folder, _, part = name.partition("/")
            file = file_in(directory / folder, part, remedy)
        else:
            file = file_in(directory, name, remedy)
        if sha256_of(file) != digest:
            raise ArtifactError(f"{file}: content does not match its sha256, the file is corrupted; {remedy}")


def file_in(directory: Path, name: Any, remedy: str) -> Path:
    """Return the path of a file that a manifest names; `ArtifactError` if it is missing or lies elsewhere."""
    if not isinstance(name, str) or "\0" in name or Path(name).name != name:
        raise ArtifactError(f"{directory}: {name!r} is missing, only files in the directory count; {remedy}")
    if len(name) > MAX_NAME or not (directory / name).is_file():
        raise ArtifactError(f"{directory}: {name[:MAX_NAME]!r} is missing, the directory is incomplete; {remedy}")
    return directory / name


def check_beside(directory: Path, *names: str) -> None:
    """Compare what lies beside the weights with the manifest: `names`, or all of it, including the tokenizer.

    Manifests of earlier releases name less, and other directories have none: what is not named is not compared.
    Raises `ArtifactError` if a named file is missing or changed.
    """
    form = form_of(directory)
    if form is None or not directory.is_dir():
        return
    manifest = directory / MANIFESTS[form]
    if not manifest.is_file():  # a graph alone
        return
    named = read_manifest(manifest).get("sha256") or {}
    bound = {name: digest for name, digest in named.items() if not name.endswith(WEIGHTS) or name in names}
    check_files(directory, [(name, bound[name]) for name in names or bound if name in bound], REMEDIES[form])


def heads_of(config: Mapping[str, Any]) -> int:
    """Return the number of heads of a dense layer from a config.json; `ValueError` if it does not say."""
    told = [config[name] for name in HEADS if name in config]
    if not told:
        raise ValueError(f"none of {', '.join(HEADS)}")
    return int(told[0])


def kept_of(layer: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Return what a layer of a plan in a manifest keeps, beside what the dense one had; `heads` are the dense heads."""
    parts = layer["matrices"]
    width = parts["q"]["dense"][0] // heads
    if width < 1:
        raise ValueError(f"{heads} heads")
    return {
        "heads": len(layer["heads"]),
        "dense_heads": heads,
        "qk_width": layer["qk_width"],
        "vo_width": layer["vo_width"],
        "dense_head_width": width,
        "neurons": layer["neurons"],
        "dense_neurons": parts["down"]["dense"][1],
        "by_index": [role for role, part in parts.items() if part.get("gathered") or part.get("scattered")],
        "macs_left": layer["macs_left"],
    }


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape from the header of a safetensors file; no weights are read.

    Raises `ArtifactError` if the file is missing or broken, or its header claims more than it holds.
    """
    try:
        path.open("rb").close()  # safetensors says of every file that it cannot open that there is none
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not readable as safetensors ({error})") from None
    if not all(name.isprintable() for name in shapes):
        raise ArtifactError(f"{path}: names of tensors hold control characters; it is not written by gatepress")
    return shapes
