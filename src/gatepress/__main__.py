"""`gatepress` and `python -m gatepress`: run the command line, and end without a traceback even while it is loaded."""

import json
import os
import signal
import sys
from typing import NoReturn

from gatepress.cli._launched import wants_json
from gatepress.signals import interrupts


def main() -> NoReturn:
    """Run the command line; the entry point of the `gatepress` script."""
    if os.name != "posix":  # file locks, the signals of a closed terminal, renamed directories
        _end("UsageError", "gatepress runs on Linux and macOS; on Windows run it in WSL (wsl --install)", 2)
    try:
        with interrupts(_leave):
            from gatepress.cli.app import main as run

        run()
    except KeyboardInterrupt as stopped:
        _end(*_interrupted(getattr(stopped, "number", signal.SIGINT)))


def _leave(number: int, _frame: object) -> NoReturn:
    """End at once: what is raised inside of an import may come out as another exception, or not at all."""
    kind, line, exit_code = _interrupted(number)
    _tell(kind, line, exit_code)
    sys.stdout.flush()
    os._exit(exit_code)


def _interrupted(number: int) -> tuple[str, str, int]:
    return "Interrupted", "interrupted; nothing was written", 128 + number


def _end(kind: str, line: str, exit_code: int) -> NoReturn:
    _tell(kind, line, exit_code)
    sys.exit(exit_code)


def _tell(kind: str, line: str, exit_code: int) -> None:
    print(f"error: {line}", file=sys.stderr)  # noqa: T201 - there is nothing else yet
    if wants_json(sys.argv[1:]):
        print(json.dumps({"error": {"type": kind, "message": line}, "exit_code": exit_code}))  # noqa: T201 - as above


if __name__ == "__main__":
    main()
