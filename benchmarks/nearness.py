"""How near pressed runs are to the model they started from, on validation rows: what the notes call distance.

    python benchmarks/nearness.py RUN [RUN ...]

Prints a row for each finished run of `gatepress train --model FINETUNED`: the metric; for two classes the area under
the ROC curve (AUC); the mean loss; and the distance to the model that it was pressed from, which is what `--distill`
presses down (`gatepress.distill.distance`: logits and hidden states), on the words as they are and without dropout. A
metric of a few hundred rows moves by hundredths from one training to the next, these move less.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from gatepress.batches import make_loader, tokenize
from gatepress.checkpoint import load_run, open_base
from gatepress.distill import distance
from gatepress.hub import locate_model
from gatepress.losses import task_losses
from gatepress.metrics import compute_metric
from gatepress.models import open_tokenizer
from gatepress.tasks.sources import load_rows

BATCH = 32


@torch.inference_mode()
def nearness(run: Path) -> dict[str, float]:
    """Return metric, AUC (two classes only), loss and distance of a run."""
    student, manifest = load_run(run)
    settings, spec = manifest.settings, manifest.task
    base = locate_model(settings.model, settings.revision)
    teacher = open_base(base, spec).eval()
    tokenizer = open_tokenizer(base)
    rows = next(iter(load_rows(settings.data, splits="validation", spec=spec).validation.values()))
    loader = make_loader(tokenize(rows, tokenizer, settings.max_length), tokenizer, BATCH, shuffle=False, seed=0)
    logits, labels, sums = [], [], np.zeros(2)
    for batch in loader:
        inputs: dict[str, Tensor] = {name: value for name, value in batch.items() if name != "labels"}
        ours, theirs = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
        far = distance(ours, theirs, inputs["attention_mask"], torch.ones(len(batch["labels"])), spec)
        losses = task_losses(ours.logits, batch["labels"], spec)
        sums += [losses.sum().item(), len(losses) * far.item()]
        logits.append(ours.logits.numpy())
        labels.append(batch["labels"].numpy())
    outputs, wanted = np.concatenate(logits), np.concatenate(labels)
    loss, far = sums / len(wanted)
    found: dict[str, Any] = {spec.metric: compute_metric(spec.metric, outputs, wanted)}
    if spec.num_labels == 2:  # noqa: PLR2004 - positives against negatives
        found["auc"] = roc_auc_score(wanted, outputs[:, 1] - outputs[:, 0])
    return {**found, "loss": loss, "distance": far}


def main() -> None:
    """Print a row for each run."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for run in made.parse_args().runs:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in nearness(run).items())
        sys.stdout.write(f"{run}  {figures}\n")


if __name__ == "__main__":
    main()
