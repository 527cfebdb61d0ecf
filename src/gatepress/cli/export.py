"""`gatepress export`: from a model directory to ONNX, checked against torch before it is kept."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gatepress.cli import _options as opt
from gatepress.cli._asked import rows_of
from gatepress.cli._console import Titled, facts, megabytes, pick, session
from gatepress.config import MAX_LOGIT_DIFF, check_export
from gatepress.files import check_output
from gatepress.hub import name_of

EXAMPLES = opt.examples(
    "gatepress export pruned/sst2 -o onnx/sst2",
    "gatepress export pruned/sst2 --quantize int8 --max-metric-drop 0.01 -o onnx/sst2-int8",
    "gatepress export runs/sst2 -o onnx/sst2-gated",
    "gatepress export distilbert/distilbert-base-uncased-finetuned-sst-2-english --quantize int8 --task sst2",
)


def export(  # noqa: PLR0913 - every option is a parameter
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A pruned directory, a run directory, any transformers directory or hub id (owner/name or "
            "owner/name@REV), or demo.",
            show_default=False,
        ),
    ],
    *,
    opset: Annotated[
        int | None,
        opt.OUTPUT(
            metavar="N", help="ONNX operator set, 17 or higher; most models need 18. Default: chosen by the exporter."
        ),
    ] = None,
    max_diff: Annotated[
        float,
        opt.OUTPUT(
            metavar="LIMIT",
            help="Write nothing if a logit differs between ONNX Runtime and torch by more than this. If the largest "
            "logit is above 1, the limit is relative to it.",
        ),
    ] = MAX_LOGIT_DIFF,
    quantize: Annotated[
        Literal["int8"] | None,
        opt.OUTPUT(
            help="int8: store the encoder's matrices and the word embeddings in 8 bits and multiply in 8 bits. The "
            "result is a quarter of the size and, on CPUs with VNNI, 1.1 to 3.4 times as fast (two pruned "
            "encoders). The logits move a little, so the metric is measured before and after, on the run's "
            "validation rows or on those that the data options name.",
            show_default=False,
        ),
    ] = None,
    max_metric_drop: Annotated[
        float | None,
        opt.OUTPUT(
            metavar="LIMIT",
            help="With --quantize: write nothing and exit with code 1 if the metric drops by more than this, e.g. "
            "0.01 for one point of accuracy. 0 allows no loss at all.",
        ),
    ] = None,
    rows: opt.MeasuredRows,
    trust_remote_code: opt.TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        opt.output_option("DIR", "Directory of the ONNX model. Default: onnx/MODEL."),
    ] = None,
    force: opt.Force = False,
    shown: opt.Shown,
) -> None:
    """Write a model as ONNX, checked against torch.

    The file takes any batch size and any length; the tokenizer is stored beside it. The graph is run in
    ONNX Runtime on shapes that it has not seen, some of them padded, and compared with torch. If they
    disagree, nothing is written. With --quantize int8, the checked graph is then made smaller and faster.
    What that costs is measured on the run's validation rows, or on those that the data options name.
    """
    with session(**vars(shown)) as screen:
        data = rows_of(rows)
        check_export(max_diff=max_diff, quantize=quantize, max_metric_drop=max_metric_drop, rows=bool(data))
        target = output or Path("onnx") / name_of(source)
        from gatepress.manifests import refuse_absent, refuse_onnx

        refuse_absent(source)  # these at once: what follows takes seconds to import
        refuse_onnx(source)
        check_output(target, force=force)

        from gatepress import export as exporting

        result = exporting.export(
            source,
            target,
            force=force,
            opset=opset,
            max_diff=max_diff,
            quantize=quantize,
            max_metric_drop=max_metric_drop,
            data=data,
            progress=screen.progress,
            trust_remote_code=trust_remote_code,
        )
        screen.result(result, tables)
        screen.note(f"next: gatepress bench {shlex.quote(str(source))} {shlex.quote(str(target))}")


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return what was written, how well it agrees with torch, and what int8 changed."""
    rows = pick(
        result,
        [
            ("opset", "operator set", str),
            ("dtype", "arithmetic", str),
            ("size_bytes", "size", megabytes),
            ("size_bytes_fp32", "  in float32", megabytes),
        ],
    )
    rows += pick(result, [("max_abs_logit_diff", "largest difference of a logit to torch", "{:.1e}".format)])
    rows += _int8_rows(result)
    rows += pick(result, [("fused_operators", "fused operators", _counts), ("output_dir", "output", str)])
    return [facts("Exported", rows)]


def _int8_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is in int8, and the logits and the metric before and after."""
    quantized = result.get("quantized")
    if quantized is None:
        return []
    parts = [f"{one['quantized']} of {one['of']} {name}" for name, one in quantized["operators"].items()]
    found = [(kind, apart) for kind, apart in quantized["logit_diff"].items() if apart]
    rows = [("in int8", ", ".join(parts))]
    rows += [
        (f"logits moved by, {kind} rows", f"{apart['mean']:.1e} on average, {apart['max']:.1e} at most")
        for kind, apart in found
    ]
    name = result.get("metric_name")
    if name is None:
        return [*rows, ("metric in int8", "not measured")]
    return [
        *rows,
        (f"{name} in float32", f"{result['metric_value_fp32']:.4f}"),
        (f"{name} in int8", f"{result['metric_value']:.4f}  (drop {result['metric_drop']:.4f})"),
    ]


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counted.items())
