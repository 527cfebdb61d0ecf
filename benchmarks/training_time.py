"""What a whole training takes: full finetuning, and pressing what came out of it, by turns on the same rows.

    python benchmarks/training_time.py --data-dir GLUE --model minilm=DIRECTORY --task sst2 --precision fp32

The first rows only, with the epochs of `paper.py accuracy`: a training takes as long as its rows are many, and few
leave room for repetitions. Seconds are those that a run reports, measuring after every epoch included. Wants a quiet
machine. The table beside the JSON is rendered from it:

    python benchmarks/training_time.py --render
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from cells import EPOCHS, FULL, RESULTS, common, gatepress, keep, models_of, parser, pressed_epochs
from paper import FACTORS, FINETUNED

from gatepress.machine import cpu_name
from gatepress.versions import MADE_WITH, versions

PATH = RESULTS / "training_time.json"
REPETITIONS = 3
ROWS, VALIDATION_ROWS = 2_000, 100


def measure(encoder: str, model: str, task: str, options: Any) -> dict[str, Any]:
    """Train every arm by turns; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in (FINETUNED, *FACTORS)}
    epochs = {FINETUNED: EPOCHS[task], **{name: pressed_epochs(task, removed) for name, removed in FACTORS.items()}}
    where = [] if options.data_dir is None else ["--data-dir", options.data_dir]
    rows = ("--task", task, *where, "--max-train-samples", ROWS, "--max-validation-samples", VALIDATION_ROWS)
    with tempfile.TemporaryDirectory() as staged:
        full, pressed = Path(staged) / "full", Path(staged) / "pressed"
        for _ in range(REPETITIONS):
            for arm, values in seconds.items():
                start, kind = (model, FULL) if arm == FINETUNED else (full, ("--distill", "--sparsity", FACTORS[arm]))
                words = ("--model", start, *rows, *kind, *common(options, epochs[arm]))
                run = full if arm == FINETUNED else pressed
                values.append(gatepress("train", *words, "-o", run, "--force")["train_seconds"])
    return {
        "encoder": encoder,
        "task": task,
        "rows": ROWS,
        "epochs": epochs,
        "seconds": seconds,
        "precision": options.precision,
        "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
        "cpu": cpu_name(),
        "versions": versions(*MADE_WITH),
    }


def render(records: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    text = "# What a whole training takes\n\n| encoder | task | training | epochs | seconds, median | spread "
    text += "| of full finetuning |\n|---|---|---|--:|--:|--:|--:|\n"
    for record in records:
        full = statistics.median(record["seconds"][FINETUNED])
        for arm, values in record["seconds"].items():
            middle = statistics.median(values)
            text += f"| {record['encoder']} | {record['task']} | {arm} | {record['epochs'][arm]} | {middle:.1f} "
            text += f"| {min(values):.1f} to {max(values):.1f} | {middle / full:.0%} |\n"
    one = records[0]
    return text + (
        f"\nThe first {one['rows']:,} rows, {len(one['seconds'][FINETUNED])} trainings of each by turns, "
        f"{one['precision']}, {one['threads']} threads of {one['cpu']}, gatepress {one['versions']['gatepress']}, "
        f"torch {one['versions']['torch']}. *{FINETUNED}*: full finetuning; *4x*: what it gave, pressed to a quarter "
        "of the encoder's multiply-accumulates, with its teacher.\n"
    )


def main() -> None:
    """Measure, or only render."""
    options = parser(__doc__).parse_args()
    models, tasks = models_of(options), options.task or EPOCHS
    records = [measure(*model, task, options) for model in models.items() for task in tasks]
    keep(PATH, records or None, render)


if __name__ == "__main__":
    main()
