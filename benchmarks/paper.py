"""The tables and figures of the paper that are made of trainings, and ours beside them: one command each.

    python benchmarks/paper.py table4 --size laptop --data-dir GLUE --model minilm=DIRECTORY --work DIR
    python benchmarks/paper.py table2 --size paper --device cuda --work DIR

`--size paper` takes the paper's encoders, tasks and five seeds: it needs a GPU and the hub. `--size laptop` takes the
encoders that `--model` names and the four tasks that have few rows; `--task`, `--seed` and `--arm` choose among them
(`paper.py table4 --help` lists them). A stopped sweep goes on where it was, and one failing run does not stop the
others. Every cell is one `gatepress train`, whose command is in the JSON. Tables show the median over seeds; they and
the figures are rendered from the JSON, which is in `results` below `--work` or where `--results` says. To render the
committed ones:

    python benchmarks/paper.py table4 --render
"""

import argparse
import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from cells import (
    EPOCHS,
    FULL,
    KEPT_IN,
    MAX_ROWS,
    OF_TRAINING,
    ROWS,
    TASKS,
    Once,
    add,
    common,
    data_of,
    gatepress,
    on_gpu,
    parser,
    pressed_epochs,
    read,
    run_of,
    sweep,
    train,
    trained_on,
)
from datasets import Dataset
from pyarrow import parquet

from gatepress.bench import render as timings
from gatepress.config import DataSettings
from gatepress.runtime import torch_device
from gatepress.tasks.sources import load_rows

PAPER_TASKS = ("cola", "stsb", "mrpc", "rte", "sst2", "mnli", "qnli", "qqp")
PAPER_MODELS = {"roberta-base": "FacebookAI/roberta-base", "roberta-large": "FacebookAI/roberta-large"}
PAPER_GATES = ("--granularity", "matrix", "--controller", "penalty")
PAPER_RANK = ("--lora-rank", 8)
WITHOUT_FFN = ("--matrices", "q,k,v,o", "--gate-axes", "out")
FACTORS = {"2x": 0.5, "4x": 0.75, "8x": 0.875}  # fewer multiply-accumulates of the encoder -> fraction removed
SEEDS = 5
SPREAD = 3  # seeds from which on a table tells the lowest and the highest
FINETUNED = "full"  # the arm that others are measured by
FROM_FINETUNED = "<full>"  # among the words of an arm: it starts from what that arm trained
PRESSED = (FROM_FINETUNED, "--distill")
AS_THEY_ARE = "--no-rotate-heads"
WHOLE = ("--granularity", "heads")
MATCHED, AS_TRAINED = "--match-shares", "--no-match-shares"  # pruning baselines and the paper know the second alone
KEY = ("encoder", "task", "arm", "seed")
SENTENCE = range(3, 26)  # words of one that is taken from other tasks

Words = tuple[object, ...]


@dataclass(frozen=True)
class Texts:
    """Among the words of an arm: a file of texts without labels.

    So many training rows behind the first `MAX_ROWS`, or what other tasks have for a task with as many texts in a row.
    """

    count: int | None  # None: of other tasks

    def __str__(self) -> str:
        """Return what the arm calls it."""
        return "texts_of_others" if self.count is None else f"{self.count}_texts"

    def file(self, task: str, options: argparse.Namespace) -> Path:
        """Return the file; written unless it is there."""
        path: Path = options.work / f"{task}-{self}.parquet"
        if not path.exists():
            part = path.with_suffix(".part")
            rows = _rows_of(task, options.data_dir)
            if self.count is None:
                texts = _of_others(len(rows.spec.text_columns), min(MAX_ROWS, len(rows.train)), options.data_dir)
            else:
                texts = rows.train.select(range(MAX_ROWS, MAX_ROWS + self.count)).remove_columns("label")
            names = zip(texts.column_names, rows.spec.text_columns, strict=True)
            texts.rename_columns(dict(names)).to_parquet(part)
            part.replace(path)
        return path

    def epochs(self, without: int, task: str, options: argparse.Namespace) -> int:
        """Return in how many epochs there are about as many steps as in so many `without` texts."""
        rows = min(MAX_ROWS, len(_rows_of(task, options.data_dir).train))
        texts: int = parquet.read_metadata(self.file(task, options)).num_rows
        return max(1, round(without * rows / (rows + texts)))


@cache
def _rows_of(task: str, data_dir: Path | None) -> Any:
    return load_rows(DataSettings(task=task, data_dir=None if data_dir is None else str(data_dir)))


def _of_others(columns: int, count: int, data_dir: Path | None) -> Dataset:
    """Return `count` sentences, RTE's hypotheses and what there is room for of STS-B's; or all pairs of STS-B."""
    pairs = _rows_of("stsb", data_dir).train.remove_columns("label")
    if columns > 1:
        return pairs
    hypotheses, sentences = (
        [text for text in dict.fromkeys(texts) if len(text.split()) in SENTENCE]
        for texts in (_rows_of("rte", data_dir).train["text_pair"][:], [*pairs["text"][:], *pairs["text_pair"][:]])
    )
    draw = random.Random(0)  # noqa: S311 - no secret
    draw.shuffle(sentences)
    found = [*hypotheses, *sentences[: count - len(hypotheses)]]
    draw.shuffle(found)
    return Dataset.from_dict({"text": found})


@dataclass(frozen=True)
class Experiment:
    """What is compared: arms, each with the words that it adds to `gatepress train`."""

    title: str
    arms: dict[str, Words]
    tasks: tuple[str, ...] = PAPER_TASKS  # of the paper's size
    words: Words = ROWS
    paper_words: Words | None = None  # in their place at the paper's size
    line: str | None = None  # what the arms are points of, for a figure
    usual: tuple[str, ...] = ()  # arms that are run where none is asked for; (): all
    models: dict[str, str] = field(default_factory=lambda: PAPER_MODELS)


def _at(fractions: dict[str, float], *words: object) -> dict[str, Words]:
    return {name: (*words, "--sparsity", fraction) for name, fraction in fractions.items()}


BASELINES: dict[str, Words] = {
    FINETUNED: FULL,
    "LoRA": ("--method", "lora"),
    "LoRA-FA": ("--method", "lora-fa"),
    "VeRA": ("--method", "vera"),
    "LoRA-XS": ("--method", "lora-xs"),
    "FineGates": ("--method", "gates", *PAPER_GATES, "--sparsity", 0),
}
SIZES: dict[str, Words] = {FINETUNED: FULL, **_at(FACTORS, *PRESSED)}
EXPERIMENTS = {
    "table2": Experiment(
        "Table 2: accuracy and trained numbers",
        {
            **BASELINES,
            "FineGates, sparse": ("--method", "gates", *PAPER_GATES, "--sparsity", 0.1),
            "FineGates, sparser": ("--method", "gates", *PAPER_GATES, "--sparsity", 0.2),
        },
    ),
    "table3": Experiment(
        "Table 3: all rows of SST-2 and MNLI",
        BASELINES,
        tasks=("sst2", "mnli"),
        words=(),
    ),
    "table4": Experiment(
        "Table 4: variants",
        {
            "FineGates": ("--method", "gates", *PAPER_GATES, "--sparsity", 0),
            "FineGates w/o intermediate, output": ("--method", "gates", *PAPER_GATES, *WITHOUT_FFN, "--sparsity", 0),
            "FineGates+LoRA": (*PAPER_GATES, "--gate-axes", "out", *PAPER_RANK, "--sparsity", 0),
            "FineGates+LoRA w/o intermediate, output": (*PAPER_GATES, *WITHOUT_FFN, *PAPER_RANK, "--sparsity", 0),
        },
    ),
    "table5": Experiment(
        "Table 5: rank of the low-rank update at 40 % sparsity",
        {f"FineGates+LoRA, rank {r}": (*PAPER_GATES, "--lora-rank", r, "--sparsity", 0.4) for r in (16, 32, 64)},
        tasks=("mrpc",),
    ),
    "figure2": Experiment(
        "Figure 2: metric against sparsity",
        _at({f"{s:.0%}": s for s in (0, 0.1, 0.2, 0.3, 0.4, 0.5)}, "--method", "gates", *PAPER_GATES),
        tasks=("cola", "sst2", "stsb"),
        paper_words=(),  # all rows of SST-2
        line="sparsity asked of each gate vector",
    ),
    "accuracy": Experiment(
        "What is kept of full finetuning at fewer multiply-accumulates",
        {
            **SIZES,
            **{f"{name}, heads as they are": words for name, words in _at(FACTORS, *PRESSED, AS_THEY_ARE).items()},
            **{f"{name}, whole heads": words for name, words in _at(FACTORS, *PRESSED, *WHOLE).items()},
            **{f"{name}, from the pretrained model": words for name, words in _at(FACTORS).items()},
            **{f"{name}, gates alone": (*words, "--method", "gates") for name, words in _at(FACTORS).items()},
            **{f"{name}, penalty": (*words, "--controller", "penalty") for name, words in _at(FACTORS).items()},
        },
        tasks=TASKS,
        models={},
        usual=tuple(SIZES),
    ),
    "matched": Experiment(
        "Classes named as often as they occur, finetuned and pressed",
        SIZES,
        tasks=("cola",),
        words=(*ROWS, MATCHED),
        models={},
    ),
    "texts": Experiment(
        "What texts without labels are worth, in as many steps",
        {
            FINETUNED: FULL,
            **{
                f"{name}{f', {count:,} texts' if count else ''}": (
                    *(*PRESSED, "--sparsity", FACTORS[name]),
                    *(("--unlabelled-file", Texts(count)) if count else ()),
                )
                for name, count in itertools.product(("4x", "8x"), (0, 10_000, 30_000))
            },
            "4x, texts of other tasks": (*PRESSED, "--sparsity", FACTORS["4x"], "--unlabelled-file", Texts(None)),
        },
        tasks=("sst2",),
        models={},
    ),
    "embedders": Experiment(
        "Embedders that learn from themselves, without labels",
        _at(FACTORS, "--embed"),
        tasks=("stsb",),
        words=(),
        models={},
    ),
}
FIGURE_3 = {
    "figure3a": "Figure 3a: one weight, with columns removed",
    "figure3b": "Figure 3b: passes over CoLA's validation rows, by what Figure 2 trained",
}


def render(experiment: Experiment, cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: a row for each encoder and arm, medians over seeds by task."""
    tasks = sorted({c["task"] for c in cells}, key=[*PAPER_TASKS].index)
    averages = AVERAGES if FINETUNED in experiment.arms and len(tasks) > 1 else {}
    names = ["encoder", "arm", "trained, without head", "MACs removed", *tasks, *averages]
    names += ["steps", "seconds", "peak memory", "trained by"]
    text = f"# {experiment.title}\n\n| {' | '.join(names)} |\n" + "|---" * len(names) + "|\n"
    for encoder in sorted({c["encoder"] for c in cells}):
        for arm in experiment.arms:
            rows = [c for c in cells if (c["encoder"], c["arm"]) == (encoder, arm)]
            if not rows:
                continue
            counted = rows[0]["trainable_params"]
            usual = [c for c in rows if c["command"].startswith("gatepress")]  # without a setting that takes memory
            columns = [
                encoder,
                arm,
                f"{counted['total'] - counted['head']:,}",
                _range(rows, "encoder_macs_removed", "{:.1%}"),
                *(_shown(cells, encoder, task, arm) for task in tasks),
                *(_kept([part(cells, encoder, task, arm) for task in tasks]) for part in averages.values()),
                _range(rows, "steps"),
                _range(rows, "train_seconds"),
                _peak(usual or rows, told=any(map(on_gpu, cells))),
                _releases(rows),
            ]
            text += f"| {' | '.join(columns)} |\n"
    machines = sorted({f"{c['precision']} on {trained_on(c)}" for c in cells})
    return text + (
        f"\nMedian over seeds, their number in square brackets where it is not {SEEDS}; in round ones the part of "
        f"full finetuning's metric with the same seeds, where the table has it. {AVERAGED if averages else ''}"
        f"Trained in {', and in '.join(machines)}; measured in float32 on all "
        "validation rows; seconds with measuring and whatever else ran. "
        f"{LEFT if 'cola' in tasks and MATCHED not in experiment.words else ''}"
        "Peak memory is that of trainings whose command sets no environment. Commands, curves and versions stand in "
        f"the JSON.{_turned(cells)}{WHISKERS if experiment.line else ''}\n{_spread(experiment, cells, tasks)}"
    )


def _spread(experiment: Experiment, cells: list[dict[str, Any]], tasks: list[str]) -> str:
    """Return a table of the lowest and highest metric over seeds; empty where no cell has enough of them."""
    text = ""
    for encoder, arm in itertools.product(sorted({c["encoder"] for c in cells}), experiment.arms):
        found = [sorted(_values(cells, encoder, task, arm).values()) for task in tasks]
        if any(len(values) >= SPREAD for values in found):
            ends = (f"{values[0]:.4f} to {values[-1]:.4f}" if len(values) >= SPREAD else "" for values in found)
            text += f"| {' | '.join((encoder, arm, *ends))} |\n"
    head = f"| {' | '.join(('encoder', 'arm', *tasks))} |\n" + "|---" * (len(tasks) + 2) + "|\n"
    return text and f"\nLowest to highest over seeds, where there are {SPREAD} or more:\n\n{head}{text}"


def _peak(rows: list[dict[str, Any]], *, told: bool) -> str:
    """Return the peak memory of trainings; with `told` that of CPUs and that of GPUs, each by its name."""
    found = {}
    for name in ("CPU", "GPU"):
        peaks = [c["peak_memory_bytes"] for c in rows if on_gpu(c) == (name == "GPU")]
        if peaks:
            found[name] = f"{max(peaks) / 1e9:.1f} GB"
    return ", ".join(f"{peak} {name}" if told else peak for name, peak in found.items())


def _turned(cells: list[dict[str, Any]]) -> str:
    """Return in which cells heads were turned, where some were and some were not: releases before 0.17 could not."""
    counted = {}
    for arm in dict.fromkeys(c["arm"] for c in cells):
        turned = [c.get("rotate_heads", False) for c in cells if c["arm"] == arm]
        if any(turned):
            counted[arm] = f"in {sum(turned)} of {len(turned)} cells of `{arm}`"
    return f" Heads were turned before gates closed {', '.join(counted.values())}." if counted else ""


def _values(cells: list[dict[str, Any]], encoder: str, task: str, arm: str) -> dict[int, float]:
    """Return the metric by seed."""
    wanted = (encoder, task, arm)
    return {c["seed"]: c["metric_value"] for c in cells if (c["encoder"], c["task"], c["arm"]) == wanted}


def _part(cells: list[dict[str, Any]], encoder: str, task: str, arm: str) -> float | None:
    """Return the median over the median of full finetuning with the same seeds; None where one of them is missing."""
    values = _values(cells, encoder, task, arm)
    full = _values(cells, encoder, task, FINETUNED)
    if arm == FINETUNED or not values or not values.keys() <= full.keys():
        return None
    return statistics.median(values.values()) / statistics.median(full[seed] for seed in values)


def _paired(cells: list[dict[str, Any]], encoder: str, task: str, arm: str) -> float | None:
    """Return the mean over seeds of the part that each kept of full finetuning with that seed; None as `_part`."""
    if _part(cells, encoder, task, arm) is None:
        return None
    values, full = (_values(cells, encoder, task, one) for one in (arm, FINETUNED))
    return statistics.mean(value / full[seed] for seed, value in values.items())


AVERAGES = {"kept on average": _part, "seed by seed": _paired}
LEFT = f"CoLA's decisions lie where training left them (`{AS_TRAINED}`). "
WHISKERS = " In the figure, whiskers reach from the lowest seed to the highest."
AVERAGED = (
    "*kept on average*: the mean of these over tasks; *seed by seed*: of the mean over seeds of each seed's part of "
    "full finetuning with it, which some cells of older releases began with another training of. "
)


def _shown(cells: list[dict[str, Any]], encoder: str, task: str, arm: str) -> str:
    values = _values(cells, encoder, task, arm)
    if not values:
        return ""
    part = _part(cells, encoder, task, arm)
    shown = f"{statistics.median(values.values()):.4f}" + ("" if part is None else f" ({part:.2%})")
    return shown + (f" [{len(values)}]" if len(values) != SEEDS else "")


def _kept(parts: list[float | None]) -> str:
    """Return the mean over tasks of the part of full finetuning's metric; nothing where a task is missing."""
    there = [part for part in parts if part is not None]
    return f"{statistics.mean(there):.2%}" if len(there) == len(parts) else ""


def _releases(rows: list[dict[str, Any]]) -> str:
    """Return the first and the last release that trained one of the cells: a recipe changes with them."""
    known = sorted((c["versions"]["gatepress"] for c in rows), key=lambda name: [*map(int, name.split("."))])
    return " to ".join(dict.fromkeys((known[0], known[-1])))


def _range(rows: list[dict[str, Any]], key: str, form: str = "{:,.0f}") -> str:
    ends = [form.format(end(c[key] for c in rows)) for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def draw(experiment: Experiment, cells: list[dict[str, Any]], figure: Any) -> None:
    """Draw the metric over the arms: a panel for each task, a line for each encoder, whiskers to the farthest seeds."""
    tasks = sorted({c["task"] for c in cells}, key=[*PAPER_TASKS].index)
    figure.set_size_inches(4 * len(tasks), 3.2)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for encoder in sorted({c["encoder"] for c in cells}):
            values = {arm: _values(cells, encoder, task, arm).values() for arm in experiment.arms}
            medians = {arm: statistics.median(found) for arm, found in values.items() if found}
            spread = [[abs(end(values[arm]) - medians[arm]) for arm in medians] for end in (min, max)]
            axes.errorbar(list(medians), list(medians.values()), spread, marker="o", capsize=3, label=encoder)
        axes.set(title=task, xlabel=experiment.line, ylabel=cells[0]["metric_name"] if len(tasks) == 1 else "metric")
        axes.legend()
        axes.grid(alpha=0.3)


def trained(
    name: str, key: tuple[Any, ...], models: dict[str, str], options: argparse.Namespace
) -> tuple[Path, dict[str, Any]]:
    """Return the run of one cell of an experiment and what it says of itself; trained unless it is there."""
    encoder, task, arm, seed = key
    experiment = EXPERIMENTS[name]
    words, start, epochs = experiment.arms[arm], (encoder, models[encoder]), EPOCHS.get(task)
    if FROM_FINETUNED in words:
        full, _ = trained(name, (encoder, task, FINETUNED, seed), models, options)
        words, start = tuple(word for word in words if word != FROM_FINETUNED), ("run_of_full", str(full))
        epochs = pressed_epochs(task, FACTORS[arm.partition(",")[0]])
    for texts in (word for word in words if isinstance(word, Texts)):
        words = tuple(texts.file(task, options) if word is texts else word for word in words)
        epochs = epochs and texts.epochs(epochs, task, options)
    if options.size == "paper":  # these epochs are for small encoders: train for as long as gatepress does by default
        epochs = None
    words = ("--task", task, AS_TRAINED, *_fixed(experiment, options), *words, "--seed", seed, *common(options, epochs))
    run = place_of(name, key, options)
    told = train(run, *start, words, options)
    return run, {**told, "command": told["command"].replace(f"{options.work}/", "")}


def place_of(name: str, key: tuple[Any, ...], options: argparse.Namespace) -> Path:
    """Return where the run of one cell of an experiment is kept."""
    encoder, task, arm, seed = key
    experiment = EXPERIMENTS[name]
    return run_of(encoder, task, seed, (*_fixed(experiment, options), *experiment.arms[arm]), options)


def _fixed(experiment: Experiment, options: argparse.Namespace) -> Words:
    """Return the words that all arms of an experiment have at the size that is asked."""
    if options.size == "paper" and experiment.paper_words is not None:
        return experiment.paper_words
    return experiment.words


def figure_3(options: argparse.Namespace) -> None:
    """Time one weight (3a), or passes over CoLA's validation rows with what Figure 2 trained (3b); then draw it."""
    path = options.results / f"paper_{options.experiment}.json"
    if not options.render:
        path.parent.mkdir(parents=True, exist_ok=True)
        words = _weights(options) if options.experiment == "figure3a" else _passes(options)
        gatepress("bench", *words, "--device", torch_device(options.device), "-o", path, "--force")
    if not path.exists():
        raise SystemExit(f"{path}: is not there, so there is nothing to draw; time it first")
    records = timings.read(path)
    timings.write(records, path.with_suffix(".md"), force=True)
    for suffix in (".png", ".svg"):
        timings.plot(records, path.with_suffix(suffix), force=True)


def _weights(options: argparse.Namespace) -> list[object]:
    """Return the words of `gatepress bench` for 3a."""
    return ["--shape", "768x768,3072x768", "--repetitions", 100_000 if options.size == "paper" else 2_000]


def _passes(options: argparse.Namespace) -> list[object]:
    """Return the words of `gatepress bench` for 3b; what they name is trained and pruned unless it is there."""
    (encoder,) = options.models
    target = "cuda" if torch_device(options.device) == "cuda" else "torch-cpu"
    pruned: list[object] = []
    for arm in EXPERIMENTS["figure2"].arms:
        run, _ = trained("figure2", (encoder, "cola", arm, options.seed), options.models, options)
        pruned.append(options.work / "figure3b" / arm.strip("%"))
        gatepress("prune", run, "-o", pruned[-1], "--for", target, "--force")
    return [*pruned, "--task", "cola", *data_of(options), "--repetitions", 10]


def _usual_models(options: argparse.Namespace) -> dict[str, str]:
    """Return the models of an experiment at the paper's size, of Figure 3b the first; none at another."""
    if options.size != "paper":
        return {}
    models = EXPERIMENTS.get(options.experiment, EXPERIMENTS["figure2"]).models
    return dict(itertools.islice(models.items(), 1 if options.experiment == "figure3b" else None))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; each experiment has the options that it makes use of."""
    made = parser(__doc__)
    ways = made.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, title in {**{name: one.title for name, one in EXPERIMENTS.items()}, **FIGURE_3}.items():
        way = ways.add_parser(name, help=title.replace("%", "%%"), description=title)
        add(way, *(("--device",) if name == "figure3a" else OF_TRAINING), *KEPT_IN)
        way.add_argument("--size", choices=("laptop", "paper"), default="laptop")
        if name in EXPERIMENTS:
            add(way, "--task", "--seed", tasks=PAPER_TASKS)
            way.add_argument(
                "--arm", action="append", choices=EXPERIMENTS[name].arms, help=_of_arms(name), metavar="ARM"
            )
        elif name == "figure3b":
            way.add_argument("--seed", action=Once, type=int, default=0)
    options = read(made, words, _usual_models)
    if options.experiment == "figure3b" and len(options.models) > 1:
        made.error("--model: figure3b takes one")
    return options


def _of_arms(name: str) -> str:
    """Return which arms an experiment has, and which of them are run unless others are asked for."""
    experiment = EXPERIMENTS[name]
    usual = f"; {', '.join(experiment.usual)} unless given" if experiment.usual else ""
    return f"one of {', '.join(map(repr, experiment.arms))}{usual}".replace("%", "%%")


def main() -> None:
    """Run the asked experiment, or only render what is there."""
    options = parse()
    if options.experiment in FIGURE_3:
        figure_3(options)
        return
    experiment = EXPERIMENTS[options.experiment]
    paper = options.size == "paper"
    tasks = options.task or (experiment.tasks if paper else [t for t in TASKS if t in experiment.tasks] or TASKS)
    keys = [
        (encoder, task, arm, seed)
        for seed in options.seed or (range(SEEDS) if paper else (0,))
        for encoder in options.models
        for task in tasks
        for arm in options.arm or experiment.usual or experiment.arms
    ]

    def cell(key: tuple[Any, ...]) -> dict[str, Any]:
        return trained(options.experiment, key, options.models, options)[1]

    path = options.results / f"paper_{options.experiment}.json"
    figure = partial(draw, experiment) if experiment.line else None
    sweep(path, keys, KEY, cell, partial(render, experiment), draw=figure, options=options)


if __name__ == "__main__":
    main()
