"""The options that commands share: one annotated type for each, so that `--help` says the same everywhere."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gatepress.config import (
    HIDDEN_WEIGHT,
    BudgetUnit,
    Controller,
    GateAxes,
    Granularity,
    Layout,
    Method,
    Metric,
    Precision,
    Runtime,
    Target,
    TrainSettings,
)

Device = Literal["auto", "cpu", "cuda"]
Context = Annotated[typer.Context, typer.Option(help="The call as typer sees it; not an option.")]

# Options by the group of the help page that shows them.
DATA = partial(typer.Option, rich_help_panel="Data")
MODEL = partial(typer.Option, rich_help_panel="Model")
GATES = partial(typer.Option, rich_help_panel="Gates")
TRAINING = partial(typer.Option, rich_help_panel="Training")
MEASURING = partial(typer.Option, rich_help_panel="Measuring")
ALTERNATIVES = partial(typer.Option, rich_help_panel="Alternatives")
OUTPUT = partial(typer.Option, rich_help_panel="Output")


def output_option(metavar: str, text: str) -> Any:
    """Return the option that names the output of a command."""
    return OUTPUT("--output", "-o", metavar=metavar, help=text)


def force_option(text: str) -> Any:
    """Return the option that lets a command replace an existing output; `text` says when that one is removed."""
    return OUTPUT(help=text, show_default=False)


def examples(*lines: str) -> str:
    """Return the end of a help page: commands to copy, one per line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# --- data -----------------------------------------------------------------------------------------

Task = Annotated[
    str | None,
    DATA(
        metavar="NAME",
        help="Named task: cola, stsb, mrpc, rte, sst2, mnli, qnli or qqp of GLUE, or demo. The demo data (tweets "
        "in three classes) comes with gatepress[demo] and needs no network.",
    ),
]
DataDir = Annotated[
    str | None,
    DATA(
        metavar="DIR",
        help="Read a GLUE task from DIR/NAME/train.tsv and DIR/NAME/validation.tsv instead of from the hub.",
    ),
]
TrainFile = Annotated[
    str | None,
    DATA(metavar="FILE", help="Your own training rows (.csv, .tsv, .jsonl or .parquet), instead of --task."),
]
ValidationFile = Annotated[
    str | None, DATA(metavar="FILE", help="Your own validation rows, on which the metric (--metric) is measured.")
]
UnlabelledFile = Annotated[
    str | None,
    DATA(
        metavar="FILE",
        help="Texts without labels, in columns named like those of the training rows. A finetuned --model "
        "answers for them, and the model whose gates close learns its answers (--distill).",
    ),
]
TextColumn = Annotated[
    str | None, DATA(metavar="NAME", help="Column with the text. Default: guessed from common names.")
]
TextPairColumn = Annotated[
    str | None, DATA(metavar="NAME", help="Column with the second text, for tasks on pairs of texts.")
]
LabelColumn = Annotated[
    str | None,
    DATA(
        metavar="NAME",
        help="Column with the label. Text and whole numbers are classes; numbers with a decimal point are "
        "regression targets; lists (jsonl, parquet) name any number of classes for a row. FIRST,SECOND,...: a column "
        "of 1 and 0 for each of these classes.",
    ),
]
MetricOption = Annotated[
    Metric | None,
    DATA(
        help="Metric to measure on the validation rows. Default: the task's own; for your own rows, accuracy for "
        "classes, f1_micro where a row has any number of them, and the Pearson correlation for numbers. f1: of the "
        "second of two classes; with more, the mean over those that labels or answers name. f1_micro: of all classes "
        "of all rows together. average_precision: how far rows of the second of two classes rank above the others. "
        "mrr@10, ndcg@10: how high the relevant passages of a query rank, the usual metrics of rerankers; pairs with "
        "the same first text belong to one query.",
        show_default=False,
    ),
]
MaxTrainSamples = Annotated[int | None, DATA(metavar="N", help="Train on the first N rows only.")]
MaxValidationSamples = Annotated[int | None, DATA(metavar="N", help="Validate on the first N rows only.")]

# --- model ----------------------------------------------------------------------------------------

Model = Annotated[
    str,
    MODEL(
        metavar="NAME|DIR",
        help="Encoder to start from, pretrained or finetuned: a hub id, a local directory, a run of another "
        "--method, or demo (MiniLM, 6 layers of 384, from gatepress[demo]).",
    ),
]
Revision = Annotated[str | None, MODEL(metavar="REV", help="Branch, tag or commit of the model on the hub.")]
Embed = Annotated[
    bool,
    MODEL(
        help="Make an embedder smaller. Each text is read on its own and becomes one vector, pooled as the "
        "sentence-transformers files beside the model say. The model itself, unpruned, is the teacher, so "
        "training rows need no labels. Validation rows are pairs, scored by the cosine of their two "
        "vectors.",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    MODEL(
        help="Allow Python code that comes with a model, in its directory or on the hub, to run on this machine. "
        "Off by default; read the code before you allow it.",
        show_default=False,
    ),
]

# --- gates ----------------------------------------------------------------------------------------

Sparsity = Annotated[
    float,
    GATES(
        "--sparsity",
        "-s",
        metavar="FRACTION",
        help="Fraction to remove, of the gates or of what --budget names: at least 0 and below 1. With "
        "structured gates, 0.5 halves the work of the encoder.",
    ),
]
GranularityOption = Annotated[
    Granularity,
    GATES(
        help="Where gates sit. structured: one gate for each inner dimension, shared by the matrices that meet "
        "there, so every closed gate makes the model smaller. heads: the same, but an attention head goes "
        "as a whole or stays. matrix: gates on the inputs and outputs of each matrix, as in the paper."
    ),
]
ControllerOption = Annotated[
    Controller,
    GATES(
        help="What decides which gates close. importance: the least useful gates close, step by step. penalty: "
        "the paper's sparsity loss."
    ),
]
RotateHeads = Annotated[
    bool | None,
    GATES(
        "--rotate-heads/--no-rotate-heads",
        help="Before training, turn each head into the singular basis of query with key and of value with "
        "output. The model computes the same, but a gate that closes takes less away. Default: on with "
        "structured gates.",
        show_default=False,
    ),
]
LoraRank = Annotated[
    int | None,
    GATES(
        metavar="RANK",
        help="Rank of the low-rank update. Default: 8; with gates in a finetuned model 32; for vera 256; for "
        "lora-xs 25.",
    ),
]
LoraMatrices = Annotated[
    str | None,
    GATES(
        metavar="ROLE,...",
        help="Which of --matrices get a low-rank update in addition to their gates. Fewer make steps faster. "
        "Default: all.",
    ),
]
MethodOption = Annotated[
    Method,
    GATES(
        help="What to train. gates+lora: gates, with a low-rank update inside them. gates: gates alone. full, "
        "lora, lora-fa, vera, lora-xs: the alternatives to gates, trained in the same loop; nothing is "
        "closed."
    ),
]
BudgetOption = Annotated[
    BudgetUnit | None,
    GATES(
        help="What --sparsity is a fraction of. gates: closed gates. weights: removed weights. macs: "
        "multiply-accumulates at the longest input, including those of attention. latency: time of the "
        "matrix products by built-in estimates; nothing is measured. These four count over the whole "
        "encoder, so that layers share the loss. vectors: closed gates, in each vector alike, as in the "
        "paper. Default: gates; with --controller penalty, vectors.",
        show_default=False,
    ),
]
GateAxesOption = Annotated[
    GateAxes,
    GATES(
        help="With --granularity matrix: put gates on both sides of a matrix, on its inputs only (in) or on its "
        "outputs only (out)."
    ),
]
ALL_MATRICES = ",".join(TrainSettings.matrices)
Matrices = Annotated[
    str,
    GATES(
        metavar="ROLE,...",
        help="Which matrices of a layer get gates, a low-rank update and trained biases: some of q, k, v (query, "
        "key, value), o (attention output), up and down (first and second matrix of the feed-forward "
        "block). Structured gates sit on q, o and down.",
    ),
]
Distill = Annotated[
    bool | None,
    TRAINING(
        help="Let the model with open gates teach the one whose gates close, with its logits and hidden states. "
        "This costs one more forward pass per step. A pretrained model learns the task first, then teaches. "
        "Default: on with --embed, and if the model was finetuned for the task and there is a low-rank update."
    ),
]
Start = Annotated[
    str | None,
    TRAINING(
        metavar="RUN",
        help="Continue from a run of the same --model, --method and gates. Its gates are closed to --sparsity at "
        "once, by the scores that the run keeps, and all epochs are left for recovery. A finetuned --model "
        "is the teacher, unless --no-distill is given.",
    ),
]
HiddenWeight = Annotated[
    float | None,
    TRAINING(
        metavar="WEIGHT",
        help="Weight of the teacher's hidden states in the loss. Its logits and the labels have weight 1 each. "
        f"Default: {HIDDEN_WEIGHT:g}.",
    ),
]
OpenEpochs = Annotated[
    int | None,
    TRAINING(
        metavar="N",
        help="How many of the epochs pass with all gates open before closing begins. Default: none; with "
        "--distill a third of them, at least one, unless the model was already finetuned for the task.",
    ),
]
Closing = Annotated[
    float | None,
    TRAINING(
        metavar="FRACTION",
        help="Fraction of the steps after which the gates have closed. In the rest of the steps the model "
        "recovers, and steps get faster the less is left. Default: 0.6; with a low-rank update in a model "
        "that was finetuned for the task, 0.35.",
    ),
]
TrainBiases = Annotated[bool, GATES(help="Also train the biases of gated matrices.")]
TrainLayerNorms = Annotated[bool, GATES(help="Also train the layer norms.")]
PenaltyWeight = Annotated[
    float,
    GATES(
        metavar="WEIGHT", help="Weight of the sparsity loss (lambda in the paper). Only --controller penalty has one."
    ),
]

# --- training -------------------------------------------------------------------------------------

Epochs = Annotated[
    int | None,
    TRAINING(
        metavar="N",
        help="Passes over the training rows. Default: enough for about 1,500 steps, at least 3 and at most 20.",
    ),
]
BatchSize = Annotated[int, TRAINING(metavar="N", help="Rows per batch, over all processes together.")]
MaxLength = Annotated[
    int,
    TRAINING(
        metavar="TOKENS",
        help="Truncate texts to this many tokens, without a warning. Of a pair, the longer text is truncated first.",
    ),
]
LearningRate = Annotated[
    float | None,
    TRAINING(
        "--learning-rate",
        "--lr",
        metavar="RATE",
        help="Learning rate of everything that is trained except gates. Default: gates+lora 3e-4 (in a finetuned "
        "model 5e-4, from a sparsity of 0.8 on 1e-3); gates, lora, lora-fa and lora-xs 1e-3; vera 4e-3; "
        "full 5e-5.",
    ),
]
MatchShares = Annotated[
    bool | None,
    TRAINING(
        "--match-shares/--no-match-shares",
        help="At the end, move the biases of the head until each class is predicted on the training rows as "
        "often as it occurs there. A model that knows little of a task predicts the larger class too often. "
        "Accuracy may fall a little. Default: on if the metric is the Matthews correlation, which depends "
        "on these shares.",
    ),
]
GateLearningRate = Annotated[
    float, TRAINING("--gate-learning-rate", "--gate-lr", metavar="RATE", help="Learning rate of the gates.")
]
WeightDecay = Annotated[
    float,
    TRAINING(
        metavar="RATE",
        help="AdamW weight decay of the task's head; with --method full, of the whole model. Nothing else has any.",
    ),
]
WarmupRatio = Annotated[
    float,
    TRAINING(
        metavar="FRACTION",
        help="Fraction of the steps in which learning rates rise. After that they fall linearly to 0.",
    ),
]
SaveEvery = Annotated[
    int | None,
    TRAINING(
        metavar="STEPS",
        help="Also write a checkpoint every STEPS steps, from which --resume can continue. Default: only after "
        "each epoch.",
    ),
]
Resume = Annotated[
    Path | None,
    TRAINING(
        metavar="RUN",
        help="Continue a run that was stopped, with its own settings, to the end that it would have reached. "
        "Only --json, --quiet and --debug can be given with it.",
    ),
]
Seed = Annotated[
    int, TRAINING(metavar="N", help="Seed of everything that is random. The same seed gives the same run.")
]
MeasuringSeed = Annotated[int, MEASURING("--seed", metavar="N", help="Seed of the generated inputs.")]
PrecisionOption = Annotated[Precision, TRAINING(help="Arithmetic of the forward and backward pass.")]

# --- what gatepress wrote ------------------------------------------------------------------------

Written = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A run, pruned or ONNX directory, or an .onnx file.", show_default=False),
]

# --- where and how --------------------------------------------------------------------------------

DeviceOption = Annotated[Device, TRAINING(help="Where to compute. auto uses a CUDA GPU if there is one.")]
RuntimeOption = Annotated[
    Runtime, MEASURING(help="What computes an ONNX file. openvino needs gatepress[openvino] and a CPU.")
]
MeasuringDevice = Annotated[Device, MEASURING(help="Where to compute. auto uses a CUDA GPU if there is one.")]
Threads = Annotated[int | None, MEASURING(metavar="N", help="CPU threads to compute with. Default: all cores.")]
LayoutOption = Annotated[
    Layout,
    OUTPUT(
        help="How the smaller matrices are stored. auto: what should be fastest on the runtime that --for names. "
        "inner: without closed neurons, head dimensions and heads; no index operation at run time. index: "
        "also without zero inputs and outputs on the residual side, which an index operation skips (only "
        "matrix gates gain from it). paper: each matrix by its own indices, as in the paper; slow, for "
        "comparison. stock: only what the original model class can hold, so that plain transformers loads "
        "it with no extra code."
    ),
]

TargetOption = Annotated[
    Target,
    OUTPUT(
        "--for",
        help="Runtime that the layout auto is chosen for. The result runs on any runtime; it is fastest on this one.",
    ),
]

LatencyTable = Annotated[
    str | None,
    OUTPUT(
        metavar="FILE",
        help="Times that the layout auto is chosen by, from another machine (written by gatepress bench "
        "--latency-table). analytic: use built-in estimates, which are the same everywhere. Default: "
        "measure this machine once, in some twenty seconds, when a choice depends on it.",
    ),
]

Tokens = Annotated[
    int | None,
    OUTPUT(
        metavar="N",
        help="Tokens per call that the layout auto is chosen for, batch size times sequence length, e.g. 1024 "
        "for batches of 8 x 128. Default: calls of 32 to 1,024 tokens count alike.",
    ),
]

Force = Annotated[
    bool, force_option("Replace an output that exists. The old one is removed only when the new one is complete.")
]
TrainForce = Annotated[
    bool,
    force_option(
        "Replace an output that exists. The old one is removed when the first checkpoint of the new run is complete."
    ),
]
Json = Annotated[
    bool,
    OUTPUT(
        "--json/--no-json",
        help="Print one JSON object on stdout instead of tables, for errors too.",
        show_default=False,
    ),
]
Quiet = Annotated[
    bool,
    OUTPUT(
        "--quiet/--no-quiet",
        "-q",
        help="Print only the result, warnings and errors: no progress, no notes.",
        show_default=False,
    ),
]
Debug = Annotated[
    bool,
    OUTPUT(
        "--debug/--no-debug", help="Show tracebacks and the messages of the underlying libraries.", show_default=False
    ),
]


# --- groups: options that several commands take together (_groups.py) -------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows that a model is measured on."""

    task: Task = None
    data_dir: DataDir = None
    validation_file: ValidationFile = None
    text_column: TextColumn = None
    text_pair_column: TextPairColumn = None
    label_column: LabelColumn = None
    max_validation_samples: MaxValidationSamples = None


@dataclass(frozen=True)
class MeasuredRows(Rows):
    """The rows that a model is measured on, and the metric."""

    metric: MetricOption = None


@dataclass(frozen=True)
class TrainingRows:
    """The rows that a model learns from and is measured on: the fields of `DataSettings`."""

    task: Task = None
    data_dir: DataDir = None
    train_file: TrainFile = None
    validation_file: ValidationFile = None
    unlabelled_file: UnlabelledFile = None
    text_column: TextColumn = None
    text_pair_column: TextPairColumn = None
    label_column: LabelColumn = None
    metric: MetricOption = None
    max_train_samples: MaxTrainSamples = None
    max_validation_samples: MaxValidationSamples = None


@dataclass(frozen=True)
class Base:
    """The model that is trained."""

    model: Model = TrainSettings.model
    revision: Revision = TrainSettings.revision
    embed: Embed = TrainSettings.embed


@dataclass(frozen=True)
class Gating:
    """Which gates there are, and how they close."""

    budget: BudgetOption = TrainSettings.budget
    granularity: GranularityOption = TrainSettings.granularity
    gate_axes: GateAxesOption = TrainSettings.gate_axes
    matrices: Matrices = ALL_MATRICES
    controller: ControllerOption = TrainSettings.controller
    rotate_heads: RotateHeads = TrainSettings.rotate_heads
    lora_rank: LoraRank = TrainSettings.lora_rank
    lora_matrices: LoraMatrices = None
    train_biases: TrainBiases = TrainSettings.train_biases
    train_layer_norms: TrainLayerNorms = TrainSettings.train_layer_norms
    penalty_weight: PenaltyWeight = TrainSettings.penalty_weight


@dataclass(frozen=True)
class Schedule:
    """How long to train, at which rates, and with which teacher."""

    distill: Distill = TrainSettings.distill
    hidden_weight: HiddenWeight = TrainSettings.hidden_weight
    open_epochs: OpenEpochs = TrainSettings.open_epochs
    closing: Closing = TrainSettings.closing
    epochs: Epochs = TrainSettings.epochs
    batch_size: BatchSize = TrainSettings.batch_size
    max_length: MaxLength = TrainSettings.max_length
    learning_rate: LearningRate = TrainSettings.learning_rate
    gate_learning_rate: GateLearningRate = TrainSettings.gate_learning_rate
    weight_decay: WeightDecay = TrainSettings.weight_decay
    warmup_ratio: WarmupRatio = TrainSettings.warmup_ratio
    match_shares: MatchShares = TrainSettings.match_shares


@dataclass(frozen=True)
class Machine:
    """Where to train, in which arithmetic, and from which seed."""

    seed: Seed = TrainSettings.seed
    device: DeviceOption = "auto"
    precision: PrecisionOption = TrainSettings.precision


@dataclass(frozen=True)
class Shown:
    """What a command prints: the parameters of `_console.session`."""

    as_json: Json = False
    quiet: Quiet = False
    debug: Debug = False
