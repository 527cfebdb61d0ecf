"""`gatepress prune`: from a run directory to a smaller model that computes the same."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._asked import numbers
from gatepress.cli._console import Titled, count, facts, grid, megabytes, percent, pick, session
from gatepress.cli._launched import refuse_launched
from gatepress.cli.train import metric_rows
from gatepress.config import DEFAULT_LAYOUT, DEFAULT_TARGET, check_prune
from gatepress.errors import UsageError
from gatepress.files import check_output

EXAMPLES = opt.examples(
    "gatepress prune runs/sst2 --sparsity 0.3,0.5,0.75 --recover-epochs 1",
    "gatepress prune runs/sst2 -o pruned/sst2",
    "gatepress prune runs/sst2 --for ort-int8 -o pruned/sst2-int8",
    "gatepress prune runs/sst2 --layout stock -o pruned/sst2-stock",
    "gatepress prune runs/sst2 --dry-run --json",
)
KEPT = ("heads", "query/key width", "value/output width", "neurons", "by index", "multiplications left", "time left")


def prune(  # noqa: PLR0913 - every option is a parameter
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run directory written by gatepress train.", show_default=False),
    ],
    *,
    layout: opt.LayoutOption = DEFAULT_LAYOUT,
    target: opt.TargetOption = DEFAULT_TARGET,
    latency_table: opt.LatencyTable = None,
    tokens: opt.Tokens = None,
    sparsity: Annotated[
        str | None,
        opt.GATES(
            "--sparsity",
            "-s",
            metavar="FRACTION,...",
            help="Close the gates anew, by the scores that the run keeps, to another fraction of its budget. Several "
            "fractions give one directory each, named after the fraction.",
        ),
    ] = None,
    recover_epochs: Annotated[
        int,
        opt.GATES(
            metavar="N",
            help="With --sparsity: train each size for N more passes over the run's rows before it is pruned, with "
            "gates fixed.",
        ),
    ] = 0,
    refit: Annotated[
        bool,
        opt.GATES(
            "--refit",
            help="With --sparsity: fit what is left by least squares to the model that the run was pressed from, on "
            "a few thousand of its rows. Nothing is trained and no labels are read.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, opt.OUTPUT(help="Only show what would be removed, per layer, and what it should gain. Write nothing.")
    ] = False,
    output: Annotated[
        Path | None,
        opt.output_option("DIR", "Directory of the smaller model. Default: pruned/RUN."),
    ] = None,
    force: opt.Force = False,
    shown: opt.Shown,
) -> None:
    """Cut the closed gates out of the weights.

    Nothing is approximated: a neuron, a head dimension or a head is removed only if every path through it
    is closed. The result is compared with the gated model on real validation rows before it is written.
    (--refit then changes what is left, and reports how close it came.) Load the result with
    gatepress.load_pruned(DIR) or with plain transformers. Next step: gatepress export.
    """
    with session(**vars(shown)) as screen:
        directory = output or Path("pruned") / run.resolve().name
        asked = None if sparsity is None else numbers("--sparsity", sparsity)
        outputs = _outputs(directory, asked)
        check_prune(layout=layout, target=target, tokens=tokens)
        if dry_run and (recover_epochs or refit or len(outputs) > 1):
            raise UsageError(
                "--dry-run plans one size of what is trained; "
                "leave out --recover-epochs and --refit, give one --sparsity"
            )
        if recover_epochs and asked is None:
            raise UsageError("--recover-epochs trains on at another sparsity; give --sparsity FRACTION with it")
        if recover_epochs:
            refuse_launched("--recover-epochs")
        if refit and asked is None:
            raise UsageError("--refit is for gates that are closed anew; give --sparsity FRACTION with it")
        from gatepress.manifests import run_file

        run_file(run)  # before the slow imports
        for path in outputs.values() if not dry_run else ():
            check_output(path, force=force)
        options: dict[str, Any] = {"layout": layout, "target": target, "latency_table": latency_table}
        options |= {"tokens": tokens, "force": force}

        if recover_epochs or refit or len(outputs) > 1:
            if len(outputs) > 1:
                screen.interrupt_note = "sizes that were complete by then, if any, are written"
            from gatepress import recovery  # loads all of training, which pruning alone need not wait for

            reports = recovery.prune_each(
                run, outputs, recover_epochs=recover_epochs, refit=refit, progress=screen.progress, **options
            )
            result = reports[0] if len(reports) == 1 else {"results": reports}
            screen.result(result, lambda _: [table for report in reports for table in tables(report)])
        else:
            from gatepress import pruning

            one = None if asked is None else next(iter(outputs))
            result = pruning.prune(run, directory, sparsity=one, dry_run=dry_run, progress=screen.progress, **options)
            screen.result(result, tables)
        if not dry_run:
            screen.note(f"next: gatepress export {shlex.quote(str(next(iter(outputs.values()))))}")


def _outputs(directory: Path, asked: list[float] | None) -> dict[float, Path]:
    """Return where each sparsity is written: a single one to `directory` itself, several side by side."""
    fractions = list(dict.fromkeys(asked or [0.0]))
    if len(fractions) == 1:
        return {fractions[0]: directory}
    if directory.name in ("", ".."):
        raise UsageError(f"-o is {directory}, expected a name to which several sizes can be added, e.g. pruned/x")
    outputs = {sparsity: directory.with_name(f"{directory.name}-s{sparsity:g}") for sparsity in fractions}
    if len(set(outputs.values())) < len(outputs):
        raise UsageError("--sparsity names fractions too near to each other for a directory each; round them")
    return outputs


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return what was removed and how exactly the rest agrees with the gated model."""
    rows = metric_rows(result.get("recovery", result))
    if refit := result.get("refit"):
        far = (f"{refit[key]:.3f}" for key in ("hidden_distance_before", "hidden_distance"))
        rows.append(("hidden states from what was pressed", " to ".join(far)))
    rows += pick(
        result,
        [
            ("asked_sparsity", "sparsity asked", percent),
            ("layout", "layout", str),
            ("target", "fastest on", str),
            ("encoder_weights_removed", "encoder weights removed", percent),
            ("encoder_macs_removed", "encoder multiplications removed", percent),
            ("expected_time_left", "expected time of the matrix products", percent),
            ("total_params", "parameters", count),
            ("size_bytes", "size", megabytes),
            ("max_abs_logit_diff", "largest difference of a logit", "{:.1e}".format),
            ("output_dir", "output", str),
        ],
    )
    shown = [facts("Pruned" if "output_dir" in result else "To be pruned", rows)]
    if "output_dir" not in result:
        shown.append(grid("What each layer keeps", ["layer", *KEPT], _layers(result.get("plan", {}))))
    return shown


def _layers(plan: dict[str, Any]) -> list[list[str]]:
    """Return one row per layer: heads, widths, neurons, matrices that keep an index, what is left."""
    return [
        [
            str(number),
            str(len(layer["heads"])),
            *(str(layer[key]) for key in ("qk_width", "vo_width", "neurons")),
            " ".join(role for role, part in layer["matrices"].items() if part["gathered"] or part["scattered"]) or "-",
            *(percent(layer[key]) for key in ("macs_left", "time_left")),
        ]
        for number, layer in enumerate(plan.get("layers", []))
    ]
