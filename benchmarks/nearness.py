"""How near pressed runs are to the model they started from: what the notes call distance.

    python benchmarks/nearness.py RUN [RUN ...]

Prints two rows for each finished run of `gatepress train --model FINETUNED`, one for the validation rows and one for as
many training rows. Each row has the metric; for two classes the area under the ROC curve (AUC); the mean loss; and how
far logits and hidden states are from those of the model that it was pressed from. The sum of these two is the distance
(`gatepress.distill`), taken on the words as they are and without dropout. A metric of a few hundred rows moves by
hundredths from one training to the next; these figures move less. What is near on training rows and far on others was
learnt by heart.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from gatepress.batches import make_loader, queries_of, rows_in_order, tokenize
from gatepress.checkpoint import load_run, open_base
from gatepress.distill import hidden_distances, logit_distances, of_classes
from gatepress.hub import locate_model
from gatepress.losses import task_losses
from gatepress.metrics import compute_metric
from gatepress.models import open_tokenizer
from gatepress.tasks import TaskSpec
from gatepress.tasks.sources import load_rows

BATCH = 32


def nearness(run: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name of a split and metric, AUC (two classes only), loss and distances of a run on its rows."""
    student, manifest = load_run(run)
    settings, spec = manifest.settings, manifest.task
    base = locate_model(settings.model, settings.revision)
    teacher, tokenizer = open_base(base, spec).eval(), open_tokenizer(base)
    rows = load_rows(settings.data, spec=spec)
    validation = next(iter(rows.validation.values()))
    for name, split in {"validation": validation, "train": rows.train}.items():
        table = tokenize(split.select(range(min(len(split), len(validation)))), tokenizer, manifest.tokens)
        yield name, _measured(student, teacher, make_loader(table, tokenizer, BATCH, shuffle=False, seed=0), spec)


@torch.inference_mode()
def _measured(student: Any, teacher: Any, loader: DataLoader[Any], spec: TaskSpec) -> dict[str, float]:
    logits, labels, sums = [], [], np.zeros(3)
    for batch in loader:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        ours, theirs = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
        hidden = hidden_distances(ours, theirs, inputs["attention_mask"]).mean()
        rows = (task_losses(ours.logits, batch["labels"], spec), logit_distances(ours, theirs, spec))
        sums += [*(values.sum().item() for values in rows), len(batch["labels"]) * hidden.item()]
        logits.append(ours.logits.numpy())
        labels.append(batch["labels"].numpy())
    outputs, wanted = np.concatenate(logits), np.concatenate(labels)
    loss, answers, inner = sums / len(wanted)
    queries = queries_of(loader)[rows_in_order(loader)]
    found: dict[str, float] = {spec.metric: compute_metric(spec.metric, outputs, wanted, queries)}
    if spec.num_labels == 2 and not spec.multi_label:  # noqa: PLR2004 - positives against negatives
        found["auc"] = roc_auc_score(wanted, of_classes(torch.from_numpy(outputs)).diff().numpy())
    return {**found, "loss": loss, "logits": answers, "hidden": inner, "distance": answers + inner}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    return made.parse_args(words)


def main() -> None:
    """Print the rows of each run."""
    for run in parse().runs:
        for split, found in nearness(run):
            figures = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
            sys.stdout.write(f"{run}  {split:10}  {figures}\n")


if __name__ == "__main__":
    main()
