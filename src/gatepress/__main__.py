"""`gatepress` and `python -m gatepress`: run the command line, and end without a traceback even before it is loaded."""

import json
import signal
import sys
from typing import NoReturn

from gatepress.cli._launched import wants_json


def main() -> NoReturn:
    """Run the command line; the entry point of the `gatepress` script."""
    try:
        from gatepress.cli.app import main as run

        run()
    except KeyboardInterrupt as stopped:
        exit_code, line = 128 + getattr(stopped, "number", signal.SIGINT), "interrupted; nothing was written"
        print(f"error: {line}", file=sys.stderr)  # noqa: T201 - there is nothing else yet
        if wants_json(sys.argv[1:]):
            print(json.dumps({"error": {"type": "Interrupted", "message": line}, "exit_code": exit_code}))  # noqa: T201 - as above
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
