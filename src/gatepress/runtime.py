"""One way to run every form of a model: a run, a pruned directory, ONNX, or a plain transformers model.

`open_runner` distinguishes the forms by their files and hides which runtime computes (runners.py), so
bench, evaluate and export need not ask.
"""

import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from gatepress import in_onnxruntime
from gatepress.checkpoint import load_run, located, read_run
from gatepress.config import DEFAULT_RUNTIME, Arithmetic, Runtime, refuse, unknown_words
from gatepress.embedding import (
    embedder_class,
    is_embedder,
    read_projections_,
    told_of_embedding_,
    weight_files,
)
from gatepress.errors import DeviceError, MissingExtraError, ModelError, UsageError
from gatepress.exported import ExportedRunner
from gatepress.files import PRUNED_FILE, RUN_FILE, expanded, read_json
from gatepress.graph import check_graph, computes_in, read_graph
from gatepress.hub import locate_model
from gatepress.manifests import (
    ONNX_MODEL,
    check_files,
    form_of,
    hashes_of,
    model_form,
    onnx_parts,
    read_config,
    read_manifest,
)
from gatepress.models import (
    AS_WRITTEN,
    has_tokenizer,
    load_pruned,
    model_errors,
    open_pruned,
    refuse_missing,
    told_of_use_,
)
from gatepress.runners import INPUTS, Kind, Runner, TorchRunner

logger = logging.getLogger(__name__)

DTYPES: dict[Arithmetic, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_runner(
    target: str | Path,
    *,
    device: str = "cpu",
    precision: Arithmetic = "fp32",
    runtime: Runtime = DEFAULT_RUNTIME,
    trust_remote_code: bool = False,
) -> Runner:
    """Open what `target` names: a directory of gatepress or transformers, an .onnx file, a hub id, or demo.

    `device` is auto, cpu or cuda[:n]. ONNX files are computed by `runtime`, with as many threads as torch has. Torch
    models compute in `precision`, with weights rounded to it, and OpenVINO does so with float32 files; otherwise an
    ONNX file computes in what it was exported in.
    Raises `ArtifactError` on a broken directory, `ModelError` on what is not a model, `DeviceError`,
    and what `hub.locate_model` raises.
    """
    refuse(unknown_words(precision=(precision, Arithmetic), runtime=(runtime, Runtime)))
    if not isinstance(target, str | os.PathLike):
        raise UsageError(f"the model is a {type(target).__name__}, expected the name of a directory, file or hub id")
    here = path = expanded(str(target))
    kind: Kind = model_form(str(target)) or "model"
    if kind == "onnx":
        return _open_onnx(path, runtime, device, precision)
    place, dtype = torch_device(device), DTYPES[precision]
    if kind == "model":
        path = locate_model(str(target), code=trust_remote_code)
        kind = form_of(path) or kind  # the hub may hold one of our forms
    name = _name(path) if path == here else str(target)
    manifest: dict[str, Any] | None = None
    head_is_random = False
    if kind == "run":
        model, run = load_run(path)
        manifest = run.to_json()
    elif kind == "pruned":
        model, manifest = load_pruned(path), read_json(path / PRUNED_FILE)
    else:
        kind = "model"  # whatever ONNX lies beside it
        model, head_is_random = _load_model(str(target), path, trust_remote_code=trust_remote_code)
    model = torch.nn.Module.to(model, torch.device(place), dtype)
    size = _bytes(_weights(path))
    return TorchRunner(name, kind, place, _tokenizer_dir(path), size, manifest, head_is_random, model=model)


def torch_device(name: str) -> str:
    """Return `cpu` or `cuda[:n]` for the value of `--device`; `DeviceError` if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError(f"--device is {name!r}, expected auto, cpu or cuda")
    if kind == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise DeviceError(
            "no CUDA device that torch can use on this machine; use --device cpu, or --for a target of CPUs"
        )
    if int(index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"no device {name}, this machine has {torch.cuda.device_count()}; use --device cuda")
    return name


def device_here(name: str) -> str:
    """Return the device that a run was trained on, or auto, with a note, if this machine has none of that name."""
    try:
        torch_device(name)
    except DeviceError:
        logger.warning("the run was trained on %s, which is not here: it goes on with what there is", name)
        return "auto"
    return name


def _weights(directory: Path) -> list[Path]:
    """Return the files that make a model: what a run trained, and what the model or run below it holds."""
    if not (directory / RUN_FILE).is_file():
        return weight_files(directory, projected=is_embedder(directory))
    manifest = read_run(directory)
    base = located(manifest.settings)
    return [directory / manifest.tensors["file"], *_weights(base)]


def _load_model(target: str, path: Path, *, trust_remote_code: bool) -> tuple[PreTrainedModel, bool]:
    """Return a model without a manifest, and whether its head was drawn at random.

    A random head is drawn from a fixed seed, so that two openings agree.
    """
    model_type = str(read_json(path / "config.json").get("model_type", ""))
    if model_type.startswith("gatepress_"):
        return open_pruned(path), False  # transformers saved it anew, after training it on for example
    embeds = is_embedder(path)
    kind: Any = embedder_class(model_type) if embeds else AutoModelForSequenceClassification
    with model_errors(target), torch.random.fork_rng(devices=[]):
        if embeds:
            config = kind.config_class.from_pretrained(path)
            told_of_embedding_(config, path)
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        torch.manual_seed(0)
        model, info = kind.from_pretrained(
            path,
            config=told_of_use_(config, path),
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **AS_WRITTEN,
        )
        read_projections_(model, path)
    refuse_missing(target, model, info["missing_keys"])
    if info["missing_keys"]:
        logger.info("%s has no task head: a random one stands in", target)
    return model.eval(), bool(info["missing_keys"])


def _open_onnx(path: Path, runtime: Runtime, device: str, precision: Arithmetic) -> ExportedRunner:
    directory, file, named = onnx_parts(path)
    graph = read_graph(file)
    manifest, beside = None, check_graph(graph, directory)
    if named:
        manifest = read_manifest(named)
        hashes = hashes_of(manifest, named, (ONNX_MODEL, *sorted(beside)), "export again")
        check_files(directory, hashes.items(), "export again")
    computing = module_of(runtime)
    place = "cpu" if device == "auto" and not computing.has_gpu() else torch_device(device)
    config = directory / "config.json"
    stored = str((manifest or {}).get("dtype") or computes_in(graph))
    given = precision if stored == "float32" else "fp32"  # int8 products stay what they are
    runner: ExportedRunner = computing.open_graph(file, place, given)(
        _name(path),
        "onnx",
        place,
        _tokenizer_dir(directory),
        _bytes([file, *(directory / name for name in beside)]),
        manifest,
        bool(manifest and manifest.get("head_is_random")),
        config=read_config(config) if config.is_file() else None,
        stored=stored,
    )
    unknown = [name for name in runner.input_names if name not in INPUTS]
    if unknown or not runner.input_names or not runner.outputs:
        raise ModelError(f"{file}: takes {', '.join(unknown) or 'no inputs'}, expected some of {', '.join(INPUTS)}")
    return runner


def module_of(runtime: Runtime) -> ModuleType:
    """Return the module of a runtime; `MissingExtraError` if it is not installed."""
    if runtime == "onnxruntime":
        return in_onnxruntime
    try:
        from gatepress import in_openvino  # noqa: PLC0415 - openvino is an extra, not always there
    except ImportError:
        raise MissingExtraError(
            "--runtime openvino needs OpenVINO; install it with: pip install 'gatepress[openvino]'"
        ) from None
    return in_openvino


def _tokenizer_dir(directory: Path) -> Path | None:
    return directory if has_tokenizer(directory) else None


def _name(path: Path) -> str:
    return path.resolve().name


def _bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)
