"""`gatepress verify`: whether a directory still matches its manifest."""

from typing import Any

import typer

from gatepress.cli import _options as opt
from gatepress.cli._console import Titled, facts, session
from gatepress.config import DEFAULT_RUNTIME, refuse_runtime

EXAMPLES = opt.examples(
    "gatepress verify pruned/sst2",
    "gatepress verify runs/sst2 --json",
    "gatepress verify onnx/sst2 --runtime openvino",
    "gatepress verify onnx/sst2 && cp -r onnx/sst2 /srv/models",
)


def verify(
    directory: opt.Written,
    *,
    runtime: opt.RuntimeOption = DEFAULT_RUNTIME,
    shown: opt.Shown,
) -> None:
    """Check that a directory is whole.

    Checks that every file the manifest names is there and has its sha256, that files hold what their headers
    claim, that shapes fit the configuration, that a run's base model is the one it was trained on, and that
    a pruned or ONNX directory still gives the logits that it gave when it was written, whatever packages,
    runtime and processor are here now. Needs no network. If there are faults, prints one line for each and
    exits with code 1.
    """
    with session(**vars(shown)) as screen:
        from gatepress.manifests import written_form

        refuse_runtime(runtime, directory, written_form(directory))  # before the slow imports

        from gatepress import verifying

        result = verifying.verify(directory, runtime=runtime)
        screen.result(result, tables)
        for fault in result["faults"]:
            screen.say(f"fault: {fault}")
        if not result["ok"]:
            raise typer.Exit(1)


def tables(result: dict[str, Any]) -> list[Titled]:
    """Return what was checked and holds, what does not, and what could not be checked."""
    states = (("checked", "holds"), ("skipped", "not checked"))
    rows = [(state, line) for key, state in states for line in result[key]]
    if (difference := result["max_abs_logit_diff"]) is not None:
        rows.append(("largest difference of a logit", f"{difference:.1e}"))
    faults = len(result["faults"])
    return [facts("Whole" if result["ok"] else f"{faults} fault{'s' * (faults > 1)}", rows)]
