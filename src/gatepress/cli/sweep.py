"""`gatepress sweep`: metric against latency for several sparsities, methods and seeds, as one picture."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._asked import numbers, refuse_unused, train_settings, whole_numbers, words
from gatepress.cli._console import Screen, Titled, grid, session
from gatepress.cli._launched import refuse_launched
from gatepress.config import DEFAULT_TARGET, TrainSettings, default_run_name
from gatepress.hub import refuse_misspelt
from gatepress.manifests import SWEEP_FILE

EXAMPLES = opt.examples(
    "gatepress sweep --task sst2 --sparsity 0,0.3,0.5,0.75 --method gates+lora,lora,full --seeds 5",
    "gatepress sweep --task demo --model demo --sparsity 0,0.5,0.8 --epochs 2 -o sweeps/demo",
)


def sweep(  # noqa: PLR0913 - every option is a parameter
    *,
    context: opt.Context,
    rows: opt.TrainingRows,
    base: opt.Base,
    sparsity: Annotated[
        str,
        opt.GATES(
            "--sparsity",
            "-s",
            metavar="FRACTION,...",
            help="Sparsities of each method that trains gates: the points of its curve. With 0, the curve starts at "
            "the whole model. A knee needs three points or more.",
        ),
    ] = "0,0.3,0.5,0.7",
    method: Annotated[
        str,
        opt.GATES(
            metavar="NAME,...",
            help="What to train, as in gatepress train --method. Each method without gates (full, lora, ...) gives "
            "one point: what would be deployed instead.",
        ),
    ] = TrainSettings.method,
    gating: opt.Gating,
    seeds: Annotated[
        int,
        opt.TRAINING(
            metavar="N",
            help="Trainings of each point, with seeds counted up from --seed. The picture shows the median and, as "
            "whiskers, the lowest and highest. With a single seed, luck looks like a result.",
        ),
    ] = 1,
    schedule: opt.Schedule,
    machine: opt.Machine,
    target: opt.TargetOption = DEFAULT_TARGET,
    bench_batch_size: Annotated[
        str, opt.MEASURING(metavar="N,...", help="Batch sizes to time. The picture shows the largest.")
    ] = "1,8",
    bench_seq_len: Annotated[
        str, opt.MEASURING(metavar="TOKENS,...", help="Sequence lengths to time. The picture shows the largest.")
    ] = "32,128",
    threads: opt.Threads = None,
    plot: Annotated[
        bool | None,
        opt.OUTPUT(
            help="Draw sweep.png and sweep.svg. Default: on if gatepress[plot] is installed.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        opt.output_option(
            "DIR", "Directory of the sweep. If it exists, the sweep continues there. Default: sweeps/TASK-MODEL."
        ),
    ] = None,
    force: Annotated[
        bool,
        opt.force_option("Start over. What a sweep in the directory has trained is removed before the first training."),
    ] = False,
    shown: opt.Shown,
) -> None:
    """Find the sparsity that pays.

    Trains every sparsity with every seed, and the methods you would use instead of gates. Then prunes,
    exports and times one model of each point, interleaved, and shows metric against latency. The knee is
    where the metric is still high for how fast the model has become: a first guess, not a verdict.

    You can interrupt it at any time: the same command continues with what is missing. With other sparsities
    or methods, or with more seeds, it adds them to what is there. All runs stay in DIR/runs, each as
    gatepress train leaves it.
    """
    with session(**vars(shown)) as screen:
        refuse_launched("gatepress sweep")
        settings = train_settings(rows, base, gating, schedule, machine)
        refuse_unused(settings, context)
        asked: dict[str, Any] = {
            "methods": list(words(method)),
            "sparsities": numbers("--sparsity", sparsity),
            "batch_sizes": whole_numbers("--bench-batch-size", bench_batch_size),
            "seq_lens": whole_numbers("--bench-seq-len", bench_seq_len),
        }
        directory = output or Path("sweeps") / default_run_name(settings).rpartition("-")[0]  # without the sparsity
        refuse_misspelt(settings.model, settings.revision)  # before the slow imports

        from gatepress import sweep as sweeping

        try:
            result = sweeping.run(
                settings,
                directory,
                **asked,
                seeds=seeds,
                target=target,
                threads=threads,
                plot=plot,
                force=force,
                progress=screen.progress,
            )
        except KeyboardInterrupt:
            if (directory / SWEEP_FILE).is_file():
                screen.interrupt_note = f"what is finished is in {directory}; the same command goes on from there"
            raise
        screen.result(result, tables)
        summary, runs = (shlex.quote(str(directory / name)) for name in ("sweep.md", "runs"))
        screen.note(f"next: look at {summary}, then gatepress prune {runs}/NAME")
        _say_failed(screen, result)


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return the summary, one row per point of the picture."""
    from gatepress.bench.summary import table

    shown = table(result)
    return [grid(shown.title, shown.columns, shown.rows, left=shown.left)]


def _say_failed(screen: Screen, result: dict[str, Any]) -> None:
    """Exit with 1 if a training failed, and say which."""
    failed = [cell for cell in result["cells"] if cell["status"] == "failed"]
    if failed:
        names = ", ".join(f"{cell['method']} {cell['sparsity']:g} seed {cell['seed']}" for cell in failed)
        screen.say(f"error: {len(failed)} of {len(result['cells'])} trainings failed ({names}); run it again to retry")
        raise typer.Exit(1)
