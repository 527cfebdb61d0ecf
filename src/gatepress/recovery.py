"""One training, several sizes: close the gates of a run to other fractions, each followed by a short training.

A run keeps the scores of its gates, so any sparsity can be cut from it at once. Cutting far from the sparsity that was
trained loses accuracy. A few epochs with the gates as they are bring most of it back; least squares (refit.py) brings
back a part of it without a training.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatepress.batches import make_loader, tokenize
from gatepress.checkpoint import RunManifest, load_run, located, open_base, read_run
from gatepress.config import DEFAULT_TARGET, TrainSettings, check_prune, refuse_below
from gatepress.distill import varied
from gatepress.embedding import reads_all
from gatepress.errors import UsageError
from gatepress.files import check_output
from gatepress.heads import is_finetuned
from gatepress.latency import for_target
from gatepress.models import open_tokenizer
from gatepress.ondisk import stands_on
from gatepress.progress import Progress
from gatepress.pruning import gated_settings, prune
from gatepress.refit import first_tokens, refit_
from gatepress.resume import refuse_other
from gatepress.runtime import device_here
from gatepress.tasks.sources import load_rows
from gatepress.training import train

REFIT_ROWS, REFIT_TOKENS, REFIT_BATCH = 4_096, 32_768, 64  # training rows and tokens at most, and rows per batch


def prune_each(  # noqa: PLR0913 - every option of the command is one
    run_dir: str | Path,
    outputs: Mapping[float, str | Path],
    *,
    recover_epochs: int = 0,
    refit: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **pruning: Any,
) -> list[dict[str, Any]]:
    """Prune a run to every sparsity that `outputs` maps to a directory; return the reports in its order.

    With `recover_epochs`, each size is trained for so many more passes over the run's rows before it is pruned, with
    gates fixed, at the rates of the run and with a schedule of its own; its report then has the `recovery` (metric,
    steps, seconds). If the run began with a finetuned model that taught it, that model teaches again. With `refit`,
    nothing is trained: what is left of each size is fitted, on the run's rows, to the finetuned model that the run
    began with, or to the run as it is (refit.py). Everything else is passed to `pruning.prune`, and its errors are
    raised.
    """
    run_dir, places = Path(run_dir), {sparsity: Path(output) for sparsity, output in outputs.items()}
    refuse_below(0, recover_epochs=recover_epochs)
    if refit and recover_epochs:
        raise UsageError("--refit is for what is not trained on; leave it out, or --recover-epochs")
    settings = gated_settings(run_dir)
    check_prune(**pruning)  # these now, not after a training
    if table := pruning.get("latency_table"):
        for_target(pruning.get("target", DEFAULT_TARGET), table)
    _refuse_sizes(run_dir, settings, places, force=force)
    taught = False
    if recover_epochs or refit:
        run, rows = read_run(run_dir), load_rows(settings.data, embeds=settings.embed)
        refuse_other(run_dir, run, replace(run, data_fingerprint=rows.fingerprint))
        # A pretrained model learned the task only in this run, whose gates are closed: nobody is left to teach.
        finetuned = is_finetuned(located(settings), run.task)
        taught = bool(settings.distill) and finetuned
        if refit:
            teacher = open_base(located(settings), run.task).eval() if finetuned else load_run(run_dir)[0]
            pruning["refit_"] = _refit_to(teacher, rows, run, open_tokenizer(run_dir), progress)
    reports = []
    for sparsity, output in places.items():
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
            recovered = Path(staged) / f"{run_dir.resolve().name}-s{sparsity:g}"  # the name that the card shows
            trained = train(asked, recovered, progress=progress)
            report = prune(recovered, output, **options)
        kept = ("metric_name", "metric_value", "examples", "epochs", "steps", "train_seconds")
        reports.append({**report, "recovery": {key: trained[key] for key in kept}})
    return reports


def _refuse_sizes(run_dir: Path, settings: TrainSettings, places: Mapping[float, Path], *, force: bool) -> None:
    """Raise what one of several sizes would be refused by, before another is written."""
    if len({output.resolve() for output in places.values()}) < len(places):
        raise UsageError("two sparsities are to be written into one directory; give each its own")
    for sparsity, output in places.items():
        replace(settings, sparsity=sparsity)  # refuses what is not a fraction
        check_output(output, force=force, reads=(run_dir, *stands_on(settings)))
    if len(places) > 1:
        prune(run_dir, output, sparsity=max(places), layout="inner", dry_run=True)


def _refit_to(
    teacher: PreTrainedModel, rows: Any, run: RunManifest, tokenizer: PreTrainedTokenizerBase, progress: Progress | None
) -> Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Any]]:
    """Return a function that fits a pruned model to `teacher` on a run's rows, with words exchanged as in training."""
    settings, special = run.settings, torch.tensor(tokenizer.all_special_ids)
    few = rows.train.select(range(min(REFIT_ROWS, len(rows.train))))
    table = tokenize(few, tokenizer, run.tokens)
    loader = make_loader(table, tokenizer, REFIT_BATCH, shuffle=True, seed=settings.seed)
    inputs = ({name: value for name, value in one.items() if name != "labels"} for one in loader)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        batches = [varied(one, special)[0] for one in first_tokens(inputs, REFIT_TOKENS)]
    return lambda student, probe: refit_(
        student, teacher, batches, probe, all_tokens=reads_all(teacher), progress=progress
    )
