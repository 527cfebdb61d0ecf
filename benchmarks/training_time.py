"""What a whole training takes: full finetuning, and pressing its result, by turns on the same rows.

    python benchmarks/training_time.py --data-dir GLUE --model minilm=DIRECTORY --task sst2 --precision fp32 --work DIR

Only the first `--rows` are used, with the epochs of `paper.py accuracy`: time grows with the number of rows, and few
rows leave room for repetitions (`--repetitions`). The fewer the rows, the more what is done only once counts. Seconds
are those that a run reports, including measuring after every epoch. It needs a quiet machine. What is measured again
replaces what was there; other encoders, tasks and precisions stay. The table is rendered from the JSON beside it, which
is in `results` below `--work` or where `--results` says. To render the committed one:

    python benchmarks/training_time.py --render
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import (
    EPOCHS,
    FULL,
    KEPT_IN,
    OF_TRAINING,
    TASKS,
    add,
    common,
    count,
    data_of,
    gatepress,
    machine,
    parser,
    pressed_epochs,
    read,
    sweep,
    trained_on,
)
from paper import FACTORS, FINETUNED

from gatepress.versions import MADE_WITH, versions

KEY = ("encoder", "task", "precision")
VALIDATION_ROWS = 100


def measure(key: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Train every arm by turns; return the seconds of each."""
    encoder, task, _ = key
    seconds: dict[str, list[float]] = {name: [] for name in (FINETUNED, *FACTORS)}
    usual = {FINETUNED: EPOCHS[task], **{name: pressed_epochs(task, removed) for name, removed in FACTORS.items()}}
    epochs = {arm: options.epochs or number for arm, number in usual.items()}
    where = data_of(options)
    rows = ("--task", task, *where, "--max-train-samples", options.rows, "--max-validation-samples", VALIDATION_ROWS)
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as staged:
        full, pressed = Path(staged) / "full", Path(staged) / "pressed"
        for _ in range(options.repetitions):
            for arm, values in seconds.items():
                kind = FULL if arm == FINETUNED else ("--distill", "--sparsity", FACTORS[arm])
                start, run = (options.models[encoder], full) if arm == FINETUNED else (full, pressed)
                words = ("--model", start, *rows, *kind, *common(options, epochs[arm]))
                told = gatepress("train", *words, "-o", run, "--force")
                values.append(told["train_seconds"])
    return {
        "rows": options.rows,
        "epochs": epochs,
        "seconds": seconds,
        **machine(told["device"]),
        "versions": versions(*MADE_WITH),
    }


def render(records: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    text = "# What a whole training takes\n\n| encoder | task | precision | rows | training | epochs | seconds, "
    text += "median | spread | of full finetuning |\n|---|---|---|--:|---|--:|--:|--:|--:|\n"
    for record in records:
        full = statistics.median(record["seconds"][FINETUNED])
        for arm, values in record["seconds"].items():
            middle = statistics.median(values)
            told = (arm, record["epochs"][arm], f"{middle:.1f}", f"{min(values):.1f} to {max(values):.1f}")
            row = (*(record[key] for key in KEY), f"{record['rows']:,}", *told, f"{middle / full:.0%}")
            text += f"| {' | '.join(map(str, row))} |\n"
    times = " or ".join(map(str, sorted({len(each["seconds"][FINETUNED]) for each in records}, reverse=True)))
    by = ", and in ".join(
        dict.fromkeys(
            f"{each['precision']}, {trained_on(each)}, gatepress {each['versions']['gatepress']}, "
            f"torch {each['versions']['torch']}"
            for each in records
        )
    )
    return text + (
        f"\nThe first rows, {times} trainings of each by turns, "
        f"{by}. *{FINETUNED}*: full finetuning; *4x*: what it gave, pressed to a quarter "
        "of the encoder's multiply-accumulates, with its teacher.\n"
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    add(made, *OF_TRAINING, *KEPT_IN, "--task")
    made.add_argument("--rows", type=count, default=2_000, help="training rows; default: 2,000")
    made.add_argument("--repetitions", type=count, default=3, help="trainings of each arm, by turns; default: 3")
    return read(made, words)


def main() -> None:
    """Measure, or only render."""
    options = parse()
    keys = [(encoder, task, options.precision) for encoder in options.models for task in options.task or TASKS]
    path = options.results / "training_time.json"
    sweep(path, keys, KEY, partial(measure, options=options), render, anew=True)


if __name__ == "__main__":
    main()
