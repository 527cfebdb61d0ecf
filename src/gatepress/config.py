"""Settings of each stage: frozen, checked, written into manifests as they are. No torch here.

A field's comment is what `--help` says of its option; a wrong value raises one `UsageError` that
lists every problem in the command line's spelling.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from gatepress.errors import ArtifactError, UsageError

Granularity = Literal["structured", "matrix", "heads"]
Controller = Literal["importance", "penalty"]
Layout = Literal["auto", "inner", "index", "paper", "stock"]
Target = Literal["ort-cpu", "ort-int8", "torch-cpu", "cuda"]
Precision = Literal["fp32", "bf16"]

DEFAULT_TARGET: Target = "ort-cpu"  # the runtime that most people deploy on


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from: a named task (hub or directory), or the user's own files."""

    task: str | None = None  # a GLUE task name, "demo", or None with own files
    data_dir: str | None = None  # directory with <task>/train.tsv and <task>/validation.tsv
    train_file: str | None = None  # csv, tsv, jsonl or parquet
    validation_file: str | None = None
    text_column: str | None = None  # None: guessed from usual names, an error names the choices
    text_pair_column: str | None = None  # None: one text a row
    label_column: str | None = None
    max_train_samples: int | None = None  # the first n rows, as in the paper
    max_validation_samples: int | None = None

    def __post_init__(self) -> None:
        """Collect what is wrong and raise it once."""
        problems = []
        for name in ("max_train_samples", "max_validation_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
        if self.task is not None and (self.train_file or self.validation_file):
            problems.append("--task and --train-file/--validation-file exclude each other; give one of them")
        if self.task is None and not (self.train_file or self.validation_file):
            problems.append("no data: give --task NAME, or --train-file and --validation-file")
        _refuse(problems)


@dataclass(frozen=True)
class TrainSettings:
    """One training run, from an open model to fixed gates."""

    data: DataSettings
    model: str = "FacebookAI/roberta-base"  # hub id, local directory, or "demo"
    revision: str | None = None  # branch, tag or commit on the hub
    sparsity: float = 0.3  # fraction of the gates to close, in [0, 1)
    granularity: Granularity = "structured"
    controller: Controller = "importance"
    lora_rank: int = 8  # 0: no low-rank update inside the gates
    train_biases: bool = True
    train_layer_norms: bool = True
    epochs: int | None = None  # None: enough for about 1,500 steps, 3 at least, 20 at most
    batch_size: int = 32
    max_length: int = 128  # tokens
    learning_rate: float = 3e-4  # biases, layer norms, low rank, head
    gate_learning_rate: float = 3e-3
    penalty_weight: float = 50.0  # lambda of eq. (9), penalty controller only
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Collect what is wrong and raise it once."""
        problems = []
        if not 0 <= self.sparsity < 1:
            problems.append(f"--sparsity is {self.sparsity}, expected a fraction of at least 0 and below 1")
        if self.lora_rank < 0:
            problems.append(f"--lora-rank is {self.lora_rank}, expected 0 or more")
        for name in ("epochs", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
        for name in ("learning_rate", "gate_learning_rate"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                problems.append(f"--{name.replace('_', '-')} is {value}, expected a positive number")
        for name, kind in (
            ("granularity", Granularity),
            ("controller", Controller),
            ("precision", Precision),
        ):
            value = getattr(self, name)
            if value not in get_args(kind):
                problems.append(f"--{name} is {value!r}, expected one of {', '.join(get_args(kind))}")
        _refuse(problems)

    def absolute(self) -> "TrainSettings":
        """Return the settings with local paths made absolute: a run is used from anywhere."""
        paths = ("data_dir", "train_file", "validation_file")
        values = {name: getattr(self.data, name) for name in paths}
        moved: dict[str, Any] = {name: _absolute(value) for name, value in values.items() if value}
        data = replace(self.data, **moved)
        model = _absolute(self.model) if self.model != "demo" and Path(self.model).expanduser().is_dir() else self.model
        return replace(self, data=data, model=model)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainSettings":
        """Read settings back; `ArtifactError` on a field that is unknown or of a wrong type."""
        try:
            return cls(**{**value, "data": DataSettings(**value["data"])})
        except (TypeError, KeyError) as error:
            raise ArtifactError(f"settings in the manifest are not understood ({error})") from None


def default_run_name(settings: TrainSettings) -> str:
    """Return the directory name a run gets when none is asked for, e.g. `sst2-roberta-base-s0.3`."""
    data = settings.data.task or Path(settings.data.train_file or "own").stem
    return f"{data}-{Path(settings.model).name}-s{settings.sparsity:g}"


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UsageError("; ".join(problems))


__all__ = [
    "DEFAULT_TARGET",
    "Controller",
    "DataSettings",
    "Granularity",
    "Layout",
    "Precision",
    "Target",
    "TrainSettings",
    "default_run_name",
]
