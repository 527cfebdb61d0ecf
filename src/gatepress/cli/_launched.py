"""Which processes print: launchers start several of one training, but stdout must hold one object."""

import os
from collections.abc import Sequence

from gatepress.errors import UsageError

LAUNCHED = "train"  # the one verb that launchers start


def is_first() -> bool:
    """Return whether this is the process that prints: launchers number the processes of one training."""
    return os.environ.get("RANK", "") in ("", "0") or os.environ.get("WORLD_SIZE") == "1"


def refuse_launched(what: str) -> None:
    """Raise `UsageError` in the first of several processes, and end the others: `what` trains in one."""
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE", "1") != "1":
        if not is_first():
            import typer  # not with the module: until it is loaded, an interrupt is answered by a traceback

            raise typer.Exit(2)
        raise UsageError(
            f"{what} trains in one process, RANK and WORLD_SIZE tell of {os.environ['WORLD_SIZE']}; start it without "
            "torchrun or accelerate launch (gatepress train is what they start), or unset these"
        )


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line that was not parsed to its end asks this process for an object on stdout."""
    return "--json" in arguments and (is_first() or list(arguments[:1]) != [LAUNCHED])
