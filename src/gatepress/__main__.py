"""`gatepress` and `python -m gatepress`: the command line, and an end without a traceback before that is there."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; the entry point of the `gatepress` script."""
    try:
        from gatepress.cli.app import main as run

        run()
    except KeyboardInterrupt as stopped:
        print("error: interrupted; nothing was written", file=sys.stderr)  # noqa: T201 - there is nothing else yet
        sys.exit(143 if type(stopped).__name__ == "Terminated" else 130)


if __name__ == "__main__":
    main()
