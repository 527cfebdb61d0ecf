"""What matrix products and index operations cost on a runtime, so that a plan can choose between them.

A closed row or column on the residual side can only be left out by picking inputs (gather) or
spreading outputs (scatter). Whether that is faster than multiplying by zeros depends on the runtime.
The answer comes from a table of measured times (latency.py) or, for a machine that is not here, from
one figure per runtime: how many multiply-accumulates take as long as moving one number. Both are a
list of `Entry`, fitted with the same few features.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from gatepress.config import Target
from gatepress.errors import ArtifactError
from gatepress.files import json_text, read_json, replace_file

FORMAT = {"format": "gatepress-latency", "version": 2}
MAX_SIZE = 1_000_000  # limit for a side of a matrix, or for tokens, in a table that is read
WORTH = 0.02  # fraction of a matrix that an index operation must save to be used

Op = Literal["product", "gather", "again", "scatter"]  # again: a gather from an input that another one reads


@dataclass(frozen=True)
class TargetFacts:
    """What is known about a runtime without measuring on the machine (benchmarks/notes/kernels.md)."""

    runtime: Literal["torch", "onnxruntime"]
    device: Literal["cpu", "cuda"]
    macs_per_moved: float  # linear multiply-accumulates in the time that an index operation moves one number
    multiple: int  # kernels are slower on widths that are not multiples of this
    equal_widths: bool  # fused attention needs query/key and value/output dimensions of the same width
    int8: bool = False  # weights and products are quantized
    picks_share: bool = True  # further gathers from one input cost less; in int8 they prevent sharing one quantization


TARGETS: dict[Target, TargetFacts] = {
    "ort-cpu": TargetFacts("onnxruntime", "cpu", macs_per_moved=45, multiple=1, equal_widths=False),
    "ort-int8": TargetFacts(
        "onnxruntime", "cpu", macs_per_moved=160, multiple=1, equal_widths=False, int8=True, picks_share=False
    ),
    "torch-cpu": TargetFacts("torch", "cpu", macs_per_moved=45, multiple=16, equal_widths=True),
    "cuda": TargetFacts("torch", "cuda", macs_per_moved=300, multiple=8, equal_widths=True),
}


@dataclass(frozen=True)
class Entry:
    """The time of one operation on `tokens` rows.

    `shape` is [out, in] of a product, [width, kept] of a gather (again or not), [kept, width] of a scatter.
    """

    op: Op
    tokens: int
    shape: tuple[int, int]
    ms: float


@dataclass(frozen=True)
class Costs:
    """Times on one runtime and where they come from; `milliseconds` predicts between the entries."""

    target: Target
    source: str  # "analytic", or the machine that was measured
    entries: tuple[Entry, ...]
    about: dict[str, Any] = field(default_factory=dict)  # threads, versions
    tokens: int | None = None  # of the calls that are planned for; None: all token counts of the table alike

    def __post_init__(self) -> None:
        """Fit at once, so that an operation without entries raises `ArtifactError`."""
        _ = self._fits

    @property
    def facts(self) -> TargetFacts:
        """What is known about the runtime itself."""
        return TARGETS[self.target]

    def milliseconds(self, op: Op, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Return the predicted time of one operation for each token count that is planned for, ascending."""
        times: npt.NDArray[np.float64] = self._fits[op] @ np.array(_features(op, shape))
        return times if self.tokens is None else np.array([np.interp(self.tokens, self._counts, times)])

    def matrix(
        self,
        dense: tuple[int, int],
        kept: tuple[int, int],
        *,
        gathered: Literal["gather", "again"] | None = None,
        scattered: bool = False,
    ) -> float:
        """Return the time of a matrix of `kept` [out, in] with its index operations, relative to the `dense` one.

        This is the mean of the ratio over the token counts that are planned for.
        """
        time = self.milliseconds("product", kept)
        if gathered:
            time = time + self.milliseconds(gathered, (dense[1], kept[1]))
        if scattered:
            time = time + self.milliseconds("scatter", (kept[0], dense[0]))
        return float(np.mean(time / self.milliseconds("product", dense)))

    @cached_property
    def _counts(self) -> list[int]:
        """Token counts of the table, ascending."""
        return sorted({entry.tokens for entry in self.entries})

    @cached_property
    def _fits(self) -> dict[Op, npt.NDArray[np.float64]]:
        """The coefficient of each feature in a time, [token counts, features] by operation."""
        return {op: np.stack([self._fitted(op, number) for number in self._counts]) for op in get_args(Op)}

    def _fitted(self, op: Op, tokens: int) -> npt.NDArray[np.float64]:
        chosen = [entry for entry in self.entries if (entry.op, entry.tokens) == (op, tokens)]
        if not chosen:
            raise ArtifactError(f"latency table: no {op} on {tokens} tokens; every operation needs every token count")
        # Relative errors count, so each equation is divided by its time; no time is negative.
        features = np.array([_features(op, entry.shape) for entry in chosen])
        times = np.array([entry.ms for entry in chosen])
        found: npt.NDArray[np.float64] = nnls(features / times[:, None], np.ones(len(chosen)))[0]
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        entries = [{**asdict(entry), "shape": list(entry.shape)} for entry in self.entries]
        return {**FORMAT, "target": self.target, "source": self.source, **self.about, "entries": entries}


@cache
def analytic(target: Target) -> Costs:
    """Return costs in units of multiply-accumulates, from `TARGETS` alone."""
    moved = TARGETS[target].macs_per_moved
    sides = (256, 1024, 4096)
    entries = [Entry("product", 1, (rows, columns), float(rows * columns)) for rows in sides for columns in sides]
    for a, b in itertools.product(sides, sides):
        entries += [Entry("gather", 1, (a, b), moved * (a + b)), Entry("scatter", 1, (a, b), moved * (a + b))]
        entries.append(Entry("again", 1, (a, b), moved * b))
    return Costs(target, "analytic", tuple(entries))


def read(path: Path) -> Costs:
    """Read a table written by `save`; `ArtifactError` if it is not one."""
    value = read_json(path)
    if value.get("format") != FORMAT["format"] or value.get("version") != FORMAT["version"]:
        raise ArtifactError(
            f"{path}: format is {value.get('format')!r} version {value.get('version')!r}, "
            f"expected {FORMAT['format']!r} version {FORMAT['version']}; "
            "measure one with gatepress bench --latency-table TARGET"
        )
    if value.get("target") not in list(TARGETS):  # it may have a type that has no hash
        raise ArtifactError(f"{path}: target is {value.get('target')!r}, expected one of {', '.join(TARGETS)}")
    about = {key: value[key] for key in value if key not in (*FORMAT, "target", "source", "entries")}
    try:
        entries = tuple(map(_entry, value["entries"]))
        return Costs(value["target"], str(value["source"]), entries, about)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: not a latency table ({error}); measure it again") from None


def save(costs: Costs, path: Path) -> None:
    """Write a table, whole or not at all."""
    replace_file(path, json_text(costs.to_json()).encode())


def _entry(value: dict[str, Any]) -> Entry:
    """Return one entry; `ValueError` naming what is wrong with it."""
    op, tokens, ms = value["op"], value["tokens"], value["ms"]
    rows, columns = value["shape"]
    if op not in get_args(Op):
        raise ValueError(f"op is {op!r}, expected one of {', '.join(get_args(Op))}")
    if not all(type(size) is int and 0 < size <= MAX_SIZE for size in (tokens, rows, columns)):
        raise ValueError(f"tokens {tokens!r} or shape {value['shape']!r} is no size")
    if not (isinstance(ms, int | float) and 0 < ms < float("inf")):
        raise ValueError(f"ms is {ms!r}, expected a positive number")
    return Entry(op, tokens, (rows, columns), float(ms))


def _features(op: Op, shape: tuple[int, int]) -> Sequence[float]:
    """Return the features that the time of an operation is linear in."""
    a, b = shape
    return (1.0, float(a), float(b), float(a * b)) if op == "product" else (1.0, float(a), float(b))


def rounded(width: int, most: int, *, multiple: int, copies: int = 1) -> int:
    """Return the least width from `width` to `most` at which `copies` together fill whole multiples."""
    return next((wider for wider in range(width, most + 1) if wider * copies % multiple == 0), width)
