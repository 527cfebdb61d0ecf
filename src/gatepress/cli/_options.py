"""The options that commands share: one annotated type each, so that `--help` says the same everywhere."""

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
    Target,
    TrainSettings,
)

Device = Literal["auto", "cpu", "cuda"]
Context = Annotated[typer.Context, typer.Option(help="What typer knows of this call: no option.")]

# An option, in the group of a help page that it stands in.
DATA = partial(typer.Option, rich_help_panel="Data")
MODEL = partial(typer.Option, rich_help_panel="Model")
GATES = partial(typer.Option, rich_help_panel="Gates")
TRAINING = partial(typer.Option, rich_help_panel="Training")
MEASURING = partial(typer.Option, rich_help_panel="Measuring")
ALTERNATIVES = partial(typer.Option, rich_help_panel="Alternatives")
OUTPUT = partial(typer.Option, rich_help_panel="Output")


def output_option(metavar: str, text: str) -> Any:
    """Return the option that names what a command writes."""
    return OUTPUT("--output", "-o", metavar=metavar, help=text)


def force_option(text: str) -> Any:
    """Return the option that lets a command replace what exists; `text` says when that goes."""
    return OUTPUT(help=text, show_default=False)


def examples(*lines: str) -> str:
    """Return the end of a help page: commands to copy, one a line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# --- data -----------------------------------------------------------------------------------------

Task = Annotated[
    str | None,
    DATA(
        metavar="NAME",
        help="A named task: cola, stsb, mrpc, rte, sst2, mnli, qnli or qqp of GLUE, or demo (tweets in "
        "three classes that come with gatepress[demo] and need no network).",
    ),
]
DataDir = Annotated[
    str | None,
    DATA(
        metavar="DIR", help="Read a GLUE task from DIR/NAME/train.tsv and DIR/NAME/validation.tsv instead of the hub."
    ),
]
TrainFile = Annotated[
    str | None,
    DATA(metavar="FILE", help="Your own training rows, as .csv, .tsv, .jsonl or .parquet, in place of --task."),
]
ValidationFile = Annotated[
    str | None, DATA(metavar="FILE", help="Your own validation rows; the metric (--metric) is measured on these.")
]
UnlabelledFile = Annotated[
    str | None,
    DATA(
        metavar="FILE",
        help="Texts without labels, in columns named as those of the training rows: a finetuned --model answers for "
        "them, and the model whose gates close learns its answers (--distill).",
    ),
]
TextColumn = Annotated[
    str | None, DATA(metavar="NAME", help="Column with the text; guessed from usual names if absent.")
]
TextPairColumn = Annotated[
    str | None, DATA(metavar="NAME", help="Column with a second text, for tasks on pairs of texts.")
]
LabelColumn = Annotated[
    str | None,
    DATA(
        metavar="NAME",
        help="Column with the label. Texts and whole numbers are classes, numbers with a point are regression targets.",
    ),
]
MetricOption = Annotated[
    Metric | None,
    DATA(
        help="What is measured on validation rows. Unless given: the task's own; of own rows accuracy of classes, the "
        "Pearson correlation of numbers. f1: of the second of two classes, the mean over more. average_precision: how "
        "far rows of the second of two classes stand above the others. mrr@10, ndcg@10: how high the relevant passages "
        "of a query rank, as rerankers are measured; pairs with the same first text are those of one query.",
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
        help="The encoder, pretrained or finetuned: a hub id, a local directory, a run of another --method, or demo "
        "(MiniLM, 6 layers of 384, from gatepress[demo]).",
    ),
]
Revision = Annotated[str | None, MODEL(metavar="REV", help="Branch, tag or commit of the model on the hub.")]
Embed = Annotated[
    bool,
    MODEL(
        help="Make an embedder smaller: each text is read on its own and becomes one vector, pooled as "
        "sentence-transformers says beside the model. The model as it is teaches, so training rows need no labels; "
        "validation rows are pairs, measured by the cosine of their two vectors.",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    MODEL(
        help="Allow Python code that comes with a model, in its directory or on the hub, to run on this machine. Off "
        "unless you have read it.",
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
        help="Fraction to remove, of the gates or of what --budget names, from 0 up to but not including 1. With "
        "structured gates, 0.5 halves the work of the encoder.",
    ),
]
GranularityOption = Annotated[
    Granularity,
    GATES(
        help="Where gates sit. structured: one for each inner dimension, shared by the matrices that meet "
        "there, so all that is closed also makes the model smaller. heads: the same, but attention heads go "
        "whole or stay. matrix: in and out of each matrix, as in the paper."
    ),
]
ControllerOption = Annotated[
    Controller,
    GATES(
        help="What decides which gates close. importance: the least useful, step by step. penalty: the "
        "paper's sparsity loss."
    ),
]
RotateHeads = Annotated[
    bool | None,
    GATES(
        "--rotate-heads/--no-rotate-heads",
        help="Let gates of heads stand on the singular basis of query with key and of value with output, which leaves "
        "the model what it is: a closed gate takes away less. Unless given: yes with structured gates.",
        show_default=False,
    ),
]
LoraRank = Annotated[
    int | None,
    GATES(
        metavar="RANK",
        help="Rank of the low-rank update. Unless given: 8, with gates in a finetuned model 32; for vera 256, for "
        "lora-xs 25.",
    ),
]
LoraMatrices = Annotated[
    str | None,
    GATES(
        metavar="ROLE,...",
        help="Which of --matrices have a low-rank update beside their gates; fewer make steps quicker. Unless given: "
        "all.",
    ),
]
MethodOption = Annotated[
    Method,
    GATES(
        help="What is trained. gates+lora: gates, with a low-rank update inside them. gates: without one. full, lora, "
        "lora-fa, vera, lora-xs: what one would do instead, in the same loop; nothing is closed."
    ),
]
BudgetOption = Annotated[
    BudgetUnit | None,
    GATES(
        help="What --sparsity is a fraction of. gates: those closed. weights: those removed. macs: "
        "multiply-accumulates at the longest input, attention among them. latency: time of the matrix products by "
        "built-in estimates; nothing is measured. All of these over the whole encoder, so that layers share the loss; "
        "vectors: gates, in each vector alike, as in the paper. gates unless given, with --controller penalty vectors.",
        show_default=False,
    ),
]
GateAxesOption = Annotated[
    GateAxes,
    GATES(help="With --granularity matrix: gates on both sides of a matrix, on its inputs or on its outputs only."),
]
ALL_MATRICES = ",".join(TrainSettings.matrices)
Matrices = Annotated[
    str,
    GATES(
        metavar="ROLE,...",
        help="Which matrices of a layer get gates, low rank and trained biases: some of q, k, v (query, key, value), "
        "o (attention output), up, down (first and second of the feed-forward block). Structured gates stand on q, o, "
        "down.",
    ),
]
Distill = Annotated[
    bool | None,
    TRAINING(
        help="Let what the model knows with open gates, logits and hidden states, teach the one whose gates close, for "
        "one more forward pass a step. Unless given: where a model was finetuned for the task and has a low-rank "
        "update. A pretrained one that is to teach learns the task first."
    ),
]
Start = Annotated[
    str | None,
    TRAINING(
        metavar="RUN",
        help="Go on from a run of the same --model, --method and gates: they are closed to --sparsity at once, by the "
        "scores that the run keeps, and in all epochs the rest recovers. A finetuned --model is the teacher, unless "
        "--no-distill.",
    ),
]
HiddenWeight = Annotated[
    float | None,
    TRAINING(
        metavar="WEIGHT",
        help="What a teacher's hidden states count for, where its logits and the labels have 1 each. Unless given: "
        f"{HIDDEN_WEIGHT:g}.",
    ),
]
OpenEpochs = Annotated[
    int | None,
    TRAINING(
        metavar="N",
        help="Of the epochs, how many pass with all gates open before closing begins. Unless given: none; with "
        "--distill a third, but none where the model was finetuned for the task already.",
    ),
]
Closing = Annotated[
    float | None,
    TRAINING(
        metavar="FRACTION",
        help="Part of the steps by which the gates have closed; in the rest what is left recovers, in steps that are "
        "the quicker the less is left. Unless given: 0.6; 0.35 with low rank in a model that was finetuned for "
        "the task.",
    ),
]
TrainBiases = Annotated[bool, GATES(help="Train the biases of gated matrices too.")]
TrainLayerNorms = Annotated[bool, GATES(help="Train the layer norms too.")]
PenaltyWeight = Annotated[
    float,
    GATES(
        metavar="WEIGHT", help="Weight of the sparsity loss (lambda of the paper); only --controller penalty has one."
    ),
]

# --- training -------------------------------------------------------------------------------------

Epochs = Annotated[
    int | None,
    TRAINING(
        metavar="N",
        help="Passes over the training rows. Unless given: enough for about 1,500 steps, at least 3 and at most 20.",
    ),
]
BatchSize = Annotated[int, TRAINING(metavar="N", help="Rows in a batch, of all processes together.")]
MaxLength = Annotated[
    int,
    TRAINING(
        metavar="TOKENS", help="Cut texts after this many tokens, without a message; of a pair the longer one first."
    ),
]
LearningRate = Annotated[
    float | None,
    TRAINING(
        "--learning-rate",
        "--lr",
        metavar="RATE",
        help="Learning rate of all that is trained but gates. Unless given: gates+lora 3e-4 (in a finetuned model "
        "5e-4, from a sparsity of 0.8 on 1e-3); gates, lora, lora-fa and lora-xs 1e-3; vera 4e-3; full 5e-5.",
    ),
]
MatchShares = Annotated[
    bool | None,
    TRAINING(
        "--match-shares/--no-match-shares",
        help="At the end move the biases of the head until each class is named among training rows as often as it "
        "occurs: what knows little of a task names the larger class too often. Unless given: where the metric is "
        "Matthews correlation, which hangs on that. Accuracy may fall a little.",
    ),
]
GateLearningRate = Annotated[
    float, TRAINING("--gate-learning-rate", "--gate-lr", metavar="RATE", help="Learning rate of the gates.")
]
WeightDecay = Annotated[
    float,
    TRAINING(
        metavar="RATE",
        help="AdamW weight decay of the task's head, with --method full of the whole model; all else has none.",
    ),
]
WarmupRatio = Annotated[
    float,
    TRAINING(
        metavar="FRACTION", help="Fraction of the steps in which learning rates rise; then they fall linearly to 0."
    ),
]
SaveEvery = Annotated[
    int | None,
    TRAINING(
        metavar="STEPS",
        help="Write a checkpoint every so many steps too, from which --resume goes on. Unless given: after each epoch.",
    ),
]
Resume = Annotated[
    Path | None,
    TRAINING(
        metavar="RUN",
        help="Go on with a run that was stopped, with its own settings, to the end that it would have come to. Only "
        "--json, --quiet and --debug go with it.",
    ),
]
Seed = Annotated[int, TRAINING(metavar="N", help="Seed of all that is random; the same seed gives the same run.")]
MeasuringSeed = Annotated[int, MEASURING("--seed", metavar="N", help="Seed of the made-up inputs.")]
PrecisionOption = Annotated[Precision, TRAINING(help="Arithmetic of the forward and backward pass.")]

# --- what gatepress wrote ------------------------------------------------------------------------

Written = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A run, a pruned or an ONNX directory, or an .onnx file.", show_default=False),
]

# --- where and how --------------------------------------------------------------------------------

DeviceOption = Annotated[Device, TRAINING(help="Where to compute; auto takes a CUDA GPU where there is one.")]
MeasuringDevice = Annotated[Device, MEASURING(help="Where to compute; auto takes a CUDA GPU where there is one.")]
Threads = Annotated[int | None, MEASURING(metavar="N", help="CPU threads to compute with; all cores unless given.")]
LayoutOption = Annotated[
    Layout,
    OUTPUT(
        help="How smaller matrices are stored. auto: what should be fastest on the runtime of --for. inner: without "
        "closed neurons, dimensions of heads and heads, no index operation at run time. index: also without zero "
        "inputs and outputs on the residual side, which an index operation picks (matrix gates only gain). paper: each "
        "matrix by its own indices, as in the paper; slow, to compare. stock: only what the original model class can "
        "hold, so that plain transformers loads it with no extra code."
    ),
]

TargetOption = Annotated[
    Target,
    OUTPUT("--for", help="Runtime that the layout auto is chosen for. The result runs anywhere, it is fastest there."),
]

LatencyTable = Annotated[
    str | None,
    OUTPUT(
        metavar="FILE",
        help="Times that the layout auto is chosen by, from another machine (gatepress bench --latency-table); "
        "analytic: built-in estimates, the same everywhere. Unless given, this machine is measured once, in "
        "some twenty seconds, where a choice hangs on it.",
    ),
]

Tokens = Annotated[
    int | None,
    OUTPUT(
        metavar="N",
        help="Tokens of one call that the layout auto is chosen for, batch size times sequence length: 1024 for "
        "batches of 8 x 128. Unless given, calls of 32 to 1,024 tokens count alike.",
    ),
]

Force = Annotated[bool, force_option("Replace an output that exists. It goes only when the new one is complete.")]
TrainForce = Annotated[
    bool, force_option("Replace an output that exists. It goes when the first checkpoint of the new run is complete.")
]
Json = Annotated[
    bool,
    OUTPUT(
        "--json/--no-json", help="Print one JSON object on stdout, errors too, in place of tables.", show_default=False
    ),
]
Quiet = Annotated[
    bool,
    OUTPUT(
        "--quiet/--no-quiet",
        "-q",
        help="No progress and no notes, only result, warnings and errors.",
        show_default=False,
    ),
]
Debug = Annotated[
    bool,
    OUTPUT(
        "--debug/--no-debug", help="Show tracebacks, and what the libraries underneath have to say.", show_default=False
    ),
]


# --- groups: what several commands take together (_groups.py) ---------------------------------------


@dataclass(frozen=True)
class Rows:
    """Which rows a model is measured on."""

    task: Task = None
    data_dir: DataDir = None
    validation_file: ValidationFile = None
    text_column: TextColumn = None
    text_pair_column: TextPairColumn = None
    label_column: LabelColumn = None
    max_validation_samples: MaxValidationSamples = None


@dataclass(frozen=True)
class MeasuredRows(Rows):
    """Which rows a model is measured on, and by which metric."""

    metric: MetricOption = None


@dataclass(frozen=True)
class TrainingRows:
    """Which rows a model learns from and is measured on: the fields of `DataSettings`."""

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
    """What is trained."""

    model: Model = TrainSettings.model
    revision: Revision = TrainSettings.revision
    embed: Embed = TrainSettings.embed


@dataclass(frozen=True)
class Gating:
    """Which gates there are and how they close."""

    budget: BudgetOption = TrainSettings.budget
    granularity: GranularityOption = TrainSettings.granularity
    gate_axes: GateAxesOption = TrainSettings.gate_axes
    matrices: Matrices = ALL_MATRICES
    controller: ControllerOption = TrainSettings.controller
    rotate_heads: RotateHeads = TrainSettings.rotate_heads
    lora_rank: LoraRank = TrainSettings.lora_rank
    lora_matrices: LoraMatrices = None


@dataclass(frozen=True)
class Schedule:
    """For how long, how fast, and behind which teacher."""

    distill: Distill = TrainSettings.distill
    hidden_weight: HiddenWeight = TrainSettings.hidden_weight
    open_epochs: OpenEpochs = TrainSettings.open_epochs
    closing: Closing = TrainSettings.closing
    epochs: Epochs = TrainSettings.epochs
    batch_size: BatchSize = TrainSettings.batch_size
    max_length: MaxLength = TrainSettings.max_length
    learning_rate: LearningRate = TrainSettings.learning_rate
    match_shares: MatchShares = TrainSettings.match_shares


@dataclass(frozen=True)
class Machine:
    """Where it is trained, in which arithmetic, from which seed."""

    seed: Seed = TrainSettings.seed
    device: DeviceOption = "auto"
    precision: PrecisionOption = TrainSettings.precision


@dataclass(frozen=True)
class Shown:
    """What a command prints: the parameters of `_console.session`."""

    as_json: Json = False
    quiet: Quiet = False
    debug: Debug = False
