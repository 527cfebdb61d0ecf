"""One way to run every form of a model: a run, a pruned directory, ONNX, or a plain transformers model.

`open_runner` tells the forms apart by the files that are there and hides which runtime computes, so
that bench, evaluate and export ask no questions. All take and give float32; an int8 ONNX file has
int8 weights inside.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from gatepress.checkpoint import (
    has_tokenizer,
    load_pruned,
    load_run,
    model_errors,
    refuse_missing,
)
from gatepress.config import RUN_FILE
from gatepress.errors import ArtifactError, DeviceError, ModelError, UsageError
from gatepress.families import FAMILIES
from gatepress.files import read_json
from gatepress.graph import check_graph, read_graph
from gatepress.hub import locate_model
from gatepress.manifests import (
    ONNX_FILE,
    ONNX_FORMAT,
    ONNX_MODEL,
    PRUNED_FILE,
    check_files,
    form_of,
    hashes_of,
    read_config,
    read_manifest,
)

logger = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MAC_TERMS = ("token", "pair", "row")
COUNTED_TOKEN = 5  # any that is in every vocabulary and does not stand for padding

Kind = Literal["run", "pruned", "onnx", "model"]
Batch = Mapping[str, npt.NDArray[np.integer[Any]]]  # each [batch, length]
Logits = npt.NDArray[np.float32]  # [batch, labels]


class Runner(Protocol):
    """A model that is ready to run, whatever file it came from.

    `prepare`, `run` and `synchronize` are apart so that a benchmark times `run` alone.
    """

    @property
    def name(self) -> str:
        """What tables call it: the directory's name, the hub id, or demo."""

    @property
    def kind(self) -> Kind:
        """The form it was found in."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda[:n]`."""

    @property
    def runtime(self) -> Literal["torch", "onnxruntime"]:
        """What computes it."""

    @property
    def dtype(self) -> str:
        """What its matrix products compute in: `float32` or `int8`."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Those of `INPUTS` that it takes."""

    @property
    def tokenizer_dir(self) -> Path | None:
        """Where its tokenizer lies; None: it has none."""

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What its outputs are called, in order; None: they have no names of their own."""

    @property
    def num_labels(self) -> int | None:
        """Width of the logits; None: not known before the first run."""

    @property
    def max_tokens(self) -> int | None:
        """The longest text it takes; None: not known."""

    @property
    def parameters(self) -> int | None:
        """All its parameters; None: not known (a bare .onnx file)."""

    def macs(self, batch: int, length: int) -> int | None:
        """Multiply-accumulates of its matrix products on so many rows and tokens; None: not known."""

    @property
    def size_bytes(self) -> int:
        """Size of the weight files that it needs."""

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What gatepress wrote beside it: `task`, `data`, `max_length`, ...; None for other models."""

    @property
    def head_is_random(self) -> bool:
        """Whether the task head is fresh: its time is right, its answers mean nothing."""

    def prepare(self, batch: Batch) -> Any:
        """Return the batch on the device: unknown inputs dropped, missing ones filled in."""

    def run(self, prepared: Any) -> Any:
        """Compute the logits of a prepared batch, where they are, without waiting for them."""

    def synchronize(self) -> None:
        """Wait until everything that was started is done."""

    def logits(self, batch: Batch) -> Logits:
        """Return the logits of a batch as float32."""


@dataclass(frozen=True)
class _Facts:
    """What a runner knows about the files behind it."""

    name: str
    kind: Kind
    device: str
    tokenizer_dir: Path | None
    size_bytes: int
    manifest: dict[str, Any] | None = None
    head_is_random: bool = False


@dataclass(frozen=True)
class TorchRunner(_Facts):
    """A transformers model in evaluation mode."""

    model: PreTrainedModel = field(kw_only=True)
    runtime: Literal["torch"] = "torch"
    dtype: str = "float32"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Those of `INPUTS` that the model's forward takes and makes a difference of."""
        return input_names(self.model)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The configuration's label names."""
        return _label_names(self.model.config.id2label or {})

    @property
    def num_labels(self) -> int | None:
        """Width of the task head."""
        return self.model.config.num_labels

    @property
    def max_tokens(self) -> int | None:
        """The longest text that the positions allow."""
        return max_tokens(self.model.config.to_dict())

    @property
    def parameters(self) -> int | None:
        """All parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def mac_terms(self) -> dict[str, int] | None:
        """Multiply-accumulates for each `token`, `pair` of tokens in a row, and `row`, counted on short rows.

        None where the count is not of that form, as with attention in windows.
        """
        counted = [self._counted(length) for length in range(2, 6)]
        slopes = np.diff(counted)
        pair = int(slopes[1] - slopes[0]) // 2
        token = int(slopes[0]) - 5 * pair  # 3 x 3 - 2 x 2
        terms = {"token": token, "pair": pair, "row": counted[0] - 2 * token - 4 * pair}
        return terms if all(_macs(terms, 1, length) == counted[length - 2] for length in range(2, 6)) else None

    def macs(self, batch: int, length: int) -> int | None:
        """Return what `mac_terms` give."""
        return _macs(self.mac_terms, batch, length)

    def _counted(self, length: int) -> int:
        """Return the multiply-accumulates of one row; fused attention would go uncounted on a CPU."""
        with plain_attention(self.model), FlopCounterMode(display=False) as counter:
            self.run(self.prepare({"input_ids": np.full((1, length), COUNTED_TOKEN)}))
        return int(counter.get_total_flops()) // 2

    def prepare(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the batch as int64 tensors on the device."""
        return {
            name: torch.from_numpy(values).to(self.device) for name, values in _fitted(batch, self.input_names).items()
        }

    def run(self, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits [batch, labels] on the device."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(**prepared).logits
            return logits

    def synchronize(self) -> None:
        """Wait for the GPU; the CPU never runs ahead."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def logits(self, batch: Batch) -> Logits:
        """Return the logits [batch, labels] as float32."""
        values: Logits = self.run(self.prepare(batch)).float().cpu().numpy()
        return values


@dataclass(frozen=True)
class OnnxRunner(_Facts):
    """A session of ONNX Runtime."""

    session: ort.InferenceSession = field(kw_only=True)
    config: dict[str, Any] | None = None  # config.json beside it
    runtime: Literal["onnxruntime"] = "onnxruntime"

    @property
    def dtype(self) -> str:
        """What the manifest says; a file from elsewhere is taken for float32."""
        return str((self.manifest or {}).get("dtype") or "float32")

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the graph."""
        return tuple(one.name for one in self.session.get_inputs())

    @property
    def output_name(self) -> str:
        """The output that is read: the logits, or the first one where none is called so."""
        names = [one.name for one in self.session.get_outputs()]
        return "logits" if "logits" in names else names[0]

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The label names of the configuration beside it."""
        return _label_names((self.config or {}).get("id2label") or {})

    @property
    def num_labels(self) -> int | None:
        """Last dimension of the output, where the graph states it."""
        shape = {one.name: one.shape for one in self.session.get_outputs()}[self.output_name]
        return shape[-1] if shape and isinstance(shape[-1], int) else None

    @property
    def max_tokens(self) -> int | None:
        """The longest text, by the configuration beside it."""
        return max_tokens(self.config) if self.config else None

    @property
    def parameters(self) -> int | None:
        """Parameters of the model it was exported from."""
        count = (self.manifest or {}).get("total_params")
        return count if isinstance(count, int) else None

    def macs(self, batch: int, length: int) -> int | None:
        """Return those of the model it was exported from."""
        terms = (self.manifest or {}).get("macs")
        known = isinstance(terms, dict) and all(type(terms.get(name)) is int for name in MAC_TERMS)
        return _macs(terms, batch, length) if known else None

    def prepare(self, batch: Batch) -> Any:
        """Return the feed on the CPU, or inputs and output bound on the GPU."""
        types = {one.name: np.int32 if one.type == "tensor(int32)" else np.int64 for one in self.session.get_inputs()}
        feed = {name: values.astype(types[name]) for name, values in _fitted(batch, self.input_names).items()}
        if self.device == "cpu":
            return feed
        kind, _, index = self.device.partition(":")
        binding = self.session.io_binding()
        for name, values in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values, kind, int(index or 0)))
        binding.bind_output(self.output_name, kind, int(index or 0))
        return binding

    def run(self, prepared: Any) -> Any:
        """Return the logits [batch, labels]; on the GPU they stay there, in the binding that is returned."""
        try:
            if self.device == "cpu":
                return self.session.run([self.output_name], prepared)[0]
            self.session.run_with_iobinding(prepared)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{self.name}: ONNX Runtime cannot run it ({reason}); export it again") from error
        return prepared

    def synchronize(self) -> None:
        """Nothing to do: ONNX Runtime returns from a run when its outputs are there."""

    def logits(self, batch: Batch) -> Logits:
        """Return the logits [batch, labels] as float32."""
        result = self.run(self.prepare(batch))
        values = np.asarray(result if self.device == "cpu" else result.copy_outputs_to_cpu()[0])
        if not np.issubdtype(values.dtype, np.floating) or values.ndim != 2 or len(values) != len(batch["input_ids"]):  # noqa: PLR2004
            raise ModelError(
                f"{self.name}: gives {values.dtype} of shape {list(values.shape)} for {len(batch['input_ids'])} rows, "
                "expected logits [batch, labels]; export it again"
            )
        return values.astype(np.float32, copy=False)


def open_runner(
    target: str | Path, *, device: str = "cpu", threads: int | None = None, trust_remote_code: bool = False
) -> Runner:
    """Open what `target` names: a directory of gatepress or transformers, an .onnx file, a hub id, or demo.

    `device` is auto, cpu or cuda[:n]. `threads` sets torch's number for the whole process, and that of
    an ONNX session; None leaves torch's number, which an ONNX session then takes too.
    Raises `ArtifactError` on a broken directory, `ModelError` on what is no model, `DeviceError`,
    and what `hub.locate_model` raises.
    """
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads is {threads}, expected 1 or more")
        torch.set_num_threads(threads)
    path = Path(target).expanduser()
    kind = _kind_of(str(target), path)
    if kind == "onnx":
        return _open_onnx(path, device)
    place = torch_device(device)
    if kind == "run":
        return _open_run(path, place)
    if kind == "pruned":
        return _open_pruned(path, place)
    return _open_model(str(target), place, trust_remote_code=trust_remote_code)


def torch_device(name: str) -> str:
    """Return `cpu` or `cuda[:n]` for what `--device` said; `DeviceError` where it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError(f"--device is {name!r}, expected auto, cpu or cuda")
    if kind == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise DeviceError("no CUDA device that torch can use on this machine; use --device cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"no device {name}, this machine has {torch.cuda.device_count()}; use --device cuda")
    return name


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return those of `INPUTS` that the model's forward takes and makes a difference of."""
    taken = inspect.signature(model.forward).parameters
    one_segment = (getattr(model.config, "type_vocab_size", None) or 1) < 2  # noqa: PLR2004 - RoBERTa: always 0
    return tuple(name for name in INPUTS if name in taken and not (name == "token_type_ids" and one_segment))


def max_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the longest text that the position table of a `config.json` has room for; None: not known."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    family = FAMILIES.get(str(config.get("model_type", "")).removeprefix("gatepress_").replace("_", "-"))
    if family is None or not family.positions_follow_padding:
        return positions
    return positions - int(config.get("pad_token_id") or 0) - 1


@contextlib.contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute attention as two products and a softmax for as long as the block runs."""
    before = model.config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    try:
        model.set_attn_implementation("eager")
    except (ValueError, NotImplementedError, AttributeError):
        logger.debug("%s keeps its own attention", type(model).__name__)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:  # noqa: SLF001
            model.set_attn_implementation(before)


def _macs(terms: Mapping[str, int] | None, batch: int, length: int) -> int | None:
    if terms is None:
        return None
    return batch * (length * terms["token"] + length * length * terms["pair"] + terms["row"])


def _kind_of(target: str, path: Path) -> Kind:
    """Tell the forms apart by their files; what is not on this disk is left to the hub."""
    form = form_of(path)
    if form and target != "demo":
        return form
    if target == "demo" or not path.is_dir():
        return "model"
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path}: holds no model; expected {RUN_FILE} (gatepress train), "
            f"{PRUNED_FILE} (gatepress prune), {ONNX_MODEL} (gatepress export), "
            "or config.json with *.safetensors (transformers)"
        )
    if str(read_json(path / "config.json").get("model_type", "")).startswith("gatepress_"):
        return "pruned"  # its manifest is missing, which its loader explains
    return "model"


def _open_run(path: Path, device: str) -> TorchRunner:
    model, manifest = load_run(path, device)
    base = locate_model(manifest.settings.model, manifest.settings.revision)
    weights = [path / manifest.tensors["file"], *base.glob("*.safetensors")]
    return TorchRunner(
        _name(path), "run", device, _tokenizer_dir(path), _bytes(weights), manifest.to_json(), model=model
    )


def _open_pruned(path: Path, device: str) -> TorchRunner:
    model = load_pruned(path)
    manifest = read_json(path / PRUNED_FILE)
    size = _bytes(list(path.glob("*.safetensors")))
    return TorchRunner(_name(path), "pruned", device, _tokenizer_dir(path), size, manifest, model=_moved(model, device))


def _open_model(target: str, device: str, *, trust_remote_code: bool) -> TorchRunner:
    path = locate_model(target)
    # A fresh head is drawn from a fixed seed, so that two openings of one encoder agree.
    with model_errors(target), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    refuse_missing(target, model, info["missing_keys"])
    random = bool(info["missing_keys"])
    if random:
        logger.info("%s has no task head: a random one stands in", target)
    name = target if target == "demo" or not Path(target).exists() else _name(Path(target))
    size = _bytes(list(path.glob("*.safetensors")))
    return TorchRunner(
        name,
        "model",
        device,
        _tokenizer_dir(path),
        size,
        head_is_random=random,
        model=_moved(model.eval(), device),
    )


def _moved(model: PreTrainedModel, device: str) -> PreTrainedModel:
    moved: PreTrainedModel = torch.nn.Module.to(model, torch.device(device))
    return moved


def _open_onnx(path: Path, device: str) -> OnnxRunner:
    directory, file = (path, path / ONNX_MODEL) if path.is_dir() else (path.parent, path)
    if not file.is_file():
        raise ModelError(f"{file}: no such file, expected an ONNX model; export one with gatepress export")
    manifest, beside = None, check_graph(read_graph(file), directory)
    if (directory / ONNX_FILE).is_file() and file.name == ONNX_MODEL:
        manifest = read_manifest(directory / ONNX_FILE, ONNX_FORMAT)
        hashes = hashes_of(manifest, directory / ONNX_FILE, (ONNX_MODEL, *sorted(beside)), "export again")
        check_files(directory, hashes.items(), "export again")
    session, place = _session(file, device)
    unknown = [one.name for one in session.get_inputs() if one.name not in INPUTS]
    if unknown or not session.get_inputs() or not session.get_outputs():
        raise ModelError(f"{file}: takes {', '.join(unknown) or 'no inputs'}, expected some of {', '.join(INPUTS)}")
    config = directory / "config.json"
    return OnnxRunner(
        _name(path),
        "onnx",
        place,
        _tokenizer_dir(directory),
        _bytes([file, *directory.glob(f"{file.name}.data")]),
        manifest,
        bool(manifest and manifest.get("head_is_random")),
        session=session,
        config=read_config(config) if config.is_file() else None,
    )


def _session(file: Path, device: str) -> tuple[ort.InferenceSession, str]:
    """Return a session and the device it computes on."""
    cuda = "CUDAExecutionProvider"
    has_cuda = cuda in ort.get_available_providers() and torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    device = torch_device(device)
    if device != "cpu" and not has_cuda:
        raise DeviceError(
            "this onnxruntime has no CUDA provider; pip install onnxruntime-gpu instead, or use --device cpu"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors are raised; what it warns of is not the user's doing
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads go on spinning for a while after a run, on cores that whoever comes next needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    index = int(device.partition(":")[2] or 0)
    providers: Sequence[Any] = ["CPUExecutionProvider"] if device == "cpu" else [(cuda, {"device_id": index})]
    try:
        session = ort.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:  # its exceptions share no base class but this one
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{file}: ONNX Runtime cannot load it ({reason}); export it again") from error
    if device != "cpu" and cuda not in session.get_providers():  # it falls back to the CPU without a word
        raise DeviceError("onnxruntime could not start its CUDA provider; use --device cpu")
    return session, device


def _fitted(batch: Batch, names: tuple[str, ...]) -> dict[str, npt.NDArray[np.int64]]:
    """Return the named inputs as contiguous int64 arrays: a missing mask is all ones, missing segments 0."""
    ids = batch["input_ids"]
    missing = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {
        name: np.ascontiguousarray(batch[name] if name in batch else missing[name], dtype=np.int64) for name in names
    }


def _label_names(id2label: Mapping[Any, Any]) -> tuple[str, ...] | None:
    """Return the names in the order of their ids; None where they are only numbered (LABEL_0, ...)."""
    names = tuple(str(id2label[key]) for key in sorted(id2label, key=int))
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def _tokenizer_dir(directory: Path) -> Path | None:
    return directory if has_tokenizer(directory) else None


def _name(path: Path) -> str:
    return path.resolve().name


def _bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)
