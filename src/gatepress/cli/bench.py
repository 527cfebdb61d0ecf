"""`gatepress bench`: time one weight, or whole models against each other."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._asked import asked_data, chosen, numbers, said_of, whole_numbers
from gatepress.cli._console import Screen, Titled, grid, session
from gatepress.config import Arithmetic, Runtime, Target, check_timing, refuse_below, spelled
from gatepress.errors import UsageError
from gatepress.files import refuse_overwriting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gatepress.bench.record import Record

EXAMPLES = opt.examples(
    "gatepress bench --device cpu",
    "gatepress bench --shape 768x768,3072x768 --repetitions 100000 --plot fig3a.png",
    "gatepress bench runs/sst2 pruned/sst2 onnx/sst2 --batch-size 1,8 --seq-len 32,128",
    "gatepress bench runs/sst2 --alternatives --plot sst2.png",
    "gatepress bench dense-onnx onnx/sst2 --fail-under 1.3 --json",
    "gatepress bench --latency-table ort-cpu -o server.json",
    "gatepress bench dense-onnx onnx/sst2 --runtime onnxruntime,openvino",
    "gatepress bench FacebookAI/roberta-base pruned/cola --precision fp32,bf16",
    "gatepress bench FacebookAI/roberta-base pruned/cola --task cola --output cola.jsonl",
)


def bench(  # noqa: PLR0913 - every option is a parameter
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Models to time end to end: directories written by gatepress, .onnx files, transformers "
            "directories, hub ids (owner/name or owner/name@REV) or demo. The others are compared with the "
            "first. With no model, one weight is timed.",
            show_default=False,
        ),
    ] = None,
    *,
    batch_size: Annotated[
        str | None, opt.MEASURING(metavar="N,...", help="With models: batch sizes. Default: 1,8.")
    ] = None,
    seq_len: Annotated[
        str | None,
        opt.MEASURING(metavar="TOKENS,...", help="With models: sequence lengths in tokens. Default: 32,128."),
    ] = None,
    shape: Annotated[
        str | None,
        opt.MEASURING(metavar="OUTxIN,...", help="Without models: sizes of the weight. Default: 768x768."),
    ] = None,
    sparsity: Annotated[
        str | None,
        opt.MEASURING(
            metavar="FRACTION,...",
            help="Without models: fractions of the columns that are removed. Default: 0 to 0.9 in tenths.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        opt.MEASURING(
            metavar="N", help="Without models: number of rows that the weight is multiplied with. Default: 128."
        ),
    ] = None,
    repetitions: Annotated[
        int | None,
        opt.MEASURING(
            metavar="N",
            help="Timed calls of each. Default: 2,000 of a weight (the paper: 100,000), 20 of a batch, 10 of a pass "
            "over a task's rows.",
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        opt.MEASURING(
            metavar="N",
            help="Untimed calls before the timed ones. Default: 10 of a weight, 3 of a batch, 1 of a pass over a "
            "task's rows.",
        ),
    ] = None,
    alternatives: Annotated[
        bool,
        opt.ALTERNATIVES(
            "--alternatives",
            help="With one run directory: time it against what you could deploy instead. Temporarily builds the "
            "dense model, its 8-bit form, the paper's layout and the forms of gatepress, in torch and ONNX "
            "Runtime. Takes a few minutes.",
        ),
    ] = False,
    for_target: Annotated[
        Target | None,
        opt.ALTERNATIVES(
            "--for",
            help="With --alternatives: prune the ONNX forms for this target. Default: each for its own runtime.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        opt.ALTERNATIVES(
            metavar="NAME",
            help="With --alternatives: the form that the others are compared with. One of dense torch, masked torch, "
            "dense ORT, dense ORT int8, paper layout ORT, paper layout torch, gatepress torch, gatepress ORT "
            "and gatepress ORT int8. Default: dense ORT.",
        ),
    ] = None,
    latency_table: Annotated[
        Target | None,
        opt.MEASURING(
            help="Instead of timing models or a weight: measure what matrix products and index operations of a "
            "runtime cost on this machine, for gatepress prune --latency-table on another one. Write it to a "
            "file with --output."
        ),
    ] = None,
    fail_under: Annotated[
        float | None,
        opt.MEASURING(
            metavar="FACTOR",
            help="With models: exit with code 1 unless the last one is at least FACTOR times as fast as the first in "
            "every table. Results are shown and written in either case.",
        ),
    ] = None,
    threads: opt.Threads = None,
    device: opt.MeasuringDevice = "cpu",
    runtime: Annotated[
        str | None,
        opt.MEASURING(
            metavar="NAME,...",
            help="With models: what computes ONNX files, onnxruntime or openvino or both; each file is timed once in "
            "each. openvino needs gatepress[openvino] and a CPU. Default: onnxruntime.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        opt.MEASURING(
            metavar="KIND,...",
            help="With models: arithmetic of torch models, and of float32 files in OpenVINO, some of fp32, bf16 and "
            "fp16; each model is timed once in each. Other ONNX files compute in what they were exported in. "
            "Default: fp32.",
        ),
    ] = None,
    seed: opt.MeasuringSeed = 0,
    rows: opt.Rows,
    max_length: Annotated[
        int | None,
        opt.DATA(metavar="TOKENS", help="With rows of a task: truncate texts to this many tokens. Default: 128."),
    ] = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        opt.output_option(
            "FILE",
            "Also write the records to FILE, as .json or .jsonl (with up to 1,000 raw samples of each), .csv or .md.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, opt.OUTPUT(metavar="FILE", help="Also draw a figure, as .png or .svg. Needs gatepress[plot].")
    ] = None,
    force: opt.Force = False,
    shown: opt.Shown,
) -> None:
    """Time models against each other, or time one weight.

    With models, the others are compared with the first. Without, one weight is multiplied with all of its
    columns and with some of them, which shows what removing the others gains. Everything that is compared
    takes turns on the same inputs, so a machine that slows down slows all of it. Batches are generated; with
    --task or --validation-file, whole passes over those rows are timed. The tables show medians with their
    spread. A time factor of 2.00x means twice as fast as the first.
    """
    with session(**vars(shown)) as screen:
        weights = {"shape": shape, "sparsity": sparsity, "tokens": tokens}
        models = {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "max_length": max_length,
            "runtime": runtime,
            "precision": precision,
            "trust_remote_code": trust_remote_code or None,
            **vars(rows),
        }
        if latency_table is not None:
            others = {**weights, **models, "plot": plot, "fail_under": fail_under, "for": for_target}
            others |= {"repetitions": repetitions, "warmup": warmup, "baseline": baseline}
            others |= {"alternatives": alternatives or None}
            others |= {"device": None if device == "cpu" else device, "seed": seed or None}
            _refuse_given(others, "means nothing to --latency-table")
            _latency_table(screen, latency_table, targets, output, threads, force=force)
            return
        if targets:
            _refuse_given(weights, "times one weight; leave it out where models are given")
        else:
            _refuse_given(models, "times models; name at least one, e.g. gatepress bench pruned/x")
        built = {"target": for_target, "baseline": baseline}
        _check_alternatives(targets, built, alternatives=alternatives)
        if alternatives:
            _refuse_given({"runtime": runtime}, "does not go with --alternatives; export the forms and name them")
        asked = _asked(
            batch_sizes=batch_size,
            seq_lens=seq_len,
            shapes=shape,
            sparsities=sparsity,
            runtimes=runtime,
            precisions=precision,
        )
        _check_factor(fail_under, asked, models=len(targets or ()), alternatives=alternatives)
        plain = {"tokens": tokens, "max_length": max_length, "repetitions": repetitions, "warmup": warmup}
        asked |= {name: value for name, value in plain.items() if value is not None}
        data = asked_data(rows)
        if targets and data:
            _refuse_given({"seq-len": seq_len}, "means nothing to the rows of a task, which are as long as they are")
        elif targets:
            _refuse_given({"max-length": max_length}, "cuts rows of a task; give --task, or --seq-len in its place")

        from gatepress.bench import render
        from gatepress.manifests import refuse_absent, run_file

        for path, check in ((output, render.check_report), (plot, render.check_plot)):
            if path is not None:
                check(path, force=force)  # before anything is timed
                refuse_overwriting(path, (*(targets or ()), rows.data_dir, rows.validation_file))
        asked |= {"device": device, "threads": threads, "seed": seed, "progress": screen.progress}
        if targets:
            check_timing(**asked)
            if alternatives:
                run_file(Path(targets[0]))  # before the slow imports
            else:
                refuse_absent(*targets)
            asked |= {"data": data, "trust_remote_code": trust_remote_code}
        asked |= {name: value for name, value in built.items() if value is not None}
        records = _records(targets, alternatives=alternatives, **asked)
        _deliver(screen, records, {"output": output, "plot": plot}, fail_under, force=force)


def _deliver(
    screen: Screen, records: "Sequence[Record]", files: dict[str, Path | None], factor: float | None, *, force: bool
) -> None:
    """Write and show the records; exit with 1 if the last model is not `factor` times as fast as the first."""
    from gatepress.bench import render
    from gatepress.bench.tables import too_slow

    written: dict[str, str] = {}
    for (key, path), write in zip(files.items(), (render.write, render.plot), strict=True):
        if path is not None:
            write(records, path, force=force)
            written[key] = str(path)
            screen.interrupt_note = f"{', '.join(written.values())} is written"
    value = {**render.json_object(records, samples=False), **written}
    missed = [] if factor is None else too_slow(records, factor)
    if factor is not None:
        value |= {"fail_under": factor, "missed": [_missed(record) for record in missed]}
    screen.result(value, lambda _: tables(records))
    for name in written.values():
        screen.note(f"wrote {name}")
    if missed:
        _say_missed(screen, missed, factor)
        raise typer.Exit(1)


def tables(records: "Sequence[Record]") -> list[Titled]:
    """Return one table for each weight, or for each batch size and length."""
    from gatepress.bench.tables import tables as tables_of

    return [grid(table.title, table.columns, table.rows, left=table.left) for table in tables_of(records)]


def _records(targets: list[str] | None, *, alternatives: bool, **asked: Any) -> "list[Record]":
    """Measure what the command line asks for."""
    if targets and alternatives:
        from gatepress import alternatives as building

        return building.run(Path(targets[0]), **asked)
    if targets:
        from gatepress.bench import endtoend

        return endtoend.run(targets, **asked)
    from gatepress.bench import matmul

    return matmul.run(**asked)


def _latency_table(  # noqa: PLR0913 - each is an option of the command
    screen: Screen, target: Target, models: list[str] | None, output: Path | None, threads: int | None, *, force: bool
) -> None:
    """Measure, write and show a latency table."""
    if models:
        raise UsageError(f"--latency-table times single products; leave out {', '.join(models)}")

    from gatepress import costs, latency
    from gatepress.bench import render, timing

    if output is not None:
        render.check_file(output, (".json",), "--output", force=force)
    refuse_below(1, threads=threads)
    with timing.undisturbed(threads):
        table = latency.measure(target, progress=screen.progress)
    if output is not None:
        costs.save(table, output)
    columns = ["operation", "tokens", "shape", "time"]
    rows = [
        [entry.op, f"{entry.tokens:,}", "x".join(map(str, entry.shape)), f"{entry.ms:.3f} ms"]
        for entry in table.entries
    ]
    calls = latency.ROUNDS * latency.REPEATS
    title = f"{target} on {table.source}, {table.about['threads']} threads, the fastest of at least {calls} calls"
    screen.result(table.to_json(), lambda _: [grid(title, columns, rows)])


def _check_alternatives(targets: list[str] | None, built: dict[str, Any], *, alternatives: bool) -> None:
    if alternatives and len(targets or ()) != 1:
        raise UsageError("--alternatives takes one run directory, e.g. gatepress bench runs/x --alternatives")
    if not alternatives:
        _refuse_given({"for": built["target"], "baseline": built["baseline"]}, "goes with --alternatives")


def _check_factor(factor: float | None, asked: dict[str, Any], *, models: int, alternatives: bool) -> None:
    if factor is None:
        return
    if not 0 < factor < math.inf:
        raise UsageError(f"--fail-under is {factor:g}, expected a factor above 0, e.g. 1.3")
    if alternatives:
        return
    if models <= 1:
        raise UsageError("--fail-under compares the last model with the first; name two, or add --alternatives")
    several = {name: asked.get(f"{name}s", ())[1:] for name in ("runtime", "precision")}
    _refuse_given(
        {name: more or None for name, more in several.items()},
        "with several values leaves open which of the last model's times --fail-under means; give one",
    )


def _missed(record: "Record") -> dict[str, Any]:
    """Return one cell in which --fail-under was missed."""
    keys = ("name", "baseline", "task", "batch_size", "seq_len", "relative_time_factor")
    return {key: getattr(record, key) for key in keys}


def _say_missed(screen: Screen, missed: "Sequence[Record]", factor: float | None) -> None:
    """Print one line that says where the last model is too slow."""
    from gatepress.bench.tables import cell

    places = ", ".join(f"{record.relative_time_factor:.2f}x at {cell(record)}" for record in missed)
    last = missed[0]
    screen.say(f"error: {last.name} is not {factor:g} times as fast as {last.baseline} (--fail-under): {places}")


def _asked(**lists: str | None) -> dict[str, Any]:
    """Return the lists that options give; the library knows the defaults of those that are absent."""
    read: dict[str, Callable[[str], Any]] = {
        "batch_sizes": lambda text: whole_numbers("--batch-size", text),
        "seq_lens": lambda text: whole_numbers("--seq-len", text),
        "shapes": lambda text: [_shape(part) for part in text.split(",")],
        "sparsities": lambda text: numbers("--sparsity", text),
        "runtimes": lambda text: chosen("--runtime", text, Runtime),
        "precisions": lambda text: chosen("--precision", text, Arithmetic),
    }
    return {name: read[name](text) for name, text in lists.items() if text is not None}


def _refuse_given(options: dict[str, Any], reason: str) -> None:
    """Refuse options that would silently have no effect."""
    given = list(map(spelled, said_of(options)))
    if given:
        raise UsageError(f"{', '.join(given)} {reason}")


def _shape(text: str) -> tuple[int, int]:
    """Return `(out, in)` of `OUTxIN`."""
    out, _, columns = text.strip().lower().partition("x")
    if not (out.isdecimal() and columns.isdecimal()):
        raise UsageError(f"--shape is {text!r}, expected sizes like 768x768 or 3072x768 separated by commas")
    return int(out), int(columns)
