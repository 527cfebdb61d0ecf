"""What a finetuned encoder becomes where it is deployed: its metric against its latency, whole and pressed.

    python benchmarks/deployed.py --data-dir GLUE --model minilm=DIRECTORY --model mpnet=DIRECTORY --work DIR

Takes the runs of `paper.py accuracy` in `--work` and trains those that are missing: full finetuning, and its result
pressed to a half, a quarter and an eighth. Each is pruned, exported to ONNX in float32 and in int8, measured on all
validation rows, and timed by turns with all others. Timing needs a quiet machine; what is built is kept in `--work`.
With `--embed` the models are embedders on STS-B: as they are, and pressed by themselves (`paper.py embedders`). Table
and figure are rendered from the JSON, which is in `results` below `--work` or where `--results` says. To render the
committed ones:

    python benchmarks/deployed.py --render
    python benchmarks/deployed.py --embed --render
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import (
    KEPT_IN,
    OF_TRAINING,
    Once,
    add,
    data_of,
    draw_both,
    gatepress,
    is_finished,
    keep,
    parser,
    read,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper import FINETUNED, KEY, PAPER_TASKS, place_of, trained

from gatepress.bench import endtoend
from gatepress.bench.figures import BLUE, FAINT, ORANGE
from gatepress.bench.record import Record, relative_to
from gatepress.files import RUN_FILE, replace_file, sha256_of

TASK, SEED = "sst2", 2
EMBEDDERS = {"task": "stsb", "metric": "spearman"}  # what these are measured by
DTYPES = ("float32", "int8")
BATCHES, LENGTHS = (1, 8), (32, 128)
WHOLE = ("full finetuning; the others: what it gave", "the model as it is; the others: the same")
SHOWN = ((1, 32), (8, 128))  # batch x length, in the table and the figure
TOLD = ("command", "encoder_macs_removed", "steps")  # by a training
ARMS = {FINETUNED: "all", "2x": "half", "4x": "a quarter", "8x": "an eighth"}  # and what is left of the encoder

Row = dict[str, Any]  # what one form of one model is, what it gives, and how long it takes


def measure(options: argparse.Namespace) -> list[Row]:
    """Build every form of every model, measure its metric, and time all of them in one run."""
    forms: dict[str, Row] = {}
    places: dict[str, Path] = {}
    experiment = "embedders" if options.embed else "accuracy"
    rows = ["--task", options.task, *data_of(options), *(("--metric", EMBEDDERS["metric"]) if options.embed else ())]
    for key in ((encoder, options.task, arm, options.seed) for encoder in options.models for arm in ARMS):
        if options.embed and key[2] == FINETUNED:
            run, report = Path(options.models[key[0]]), dict.fromkeys(TOLD)  # nobody trained it
        elif options.finished and not is_finished(place_of(experiment, key, options)):
            continue
        else:
            run, report = trained(experiment, key, options.models, options)
        for dtype, directory in _export(run, options.work / "deployed" / run.name, key[2]):
            name = f"{key[0]} {key[2]} {dtype}"
            scored = gatepress("evaluate", directory, *rows)
            forms[name] = {
                **dict(zip((*KEY, "dtype"), (*key, dtype), strict=True)),
                **{name: report[name] for name in TOLD},
                **{name: scored[name] for name in ("metric_name", "metric_value", "examples")},
            }
            places[name] = directory
    records = endtoend.run(places, batch_sizes=BATCHES, seq_lens=LENGTHS)
    cells = {(one.name, one.batch_size, one.seq_len): one for one in records}
    return [
        {**forms[name], "record": relative_to(one, cells[_whole(forms[name]), batch, length]).to_json()}
        for (name, batch, length), one in cells.items()
    ]


def _whole(row: Row) -> str:
    """Return the name of what a form is compared with: the same encoder, finetuned, in float32."""
    return f"{row['encoder']} {FINETUNED} {DTYPES[0]}"


def _export(run: Path, place: Path, arm: str) -> Iterator[tuple[str, Path]]:
    """Write the ONNX forms of a run beneath `place`, unless those of this very run are; yield (dtype, directory)."""
    made_of, manifest = place / "run.sha256", run / RUN_FILE
    digest = sha256_of(manifest if manifest.is_file() else run / "model.safetensors")
    if not made_of.exists() or made_of.read_text() != digest:  # it was trained anew
        shutil.rmtree(place, ignore_errors=True)
        replace_file(made_of, digest.encode())
    source = run if arm == FINETUNED else place / "pruned"
    if not source.exists():
        gatepress("prune", run, "-o", source)
    for dtype, words in zip(DTYPES, ((), ("--quantize", "int8")), strict=True):
        if not (place / dtype).exists():
            gatepress("export", source, "-o", place / dtype, *words)
        yield dtype, place / dtype


def _embedders(rows: list[Row]) -> bool:
    """Say whether the models are embedders, by the commands that trained them."""
    return any("--embed" in (row["command"] or "") for row in rows)


def at(rows: list[Row], batch: int, length: int, **facts: Any) -> list[tuple[Row, Record]]:
    """Return the rows of one batch and length that have these `facts`, each with its record."""
    pairs = [(row, Record.from_json(row["record"])) for row in rows if facts.items() <= row.items()]
    return [(row, record) for row, record in pairs if (record.batch_size, record.seq_len) == (batch, length)]


def render(rows: list[Row]) -> str:
    """Return the table in Markdown: a line for each model, float32 beside int8."""
    one, first = rows[0], Record.from_json(rows[0]["record"])
    sizes = [f"{batch} x {length}" for batch, length in SHOWN]
    columns = ["encoder", "left of it", "parameters"]
    columns += [f"{what}, {dtype}" for dtype in DTYPES for what in (one["metric_name"], "file", *sizes)]
    text = f"# {one['task']}: what is deployed\n\n| {' | '.join(columns)} |\n|---|---{'|--:' * (len(columns) - 2)}|\n"
    for encoder in dict.fromkeys(row["encoder"] for row in rows):
        for arm, left in ARMS.items():
            line = [encoder, left]
            for dtype in DTYPES:
                found = [pair for size in SHOWN for pair in at(rows, *size, encoder=encoder, arm=arm, dtype=dtype)]
                if not found:
                    break
                row, record = found[0]
                if dtype == DTYPES[0]:
                    line.append(f"{(record.parameters or 0) / 1e6:.1f} M")
                line += [f"{row['metric_value']:.4f}", f"{(record.size_bytes or 0) / 1e6:.1f} MB"]
                line += [f"{r.latency_ms_median:.1f} ms ({r.relative_time_factor:.2f}x)" for _, r in found]
            text += f"| {' | '.join(line)} |\n" if len(line) == len(columns) else ""
    return text + (
        f"\nONNX Runtime, {first.threads} threads of {first.device_name}, all by turns in one run, median of "
        f"{first.repetitions}; batch x tokens, in brackets how many times as fast as the whole model in float32. "
        f"*all*: {WHOLE[_embedders(rows)]}, pressed with its teacher to so much of the encoder's "
        f"multiply-accumulates. {one['metric_name']} of each ONNX form on all {one['examples']:,} validation rows, "
        f"seed {one['seed']}. All batches and lengths, spreads and commands: the JSON.\n"
    )


def draw(rows: list[Row], figure: Figure) -> None:
    """Draw metric against latency on a figure: a panel for each batch and length."""
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    figure.set_size_inches(8.4, 3.9)
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for axes, size in zip(panels, SHOWN, strict=True):
        for encoder, color in zip(encoders, (BLUE, ORANGE, "#009e73"), strict=False):
            for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
                _curve(axes, at(rows, *size, encoder=encoder, dtype=dtype), f"{encoder}, {dtype}", color, style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "25" else "")
        axes.margins(y=0.12)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set(xlabel=f"one batch of {size[0]} x {size[1]} tokens in ONNX Runtime (ms)")
    panels[0].set_ylabel(f"{rows[0]['metric_name']} on {rows[0]['task']}")
    panels[0].legend(frameon=False, fontsize=8.5)


def _curve(axes: Axes, points: list[tuple[Row, Record]], label: str, color: str, style: str) -> None:
    xs, ys = [record.latency_ms_median for _, record in points], [row["metric_value"] for row, _ in points]
    axes.plot(xs, ys, style, color=color, marker="o", markersize=4, linewidth=1.5, label=label)
    for x, y, (row, _) in zip(xs, ys, points, strict=True):
        axes.annotate(row["arm"], (x, y), (0, -11), textcoords="offset points", ha="center", color=color, fontsize=7.5)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    add(made, *OF_TRAINING, *KEPT_IN)
    made.add_argument("--task", action=Once, choices=PAPER_TASKS, help=f"{TASK} unless given")
    made.add_argument("--seed", action=Once, type=int, default=SEED)
    made.add_argument("--embed", action="store_true", help="embedders in place of classifiers")
    made.add_argument("--finished", action="store_true", help="only models whose training is in --work: train none")
    options = read(made, words)
    if options.embed and options.task:
        made.error(f"--embed is measured on {EMBEDDERS['task']}; drop --task")
    options.task = options.task or (EMBEDDERS["task"] if options.embed else TASK)
    return options


def main() -> None:
    """Measure, or only render."""
    options = parse()
    path = options.results / f"deployed{'_embedders' if options.embed else ''}.json"
    rows = keep(path, None if options.render else measure(options), render)
    draw_both(path, partial(draw, rows))


if __name__ == "__main__":
    main()
