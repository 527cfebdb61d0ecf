"""`gatepress prune`: from a run directory to a smaller model that computes the same."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._console import count, facts, grid, megabytes, percent, pick, session
from gatepress.cli.train import metric_rows
from gatepress.config import DEFAULT_TARGET, Layout
from gatepress.files import check_output

if TYPE_CHECKING:
    from gatepress.cli._console import Titled

EXAMPLES = opt.examples(
    "gatepress prune runs/sst2 -o pruned/sst2",
    "gatepress prune runs/sst2 --for ort-int8 -o pruned/sst2-int8",
    "gatepress prune runs/sst2 --layout stock -o pruned/sst2-stock",
    "gatepress prune runs/sst2 --dry-run --json",
)
KEPT = ("heads", "query/key width", "value/output width", "neurons", "by index", "multiplications left", "time left")
DEFAULT_LAYOUT: Layout = "auto"


def prune(  # noqa: PLR0913 - every option is a parameter
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run directory that gatepress train wrote.", show_default=False),
    ],
    *,
    layout: opt.LayoutOption = DEFAULT_LAYOUT,
    target: opt.TargetOption = DEFAULT_TARGET,
    latency_table: opt.LatencyTable = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Only tell what would go, per layer, and what it should gain; write nothing.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory of the smaller model; pruned/RUN unless given.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Cut the closed gates out of the weights.

    Nothing is approximated: a neuron, a head dimension or a head goes only where every path through it
    is shut, and the result is compared with the gated model on real validation rows before it is
    written. It loads with gatepress.load_pruned(DIR) or with plain transformers. Next step: gatepress
    export.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as screen:
        directory = output or Path("pruned") / run.resolve().name
        if not dry_run:
            check_output(directory, force=force)  # at once: what follows takes seconds to import

        from gatepress import pruning

        result = pruning.prune(
            run,
            directory,
            layout=layout,
            target=target,
            latency_table=latency_table,
            force=force,
            dry_run=dry_run,
            progress=screen.progress,
        )
        screen.result(result if dry_run else {"output_dir": str(directory), **result}, tables)
        if not dry_run:
            screen.note(f"next: gatepress export {directory}")


def tables(result: dict[str, Any]) -> "list[Titled]":
    """Return what went and how exactly the rest agrees with the gated model."""
    rows = metric_rows(result)
    rows += pick(
        result,
        [
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
    """Return one row a layer: heads, widths, neurons, matrices that keep an index, what is left."""
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
