"""A run against what could be deployed instead, built temporarily and timed interleaved.

From one run directory: the dense model it started from, the run itself with its gates as masks, the
paper's way of leaving out what is closed (each matrix by its own index, nothing else), and what
gatepress makes of it, in torch, in ONNX Runtime, and in ONNX Runtime with 8-bit weights. Everything
except the run is in a temporary directory while it is timed.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from gatepress.bench import endtoend
from gatepress.bench.record import Record
from gatepress.bench.timing import computing_with
from gatepress.checkpoint import located, open_base, read_run
from gatepress.config import Layout, Target
from gatepress.embedding import as_saved, write_modules_of
from gatepress.errors import UsageError
from gatepress.export import export
from gatepress.files import explained, temporary_directory
from gatepress.models import open_tokenizer
from gatepress.progress import NoProgress, Progress
from gatepress.pruning import prune
from gatepress.runners import max_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

BASELINE = "dense ORT"  # what a user would deploy who had never heard of gates

# Name in the tables -> directory; the run itself has none of its own.
FORMS = {
    "dense torch": "dense",
    "masked torch": "",
    "dense ORT": "dense-onnx",
    "dense ORT int8": "dense-int8",
    "paper layout ORT": "paper-onnx",
    "paper layout torch": "paper",
    "gatepress torch": "for-torch",
    "gatepress ORT": "for-ort-onnx",
    "gatepress ORT int8": "for-int8-onnx",
}


def run(
    run_dir: Path,
    *,
    target: Target | None = None,
    baseline: str = BASELINE,
    progress: Progress | None = None,
    **measuring: Any,
) -> list[Record]:
    """Build the forms of a run and time them in one `endtoend.run`, which takes what is in `measuring`.

    The first record of each cell is the `baseline`; the others follow in the order of `FORMS`. The forms
    of gatepress are each pruned for the runtime that computes them, or those in ONNX for `target`.
    Raises `UsageError` on an unknown baseline and on a device other than the CPU, and what `prune`,
    `export` and `endtoend.run` raise; the temporary directory is removed in any case.
    """
    if baseline not in FORMS:
        raise UsageError(f"--baseline is {baseline!r}, expected one of: {', '.join(FORMS)}")
    if endtoend.check(**measuring).type != "cpu":
        raise UsageError("--alternatives compares runtimes of the CPU; leave out --device, or name the models to time")
    with temporary_directory() as root:
        with computing_with(measuring.get("threads")):  # layouts are chosen for the threads that are timed
            _build(run_dir, Path(root), target, _longest(measuring), progress or NoProgress())
        names = [baseline, *(name for name in FORMS if name != baseline)]
        targets = {name: Path(root, FORMS[name]) if FORMS[name] else run_dir for name in names}
        return endtoend.run(targets, progress=progress, **measuring)


def _longest(measuring: dict[str, Any]) -> int:
    """Return the tokens of the longest batch that is timed; for a task's rows there are none to generate."""
    return 0 if measuring.get("data") else max(measuring.get("seq_lens", endtoend.SEQ_LENS))


def _build(run_dir: Path, root: Path, target: Target | None, longest: int, progress: Progress) -> None:
    """Write every form of `FORMS` except the run."""
    prunings: list[tuple[str, Layout, Target]] = [
        ("paper", "paper", "ort-cpu"),
        ("for-torch", "auto", "torch-cpu"),
        ("for-ort", "auto", target or "ort-cpu"),
        ("for-int8", "auto", target or "ort-int8"),
    ]
    exports: list[tuple[str, str, Literal["int8"] | None]] = [
        ("dense", "dense-onnx", None),
        ("dense", "dense-int8", "int8"),
        ("paper", "paper-onnx", None),
        ("for-ort", "for-ort-onnx", None),
        ("for-int8", "for-int8-onnx", "int8"),
    ]
    steps: list[tuple[str, Callable[[], object]]] = [("dense", partial(_write_dense, run_dir, root / "dense", longest))]
    for name, layout, runtime in prunings:
        steps.append((name, partial(prune, run_dir, root / name, layout=layout, target=runtime, progress=progress)))
    for source, name, quantize in exports:
        steps.append((name, partial(export, root / source, root / name, quantize=quantize, measure=False)))
    progress.start(len(steps), "building the alternatives")
    try:
        for name, step in steps:
            step()
            progress.advance(1, built=name)
    finally:
        progress.finish()


def _write_dense(run_dir: Path, directory: Path, longest: int) -> None:
    """Write the base model with a head for the run's task, not finetuned: any weights take as long."""
    manifest = read_run(run_dir)
    base = located(manifest.settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_base(base, manifest.task)
    endtoend.refuse_longer(str(run_dir), max_tokens(model.config.to_dict()), longest)
    with explained(directory):
        as_saved(model).save_pretrained(directory)
        write_modules_of(model, directory)
        open_tokenizer(run_dir).save_pretrained(directory)
