"""One training, several sizes: the gates of a run closed to other fractions, each with a short training behind it.

A run keeps the scores of its gates, so any sparsity can be cut from it at once. What is cut far from the sparsity
that was trained loses accuracy; a few epochs with the gates as they are bring most of it back.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatepress.checkpoint import is_finetuned, located, read_run
from gatepress.config import DEFAULT_TARGET, refuse_below
from gatepress.files import check_output
from gatepress.latency import for_target
from gatepress.ondisk import stands_on
from gatepress.progress import Progress
from gatepress.pruning import gated_settings, prune
from gatepress.resume import refuse_other
from gatepress.runtime import device_here
from gatepress.tasks.sources import load_rows
from gatepress.training import train


def prune_each(
    run_dir: Path,
    outputs: dict[float, Path],
    *,
    recover_epochs: int = 0,
    force: bool = False,
    progress: Progress | None = None,
    **pruning: Any,
) -> list[dict[str, Any]]:
    """Prune a run to every sparsity that `outputs` maps to a directory; return the reports in its order.

    With `recover_epochs` each is trained on for so many passes over the run's rows, gates fixed, before it is
    pruned, at the rates of the run with a schedule of its own; its report then has the `recovery` (metric, steps,
    seconds). Where the run began with a finetuned model that taught it, that one teaches again. All else goes to
    `pruning.prune`, whose errors are raised.
    """
    refuse_below(0, recover_epochs=recover_epochs)
    settings = gated_settings(run_dir)
    for sparsity in outputs:
        replace(settings, sparsity=sparsity)  # which refuses what is no fraction
    refuse_below(1, tokens=pruning.get("tokens"))  # these two now, not behind a training
    if table := pruning.get("latency_table"):
        for_target(pruning.get("target", DEFAULT_TARGET), table)
    taught = False
    if recover_epochs:
        run = read_run(run_dir)
        # A pretrained model has learned the task in this run alone, whose gates are closed: nobody is left to teach.
        taught = bool(settings.distill) and is_finetuned(located(settings), run.task)
        refuse_other(
            run_dir, run, replace(run, data_fingerprint=load_rows(settings.data, embeds=settings.embed).fingerprint)
        )
    reads = (run_dir, *stands_on(settings))
    for output in outputs.values():
        check_output(output, force=force, reads=reads)
    reports = []
    for sparsity, output in outputs.items():
        options: dict[str, Any] = {"force": force, "progress": progress, **pruning}
        if not recover_epochs:
            reports.append(prune(run_dir, output, sparsity=sparsity, **options))
            continue
        asked = replace(
            settings,
            sparsity=sparsity,
            start=str(run_dir),
            epochs=recover_epochs,
            open_epochs=0,
            distill=taught,
            hidden_weight=settings.hidden_weight if taught else None,
            device=device_here(settings.device),
        )
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as staged:
            recovered = Path(staged) / f"{run_dir.resolve().name}-s{sparsity:g}"  # the card calls it so
            trained = train(asked, recovered, progress=progress)
            report = prune(recovered, output, **options)
        kept = ("metric_name", "metric_value", "examples", "epochs", "steps", "train_seconds")
        reports.append({**report, "recovery": {key: trained[key] for key in kept}})
    return reports
