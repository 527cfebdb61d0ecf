"""The main job on real tasks: train, evaluate, prune, evaluate, export, evaluate; one JSON of results.

    python benchmarks/main_job.py --data-dir GLUE --model NAME=DIRECTORY ... --work DIR [--task sst2 ...]

Every cell runs the command line as a user would. A cell whose run directory is there already is not
trained again, so a stopped sweep goes on where it was. The table beside the JSON is rendered from it:

    python benchmarks/main_job.py --render
"""

import argparse
from typing import Any

from cells import RESULTS, ROWS, TASKS, common, gatepress, models_of, parser, sweep, train

PATH = RESULTS / "main_job.json"
FORMS = ("run", "pruned", "onnx")
KEY = ("encoder", "task")


def cell(key: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Take one encoder through one task and return what was asked, counted and measured."""
    name, task = key
    places = {form: options.work / form / f"{name}-{task}" for form in FORMS}
    words = ("--task", task, "--sparsity", options.sparsity, *ROWS, *common(options))
    trained = train(places["run"], name, models_of(options)[name], words, options)
    cut = gatepress("prune", places["run"], "-o", places["pruned"], "--force")
    graph = gatepress("export", places["pruned"], "-o", places["onnx"], "--force")
    scores = {form: gatepress("evaluate", place) for form, place in places.items()}
    return {
        **trained,
        "metric_in_training": trained["metric_value"],
        **{f"metric_{form}": scores[form]["metric_value"] for form in FORMS},
        "total_params": cut["total_params"],
        "max_abs_logit_diff": {"pruned": cut["max_abs_logit_diff"], "onnx": graph["max_abs_logit_diff"]},
        "seed": 0,
    }


def render(cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    cells = sorted(cells, key=lambda c: (c["encoder"], TASKS.index(c["task"])))
    head = (
        "| encoder | task | metric | run | pruned | ONNX | gates asked | gates closed | encoder MACs removed "
        "| parameters | max logit difference, pruned / ONNX |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = [
        f"| {c['encoder']} | {c['task']} | {c['metric_name']} "
        + "".join(f"| {c[f'metric_{form}']:.4f} " for form in FORMS)
        + f"| {c['asked_sparsity']:.1%} | {c['closed_gates'] / c['total_gates']:.2%} | {c['encoder_macs_removed']:.2%} "
        f"| {c['dense_params'] / 1e6:.1f}M → {c['total_params'] / 1e6:.1f}M "
        f"| {c['max_abs_logit_diff']['pruned']:.0e} / {c['max_abs_logit_diff']['onnx']:.0e} |"
        for c in cells
    ]
    one = cells[0]
    note = (
        f"\n\nFirst 10,000 training rows at most, one seed, {one['granularity']} gates, {one['controller']} "
        f"controller, rank {one['lora_rank'] or 'of the method'}, trained in {one['precision']}, measured in float32 "
        f"on {one['cores']} cores of {one['cpu']}. Epochs: "
        + ", ".join(f"{c['encoder']} {c['task']} {c['epochs']}" for c in cells)
        + ".\n"
    )
    return "# The main job on real tasks\n\n" + head + "\n".join(rows) + note


def main() -> None:
    """Run the asked cells, or only render what is there."""
    made = parser(__doc__)
    made.add_argument("--sparsity", type=float, default=0.5)
    options = made.parse_args()
    keys = [(name, task) for name in models_of(options) for task in options.task or TASKS]
    sweep(PATH, keys, KEY, lambda key: cell(key, options), render)


if __name__ == "__main__":
    main()
