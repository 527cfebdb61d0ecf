"""The main job on real tasks: train, evaluate, prune, evaluate, export, evaluate; one JSON of results.

    python benchmarks/main_job.py --data-dir GLUE --model NAME=DIRECTORY --work DIR [--task sst2 ...] [--seed 0 ...]

Every cell runs the command line as a user would. A cell whose run directory exists already is not trained again, so a
stopped sweep goes on where it was. The table is rendered from the JSON beside it, which is in `results` below `--work`
or where `--results` says. To render the committed one:

    python benchmarks/main_job.py --render
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from cells import (
    KEPT_IN,
    OF_TRAINING,
    ROWS,
    TASKS,
    add,
    common,
    gatepress,
    parser,
    read,
    sweep,
    train,
    trained_on,
)

FORMS = ("run", "pruned", "onnx")
KEY = ("encoder", "task", "asked_sparsity", "seed")


def cell(key: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Take one encoder through one task and return what was asked, counted and measured."""
    name, task, sparsity, seed = key
    places = {form: options.work / form / f"{name}-{task}-{sparsity:g}-{seed}" for form in FORMS}
    words = ("--task", task, "--sparsity", sparsity, *ROWS, "--seed", seed, *common(options))
    trained = train(places["run"], name, options.models[name], words, options)
    cut = gatepress("prune", places["run"], "-o", places["pruned"], "--force")
    graph = gatepress("export", places["pruned"], "-o", places["onnx"], "--force")
    scores = {form: gatepress("evaluate", place) for form, place in places.items()}
    return {
        **trained,
        "metric_in_training": trained["metric_value"],
        **{f"metric_{form}": scores[form]["metric_value"] for form in FORMS},
        "total_params": cut["total_params"],
        "max_abs_logit_diff": {"pruned": cut["max_abs_logit_diff"], "onnx": graph["max_abs_logit_diff"]},
    }


def render(cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    cells = sorted(cells, key=lambda c: (c["encoder"], TASKS.index(c["task"]), c["asked_sparsity"], c["seed"]))
    seeds = sorted({c["seed"] for c in cells})
    head = (
        "| encoder | task | metric | run | pruned | ONNX | gates asked | gates closed | encoder MACs removed "
        "| parameters | max logit difference, pruned / ONNX |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = [
        f"| {c['encoder']} | {_named(c, seeds)} | {c['metric_name']} "
        + "".join(f"| {c[f'metric_{form}']:.4f} " for form in FORMS)
        + f"| {c['asked_sparsity']:.1%} | {c['closed_gates'] / c['total_gates']:.2%} | {c['encoder_macs_removed']:.2%} "
        f"| {c['dense_params'] / 1e6:.1f}M → {c['total_params'] / 1e6:.1f}M "
        f"| {c['max_abs_logit_diff']['pruned']:.0e} / {c['max_abs_logit_diff']['onnx']:.0e} |"
        for c in cells
    ]
    one = cells[0]
    told = "one seed" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    machines = ", and ".join(dict.fromkeys(trained_on(c) for c in cells))
    note = (
        f"\n\nFirst 10,000 training rows at most, {told}, {one['granularity']} gates, {one['controller']} "
        f"controller, rank {one['lora_rank'] or 'of the method'}, trained in {one['precision']}, measured in float32 "
        f"on {machines}. Epochs: "
        + ", ".join(dict.fromkeys(f"{c['encoder']} {c['task']} {c['epochs']}" for c in cells))
        + ".\n"
    )
    return "# The main job on real tasks\n\n" + head + "\n".join(rows) + note


def _named(cell: dict[str, Any], seeds: list[int]) -> str:
    """Return a cell's task, with its seed where there are several."""
    return f"{cell['task']}, seed {cell['seed']}" if len(seeds) > 1 else str(cell["task"])


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    add(made, *OF_TRAINING, *KEPT_IN, "--task", "--seed")
    made.add_argument("--sparsity", type=float, default=0.5)
    return read(made, words)


def main() -> None:
    """Run the asked cells, or only render what is there."""
    options = parse()
    keys = [
        (name, task, options.sparsity, seed)
        for seed in options.seed or (0,)
        for name in options.models
        for task in options.task or TASKS
    ]
    sweep(options.results / "main_job.json", keys, KEY, partial(cell, options=options), render, options=options)


if __name__ == "__main__":
    main()
