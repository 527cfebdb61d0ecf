"""Settings of each stage: frozen, checked, and written into manifests as they are. No torch here.

A field's comment gives its meaning in brief; the text for `--help` is at its option (cli/_options.py).
A wrong value raises one `UsageError` that lists every problem in the spelling of the command line.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from gatepress.errors import ArtifactError, UsageError
from gatepress.families import ROLES
from gatepress.files import expanded
from gatepress.hub import name_of

T = TypeVar("T")
Method = Literal["gates+lora", "gates", "full", "lora", "lora-fa", "vera", "lora-xs"]
Granularity = Literal["structured", "matrix", "heads"]
GateAxes = Literal["both", "in", "out"]
Controller = Literal["importance", "penalty"]
BudgetUnit = Literal["gates", "weights", "macs", "latency", "vectors"]
Layout = Literal["auto", "inner", "index", "paper", "stock"]
Target = Literal["ort-cpu", "ort-int8", "torch-cpu", "cuda"]
Precision = Literal["fp32", "bf16"]  # of training; what is trained stays in float32
Metric = Literal[
    "accuracy", "matthews", "f1", "f1_micro", "average_precision", "mrr@10", "ndcg@10", "pearson", "spearman"
]
Arithmetic = Literal["fp32", "bf16", "fp16"]  # that a torch model is served in, weights included
Runtime = Literal["onnxruntime", "openvino"]  # of ONNX files

ROTATED: tuple[Granularity, ...] = ("structured", "matrix")  # these have gates of single head dimensions
DEFAULT_LAYOUT: Layout = "auto"
DEFAULT_RUNTIME: Runtime = "onnxruntime"
DEFAULT_TARGET: Target = "ort-cpu"  # the runtime that most people deploy on
MAX_LOGIT_DIFF = 1e-4  # between float32 forms of one model; relative to the largest logit if that is above 1
METRIC_ROUNDING = 1e-9  # of a difference of two metrics: 0.87 - 0.86 is more than 0.01
MOST_SEEDS = 2**32  # NumPy's limit
MOST_SIZE = 2**20  # rows of a batch, and tokens of a row, in a timing: more do not fit into any memory
MOST = {
    "seed": MOST_SEEDS - 1,
    "threads": 1_024,  # OpenMP ends the process if it cannot start as many as it is told to
}


@dataclass(frozen=True)
class MethodSpec:
    """What a method trains besides the head, and the rate and rank it uses unless told otherwise."""

    gated: bool
    learning_rate: float
    rank: int = 0  # 0: it has no low-rank update
    closing: float = 0.60  # fraction of the steps in which gates close; in the rest, what is left recovers
    distill: bool = False  # whether the open model teaches the one whose gates close


METHODS: dict[str, MethodSpec] = {
    "gates+lora": MethodSpec(gated=True, learning_rate=3e-4, rank=8),
    "gates": MethodSpec(gated=True, learning_rate=1e-3),
    "full": MethodSpec(gated=False, learning_rate=5e-5),
    "lora": MethodSpec(gated=False, learning_rate=1e-3, rank=8),
    "lora-fa": MethodSpec(gated=False, learning_rate=1e-3, rank=8),
    "vera": MethodSpec(gated=False, learning_rate=4e-3, rank=256),
    "lora-xs": MethodSpec(gated=False, learning_rate=1e-3, rank=25),
}

# For gates with low rank in a model that knows the task: more of the steps are for recovery, and the model as it was
# teaches. If little is left, most of it is learnt anew, at a higher rate.
FINETUNED = MethodSpec(gated=True, learning_rate=5e-4, rank=32, closing=0.35, distill=True)
LITTLE_LEFT, RATE_OF_LITTLE = 0.8, 1e-3  # from this sparsity on, at this rate
# Answers to training rows can be learnt by heart; hidden states are too many for that. A student that computes as its
# teacher does also answers like it on rows that neither has seen.
HIDDEN_WEIGHT, HIDDEN_WEIGHT_OF_OLD = 20.0, 1.0  # the old value is that of releases before 0.21


# Settings that mean nothing to a method without gates.
OF_GATES = (
    *("sparsity", "budget", "granularity", "gate_axes", "controller", "penalty_weight", "closing", "open_epochs"),
    *("gate_learning_rate", "train_biases", "train_layer_norms"),
)


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from: a named task (hub or directory), or the user's own files."""

    task: str | None = None  # a GLUE task name, "demo", or None with own files
    data_dir: str | None = None  # directory with <task>/train.tsv and <task>/validation.tsv
    train_file: str | None = None  # csv, tsv, jsonl or parquet
    validation_file: str | None = None
    unlabelled_file: str | None = None  # texts that a teacher answers for, in columns of the same names
    text_column: str | None = None  # None: guessed from common names; an error names the choices
    text_pair_column: str | None = None  # None: one text per row
    label_column: str | None = None
    metric: Metric | None = None  # None: the task's; for own rows accuracy of classes, Pearson correlation of numbers
    max_train_samples: int | None = None  # the first n rows, as in the paper
    max_validation_samples: int | None = None

    def __post_init__(self) -> None:
        """Collect all problems and raise them at once."""
        limits = {name: getattr(self, name) for name in ("max_train_samples", "max_validation_samples")}
        problems = _below(1, limits)
        if self.metric is not None:
            problems += unknown_words(metric=(self.metric, Metric))
        if self.task is not None and (self.train_file or self.validation_file):
            problems.append("--task and --train-file/--validation-file exclude each other; give one of them")
        if self.task is None and not (self.train_file or self.validation_file):
            problems.append("no data: give --task NAME, or --train-file and --validation-file")
        refuse(problems)
        for name, value in limits.items():
            object.__setattr__(self, name, None if value is None else int(value))  # numbers of NumPy, too

    def absolute(self) -> "DataSettings":
        """Return the settings with absolute paths, so that what a manifest names can be read from anywhere."""
        paths = {name: getattr(self, name) for name in _PATHS}
        changed: dict[str, Any] = {name: _absolute(path) for name, path in paths.items() if path}
        return replace(self, **changed)


_PATHS = ("data_dir", "train_file", "validation_file", "unlabelled_file")  # of rows
_FRACTION = "a fraction of at least 0 and "
_NUMBERS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("sparsity",), lambda value: 0 <= value < 1, f"{_FRACTION}below 1"),
    (("warmup_ratio",), lambda value: 0 <= value <= 1, f"{_FRACTION}at most 1"),
    (("closing",), lambda value: 0 < value <= 1, "a fraction above 0 and of at most 1"),
    (("epochs", "batch_size", "max_length", "lora_rank", "save_every"), lambda value: value >= 1, "1 or more"),
    (("open_epochs",), lambda value: value >= 0, "0 or more"),
    (("learning_rate", "gate_learning_rate"), lambda value: 0 < value < float("inf"), "a positive number"),
    (("weight_decay", "penalty_weight", "hidden_weight"), lambda v: 0 <= v < float("inf"), "a number from 0 on"),
    (("seed",), lambda value: 0 <= value < MOST_SEEDS, f"a whole number from 0 to {MOST_SEEDS - 1}"),
)
_WHOLE = ("epochs", "batch_size", "max_length", "lora_rank", "save_every", "open_epochs", "seed")


@dataclass(frozen=True)
class TrainSettings:
    """One training run, from an open model to fixed gates."""

    data: DataSettings
    model: str = "FacebookAI/roberta-base"  # hub id, local directory, run of another method, or "demo"
    revision: str | None = None  # branch, tag or commit on the hub
    commit: str | None = None  # what a training found there, so that a run stays with it; None: on this disk
    embed: bool = False  # an embedder: texts are read one by one, and the model itself teaches, without labels
    method: Method = "gates+lora"
    sparsity: float = 0.3  # fraction of `budget` to remove, in [0, 1)
    budget: BudgetUnit | None = None  # None: gates; the penalty controller counts by vectors
    granularity: Granularity = "structured"
    gate_axes: GateAxes = "both"  # of matrix gates
    matrices: tuple[str, ...] = ROLES  # which of a layer's matrices take part
    controller: Controller = "importance"
    rotate_heads: bool | None = None  # gates stand on the singular basis of each head; None: structured gates do
    lora_rank: int | None = None  # None: the method's own, more in a finetuned model
    lora_matrices: tuple[str, ...] | None = None  # which of `matrices` have low rank in addition to gates; None: all
    train_biases: bool = True
    train_layer_norms: bool = True
    closing: float | None = None  # fraction of the steps after which gates have closed; None: depends on the rank
    open_epochs: int | None = None  # with all gates open, before any closes; None: none, or a third before teaching
    start: str | None = None  # run to continue from: its gates are closed at once, and all epochs are for recovery
    distill: bool | None = None  # the open model teaches the one whose gates close; None: if it was finetuned
    hidden_weight: float | None = None  # of a teacher's hidden states; logits and labels have 1 each; None: chosen
    epochs: int | None = None  # None: enough for about 1,500 steps, at least 3, at most 20
    match_shares: bool | None = None  # by the biases of the head, at the end; None: with Matthews correlation
    batch_size: int = 32
    max_length: int = 128  # tokens
    learning_rate: float | None = None  # of everything trained except gates; None: depends on the rank
    gate_learning_rate: float = 3e-3
    penalty_weight: float = 50.0  # lambda of eq. (9), penalty controller only
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06
    save_every: int | None = None  # steps between checkpoints within an epoch; None: only at its end
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Collect all problems and raise them at once; numbers of NumPy become Python's own, which manifests hold."""
        refuse([*self._unknown_words(), *self._wrong_numbers(), *self._wrong_pairs()])
        for name, value, *_ in self._numbers():
            object.__setattr__(self, name, int(value) if isinstance(value, numbers.Integral) else float(value))

    def _unknown_words(self) -> list[str]:
        problems = unknown_words(
            method=(self.method, Method),
            budget=(_unless_asked(self.budget, self.unit), BudgetUnit),
            granularity=(self.granularity, Granularity),
            gate_axes=(self.gate_axes, GateAxes),
            controller=(self.controller, Controller),
            precision=(self.precision, Precision),
        )
        matrices: dict[str, tuple[Sequence[str] | None, Sequence[str]]] = {
            "matrices": (self.matrices, ROLES),
            "lora_matrices": (self.lora_matrices, self.matrices),
        }
        problems += [
            f"{spelled(name)} is {','.join([asked] if isinstance(asked, str) else asked)!r}, "
            f"expected some of {','.join(possible)}"
            for name, (asked, possible) in matrices.items()
            if asked is not None and (isinstance(asked, str) or not (asked and set(asked) <= set(possible)))
        ]
        return problems

    def _numbers(self) -> Iterator[tuple[str, Any, Callable[[Any], bool], str]]:
        """Yield all numbers that are given: name, value, what it must fit, and that in words."""
        for names, fits, expected in _NUMBERS:
            for name in names:
                if (value := getattr(self, name)) is not None:
                    yield name, value, fits, expected

    def _wrong_numbers(self) -> list[str]:
        problems = []
        for name, value, fits, expected in self._numbers():
            whole = name in _WHOLE
            if not isinstance(value, numbers.Integral if whole else numbers.Real):
                problems.append(f"{spelled(name)} is {value!r}, expected a {'whole ' if whole else ''}number")
            elif not fits(value):
                problems.append(f"{spelled(name)} is {value}, expected {expected}")
        return problems

    def _wrong_pairs(self) -> list[str]:
        problems = []
        missing = [name for name in ("train_file", "validation_file") if not getattr(self.data, name)]
        if self.data.task is None and missing:
            rows = missing[0].partition("_")[0]
            problems.append(f"own data has no {rows} rows; give them with {spelled(missing[0])} FILE")
        if self.gate_axes != "both" and self.granularity != "matrix":
            problems.append(f"--gate-axes {self.gate_axes} goes with --granularity matrix")
        if self.rotate_heads and not (self.gated and self.granularity in ROTATED):
            asked = f"--granularity {self.granularity}" if self.gated else f"--method {self.method}"
            problems.append(f"--rotate-heads chooses the dimensions that gates of heads stand on, {asked} has none")
        if self.distill and not self.gated:
            problems.append(f"--distill teaches a model whose gates close, --method {self.method} has none")
        if self.hidden_weight is not None and (self.distill is False or not self.gated):
            asked = "--no-distill" if self.gated else f"--method {self.method}"
            problems.append(f"--hidden-weight weighs what a teacher computes, {asked} has none")
        if self.embed and not (self.gated and self.distill is not False and not self.open_epochs):
            asked = "--open-epochs" if self.open_epochs else "--no-distill" if self.gated else f"--method {self.method}"
            problems.append(f"with --embed the unpruned model is the teacher, from the first step on; drop {asked}")
        if self.open_epochs and self.start:
            problems.append("--open-epochs says nothing to --start, whose gates are closed at once")
        if self.lora_rank is not None and self.method in METHODS and not METHODS[self.method].rank:
            problems.append(f"--lora-rank means nothing to --method {self.method}, which has no low-rank update")
        if self.lora_matrices is not None and self.method in METHODS and not self.low_rank_in:
            why = "--matrices says where that trains" if self.rank else "which has no low-rank update"
            problems.append(f"--lora-matrices means nothing to --method {self.method}, {why}")
        return problems

    @property
    def reads(self) -> tuple[str | None, ...]:
        """What training reads from disk, as far as these are paths; the model demo is a package."""
        model = None if self.model == "demo" else self.model
        return (model, self.start, *(getattr(self.data, name) for name in _PATHS))

    @property
    def gated(self) -> bool:
        """Whether the method trains gates."""
        return self.method in METHODS and METHODS[self.method].gated

    @property
    def rank(self) -> int:
        """Rank of the low-rank update; 0 if the method has none."""
        own = METHODS[self.method].rank
        return (self.lora_rank or own) if own else 0

    @property
    def low_rank_in(self) -> tuple[str, ...]:
        """Which of a layer's matrices have a low-rank update in addition to their gates."""
        return (self.lora_matrices or self.matrices) if self.gated and self.rank else ()

    @property
    def rate(self) -> float:
        """Learning rate of everything that is trained except gates."""
        return self.learning_rate or METHODS[self.method].learning_rate

    @property
    def unit(self) -> BudgetUnit:
        """What `sparsity` is a fraction of."""
        return self.budget or ("vectors" if self.controller == "penalty" else "gates")

    def matches(self, metric: Metric) -> bool:
        """Whether the head is moved at the end, for a task with this metric: Matthews correlation depends on shares."""
        return _unless_asked(self.match_shares, metric == "matthews")

    def resolved(self, metric: Metric, *, finetuned: bool) -> "TrainSettings":
        """Return the settings with what method and metric choose, so that no manifest depends on later defaults.

        `UsageError` if something is asked of a teacher and there is none: answers for texts without labels, teaching
        from the first step, or a weight.
        """
        own = METHODS[self.method]
        if finetuned and own.gated and own.rank:
            little = self.sparsity >= LITTLE_LEFT
            own = replace(FINETUNED, learning_rate=RATE_OF_LITTLE) if little else FINETUNED
        distill = _unless_asked(self.distill, own.distill or self.embed)
        if self.data.unlabelled_file and not (finetuned and distill and not self.open_epochs):
            raise UsageError(
                "--unlabelled-file holds texts that a teacher must answer for from the first step, and there is none; "
                "give a --model that was finetuned for the task, --distill, and no --open-epochs"
            )
        if self.start and distill and not finetuned:
            raise UsageError(
                "--distill with --start has nobody to teach: the run's gates are closed, and its --model was not "
                "finetuned for the task; leave out --distill"
            )
        if self.hidden_weight is not None and not distill:
            raise UsageError(
                "--hidden-weight weighs what a teacher computes, and there is none; "
                "give --distill, or a --model that was finetuned for the task"
            )
        return replace(
            self,
            lora_rank=(self.lora_rank or own.rank) if own.rank else None,
            lora_matrices=self.low_rank_in or None,
            learning_rate=self.learning_rate or own.learning_rate,
            closing=(self.closing or own.closing) if own.gated else None,
            distill=distill,
            hidden_weight=_unless_asked(self.hidden_weight, HIDDEN_WEIGHT) if distill else None,
            rotate_heads=_unless_asked(self.rotate_heads, own.gated and self.granularity == "structured"),
            match_shares=self.matches(metric),
        )

    def absolute(self) -> "TrainSettings":
        """Return the settings with absolute local paths, so that a run can be used from anywhere."""
        start = _absolute(self.start) if self.start else None
        here = not self.commit and self.model != "demo" and _is_directory(self.model)
        model = _absolute(self.model) if here else self.model
        return replace(self, data=self.data.absolute(), model=model, start=start)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainSettings":
        """Read settings back; `ArtifactError` if a field is unknown or has the wrong type."""
        method = {} if "method" in value else _method_of_old(value)
        try:
            matrices = tuple(value.get("matrices", ROLES))
            updated = value.get("lora_matrices")
            settings = cls(
                **{
                    "distill": False,
                    "rotate_heads": False,
                    "match_shares": False,
                    "hidden_weight": HIDDEN_WEIGHT_OF_OLD if value.get("distill") else None,
                    **value,
                    **method,
                    "matrices": matrices,
                    "lora_matrices": updated and tuple(updated),
                    "data": DataSettings(**value["data"]),
                }
            )
        except (TypeError, KeyError, UsageError) as error:
            raise ArtifactError(f"settings in the manifest are not understood ({error})") from None
        if "closing" not in value and settings.gated:  # before it could be chosen, it was that of a pretrained model
            settings = replace(settings, closing=MethodSpec.closing)
        if "lora_matrices" not in value:  # every matrix with gates had low rank
            settings = replace(settings, lora_matrices=settings.low_rank_in or None)
        return settings


def unused_by(settings: TrainSettings) -> dict[str, str]:
    """Return the names of settings that mean nothing beside others, and what they mean nothing to."""
    unused = {}
    if settings.controller == "importance":
        unused["penalty_weight"] = "--controller importance, which has no penalty"
    if settings.start:
        unused["closing"] = "--start, whose gates are closed at once"
    if not settings.gated:
        why = "trains the whole model" if settings.method == "full" else "has no gates"
        names = (*OF_GATES, *(("matrices",) if settings.method == "full" else ()))
        unused |= dict.fromkeys(names, f"--method {settings.method}, which {why}")
    return unused


def _method_of_old(value: dict[str, Any]) -> dict[str, Any]:
    """Return the method fields of a manifest older than methods; there, rank 0 stood for gates alone."""
    rank = value.get("lora_rank")
    return {"method": "gates+lora", "lora_rank": rank} if rank else {"method": "gates", "lora_rank": None}


def default_run_name(settings: TrainSettings) -> str:
    """Return the directory name of a run if none is given, e.g. `sst2-roberta-base-s0.3`."""
    data = settings.data.task or Path(settings.data.train_file or "own").stem
    name = f"s{settings.sparsity:g}" if settings.gated else settings.method
    return f"{data}-{name_of(settings.model)}-{name}"


def spelled(name: str) -> str:
    """Return how the command line spells the option of a field."""
    return f"--{name.replace('_', '-')}"


def _absolute(path: str) -> str:
    return str(expanded(path).absolute())


def _is_directory(name: str) -> bool:
    """Return whether a model is a directory here; anything else is found out where it is opened."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _unless_asked(asked: T | None, otherwise: T) -> T:
    return otherwise if asked is None else asked


def dropped(drop: float, limit: float) -> bool:
    """Return whether a metric dropped by more than a limit; one that is no number did."""
    return not drop <= limit + METRIC_ROUNDING


def check_prune(
    *, layout: Layout = DEFAULT_LAYOUT, target: Target = DEFAULT_TARGET, tokens: int | None = None, **_others: Any
) -> None:
    """Raise `UsageError` for options of `prune` that mean nothing, before anything is loaded or trained."""
    refuse(unknown_words(layout=(layout, Layout), **{"for": (target, Target)}))
    refuse_below(1, tokens=tokens)


def check_export(*, max_diff: float, quantize: str | None, max_metric_drop: float | None, rows: bool) -> None:
    """Raise one `UsageError` for options of an export that mean nothing; `rows`: whether some were named."""
    problems = []
    if not (max_diff > 0 and math.isfinite(max_diff)):
        problems.append(f"--max-diff is {max_diff}, expected a positive number")
    if quantize not in (None, "int8"):
        problems.append(f"--quantize is {quantize!r}, expected int8")
    if max_metric_drop is not None and not 0 <= max_metric_drop < math.inf:
        problems.append(f"--max-metric-drop is {max_metric_drop}, expected 0 or a positive number")
    if max_metric_drop is not None and quantize is None:
        problems.append("--max-metric-drop limits what --quantize costs; give --quantize int8 with it")
    if rows and not quantize:
        problems.append("data options say what the metric of --quantize int8 is measured on; give that with them")
    refuse(problems)


def refuse_runtime(runtime: Runtime, target: object, form: str | None) -> None:
    """Raise `UsageError` if a `runtime` of ONNX files was chosen for a `target` of another form."""
    if runtime != DEFAULT_RUNTIME and form != "onnx":
        raise UsageError(f"--runtime is {runtime}, but {target} is no ONNX file; leave it out")


def check_timing(  # noqa: PLR0913 - what a comparison of models can be asked wrongly
    *,
    batch_sizes: Sequence[int] = (1,),
    seq_lens: Sequence[int] = (1,),
    repetitions: int | None = None,
    warmup: int | None = None,
    threads: int | None = None,
    max_length: int = 1,
    seed: int = 0,
    prefix: str = "",
    **_others: Any,
) -> None:
    """Raise one `UsageError` for sizes and numbers of a timing that mean nothing.

    `prefix` stands before the names of sizes on the command line that took them.
    """
    problems = []
    for option, sizes in ((f"--{prefix}batch-size", batch_sizes), (f"--{prefix}seq-len", seq_lens)):
        if not sizes:
            problems.append(f"{option} is empty, expected sizes like 1,8")
        problems += [f"{option} is {size}, expected 1 or more" for size in sizes if size < 1]
        problems += [f"{option} is {size}, expected {MOST_SIZE:,} or less" for size in sizes if size > MOST_SIZE]
    refuse(problems)
    refuse_below(1, repetitions=repetitions, threads=threads, max_length=max_length)
    refuse_below(0, warmup=warmup, seed=seed)


def refuse_below(least: int, **options: Any) -> None:
    """Raise one `UsageError` naming every given option that is below `least`, or above the most it may be."""
    refuse(_below(least, options))


def _below(least: int, options: Mapping[str, Any]) -> list[str]:
    """Return a line for each option that is given and is no whole number of those that `refuse_below` takes."""
    problems = []
    for name, value in options.items():
        whole = value is None or isinstance(value, numbers.Integral)
        if not whole:
            problems.append(f"{spelled(name)} is {value!r}, expected a whole number")
        elif value is not None and not least <= value <= MOST.get(name, value):
            most = f"to {MOST[name]:,}" if name in MOST else "or more"
            problems.append(f"{spelled(name)} is {value}, expected {least} {most}")
    return problems


def refuse_single(**options: Any) -> None:
    """Raise one `UsageError` for options that are one thing where a sequence of them is expected."""
    refuse(
        [
            f"{name} is {value!r}, expected a list of them: [{value!r}]"
            for name, value in options.items()
            if isinstance(value, str) or not isinstance(value, Iterable)
        ]
    )


def unknown_words(**options: tuple[Any, Any]) -> list[str]:
    """Return a line for each option, (value, `Literal`), that is none of its words."""
    return [
        f"{spelled(name)} is {value!r}, expected one of {', '.join(get_args(kind))}"
        for name, (value, kind) in options.items()
        if value not in get_args(kind)
    ]


def refuse(problems: Sequence[str]) -> None:
    """Raise the collected problems, if any, as one `UsageError`."""
    if problems:
        raise UsageError("; ".join(problems))
