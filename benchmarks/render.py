"""Render every table and figure from the JSON beside it, and the README's figures from the same files.

    python benchmarks/render.py

Nothing in a rendered file is typed by hand; running this twice changes nothing.
"""

import argparse
import itertools
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deployed
import main_job
import paper
import pruning_baselines
import resume
import shares
import sizes
import steps
import training_time
from cells import RESULTS, TASKS, draw_both, parser
from speed import AGAIN, GRID

from gatepress.bench import render
from gatepress.bench.record import Record

README = Path(__file__).parents[1] / "README.md"
GUIDE = README.parent / "docs/which-sparsity.md"
TIMINGS = (
    "matmul",
    "speed_base",
    "speed_base_xeon",
    "speed_base_avx2",
    "speed_trained",
    "speed_trained_xeon",
    "speed_trained_xeon_penalty",
    "speed_trained_avx2",
    "speed_structured_minilm",
    "speed_structured_roberta-base",
    "speed_deberta",
    "speed_modernbert",
    "speed_gte",
    "speed_eurobert",
    "speed_qwen3",
    "speed_gemma3",
    "speed_bf16",
    "speed_openvino",
    "paper_figure3b",
)
BATCH, LENGTH = 8, 128  # of the latencies in the README
FIRST, SIZE, LEAD = "mpnet", "12 layers of 768", "4x"  # the encoder of its first table, and what its sentence is about
ENCODER = "minilm"  # of its table of other pruning
NAMES = {"sst2": "SST-2", "stsb": "STS-B", "rte": "RTE", "cola": "CoLA"}
TOLERATED = 0.03  # what a chosen layout may be slower than the best fixed one


def defaults_table(rows: list[dict[str, Any]]) -> str:
    """Return why the defaults are what they are, in Markdown."""
    head = (
        "# Why the defaults are what they are\n\nMiniLM (6 x 384) on SST-2, first 10,000 training rows, "
        "five epochs, one seed, trained in bf16, validation accuracy over 872 rows (one row is 0.0011: small "
        "differences mean nothing). MACs are those of the encoder's matrices that are really left, without any "
        "index operation.\n\n| gates | closed by | rank | asked | closed | encoder MACs left | accuracy | from |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {row['gates']} | {row['controller']} | {row['lora_rank']} | {row['asked']:.0%} | {row['closed']:.2%} "
        f"| {row['macs_left']:.1%} | {row['accuracy']:.4f} | {row['command']} |"
        for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def grid_table(rows: list[dict[str, Any]]) -> str:
    """Return whether the chosen layout was ever slower than a fixed one, in Markdown."""
    names = ["shape", "runtime", "closed", "batch x length", "dense", "inner", "index", "auto", "auto against dense"]
    names += ["the fastest beside it", "against that", "in single rounds", "noise"]
    lines, behind, noise = [], [], []
    for row in sorted(rows, key=_of_grid):
        ms = {name: f"{statistics.median(times):.2f}" for name, times in row["ms"].items()}
        over = {name: statistics.median(ratios) - 1 for name, ratios in row["auto_over"].items()}
        noise.append(abs(over.pop(AGAIN)))
        best = max(over, key=over.__getitem__)
        behind.append(over[best])
        rounds = [ratio - 1 for ratio in row["auto_over"][best]]
        cells = [row["encoder"], row["target"], f"{row['sparsity_asked']:.0%}"]
        cells += [f"{row['batch_size']} x {row['seq_len']}"]
        cells += [ms.get(name, "as auto") for name in ("dense", "inner", "index", "auto")]
        cells += [f"{1 / (1 + over['dense']):.2f}x", best, f"{behind[-1]:+.1%}"]
        cells += [f"{min(rounds):+.1%} to {max(rounds):+.1%}", f"{noise[-1]:.1%}"]
        lines.append(f"| {' | '.join(cells)} |\n")
    one = rows[0]
    counts = " or ".join(str(count) for count in sorted({len(row["ms"]["auto"]) for row in rows}))
    releases = " and ".join(sorted({row["versions"]["gatepress"] for row in rows}))
    above = sum(1 for part in behind if part > TOLERATED)
    return (
        "# Is the chosen layout ever slower than a fixed one?\n\n`python benchmarks/speed.py grid`. Matrix gates "
        "closed at random, on both axes of every matrix; `auto` is chosen for the tokens of the row (`prune --tokens`, "
        f"batch times length). Each row has {counts} rounds; in a round all "
        f"layouts are opened anew and take turns, {one['repetitions']} calls each. Times are milliseconds, medians of "
        "the medians of rounds. *Against that*: `auto` in parts of the one of dense, inner and index that is the "
        "fastest beside it, by calls that took turns in pairs: the median of a round, the median of rounds, and the "
        "least and the largest of them. *Noise*: the same of `auto` against `auto` opened once more. A fixed layout "
        f"that is `auto`, byte by byte, was not timed beside it. {one['device_name']}, {one['threads']} threads; "
        f"gatepress {releases}.\n\n"
        f"Of {len(rows)} rows {above} are more than {TOLERATED:.0%} behind, the worst {max(behind):.1%}; the median "
        f"is {statistics.median(behind):+.1%}. Between `auto` and itself half of the rows lie up to "
        f"{statistics.median(noise):.1%} apart, the worst {max(noise):.1%}.\n\n"
        f"| {' | '.join(names)} |\n|---|---|--:|---|--:|--:|--:|--:|--:|---|--:|---|--:|\n" + "".join(lines)
    )


def _of_grid(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return where a row stands: rows that are measured anew come last in the file."""
    return row["encoder"], row["sparsity_asked"], list(GRID).index(row["target"]), row["batch_size"], row["seq_len"]


def collapse_table(result: dict[str, Any]) -> str:
    """Return time and memory of prune, in Markdown."""
    base, imports = result["base_bytes"], result["rss_of_the_imports_alone_bytes"]
    seconds = result["seconds_of_the_imports_alone"]
    lines = [
        f"| {run['layout']} | {run['seconds']:.1f} s | {run['seconds'] - seconds:.1f} s "
        f"| {run['peak_rss_bytes'] / 1e6:,.0f} MB "
        f"| {(run['peak_rss_bytes'] - imports) / base:.2f} |"
        for run in result["runs"]
    ]
    return (
        f"# Time and memory of `gatepress prune`\n\nShape {result['shape']}, weights of {base / 1e6:,.0f} MB, "
        "matrix gates "
        "at 0.3 on both axes; a fresh process from start to exit, checks and parity included. A process that has only "
        f"imported gatepress and torch takes {seconds:.1f} s and holds {imports / 1e6:,.0f} MB.\n\n| layout | time "
        "| behind the imports | peak resident memory | above the imports, in base weights |\n|---|--:|--:|--:|--:|\n"
        + "\n".join(lines)
        + "\n"
    )


def fusions_table(rows: list[dict[str, Any]]) -> str:
    """Return what ONNX Runtime fuses, in Markdown: a column for each operator."""
    names = sorted({name for row in rows for name in row["fused_operators"]})
    lines = [
        f"| {row['encoder']} | {row['dtype']} | {row['layout']} | "
        + " | ".join(str(row["fused_operators"].get(name, "")) for name in names)
        + f" | {sum(row['operators'].values())} |"
        for row in rows
    ]
    return (
        "# What ONNX Runtime fuses\n\n`python benchmarks/speed.py fusions`. Fused or whole operators that it runs, and "
        "all operators, by the shape and the layout of the graph; matrix gates, 30 % closed on both axes.\n\n"
        f"| shape | dtype | layout | {' | '.join(names)} | all |\n|---|---|---|{'--:|' * (len(names) + 1)}\n"
        + "\n".join(lines)
        + "\n"
    )


def kernels_table(rows: list[dict[str, Any]]) -> str:
    """Return single products and index operations, in Markdown."""
    lines = [
        f"| {row['runtime']} | {row['what']} | {row['shape'][0]} x {row['shape'][1]} | {row['tokens']:,} "
        f"| {row['ms']:.3f} ms |"
        for row in rows
    ]
    return (
        "# Single products and index operations\n\n`python benchmarks/speed.py kernels`; the fastest of 30 calls on "
        f"{rows[0]['device_name']}, {rows[0]['threads']} threads. A product is `[out, in]`, an index operation "
        "goes from "
        "the first width to the second.\n\n| runtime | what | shape | tokens | time |\n|---|---|---|--:|--:|\n"
        + "\n".join(lines)
        + "\n"
    )


def speed_figures() -> str:
    """Return what pruning buys against what a user would deploy instead, on each machine in one interleaved run."""
    machines, trained = (
        [_largest(render.read(RESULTS / f"speed_{gates}{machine}.json")) for machine in ("", "_xeon", "_avx2")]
        for gates in ("base", "trained")
    )
    rows = "\n".join(
        f"| {same[0].name} "
        + "".join(f"| {one.latency_ms_median:,.0f} ms | {one.relative_time_factor:.2f}x " for one in same)
        + "|"
        for same in zip(*machines, strict=True)
    )
    titles = "".join(f"| {records[0].device_name} | factor " for records in machines)
    dense = machines[0][0]
    releases = ", ".join(one[0].versions["gatepress"] for one in machines)
    return (
        f"| {BATCH} x {LENGTH} tokens {titles}|\n|---|{'--:|' * (2 * len(machines))}\n{rows}\n\n"
        "RoBERTa-base shape with random weights. 30 % of each of the paper's gate vectors is closed at random, which "
        f"leaves {_left(machines)} of {(dense.macs or 0) / 1e9:.0f} G multiply-accumulates. Trained gates leave "
        f"{_left(trained)}; gatepress ORT is then {_factors(trained, 'gatepress ORT')} times as fast as dense ORT, and "
        f"its int8 form {_factors(trained, 'gatepress ORT int8')} times.\n\n*masked* is the gated model before it is "
        f"pruned; *paper layout* cuts each matrix by its own indices. {dense.threads} threads, median of "
        f"{dense.repetitions}, one interleaved run on each machine (`gatepress bench RUN --alternatives`), "
        f"by gatepress {releases}. All batches and lengths, the trained runs and structured gates: "
        "[benchmarks](benchmarks/README.md).\n"
    )


def _left(machines: list[list[Record]]) -> str:
    """Return what the forms of gatepress compute, from the least to the most, in billions."""
    macs = [(one.macs or 0) / 1e9 for records in machines for one in records if one.name.startswith("gatepress")]
    return f"{min(macs):.0f} to {max(macs):.0f}"


def _factors(machines: list[list[Record]], name: str) -> str:
    factors = [one.relative_time_factor or 0 for records in machines for one in records if one.name == name]
    return f"{min(factors):.1f} to {max(factors):.1f}"


def _largest(records: list[Record]) -> list[Record]:
    return [record for record in records if (record.batch_size, record.seq_len) == (BATCH, LENGTH)]


def readme_figures() -> str:
    """Return the README's sentence and table, from what is deployed of one encoder."""
    rows = json.loads((RESULTS / "deployed.json").read_text())
    found = {
        (arm, dtype): deployed.at(rows, BATCH, LENGTH, encoder=FIRST, arm=arm, dtype=dtype)[0]
        for arm, dtype in itertools.product(deployed.ARMS, deployed.DTYPES)
    }
    dense_int8 = found["full", "int8"][1]
    whole, pressed, small = (found[key] for key in (("full", "float32"), (LEAD, "float32"), (LEAD, "int8")))
    lead = (
        f"with {deployed.ARMS[LEAD]} of its encoder's work left, {FIRST} finetuned on SST-2 reaches "
        f"**{pressed[0]['metric_value']:.1%}** accuracy ({whole[0]['metric_value']:.1%} before) at "
        f"**{pressed[1].relative_time_factor:.1f}x** the speed in ONNX Runtime, and {small[0]['metric_value']:.1%} at "
        f"{small[1].relative_time_factor:.1f}x in int8."
    )
    plain = [found[arm, "float32"] for arm in deployed.ARMS]
    lines = [
        ("encoder multiply-accumulates", [f"{1 - row['encoder_macs_removed']:.1%}" for row, _ in plain]),
        ("parameters", [f"{(record.parameters or 0) / 1e6:.1f} M" for _, record in plain]),
    ]
    for dtype in deployed.DTYPES:
        cells = [found[arm, dtype] for arm in deployed.ARMS]
        lines += [
            (f"accuracy, {dtype}", [f"{row['metric_value']:.1%}" for row, _ in cells]),
            (f"ONNX file, {dtype}", [f"{(record.size_bytes or 0) / 1e6:.1f} MB" for _, record in cells]),
            (
                f"{BATCH} x {LENGTH} tokens, {dtype}",
                [f"{record.latency_ms_median:.1f} ms ({record.relative_time_factor:.1f}x)" for _, record in cells],
            ),
        ]
    head = f"| {FIRST} ({SIZE}) on SST-2, 10,000 rows | before | " + " | ".join(
        f"after: {left}" for left in [*deployed.ARMS.values()][1:]
    )
    table = "\n".join(f"| {name} | {' | '.join(values)} |" for name, values in lines)
    record = whole[1]
    return (
        f"Measured: {lead}\n\n{head} |\n|---|{'--:|' * len(deployed.ARMS)}\n{table}\n\n"
        f"gatepress {record.versions['gatepress']}, ONNX Runtime on {record.device_name}, {record.threads} threads, "
        f"median of {record.repetitions} interleaved repetitions; {whole[0]['examples']} validation rows (one row is "
        "0.1 %); one seed. *Before* is full finetuning; *after* is its result, pressed with "
        "`gatepress train --model runs/full`. "
        "Factors are relative to the dense model in float32; relative to the dense model in int8, "
        f"{deployed.ARMS[LEAD]} in int8 is {dense_int8.latency_ms_median / small[1].latency_ms_median:.1f}x. "
        "Other lengths and a small encoder: [what is deployed](benchmarks/results/deployed.md).\n"
    )


def readme_pruned() -> str:
    """Return what is kept at equal multiply-accumulates by gates and by other ways to prune, in Markdown."""
    records = json.loads((RESULTS / "pruning_baselines.json").read_text())
    gates = pruning_baselines.of_gates([one for one in records if one["encoder"] == ENCODER])
    compared = {pruning_baselines.same(one) for one in gates}
    records = [one for one in records if pruning_baselines.same(one) in compared]
    names = {pruning_baselines.GATES: "gates", "taylor": "Taylor", "magnitude": "magnitude"}
    values = defaultdict(list)
    for one in (*records, *gates):
        values[one["task"], one["method"], one["asked_kept"]].append(one["metric_value"])
    for one in gates:
        values[one["task"], "full", one["asked_kept"]].append(one["full_metric_value"])
    fractions = sorted({one["asked_kept"] for one in records}, reverse=True)
    columns = [(method, kept) for kept in fractions for method in ("full", *names)]
    left = {round(1 - removed, 6): deployed.ARMS[arm] for arm, removed in paper.FACTORS.items()}
    titles = ["full finetuning" if method == "full" else f"{left[kept]}: {names[method]}" for method, kept in columns]
    metrics = {one["task"]: one["metric_name"] for one in records}
    rows = [
        f"| {task} ({metrics[task]}) | {' | '.join(_mean(values[task, *column]) for column in columns)} |"
        for task in TASKS
        if task in metrics
    ]
    return (
        f"| MiniLM | {' | '.join(titles)} |\n|---|{'--:|' * len(columns)}\n"
        + "\n".join(rows)
        + "\n\nAll at equal multiply-accumulates, mean over seeds (their number in square brackets, if not 1). The "
        "columns of a size start from the full finetuning in front of them and train for the same number of epochs, "
        "gates with a teacher, as is their default. *Taylor* is Torch-Pruning's score. With so few seeds the order of "
        "a row is what counts: over all seeds, gates keep less of CoLA at an eighth "
        "([table](benchmarks/results/paper_accuracy.md)).\n\n"
        f"{pruning_baselines.won(records, gates)} "
        "[How](benchmarks/results/pruning_baselines.md).\n\n"
        f"Finetuned again with the teacher that gates have, Taylor's cut comes nearer: {_taught()} "
        "[Table](benchmarks/results/pruning_taught.md).\n"
    )


def readme_kept() -> str:
    """Return what is kept of full finetuning's metric on average and on the task that loses most, in Markdown."""
    cells = _cells()
    sentences, seeds = [], set()
    for encoder, title in ((ENCODER, "MiniLM"), (FIRST, FIRST)):
        kept = []
        for arm in paper.FACTORS:
            seeds |= {len(paper._values(cells, encoder, task, arm)) for task in TASKS}
            parts = _parts(cells, encoder, arm)
            least = min(parts, key=lambda task: parts[task])
            lost = f"lowest: {NAMES[least]}, {parts[least]:.0%}"
            kept.append(f"{statistics.mean(parts.values()):.1%} at {deployed.ARMS[arm]} ({lost})")
        sentences.append(f"{title} {', '.join(kept)}")
    told = json.loads((RESULTS / "shares.json").read_text())
    matched = [{**one, "metric_value": one["matched"]["metric_value"]} for one in told]
    averages, counted = _averages(cells, matched)
    moved = [f"{average:.1%} at {deployed.ARMS[arm]}" for arm, average in averages.items()]
    finetuned = json.loads((RESULTS / "paper_matched.json").read_text())
    larger = paper._part(finetuned, FIRST, "cola", "4x") or 0.0
    both = len(paper._values(finetuned, FIRST, "cola", "4x"))
    return (
        f"- Some accuracy is lost. What is kept of full finetuning's metric, on average over {len(TASKS)} tasks:\n"
        f"  - As trained, with `{paper.AS_TRAINED}`: {'; '.join(sentences)} "
        f"([table](benchmarks/results/paper_accuracy.md), {min(seeds)} to {max(seeds)} seeds, several releases).\n"
        "  - With `--match-shares` in finetuning and in pressing, CoLA's default since 0.33: MiniLM "
        f"{', '.join(moved)} ([table](benchmarks/results/shares.md), {counted} seeds of CoLA). mpnet keeps "
        f"{larger:.0%} of its CoLA at a quarter ([table](benchmarks/results/paper_matched.md), {both} seeds).\n"
    )


def guide_small() -> str:
    """Return what MiniLM keeps, medians over seeds, in Markdown."""
    cells = _cells()

    def shown(task: str, arm: str) -> str:
        part = paper._part(cells, ENCODER, task, arm) or 0.0
        return f"{statistics.median(paper._values(cells, ENCODER, task, arm).values()):.3f} ({part:.0%})"

    return _by_task(shown)


def guide_large() -> str:
    """Return what the larger encoder keeps, seed by seed, in Markdown."""
    cells = _cells()

    def shown(task: str, arm: str) -> str:
        values, full = (paper._values(cells, FIRST, task, one) for one in (arm, paper.FINETUNED))
        return ", ".join(f"{value:.3f} of {full[seed]:.3f}" for seed, value in sorted(values.items()))

    return _by_task(shown)


def _cells(experiment: str = "accuracy") -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((RESULTS / f"paper_{experiment}.json").read_text())
    return cells


def _parts(cells: list[dict[str, Any]], encoder: str, arm: str) -> dict[str, float]:
    """Return what an arm keeps of full finetuning's metric, by task."""
    return {task: paper._part(cells, encoder, task, arm) or 0.0 for task in TASKS}


def _averages(cells: list[dict[str, Any]], instead: list[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """Return what MiniLM keeps on average over the tasks, by arm, and how many seeds there are `instead`.

    Those cells stand in place of all others of their tasks.
    """
    own = [one for one in instead if one["encoder"] == ENCODER]
    tasks = {one["task"] for one in own}
    every = [*own, *(one for one in cells if one["task"] not in tasks)]
    averages = {arm: statistics.mean(_parts(every, ENCODER, arm).values()) for arm in paper.FACTORS}
    return averages, len({one["seed"] for one in own})


def _by_task(shown: Callable[[str, str], str]) -> str:
    """Return a table of what is `shown` of a task and an arm: a row for each size."""
    rows = [f"| {deployed.ARMS[arm]} | {' | '.join(shown(task, arm) for task in NAMES)} |" for arm in paper.FACTORS]
    head = f"| multiply-accumulates | {' | '.join(NAMES.values())} |\n|---|{'--:|' * len(NAMES)}\n"
    return head + "\n".join(rows) + "\n"


def _taught() -> str:
    others, gates = pruning_baselines.apart(json.loads((RESULTS / "pruning_taught.json").read_text()))
    return pruning_baselines.won([one for one in others if one["method"] == "taylor-taught"], gates)


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" [{len(values)}]" if len(values) > 1 else "") if values else ""


TABLES: dict[str, Callable[[Any], str]] = {
    "defaults": defaults_table,
    **dict.fromkeys(("deployed", "deployed_embedders"), deployed.render),
    "fusions": fusions_table,
    "kernels": kernels_table,
    "main_job": main_job.render,
    **{f"paper_{name}": partial(paper.render, experiment) for name, experiment in paper.EXPERIMENTS.items()},
    "pruning_baselines": pruning_baselines.render,
    "pruning_taught": pruning_baselines.render_taught,
    "resume": resume.render,
    "shares": shares.render,
    "sizes": sizes.render,
    "speed_collapse": collapse_table,
    "speed_grid": grid_table,
    "steps": steps.render,
    "steps_bf16": steps.render,
    "training_time": training_time.render,
}
FIGURES: dict[str, Callable[[Any, Any], None]] = {
    **dict.fromkeys(("deployed", "deployed_embedders"), deployed.draw),
    **{f"paper_{name}": partial(paper.draw, one) for name, one in paper.EXPERIMENTS.items() if one.line},
}
BLOCKS = {
    README: {"figures": readme_figures, "speed": speed_figures, "pruned": readme_pruned, "kept": readme_kept},
    GUIDE: {"small": guide_small, "large": guide_large},
}


def tables() -> Iterator[tuple[Path, str]]:
    """Yield every table that is rendered from one file here, and where it belongs."""
    for name, table in TABLES.items():
        source = RESULTS / f"{name}.json"
        if source.exists():
            yield source.with_suffix(".md"), table(json.loads(source.read_text()))


def documents() -> Iterator[tuple[Path, str]]:
    """Yield every document with the figures between its marks rendered anew."""
    for path, blocks in BLOCKS.items():
        text = path.read_text()
        for mark, block in blocks.items():
            plain = block().replace("\\", r"\\")
            text = re.sub(rf"(?s)(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", rf"\g<1>{plain}\g<2>", text)
        yield path, text


def figures() -> Iterator[tuple[Path, Callable[[Any], None]]]:
    """Yield every figure that is drawn from one file here, without a suffix, and what draws it."""
    for name, draw in FIGURES.items():
        source = RESULTS / f"{name}.json"
        if source.exists():
            yield source.with_suffix(""), partial(draw, json.loads(source.read_text()))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, which has no options."""
    return parser(__doc__).parse_args(words)


def main() -> None:
    """Write every rendered file."""
    parse()
    for path, text in tables():
        path.write_text(text)
    for path, draw_on in figures():
        draw_both(path, draw_on)
    for name in TIMINGS:
        records = render.read(RESULTS / f"{name}.json")
        render.write(records, RESULTS / f"{name}.md", force=True)
        for suffix in ("svg", "png"):
            render.plot(records, RESULTS / f"{name}.{suffix}", force=True)
    for path, text in documents():
        path.write_text(text)


if __name__ == "__main__":
    main()
