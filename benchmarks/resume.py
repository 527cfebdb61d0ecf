"""Does a run that was killed end as the run that was not? `gatepress train` killed, then resumed and compared.

    python benchmarks/resume.py --work DIR [--kills 50] [--save-every 2] [--model DIR] [--max-train-samples 512]

One run is left alone. Each other run is sent SIGKILL at a moment drawn evenly over the time that the first took,
loading and writing included. It goes on with `gatepress train --resume` (from the start if there was no checkpoint yet)
and is compared bit by bit. Moments that are already in the results (in `results` below `--work`, or where `--results`
says) are not tried again.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import KEPT_IN, add, count, gatepress, keep, machine, parser, read, records_in, sweep

from gatepress.versions import MADE_WITH, versions

TIMES = ("train_seconds", "peak_memory_bytes", "output_dir")


def said(run: Path) -> dict[str, Any]:
    """Return what a run directory says of itself, without times; its tensors by their sha256."""
    manifest = json.loads((run / "gatepress_run.json").read_text())
    report = {key: value for key, value in manifest["report"].items() if key not in TIMES}
    report["curve"] = [{key: value for key, value in point.items() if key not in TIMES} for point in report["curve"]]
    return {**manifest, "report": report, "files": sorted(path.name for path in run.iterdir())}


def killed(words: list[str], moment: float) -> bool:
    """Start a command and kill it after `moment` seconds; return whether it had not ended by then."""
    process = subprocess.Popen([sys.executable, "-m", "gatepress", *words, "--quiet"], stdout=subprocess.DEVNULL)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def cell(key: tuple[Any, ...], words: list[str], whole: Path, seconds: float) -> dict[str, Any]:
    """Kill one run, let it go on to its end, and compare it with the whole one."""
    (number,) = key
    moment = seconds * random.Random(number).random()  # noqa: S311 - a moment, not a secret
    run = whole.with_name(f"killed-{number}")
    shutil.rmtree(run, ignore_errors=True)
    command = [*words, "-o", str(run)]
    was_killed = killed(command, moment)
    manifest = run / "gatepress_run.json"
    found = json.loads(manifest.read_text()) if manifest.exists() else {}
    gatepress(*(("train", "--resume", run) if found else command))
    equal = said(run) == said(whole)
    if equal:  # one that is not is kept, to be looked at
        shutil.rmtree(run)
    return {
        "moment_s": round(moment, 3),
        "whole_s": round(seconds, 1),
        "killed": was_killed,
        "status": found.get("status"),  # as it was found; none: nothing had been written
        "checkpoint_step": found.get("step"),
        "equal": equal,
        "versions": versions(*MADE_WITH),
        **machine(),
        "command": command_of(words),
    }


def refuse_other(path: Path, words: list[str]) -> None:
    """Exit where the results hold kills of another command or of other versions: the table says one thing of all."""
    told = {"command": command_of(words), "versions": versions(*MADE_WITH)}
    for one in records_in(path):
        for name, value in told.items():
            if one[name] != value:
                raise SystemExit(
                    f"{path}: holds kills with another {name} ({one[name]}) than is asked for ({value}); take them "
                    "out, or give another --results"
                )


def command_of(words: list[str]) -> str:
    """Return the command that is killed, as a cell tells it."""
    return "gatepress " + " ".join(words)


def render(cells: list[dict[str, Any]]) -> str:
    """Return what came out, as one paragraph of Markdown."""
    dead = [one for one in cells if one["killed"]]
    steps = [one["checkpoint_step"] for one in dead if one["status"] == "training"]
    early = sum(one["status"] is None for one in dead)
    equal, last = sum(one["equal"] for one in dead), cells[-1]
    return (
        f"# Killed and resumed\n\n`{last['command']}` was killed (SIGKILL) at {len(dead)} moments, drawn evenly over "
        f"the {last['whole_s']:.0f} s that it takes from its start. {len(steps)} runs had a checkpoint, of "
        f"{len(set(steps))} different steps, and went on with `--resume`; {early} had written nothing and were started "
        f"again; {len(dead) - len(steps) - early} had finished and were about to end. {equal} of {len(dead)} came to "
        "the tensors (sha256), metric, curve, counts and files of the run that was not killed. "
        f"{last['cores']} cores of {last['cpu']}, torch {last['versions']['torch']}, float32.\n"
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    add(made, *KEPT_IN)
    made.add_argument("--kills", type=count, default=50)
    made.add_argument("--save-every", type=count, default=2, metavar="STEPS")
    made.add_argument("--model", default="demo", metavar="DIR", help="demo unless given")
    made.add_argument("--max-train-samples", type=count, default=512)
    return read(made, words)


def main() -> None:
    """Train once, then kill and resume as often as asked."""
    options = parse()
    path, keys = options.results / "resume.json", [(number,) for number in range(options.kills)]
    if options.render:
        keep(path, None, render)
        return
    words = ["train", "--task", "demo", "--model", options.model, "--device", "cpu", "--epochs", "3"]
    words += ["--max-train-samples", str(options.max_train_samples), "--max-validation-samples", "256"]
    words += ["--save-every", str(options.save_every)]
    refuse_other(path, words)
    whole = options.work / "whole"
    begun = time.monotonic()
    gatepress(*words, "-o", whole, "--force")
    kill = partial(cell, words=words, whole=whole, seconds=time.monotonic() - begun)
    sweep(path, keys, ("kill",), kill, render)


if __name__ == "__main__":
    main()
