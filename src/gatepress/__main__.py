"""`gatepress` and `python -m gatepress`: run the command line, and end without a traceback even before it is loaded."""

import json
import os
import signal
import sys
from typing import NoReturn

from gatepress.cli._launched import wants_json


def main() -> NoReturn:
    """Run the command line; the entry point of the `gatepress` script."""
    if os.name != "posix":  # file locks, the signals of a closed terminal, renamed directories
        _end("UsageError", "gatepress runs on Linux and macOS; on Windows run it in WSL (wsl --install)", 2)
    try:
        from gatepress.cli.app import main as run

        run()
    except KeyboardInterrupt as stopped:
        _end("Interrupted", "interrupted; nothing was written", 128 + getattr(stopped, "number", signal.SIGINT))


def _end(kind: str, line: str, exit_code: int) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)  # noqa: T201 - there is nothing else yet
    if wants_json(sys.argv[1:]):
        print(json.dumps({"error": {"type": kind, "message": line}, "exit_code": exit_code}))  # noqa: T201 - as above
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
