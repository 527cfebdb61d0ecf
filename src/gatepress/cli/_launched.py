"""Which processes print: launchers start several of one training, but stdout must hold one object."""

import os
from collections.abc import Sequence

LAUNCHED = "train"  # the one verb that launchers start


def is_first() -> bool:
    """Return whether this is the process that prints: launchers number the processes of one training."""
    return os.environ.get("RANK", "") in ("", "0") or os.environ.get("WORLD_SIZE") == "1"


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line that was not parsed to its end asks this process for an object on stdout."""
    return "--json" in arguments and (is_first() or list(arguments[:1]) != [LAUNCHED])
