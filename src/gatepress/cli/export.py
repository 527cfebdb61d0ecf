"""`gatepress export`: from a model directory to ONNX, checked against torch before it is kept."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._console import facts, megabytes, pick, session
from gatepress.files import check_output

if TYPE_CHECKING:
    from gatepress.cli._console import Titled

EXAMPLES = opt.examples(
    "gatepress export pruned/sst2 -o onnx/sst2",
    "gatepress export runs/sst2 -o onnx/sst2-gated",
    "gatepress export distilbert/distilbert-base-uncased-finetuned-sst-2-english",
)


def export(  # noqa: PLR0913 - every option is a parameter
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A pruned directory, a run directory, any transformers directory or hub id, or demo.",
            show_default=False,
        ),
    ],
    *,
    opset: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="ONNX operator set; the exporter's own choice unless given.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    max_diff: Annotated[
        float,
        typer.Option(
            metavar="LIMIT",
            help="Refuse to write when a logit of ONNX Runtime and torch differs by more than this.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = 1e-4,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory of the ONNX model; onnx/MODEL unless given.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write a model as ONNX, checked against torch.

    The file takes any batch size and any length; the tokenizer lies beside it. It is run in ONNX
    Runtime on shapes it has not seen, padded ones among them, and compared with torch. Where they
    disagree, nothing is written.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as screen:
        target = output or Path("onnx") / name_of(source)
        check_output(target, force=force)  # at once: what follows takes seconds to import

        from gatepress import export as exporting

        result = exporting.export(source, target, force=force, opset=opset, max_diff=max_diff)
        screen.result({"output_dir": str(target), **result}, tables)
        screen.note(f"next: gatepress bench {source} {target}")


def name_of(target: str) -> str:
    """Return the last part of a directory or hub id."""
    path = Path(target)
    return path.resolve().name if path.exists() else path.name


def tables(result: dict[str, Any]) -> "list[Titled]":
    """Return what was written and how well it agrees with torch."""
    rows = pick(
        result,
        [
            ("opset", "operator set", str),
            ("size_bytes", "size", megabytes),
            ("max_abs_logit_diff", "largest difference of a logit", "{:.1e}".format),
            ("output_dir", "output", str),
        ],
    )
    return [facts("Exported", rows)]
