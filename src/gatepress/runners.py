"""What computes a model, behind one interface, and the torch side of it; ONNX graphs are in exported.py.

All return float32, also where they compute in half its width or in int8.
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
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from gatepress.collapse import parameters_of
from gatepress.config import Runtime
from gatepress.embedding import embeds
from gatepress.errors import ModelError, UsageError
from gatepress.families import row_of
from gatepress.tasks.labels import in_order

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LOGITS, VECTORS, TOKENS = "logits", "sentence_embedding", "last_hidden_state"  # names of a graph's outputs
COUNTED_TOKEN = 5  # an id that is in every vocabulary and is not padding

Kind = Literal["run", "pruned", "onnx", "model"]
Batch = Mapping[str, npt.NDArray[np.integer[Any]]]  # each [batch, length]
Logits = npt.NDArray[np.float32]  # [batch, labels]


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
    runtime: ClassVar[Literal["torch", Runtime]]

    @property
    @abstractmethod
    def takes_precision(self) -> bool:
        """Whether who opens it chooses what it computes in; otherwise its file says."""

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
    takes_precision = True

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
        return terms if all(macs_of(terms, 1, length) == counted[length - 2] for length in range(2, 6)) else None

    def macs(self, batch: int, length: int) -> int | None:
        """Return the count from `mac_terms`."""
        return macs_of(self.mac_terms, batch, length)

    def _counted(self, rows: int, length: int) -> int:
        """Return the multiply-accumulates of a call."""
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - torch counts those of GPUs alone
        with FlopCounterMode(display=False, custom_mapping={fused: _attention_flops}) as counter:
            self.run(self.prepare({"input_ids": np.full((rows, length), COUNTED_TOKEN)}))
        return int(counter.get_total_flops()) // 2

    def prepare(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the batch as int64 tensors on the device."""
        return {
            name: torch.from_numpy(values).to(self.device) for name, values in fitted(batch, self.input_names).items()
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


def macs_of(terms: Mapping[str, int] | None, batch: int, length: int) -> int | None:
    """Return the multiply-accumulates of a call by `TorchRunner.mac_terms`; None without terms."""
    if terms is None:
        return None
    return batch * (length * terms["token"] + length * length * terms["pair"] + terms["row"])


def fitted(batch: Batch, names: tuple[str, ...]) -> dict[str, npt.NDArray[np.int64]]:
    """Return the named inputs as contiguous int64 arrays: a missing mask is all ones, missing segments are 0."""
    if "input_ids" not in batch:
        raise UsageError(f"the batch holds {', '.join(batch) or 'nothing'}, expected input_ids")
    ids = batch["input_ids"]
    missing = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {
        name: np.ascontiguousarray(batch[name] if name in batch else missing[name], dtype=np.int64) for name in names
    }
