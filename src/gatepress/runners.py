"""The two runtimes behind one interface: a transformers model in torch, a session of ONNX Runtime.

All return float32. An int8 ONNX file has int8 weights inside; a torch model may compute in half the width of float32.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from gatepress.collapse import parameters_of
from gatepress.embedding import embeds
from gatepress.errors import ModelError, reason_of
from gatepress.families import row_of
from gatepress.tasks.labels import in_order

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LOGITS, VECTORS, TOKENS = "logits", "sentence_embedding", "last_hidden_state"  # names of a graph's outputs
MAC_TERMS = ("token", "pair", "row")
COUNTED_TOKEN = 5  # an id that is in every vocabulary and is not padding

Kind = Literal["run", "pruned", "onnx", "model"]
Batch = Mapping[str, npt.NDArray[np.integer[Any]]]  # each [batch, length]
Logits = npt.NDArray[np.float32]  # [batch, labels]


def session_options() -> ort.SessionOptions:
    """Return the options for sessions of ONNX Runtime: as many threads as torch has, and no messages."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, and its warnings are not about anything the user did
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads go on spinning for a while after a run, on cores that whatever comes next needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


@dataclass(frozen=True)
class Runner(ABC):
    """A model that is ready to run, and what is known about the files behind it.

    `prepare`, `run` and `synchronize` are separate so that a benchmark times `run` alone.
    """

    name: str  # the directory's, the hub id, or demo
    kind: Kind  # the form in which it was found
    device: str  # cpu or cuda[:n]
    tokenizer_dir: Path | None  # None: it has no tokenizer
    size_bytes: int  # of the weight files that it needs
    manifest: dict[str, Any] | None = None  # from gatepress: task, data, max_length, ...; None for other models
    head_is_random: bool = False  # its timings are right, its answers mean nothing
    runtime: ClassVar[Literal["torch", "onnxruntime"]]

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The type its matrix products compute in: `float32`, `bfloat16`, `float16` or `int8`."""

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """The names of `INPUTS` that it takes."""

    @property
    @abstractmethod
    def label_names(self) -> tuple[str, ...] | None:
        """Names of its outputs, in order; None: they have no names of their own."""

    @property
    @abstractmethod
    def problem_type(self) -> str | None:
        """What its configuration says that it was trained for; None: nothing."""

    @property
    @abstractmethod
    def embeds(self) -> bool:
        """Whether its logits are vectors of texts, as an embedder gives them."""

    @property
    @abstractmethod
    def num_labels(self) -> int | None:
        """Width of the logits; None: not known before the first run."""

    @property
    @abstractmethod
    def max_tokens(self) -> int | None:
        """The most tokens of a text that it takes; None: not known."""

    @property
    @abstractmethod
    def parameters(self) -> int | None:
        """Number of all its parameters; None: not known (a bare .onnx file)."""

    @abstractmethod
    def macs(self, batch: int, length: int) -> int | None:
        """Return the multiply-accumulates of its matrix products on so many rows and tokens; None: not known."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Any:
        """Return the batch on the device: unknown inputs dropped, missing ones filled in."""

    @abstractmethod
    def run(self, prepared: Any) -> Any:
        """Compute the logits of a prepared batch, where they are, without waiting for them."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was started is done."""

    @abstractmethod
    def logits(self, batch: Batch) -> Logits:
        """Return the logits of a batch as float32."""


@dataclass(frozen=True)
class TorchRunner(Runner):
    """A transformers model in evaluation mode."""

    model: PreTrainedModel = field(kw_only=True)
    runtime = "torch"

    @property
    def dtype(self) -> str:
        """The type of the model's weights."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of `INPUTS` that the model's forward takes and uses."""
        return input_names(self.model)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Label names of the configuration."""
        return in_order(self.model.config.id2label or {}) or None

    @property
    def problem_type(self) -> str | None:
        """What the configuration says."""
        return getattr(self.model.config, "problem_type", None)

    @property
    def embeds(self) -> bool:
        """Whether the model is an embedder."""
        return embeds(self.model)

    @property
    def num_labels(self) -> int | None:
        """Width of the task head; None: it has none."""
        return None if self.embeds else self.model.config.num_labels

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a text that the positions allow."""
        return max_tokens(self.model.config.to_dict())

    @property
    def parameters(self) -> int | None:
        """Number of all parameters, shared ones counted once."""
        return parameters_of(self.model)

    @cached_property
    def mac_terms(self) -> dict[str, int] | None:
        """Multiply-accumulates for each `token`, `pair` of tokens in a row, and `row`, counted on short rows.

        What a call computes once for all its rows, as with positions, is left out. None if the count does not have that
        form, as with attention in windows.
        """
        self.model.requires_grad_(False)  # nothing is trained here; torch's counter asks parameters for their gradients
        counted = [self._counted(2, length) - self._counted(1, length) for length in range(2, 6)]
        slopes = np.diff(counted)
        pair = int(slopes[1] - slopes[0]) // 2
        token = int(slopes[0]) - 5 * pair  # 3 x 3 - 2 x 2
        terms = {"token": token, "pair": pair, "row": counted[0] - 2 * token - 4 * pair}
        return terms if all(_macs(terms, 1, length) == counted[length - 2] for length in range(2, 6)) else None

    def macs(self, batch: int, length: int) -> int | None:
        """Return the count from `mac_terms`."""
        return _macs(self.mac_terms, batch, length)

    def _counted(self, rows: int, length: int) -> int:
        """Return the multiply-accumulates of a call."""
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - torch counts those of GPUs alone
        with FlopCounterMode(display=False, custom_mapping={fused: _attention_flops}) as counter:
            self.run(self.prepare({"input_ids": np.full((rows, length), COUNTED_TOKEN)}))
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
class OnnxRunner(Runner):
    """A session of ONNX Runtime."""

    session: ort.InferenceSession = field(kw_only=True)
    config: dict[str, Any] | None = None  # config.json beside it
    runtime = "onnxruntime"

    @property
    def dtype(self) -> str:
        """The type that the manifest says; a file from elsewhere is taken for float32."""
        return str((self.manifest or {}).get("dtype") or "float32")

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the graph."""
        return tuple(one.name for one in self.session.get_inputs())

    @property
    def output_name(self) -> str:
        """The output that is read: the logits, or vectors of texts, or the first one if none has such a name."""
        names = [one.name for one in self.session.get_outputs()]
        return next((name for name in (LOGITS, VECTORS) if name in names), names[0])

    @property
    def embeds(self) -> bool:
        """Whether its output has the name that an embedder's has."""
        return self.output_name == VECTORS

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Label names of the configuration beside it."""
        return in_order((self.config or {}).get("id2label") or {}) or None

    @property
    def problem_type(self) -> str | None:
        """What the configuration beside it says."""
        return (self.config or {}).get("problem_type")

    @property
    def num_labels(self) -> int | None:
        """Last dimension of the output, if the graph states it."""
        shape = {one.name: one.shape for one in self.session.get_outputs()}[self.output_name]
        return shape[-1] if shape and isinstance(shape[-1], int) else None

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a text, by the configuration beside it."""
        return max_tokens(self.config) if self.config else None

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the model it was exported from."""
        count = (self.manifest or {}).get("total_params")
        return count if isinstance(count, int) else None

    def macs(self, batch: int, length: int) -> int | None:
        """Return the count for the model it was exported from."""
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
        """Return the logits [batch, labels]; on the GPU they stay there, in the returned binding."""
        try:
            if self.device == "cpu":
                return self.session.run([self.output_name], prepared)[0]
            self.session.run_with_iobinding(prepared)
        except Exception as error:  # ONNX Runtime's exceptions share no other base class
            raise ModelError(
                f"{self.name}: ONNX Runtime cannot run it ({reason_of(error)}); export it again"
            ) from error
        return prepared

    def synchronize(self) -> None:
        """Do nothing: ONNX Runtime returns from a run when its outputs are there."""

    def logits(self, batch: Batch) -> Logits:
        """Return the logits [batch, labels] as float32."""
        result = self.run(self.prepare(batch))
        values = np.asarray(result if self.device == "cpu" else result.copy_outputs_to_cpu()[0])
        rows = len(batch["input_ids"])
        if not np.issubdtype(values.dtype, np.floating) or values.ndim != 2 or len(values) != rows:  # noqa: PLR2004 - see the error
            raise ModelError(
                f"{self.name}: gives {values.dtype} of shape {list(values.shape)} for {rows} rows, "
                "expected logits [batch, labels]; export it again"
            )
        return values.astype(np.float32, copy=False)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the operations of attention, from shapes [batch, heads, length, width]: scores, and what they weigh."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of `INPUTS` that the model's forward takes and uses.

    Raises `ModelError` if it does not name `input_ids`, like a wrapper that passes everything on.
    """
    taken = inspect.signature(model.forward).parameters
    if INPUTS[0] not in taken:
        takes = ", ".join(taken) or "nothing"
        raise ModelError(
            f"{type(model).__name__}: its forward takes {takes}, expected {INPUTS[0]} among its parameters"
        )
    one_segment = (getattr(model.config, "type_vocab_size", None) or 1) < 2  # noqa: PLR2004 - RoBERTa: always 0
    return tuple(name for name in INPUTS if name in taken and not (name == "token_type_ids" and one_segment))


def max_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens of a text that the position table of a `config.json` has room for; None: not known."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    family = row_of(config.get("model_type"))
    return positions if family is None else positions - family.first_position(config.get("pad_token_id"))


def _macs(terms: Mapping[str, int] | None, batch: int, length: int) -> int | None:
    if terms is None:
        return None
    return batch * (length * terms["token"] + length * length * terms["pair"] + terms["row"])


def _fitted(batch: Batch, names: tuple[str, ...]) -> dict[str, npt.NDArray[np.int64]]:
    """Return the named inputs as contiguous int64 arrays: a missing mask is all ones, missing segments are 0."""
    ids = batch["input_ids"]
    missing = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {
        name: np.ascontiguousarray(batch[name] if name in batch else missing[name], dtype=np.int64) for name in names
    }
