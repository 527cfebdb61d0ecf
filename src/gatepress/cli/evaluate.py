"""`gatepress evaluate`: the same metric on the same rows, in whatever form the model is."""

import math
from typing import Annotated, Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._asked import rows_of
from gatepress.cli._console import Titled, count, facts, pick, session
from gatepress.cli.train import metric_rows
from gatepress.config import DEFAULT_RUNTIME, Arithmetic, dropped, refuse_below
from gatepress.errors import UsageError

EXAMPLES = opt.examples(
    "gatepress evaluate runs/sst2",
    "gatepress evaluate onnx/sst2 --json",
    "gatepress evaluate pruned/sst2 --precision bf16 --against pruned/sst2 --max-metric-drop 0.01",
    "gatepress evaluate pruned/sst2 --task sst2 --data-dir glue",
    "gatepress evaluate onnx/sst2 --against runs/full --max-metric-drop 0.01",
    "gatepress evaluate onnx/sst2 --runtime openvino --precision bf16",
    "gatepress evaluate pruned/topics --validation-file fresh.csv --label-column topic",
)


def evaluate(  # noqa: PLR0913 - every option is a parameter
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run, pruned or ONNX directory, an .onnx file, or any model with a task head: a directory or a "
            "hub id (owner/name or owner/name@REV).",
            show_default=False,
        ),
    ],
    *,
    rows: opt.MeasuredRows,
    batch_size: Annotated[int, opt.MEASURING(metavar="N", help="Rows per batch.")] = 32,
    max_length: Annotated[
        int | None,
        opt.MEASURING(metavar="TOKENS", help="Truncate texts to this many tokens. Default: as in training, else 128."),
    ] = None,
    against: Annotated[
        str | None,
        opt.MEASURING(
            metavar="MODEL",
            help="Also measure this model on the same rows, and show how far the metric dropped from it: the "
            "finetuned model before it was pressed, for example, or the previous release. It computes in "
            "float32 whatever --precision says, and in ONNX Runtime whatever --runtime says.",
        ),
    ] = None,
    max_metric_drop: Annotated[
        float | None,
        opt.MEASURING(
            metavar="LIMIT",
            help="With --against: exit with code 1 if the metric dropped by more than this, e.g. 0.01 for one point "
            "of accuracy. The result is shown in either case.",
        ),
    ] = None,
    device: opt.MeasuringDevice = "auto",
    runtime: opt.RuntimeOption = DEFAULT_RUNTIME,
    precision: Annotated[
        Arithmetic,
        opt.MEASURING(
            help="Arithmetic of a torch model, or of a float32 file in OpenVINO. Other ONNX files compute in what "
            "they were exported in."
        ),
    ] = "fp32",
    trust_remote_code: opt.TrustRemoteCode = False,
    shown: opt.Shown,
) -> None:
    """Measure the metric on the validation rows.

    Directories written by gatepress know their task and its rows. Use the data options to measure on other
    rows (--task, --validation-file) or on some of them (--max-validation-samples). A run, its pruned form
    and its ONNX form all score the same.
    """
    with session(**vars(shown)) as screen:
        data = rows_of(rows)
        refuse_below(1, batch_size=batch_size, max_length=max_length)
        if max_metric_drop is not None and not 0 <= max_metric_drop < math.inf:
            raise UsageError(f"--max-metric-drop is {max_metric_drop}, expected 0 or a positive number")
        if max_metric_drop is not None and against is None:
            raise UsageError("--max-metric-drop limits the drop from another model; name it with --against")

        from gatepress.manifests import refuse_absent

        refuse_absent(target, against)  # before the slow imports

        from gatepress import evaluation

        result = evaluation.evaluate(
            target,
            against=against,
            data=data,
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            precision=precision,
            runtime=runtime,
            progress=screen.progress,
            trust_remote_code=trust_remote_code,
        )
        limit = {} if max_metric_drop is None else {"max_metric_drop": max_metric_drop}
        screen.result({**result, **limit}, tables)
        if max_metric_drop is not None and dropped(result["metric_drop"], max_metric_drop):
            name, value, drop = (result[key] for key in ("metric_name", "metric_value", "metric_drop"))
            screen.say(
                f"error: {name} is {value:.4f}, {drop:.4f} less than that of {against}, "
                f"expected at most --max-metric-drop {max_metric_drop:g}"
            )
            raise typer.Exit(1)


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return the metric and what it was measured on."""
    rows = metric_rows(result)
    rows += pick(
        result,
        [
            ("metric_value_against", "of what it is compared with", "{:.4f}".format),
            ("metric_drop", "drop", "{:.4f}".format),
            ("kind", "kind", str),
            ("runtime", "runtime", str),
            ("dtype", "arithmetic", str),
            ("total_params", "parameters", count),
        ],
    )
    return [facts("Evaluated", rows)]
