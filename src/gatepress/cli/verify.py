"""`gatepress verify`: whether a directory still is what its manifest says."""

from typing import Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._console import Titled, facts, session

EXAMPLES = opt.examples(
    "gatepress verify pruned/sst2",
    "gatepress verify runs/sst2 --json",
    "gatepress verify onnx/sst2 && cp -r onnx/sst2 /srv/models",
)


def verify(
    directory: opt.Written,
    *,
    shown: opt.Shown,
) -> None:
    """Check that a directory is whole.

    Every file that the manifest names is there with its sha256, headers hold what they claim, shapes fit
    the configuration, a run's base model is the one it was trained on, logits are finite. Needs no
    network. Exit code 1 with one line for each fault.
    """
    with session(**vars(shown)) as screen:
        from gatepress import verifying

        result = verifying.verify(directory)
        screen.result(result, tables)
        for fault in result["faults"]:
            screen.say(f"fault: {fault}")
        if not result["ok"]:
            raise typer.Exit(1)


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return what was checked and holds, what does not, and what could not be checked."""
    states = (("checked", "holds"), ("skipped", "not checked"))
    rows = [(state, line) for key, state in states for line in result[key]]
    faults = len(result["faults"])
    return [facts("Whole" if result["ok"] else f"{faults} fault{'s' * (faults > 1)}", rows)]
