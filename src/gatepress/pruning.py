"""From a run directory to a pruned directory, with the proof that nothing changed."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gatepress.agreement import agree
from gatepress.budget import budget_of
from gatepress.card import CARD_FILE, card
from gatepress.checkpoint import RunManifest, load_run, read_probe, read_run
from gatepress.collapse import cut, live_parts, parameters_of, ship_code
from gatepress.commands import revision_of
from gatepress.config import DEFAULT_LAYOUT, DEFAULT_TARGET, Layout, Target, TrainSettings, check_prune
from gatepress.costs import Costs, analytic
from gatepress.embedding import as_saved, write_modules_of
from gatepress.errors import UsageError
from gatepress.expected import write_expected
from gatepress.files import PRUNED_FILE, check_output, json_text, new_directory, read_json, sha256_of
from gatepress.gates import counted, gates_of
from gatepress.guest import as_guest
from gatepress.latency import for_target
from gatepress.manifests import PRUNED_FORMAT
from gatepress.models import open_pruned, open_tokenizer, save_tokenizer
from gatepress.ondisk import stands_on
from gatepress.plan import Live, chooses, make_plan
from gatepress.progress import Progress
from gatepress.resolve import Layer, family_of, resolve
from gatepress.runners import Batch, Logits
from gatepress.schema import refuse_unsound
from gatepress.versions import MADE_WITH, versions

logger = logging.getLogger(__name__)

UNCHANGED = "nothing was written, please report it"
NOTHING_REMOVED = "%s: --layout %s can leave out none of its %d closed gates, so this is the whole model; try another"


@as_guest()
def prune(  # noqa: PLR0913 - every option of the command is one
    run_dir: str | Path,
    output: str | Path,
    *,
    layout: Layout = DEFAULT_LAYOUT,
    target: Target = DEFAULT_TARGET,
    latency_table: str | Path | None = None,
    tokens: int | None = None,
    sparsity: float | None = None,
    refit_: Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Any]] | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Collapse a run's closed gates into smaller dense matrices and write a pruned directory.

    The layout `auto` is chosen for `target` by the times in `latency_table` (see `latency.for_target`), which are read
    or measured only if the choice depends on them, for calls of `tokens` tokens (batch size times sequence length;
    None: all sizes that there are times for). With `sparsity`, the gates are closed anew, by the scores that the run
    keeps, to another fraction of its budget. `refit_` may then change the remaining weights: it is called with the
    pruned model and the run's probe rows, and its result goes into the report.

    The gated model and what is loaded back from the new directory must agree on the probe rows within
    `config.MAX_LOGIT_DIFF`; otherwise `ParityError` is raised and nothing is written. With `refit_`, gated and pruned
    model are compared before it, pruned and loaded one after it. With `dry_run`, only plans.
    """
    check_prune(layout=layout, target=target, tokens=tokens)
    run_dir, output = Path(run_dir), Path(output)
    settings = gated_settings(run_dir)
    if not dry_run:
        check_output(output, force=force, reads=(run_dir, *stands_on(settings)))
    model, manifest = load_run(run_dir)
    probe = read_probe(run_dir, model)
    layers = resolve(model)
    trained = manifest
    if sparsity is not None:
        manifest = _close_anew_(model, layers, manifest, sparsity, run_dir)
    total, closed = counted(gate for _, gate in gates_of(model))
    live = live_parts(model, layers)
    costs = replace(_costs(live, layout, target, latency_table, progress), tokens=tokens)
    plan = make_plan(layers, live, layout, costs)
    if closed and not plan.removed_fraction:
        logger.warning(NOTHING_REMOVED, run_dir, layout, closed)
    report: dict[str, Any] = {
        "task": manifest.task.name,
        "layout": layout,
        "target": target,
        "asked_sparsity": manifest.settings.sparsity,
        "total_gates": total,
        "closed_gates": closed,
        "closed_fraction": closed / total,
        "dense_params": manifest.report.get("dense_params"),
        "encoder_weights_removed": plan.removed_fraction,
        "encoder_macs_removed": plan.removed_fraction,
        "expected_time_left": plan.time_left,
        "total_params": None,
        "plan": plan.to_json(),
    }
    if dry_run:
        dense = report["dense_params"]
        return {**report, "total_params": None if dense is None else dense - plan.removed_parameters}
    wanted = _logits(model, probe)
    pruned = cut(model, plan, consume=True)
    report["total_params"] = parameters_of(pruned)
    del model
    difference = 0.0
    if refit_:
        difference = agree(wanted, _logits(pruned, probe), "gated and pruned logits", UNCHANGED)
        report["refit"] = refit_(pruned, probe)
        wanted = _logits(pruned, probe)
    with new_directory(output, force=force) as staged:
        parts = _write(pruned, staged, layout)
        del pruned  # what counts is what is on disk, which is loaded now
        reloaded = open_pruned(staged)
        difference = max(difference, agree(wanted, _logits(reloaded, probe), "gated and reloaded logits", UNCHANGED))
        bound = save_tokenizer(open_tokenizer(run_dir), staged) | write_expected(
            staged, reloaded, partial(_answer, reloaded)
        )
        report |= {"max_abs_logit_diff": difference, "probe_rows": len(probe["input_ids"])}
        loaded = [staged / "config.json", staged / "model.safetensors", *staged.glob("*.py"), *parts]
        body = {
            **PRUNED_FORMAT,
            "task": manifest.task.to_json(),
            "data": manifest.to_json()["data"],
            "max_length": manifest.tokens,
            "base": {"model": manifest.settings.model, "revision": revision_of(manifest.settings.to_json())},
            "base_sha256": manifest.base_sha256,
            "data_fingerprint": manifest.data_fingerprint,
            "seed": manifest.settings.seed,
            "run": {
                "name": run_dir.resolve().name,
                "settings": trained.settings.to_json(),
                "report": trained.report,
            },
            "asked": {
                "sparsity": sparsity,
                "layout": layout,
                "target": target,
                "latency_table": None if latency_table is None else str(latency_table),
                "tokens": tokens,
                "refit": refit_ is not None,
            },
            "sha256": {file.relative_to(staged).as_posix(): sha256_of(file) for file in loaded} | bound,
            "report": report,
            "versions": versions(*MADE_WITH),
        }
        refuse_unsound(body)
        (staged / PRUNED_FILE).write_text(json_text(body), encoding="utf-8")
        (staged / CARD_FILE).write_text(card(body, outputs=wanted.shape[1]), encoding="utf-8")
    return {**report, "size_bytes": (output / "model.safetensors").stat().st_size, "output_dir": str(output)}


def _close_anew_(
    model: PreTrainedModel, layers: list[Layer], manifest: RunManifest, sparsity: float, run_dir: Path
) -> RunManifest:
    """Close a run's gates to another sparsity, in place; return the manifest as if that had been asked for."""
    settings = replace(manifest.settings, sparsity=sparsity)
    budget_of(model, layers, settings, steps=1, tokens=manifest.tokens).close_anew(sparsity, run=run_dir)
    return replace(manifest, settings=settings)


def _costs(
    live: list[dict[str, Live]], layout: Layout, target: Target, table: str | Path | None, progress: Progress | None
) -> Costs:
    """Return the costs to plan by; nothing is measured if no choice depends on them."""
    if table is None and (layout != "auto" or not chooses(live)):
        return analytic(target)
    return for_target(target, table, progress)


def gated_settings(run_dir: Path) -> TrainSettings:
    """Return the settings of a run; `UsageError` if it has no gates."""
    settings = read_run(run_dir).settings
    if not settings.gated:
        raise UsageError(
            f"{run_dir}: was trained with --method {settings.method}, which closes no gates, so there is "
            "nothing to prune; gatepress export takes it as it is"
        )
    return settings


def _write(pruned: PreTrainedModel, staged: Path, layout: Layout) -> list[Path]:
    """Write weights and config, and for a layout of our own the code that loads it.

    Returns the additional files at the top level that an embedder needs.
    """
    # One file, because the manifest binds one hash; of some families a hub's names differ from those of their classes.
    as_saved(pruned).save_pretrained(staged, max_shard_size="100GB", save_original_format=False)
    if layout != "stock":
        config = read_json(staged / "config.json")
        ship_code(config, staged)
        (staged / "config.json").write_text(json_text(config), encoding="utf-8")
    return [staged / name for name in write_modules_of(pruned, staged)]


@torch.inference_mode()
def _answer(model: PreTrainedModel, rows: Batch) -> Logits:
    logits: Logits = model(**{name: torch.from_numpy(values) for name, values in rows.items()}).logits.float().numpy()
    return logits


@torch.inference_mode()
def _logits(model: PreTrainedModel, probe: dict[str, Tensor]) -> Tensor:
    """Return the logits of the rows, of the longest row alone, and of the first half of each row with the rest masked.

    The longest row alone needs no padding. If all rows of a probe have one length, only masking shows it.
    """
    forms = [probe, {name: value[:1] for name, value in probe.items()}]
    if (mask := probe.get("attention_mask")) is not None:
        first_half = mask.cumsum(1) <= (mask.sum(1, keepdim=True) + 1) // 2
        forms.append({**probe, "attention_mask": mask * first_half})
        if family_of(model.config).causal:  # heads of decoders find the last token by what is not padding
            forms[-1]["input_ids"] = probe["input_ids"].where(first_half, model.config.pad_token_id or 0)
    return torch.cat([model(**rows).logits.float() for rows in forms])
