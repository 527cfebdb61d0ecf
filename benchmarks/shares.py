"""Classes named as often as they occur: what `gatepress train --match-shares` does to finished trainings.

    python benchmarks/shares.py --data-dir GLUE --model minilm=DIRECTORY --task cola --work DIR

Takes the runs of `paper.py accuracy` in `--work` (full finetuning, and what was pressed from it) and trains those that
are missing. Then it moves the biases of each head as that option does after a last epoch, and measures all validation
rows before and after it. A cell that is in the results is not measured again. The table is rendered from the JSON
beside it, which is in `results` below `--work` or where `--results` says. To render the committed one:

    python benchmarks/shares.py --render
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from cells import KEPT_IN, OF_TRAINING, TASKS, add, machine, parser, read, sweep, trained_on
from paper import FACTORS, FINETUNED, SEEDS, trained
from torch.nn import functional

from gatepress.batches import make_loader, tokenize
from gatepress.checkpoint import load_run
from gatepress.evaluation import outputs_of
from gatepress.metrics import compute_metric
from gatepress.models import open_tokenizer
from gatepress.shares import drawn, match_
from gatepress.tasks import task_named
from gatepress.tasks.sources import load_rows
from gatepress.versions import MADE_WITH, versions

KEY = ("encoder", "task", "arm", "seed")
ARMS = (FINETUNED, *FACTORS)
OF_CLASSES = tuple(task for task in TASKS if task_named(task).label_names)
BATCH = 64


def measure(key: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one run as it was trained, and with each class named as often as it occurs."""
    encoder, task, arm, seed = key
    run, told = trained("accuracy", (encoder, task, arm, seed), options.models, options)
    model, manifest = load_run(run)
    rows, tokenizer = load_rows(manifest.settings.data, spec=manifest.task), open_tokenizer(run)
    (validation,) = rows.validation.values()
    assert rows.train is not None  # noqa: S101 - all splits are asked for
    known, unseen = (
        make_loader(tokenize(split, tokenizer, manifest.tokens), tokenizer, BATCH, shuffle=False, seed=0)
        for split in (drawn(rows.train), validation)
    )
    before, labels = outputs_of(model, unseen)
    offsets = match_(model, *outputs_of(model, known))
    behind, _ = outputs_of(model, unseen)
    larger = int(np.bincount(labels).argmax())
    return {
        "metric_name": manifest.task.metric,
        "examples": len(labels),
        "as_trained": _told(before, labels, manifest.task.metric, larger),
        "matched": _told(behind, labels, manifest.task.metric, larger),
        "offsets": offsets,
        "larger_share": float((labels == larger).mean()),
        "trained_by": manifest.versions["gatepress"],
        **{name: told[name] for name in ("precision", "epochs", "base_sha256")},
        **machine(),
        "versions": versions(*MADE_WITH),
    }


def _told(logits: Any, labels: Any, metric: Any, larger: int) -> dict[str, float]:
    return {
        "metric_value": compute_metric(metric, logits, labels, np.arange(len(labels))),
        "accuracy": compute_metric("accuracy", logits, labels, np.arange(len(labels))),
        "loss": functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item(),
        "larger_share": float((logits.argmax(1) == larger).mean()),
    }


def render(cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: a row for each arm, medians over seeds, as trained and matched."""
    text = "# Classes named as often as they occur\n\n"
    names = ["encoder", "task", "metric", "arm", "seeds", "as trained", "of full", "matched", "of full, matched"]
    names += ["higher in", "accuracy", "loss", "larger class named", "occurs"]
    text += f"| {' | '.join(names)} |\n|{'---|' * 4}{'--:|' * (len(names) - 4)}\n"
    for encoder, task in dict.fromkeys((one["encoder"], one["task"]) for one in cells):
        rows = [one for one in cells if (one["encoder"], one["task"]) == (encoder, task)]
        by_arm = {arm: [one for one in rows if one["arm"] == arm] for arm in ARMS}
        for arm, own in by_arm.items():
            if not own:
                continue
            seeds = {one["seed"] for one in own}
            full = [one for one in by_arm[FINETUNED] if one["seed"] in seeds]
            comparable = arm != FINETUNED and {one["seed"] for one in full} == seeds
            columns = [encoder, task, own[0]["metric_name"], arm, str(len(own))]
            for way in ("as_trained", "matched"):
                value = _median(own, way, "metric_value")
                kept = f"{value / _median(full, way, 'metric_value'):.1%}" if comparable else ""
                columns += [f"{value:.4f}", kept]
            higher = sum(one["matched"]["metric_value"] > one["as_trained"]["metric_value"] for one in own)
            columns.append(f"{higher} of {len(own)}")
            columns += [_both(own, "accuracy", ".4f"), _both(own, "loss", ".3f"), _both(own, "larger_share", ".1%")]
            text += f"| {' | '.join([*columns, format(own[0]['larger_share'], '.1%')])} |\n"
    machines = ", and on ".join(sorted({trained_on(one) for one in cells}))
    releases = ", ".join(sorted({one["trained_by"] for one in cells}))
    return text + (
        "\nMedians over seeds, on all validation rows. *matched*: behind the training the biases of the head are moved "
        "until each class is named among training rows as often as among their labels (`train --match-shares`); all "
        "else is as trained. Of two numbers the first is as trained. *larger class named*: in which part of the rows. "
        f"Trained by {releases}; on {machines}.\n"
    )


def _median(cells: list[dict[str, Any]], way: str, name: str) -> float:
    middle: float = statistics.median(one[way][name] for one in cells)
    return middle


def _both(cells: list[dict[str, Any]], name: str, form: str) -> str:
    return " to ".join(format(_median(cells, way, name), form) for way in ("as_trained", "matched"))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    add(made, *OF_TRAINING, *KEPT_IN, "--task", "--seed", tasks=OF_CLASSES)
    made.add_argument("--arm", action="append", choices=ARMS, help="default: all of them")
    return read(made, words)


def main() -> None:
    """Measure, or only render."""
    options = parse()
    keys = [
        (encoder, task, arm, seed)
        for encoder in options.models
        for task in options.task or OF_CLASSES
        for arm in options.arm or ARMS
        for seed in (range(SEEDS) if options.seed is None else options.seed)
    ]
    sweep(options.results / "shares.json", keys, KEY, partial(measure, options=options), render, options=options)


if __name__ == "__main__":
    main()
