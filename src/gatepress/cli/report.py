"""`gatepress report`: one HTML page of runs, models, sweeps and measurements."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._console import Titled, facts, grid, percent, session

EXAMPLES = opt.examples(
    "gatepress report runs/sst2 pruned/sst2 onnx/sst2 -o sst2.html",
    "gatepress report pruned/sst2 --bench bench.json --title 'SST-2, half the size'",
    "gatepress report sweeps/sst2-roberta-base",
)


def report(  # noqa: PLR0913 - every option is a parameter
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Directories written by gatepress train, prune, export or sweep, in the order in which the page "
            "shows them.",
            show_default=False,
        ),
    ],
    *,
    bench: Annotated[
        list[Path] | None,
        opt.MEASURING(
            metavar="FILE",
            help="Latencies to show beside them, as written by gatepress bench --output FILE.json. Can be given more "
            "than once.",
        ),
    ] = None,
    title: Annotated[
        str | None, opt.OUTPUT(metavar="TEXT", help="Title of the page. Default: made from the tasks.")
    ] = None,
    output: Annotated[
        Path,
        opt.output_option("FILE", "The page to write, as .html."),
    ] = Path("report.html"),
    force: opt.Force = False,
    shown: opt.Shown,
) -> None:
    """Write one HTML page to look at, print or send.

    The page shows the metric, sizes, latency, the course of training, what each layer keeps, where all of it
    comes from, and the commands that rebuild it. The file is self-contained: it loads nothing from other
    hosts and needs no script. Only manifests are read, so it takes a moment.
    """
    with session(**vars(shown)) as screen:
        from gatepress.report import build

        result = build.report(directories, output, benches=bench or (), title=title, force=force)
        screen.result(result, tables)
        screen.note(f"wrote {output}; open it in a browser")


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return the first sentence of the page, and the models that it is about."""
    columns = ["model", "kind", "task", "metric", "removed"]
    rows = [
        [
            model["name"],
            model["kind"],
            model["task"] or "",
            "" if model["metric_value"] is None else f"{model['metric_name']} {model['metric_value']:.4f}",
            "" if model["encoder_macs_removed"] is None else percent(model["encoder_macs_removed"]),
        ]
        for model in result["models"]
    ]
    told = [("finding", result["finding"]), ("sections", ", ".join(result["sections"])), ("output", result["output"])]
    return [facts(result["title"], told), grid("Models", columns, rows, left=3)]
