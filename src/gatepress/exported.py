"""An exported graph: what is known about it stands in the files beside it, whichever runtime computes it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gatepress.errors import ArtifactError, ModelError, reason_of
from gatepress.runners import LOGITS, VECTORS, Batch, Logits, Runner, macs_of, max_tokens
from gatepress.tasks.labels import in_order

MAC_TERMS = ("token", "pair", "row")

Opened = Callable[..., "ExportedRunner"]  # takes the fields that all of them have


@dataclass(frozen=True)
class ExportedRunner(Runner):
    """An ONNX graph, and what its manifest and the configuration beside it say."""

    config: dict[str, Any] | None = None  # config.json beside it
    stored: str = "float32"  # the type that it was exported in
    label: ClassVar[str]  # of the runtime, in errors

    @property
    @abstractmethod
    def outputs(self) -> dict[str, Sequence[Any]]:
        """The outputs of the graph and their shapes; a dimension that is not fixed is no int."""

    @property
    def dtype(self) -> str:
        """The type that it was exported in."""
        return self.stored

    @cached_property
    def output_name(self) -> str:
        """The output that is read: the logits, or vectors of texts, or the first one if none has such a name."""
        names = list(self.outputs)  # looked up once: every call that is timed reads the name
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
        shape = self.outputs[self.output_name]
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
        return macs_of(terms, batch, length) if known else None

    @abstractmethod
    def compute(self, prepared: Any) -> Any:
        """Do what `run` does; any exception is one of the runtime's own."""

    def run(self, prepared: Any) -> Any:
        """Return the logits [batch, labels]; on a GPU they stay there, in what is returned."""
        try:
            return self.compute(prepared)
        except Exception as error:  # exceptions of these runtimes share no other base class
            raise ModelError(f"{self.name}: {self.label} cannot run it ({_said(error)}); export it again") from error

    def fetched(self, result: Any) -> npt.NDArray[Any]:
        """Return what `run` gave as an array on the CPU."""
        return np.asarray(result)

    def logits(self, batch: Batch) -> Logits:
        """Return the logits [batch, labels] as float32."""
        values = self.fetched(self.run(self.prepare(batch)))
        rows = len(batch["input_ids"])
        if not np.issubdtype(values.dtype, np.floating) or values.ndim != 2 or len(values) != rows:  # noqa: PLR2004 - see the error
            raise ModelError(
                f"{self.name}: gives {values.dtype} of shape {list(values.shape)} for {rows} rows, "
                "expected logits [batch, labels]; export it again"
            )
        return values.astype(np.float32, copy=False)

    def synchronize(self) -> None:
        """Do nothing: these runtimes return from a run when its outputs are there."""


def _said(error: Exception) -> str:
    """Return what a runtime said, without the lines in which OpenVINO names its own source files."""
    said = [line for line in str(error).splitlines() if not line.startswith("Exception from ")]
    return reason_of(RuntimeError("\n".join(said)))


@contextmanager
def loading(label: str, file: Path) -> Iterator[None]:
    """Turn what a runtime says of a file that it cannot load into an `ArtifactError`."""
    try:
        yield
    except Exception as error:  # as above
        raise ArtifactError(f"{file}: {label} cannot load it ({_said(error)}); export it again") from error
