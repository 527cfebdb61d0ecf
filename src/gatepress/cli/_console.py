"""What every command shares: where output goes, how errors end, how results are shown.

stdout is data (one JSON object with --json, otherwise tables); stderr is progress, notes and errors.
Exit codes: 0 done, 1 could not, 2 wrong usage, 129 hung up, 130 interrupted, 143 terminated.
"""

import contextlib
import errno
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer

from gatepress.cli._launched import is_first
from gatepress.errors import GatepressError
from gatepress.files import cannot_write, json_text
from gatepress.progress import NoProgress, Progress

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from gatepress.cli._progress import BarProgress, LineProgress

Titled = tuple[str, "Table | Group"]  # rich is imported only when something is shown

SIGNALS: list[int] = []  # received signals: some libraries swallow what a handler raises while they are imported
DELIVERED = threading.Event()  # whether the one JSON object, or all tables, were written: nothing is left to stop
OF_SIGNALS = 128  # plus the signal's number is the exit code, as in shells
NOTHING_WRITTEN = "nothing was written"
INTERRUPTED = "Interrupted"  # the kind of error that a signal is
PIPE_WIDTH = 120  # columns of a table that goes into a file or a pipe

# Libraries read these when they are first imported, so they must be set before a command imports one.
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Nor does a tool that compresses models report on who runs it. Read at import too, also with --debug.
NO_TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "ORT_DISABLE_TELEMETRY": "1"}

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Terminated(KeyboardInterrupt):
    """The system asked the process to end: `timeout`, a scheduler or a container (SIGTERM), a closed terminal (SIGHUP).

    `number` is that of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


class Screen:
    """The two streams of one running command."""

    def __init__(self, stdout: TextIO, stderr: TextIO, *, as_json: bool, quiet: bool) -> None:
        """Write results to `stdout` and everything else to `stderr`."""
        self.stdout = stdout
        self.stderr = cast("TextIO", _Unhindered(stderr))
        self.as_json = as_json
        self.quiet = quiet
        self.interrupt_note = NOTHING_WRITTEN  # a command that keeps checkpoints says so here
        self._drawing: BarProgress | LineProgress | None = None

    @property
    def progress(self) -> Progress:
        """Where the library reports its progress."""
        if self.quiet:
            return NoProgress()
        if self._drawing is None:
            from gatepress.cli._progress import BarProgress, LineProgress

            bars = self.stderr.isatty() and os.environ.get("TERM") != "dumb"
            self._drawing = BarProgress(self.stderr) if bars else LineProgress(self.stderr)
        return self._drawing

    def note(self, text: str) -> None:
        """Print a remark; it is not data, so it goes to stderr."""
        if not self.quiet:
            self.say(text)

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bars if there are any."""
        if self._drawing is not None:
            self._drawing.say(line)
        else:
            print(line, file=self.stderr, flush=True)

    def result(self, value: dict[str, Any], view: Callable[[dict[str, Any]], Sequence[Titled]]) -> None:
        """Print the result: as it is with --json, otherwise as the tables that `view` makes of it."""
        self.close()
        if self.as_json:
            self._write_json(plain(value))
        else:
            from rich.console import Console

            console = Console(file=self.stdout, width=None if self.stdout.isatty() else PIPE_WIDTH)
            for title, table in view(value):
                console.print(title, markup=False, highlight=False, soft_wrap=not self.stdout.isatty())
                console.print(table, crop=False)  # a terminal that is too narrow breaks lines; nothing is lost
            DELIVERED.set()
        self.stdout.flush()

    def error(self, kind: str, message: str, exit_code: int) -> None:
        """Print an error: a line on stderr and, with --json, the object that pipelines parse on stdout."""
        self.close()
        line = " ".join(part.strip() for part in message.splitlines() if part.strip())
        self.say(f"error: {line}")
        if self.as_json:
            told = {"error": {"type": kind, "message": line}, "exit_code": exit_code}
            try:
                self._write_json(told)
                self.stdout.flush()
            except (OSError, ValueError):
                leave(self.stdout)  # stdout takes nothing, but stderr has the error

    def _write_json(self, value: dict[str, Any]) -> None:
        """Write one object, in ASCII if the encoding of stdout has no more."""
        DELIVERED.set()
        text = json_text(value)
        try:
            text.encode(self.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value, indent=2, allow_nan=False) + "\n"
        self.stdout.write(text)

    def close(self) -> None:
        """End live bars, if there are any."""
        if self._drawing is not None:
            self._drawing.close()


class _Unhindered:
    """A stream for what is not data: if nobody reads it any more, or its disk is full, the work goes on without it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or discard this and all that follows."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            leave(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush, or discard what is left."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            leave(self._stream)


def leave(stream: TextIO) -> None:
    """Discard what is still to be written to a stream that accepts nothing more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def mend_streams() -> None:
    """Make stdout and stderr accept any text: a closed one leads nowhere, characters it does not know are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def plain(value: Any) -> Any:
    """Return `value` with what strict JSON lacks replaced: NaN and infinity by null, paths by text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


@contextlib.contextmanager
def session(*, as_json: bool, quiet: bool, debug: bool, launched: bool = False) -> Iterator[Screen]:
    """Run the body of a command: the one place where exceptions become lines and exit codes.

    If a command was `launched` in several processes, only the first one prints.
    """
    with contextlib.ExitStack() as stack:
        first = not launched or is_first()
        stdout = sys.stdout if first else stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        screen = Screen(stdout, sys.stderr, as_json=as_json, quiet=quiet or not first)
        stack.callback(screen.close)
        # A library that prints must not spoil the data on stdout.
        stack.enter_context(contextlib.redirect_stdout(screen.stderr))
        stack.enter_context(_logging_to(screen, debug=debug))
        for name, value in (NO_TELEMETRY | ({} if debug else QUIET_LIBRARIES)).items():
            os.environ.setdefault(name, value)
        if not debug:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        try:
            yield screen
        except typer.Exit:
            raise
        except BrokenPipeError:
            # The reader of stdout went away, as `| head` does: nobody is left to tell.
            leave(screen.stdout)
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - users see tracebacks only with --debug
            screen.close()
            kind, message, exit_code = explain(error, screen.interrupt_note)
            if debug:
                traceback.print_exc(file=screen.stderr)
            if first or kind != INTERRUPTED:  # all of them are
                screen.error(kind, message, exit_code)
            raise typer.Exit(exit_code) from None


def explain(error: BaseException, note: str = NOTHING_WRITTEN) -> tuple[str, str, int]:
    """Return the kind, the one-line message and the exit code of an exception; `note`: what an interruption left."""
    kind = type(error).__name__
    if isinstance(error, GatepressError):
        return kind, str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt) or SIGNALS:
        came = [getattr(error, "number", signal.SIGINT), *SIGNALS]
        number = next((one for one in came if one != signal.SIGINT), signal.SIGINT)
        return INTERRUPTED, f"interrupted; {note}", OF_SIGNALS + number
    if _is_out_of_memory(error):
        return "OutOfMemory", "out of memory; take smaller batches, shorter texts or a smaller model", 1
    if isinstance(error, OSError):
        return "OSError", _os_error_text(error), 1
    text = f"internal error ({kind}: {error}); run it again with --debug and report what that prints"
    return "InternalError", text, 1


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; torch has its own exceptions for that, which are not imported here."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _os_error_text(error: OSError) -> str:
    place = str(error.filename or "output")
    if error.errno in FULL_DISK:
        if not error.filename:
            return f"{place}: cannot write ({error.strerror}); free some space where it goes"
        return str(cannot_write(Path(place), error))
    reason = error.strerror or str(error)
    return f"{place}: cannot read or write ({reason}); check that it exists and that you have access to it"


class _Said(logging.Handler):
    """Show log records as notes of the command, above live bars if there are any."""

    def __init__(self, screen: Screen, *, debug: bool) -> None:
        super().__init__()
        self.screen = screen
        self.debug = debug

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record: with its origin with --debug, otherwise as plain text or `warning: ...`."""
        text = record.getMessage()
        if self.debug:
            text = f"{record.levelname} {record.name}: {text}"
        elif record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        self.screen.say(text)


@contextlib.contextmanager
def _logging_to(screen: Screen, *, debug: bool) -> Iterator[None]:
    """Show gatepress's log, and with --debug that of all libraries, while the command runs."""
    logger = logging.getLogger() if debug else logging.getLogger("gatepress")
    handler = _Said(screen, debug=debug)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if screen.quiet else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


# --- tables -------------------------------------------------------------------------------------


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Titled:
    """Return a two-column table of names and values."""
    return title, _table(["", ""], rows, left=2, show_header=False)


def grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Titled:
    """Return a table whose first `left` columns are text and whose others are numbers."""
    return title, _table(columns, rows, left=left)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, show_header: bool = True) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=show_header)
    for index, name in enumerate(columns):
        # Texts that are too long go on in the next line, numbers are left whole.
        whole = None if index < left else max((len(row[index]) for row in rows), default=0)
        table.add_column(Text(name), justify="left" if index < left else "right", overflow="fold", min_width=whole)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a path in [brackets] is no markup
    return table


def lines(title: str, texts: Sequence[str]) -> Titled:
    """Return numbered texts, each to be copied from one line however long."""
    from rich.console import Group
    from rich.text import Text

    numbered = (f" {number}  {text}" for number, text in enumerate(texts, 1))
    return title, Group(*(Text(line, no_wrap=True, overflow="ignore") for line in ["", *numbered, ""]))


def percent(fraction: float) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * fraction:.2f} %"


def count(number: float) -> str:
    """Return a whole number with thousands separated."""
    return f"{number:,.0f}"


def megabytes(size_bytes: float) -> str:
    """Return bytes as megabytes (10^6)."""
    return f"{size_bytes / 1e6:.1f} MB"


def pick(result: dict[str, Any], shown: Sequence[tuple[str, str, Callable[[Any], str]]]) -> list[tuple[str, str]]:
    """Return (label, text) for each (key, label, formatter) whose key the result has."""
    return [(label, style(result[key])) for key, label, style in shown if result.get(key) is not None]
