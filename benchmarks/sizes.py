"""Several sizes of one training: as they are cut, fitted by least squares, or trained on for an epoch.

    python benchmarks/sizes.py --data-dir GLUE --model minilm=DIRECTORY --task cola --work DIR

Takes the runs of `paper.py accuracy` at half (its arm `2x`) in `--work` and trains those that are missing. Then
`gatepress prune` closes their gates anew to each of `SIZES`, plainly, with `--refit` and with `--recover-epochs 1`, and
the results are measured on all validation rows. A cell that is in the results is not measured again. The table is
rendered from the JSON beside it, which is in `results` below `--work` or where `--results` says. To render the
committed one:

    python benchmarks/sizes.py --render
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import (
    KEPT_IN,
    OF_TRAINING,
    TASKS,
    add,
    data_of,
    gatepress,
    machine,
    parser,
    read,
    sweep,
    trained_on,
)
from paper import SEEDS, trained

from gatepress.versions import MADE_WITH, versions

KEY = ("encoder", "task", "seed", "way", "sparsity")
WAYS = {"as cut": (), "--refit": ("--refit",), "--recover-epochs 1": ("--recover-epochs", 1)}
SIZES = (0.3, 0.6, 0.75)  # of the gates, where the runs were trained at half


def measure(key: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Cut one size in one way and measure it."""
    encoder, task, seed, way, sparsity = key
    run, report = trained("accuracy", (encoder, task, "2x", seed), options.models, options)
    rows = ["--task", task, *data_of(options)]
    with tempfile.TemporaryDirectory(dir=options.work) as staged:
        cut = gatepress("prune", run, "--sparsity", sparsity, *WAYS[way], "-o", Path(staged) / "cut")
        told = gatepress("evaluate", Path(staged) / "cut", *rows)
    more = cut.get("refit", {})
    return {
        **{name: told[name] for name in ("metric_name", "metric_value", "examples")},
        **{name: cut[name] for name in ("closed_fraction", "encoder_macs_removed", "max_abs_logit_diff")},
        **{name: more[name] for name in ("hidden_distance_before", "hidden_distance", "tokens") if more},
        "seconds": more.get("seconds") or cut.get("recovery", {}).get("train_seconds"),
        "run_metric": report["metric_value"],
        "start_metric": report["start_metric"],
        "start_sha256": report["start_sha256"],
        **machine(),
        "versions": versions(*MADE_WITH),
    }


def render(cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: a row for each way, medians by size over the seeds that all ways have of it."""
    names = ["encoder", "task", "seeds", "finetuned", "trained at half", "then closed anew"]
    names += [*(f"{1 - size:.0%} left" for size in SIZES), "seconds"]
    text = f"# Several sizes of one training\n\n| {' | '.join(names)} |\n|{'---|' * 6}{'--:|' * (len(SIZES) + 1)}\n"
    for encoder, task in dict.fromkeys((one["encoder"], one["task"]) for one in cells):
        here = [one for one in cells if (one["encoder"], one["task"]) == (encoder, task)]
        shared = set.union(*(_common(here, size) for size in SIZES))
        for way in WAYS:
            rows = [one for one in here if one["way"] == way]
            if not rows:
                continue
            own = {one["seed"]: one for one in rows}
            by_seed = [own[seed] for seed in own if seed in shared] or list(own.values())
            start, half = (statistics.median(one[name] for one in by_seed) for name in ("start_metric", "run_metric"))
            times = [one["seconds"] for one in rows if one["seconds"] is not None]
            columns = [encoder, task, str(len(own)), f"{start:.4f}", f"{half:.4f}", way]
            for size in SIZES:
                common = _common(here, size)
                values = [one["metric_value"] for one in rows if one["sparsity"] == size and one["seed"] in common]
                number = f" [{len(values)}]" if len(values) != len(own) else ""
                columns.append(f"{statistics.median(values):.4f}{number}" if values else "")
            columns.append(f"{min(times):.0f} to {max(times):.0f}" if times else "")
            text += f"| {' | '.join(columns)} |\n"
    machines = ", and on ".join(sorted({trained_on(one) for one in cells}))
    releases = ", ".join(sorted({one["versions"]["gatepress"] for one in cells}))
    return text + (
        "\nMedians over the seeds that all ways have of a size (their number in square brackets where a way has more), "
        "on all validation rows. "
        "*trained at half*: a finetuned model pressed to half, with its "
        "teacher; its gates are then opened or closed to what is named. *seconds*: of the fit, or of the epoch, with "
        f"whatever else ran. On {machines}, gatepress {releases}.\n"
    )


def _common(cells: list[dict[str, Any]], size: float) -> set[int]:
    """Return the seeds of which every way has a size."""
    seeds: dict[str, set[int]] = {}
    for one in cells:
        if one["sparsity"] == size:
            seeds.setdefault(one["way"], set()).add(one["seed"])
    return set.intersection(*seeds.values()) if seeds else set()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    add(made, *OF_TRAINING, *KEPT_IN, "--task", "--seed")
    made.add_argument("--way", action="append", choices=tuple(WAYS), help="default: all of them")
    return read(made, words)


def main() -> None:
    """Measure, or only render."""
    options = parse()
    keys = [
        (encoder, task, seed, way, size)
        for encoder in options.models
        for task in options.task or TASKS
        for seed in (range(SEEDS) if options.seed is None else options.seed)
        for way in options.way or WAYS
        for size in SIZES
    ]
    sweep(options.results / "sizes.json", keys, KEY, partial(measure, options=options), render, options=options)


if __name__ == "__main__":
    main()
