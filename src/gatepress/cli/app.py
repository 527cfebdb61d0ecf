"""The `gatepress` command: its verbs, its version, and what happens when a command line is not understood."""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import gatepress
from gatepress.cli import bench, demo, evaluate, export, inspect, prune, report, sweep, train, verify
from gatepress.cli._console import DELIVERED, SIGNALS, Screen, Terminated, explain, leave, mend_streams
from gatepress.cli._groups import spread
from gatepress.cli._launched import wants_json
from gatepress.cli._options import examples
from gatepress.signals import INTERRUPTS


class StoppedError(Exception):
    """Raised for a signal outside of a session: on a KeyboardInterrupt typer would end silently."""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError from None


class Verbs(TyperGroup):
    """End wrong usage like every other error: one line, exit code 2, JSON if JSON was asked for."""

    def make_context(self, *given: Any, **settings: Any) -> Any:
        """Read what precedes the verb."""
        with _stoppable():
            return super().make_context(*given, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Read the options of the verb and run it."""
        with _stoppable():
            return super().invoke(ctx)

    def main(self, args: Sequence[str] | None = None, *given: Any, **settings: Any) -> NoReturn:
        """Run the verb that `args` ask for and exit."""
        arguments = list(sys.argv[1:] if args is None else args)
        settings["standalone_mode"] = False  # exceptions come here instead of being printed
        try:
            exit_code = super().main(arguments, *given, **settings)
        except (StoppedError, typer.Abort):
            exit_code = _interrupted(arguments)
        except OSError as error:  # help and errors of usage are printed outside of a session
            leave(sys.stdout)
            _, message, exit_code = explain(error)
            if not isinstance(error, BrokenPipeError):
                typer.echo(f"error: {message}", err=True)
        except Exception as error:
            if SIGNALS:  # what was imported has made another exception of it
                sys.exit(_interrupted(arguments))
            # typer has bundled click, renamed, since 0.20-odd, so its errors are recognised by their shape.
            if not hasattr(error, "format_message"):
                raise
            exit_code = _wrong_usage(error, arguments)
        sys.exit(exit_code if isinstance(exit_code, int) else 0)


def _screen(arguments: Sequence[str]) -> Screen:
    """Return where to print outside of a session."""
    return Screen(sys.stdout, sys.stderr, as_json=wants_json(arguments), quiet=False)


def _interrupted(arguments: Sequence[str]) -> int:
    """Print that the command was interrupted; return the exit code."""
    kind, message, exit_code = explain(KeyboardInterrupt())
    _screen(arguments).error(kind, message, exit_code)
    return exit_code


def _wrong_usage(error: Any, arguments: Sequence[str]) -> int:
    """Print what is wrong with the request; return the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message(), err=True)
        return int(error.exit_code)
    context = getattr(error, "ctx", None)
    verbs = [word for word in arguments[:1] if word in VERBS]
    command = context.command_path if context is not None else " ".join(["gatepress", *verbs])
    text = error.format_message().strip().rstrip(".").replace("Value error, ", "")
    if "Input should be" in text:  # pydantic does not say what it got
        options = getattr(getattr(error, "param", None), "opts", ())
        text += "".join(f", got {value!r}" for option, value in pairwise(arguments) if option in options)
    message = f"{text[:1].lower()}{text[1:]}{' See' if text.endswith('?') else '; see'} '{command} --help'"
    _screen(arguments).error("UsageError", message, int(error.exit_code))
    return int(error.exit_code)


class Verb(TyperCommand):
    """A command whose help page shows its options in the groups that they belong to."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group, in the order of the parameters."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            group = getattr(parameter, "rich_help_panel", None) or f"{parameter.param_type_name.title()}s"
            if record := parameter.get_help_record(ctx):
                sections.setdefault(group, []).append(record)
        sections["Options"] = sections.pop("Options", [])  # --help comes last
        for group, records in sections.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer passes the flag like this
    if asked:
        typer.echo(f"gatepress {gatepress.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: whole option names at 80 columns, and no rich to import
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "gatepress train --task sst2 --sparsity 0.3 -o runs/sst2",
        "gatepress prune runs/sst2 -o pruned/sst2",
        "gatepress export pruned/sst2 -o onnx/sst2",
        "gatepress bench runs/sst2 pruned/sst2 onnx/sst2 --batch-size 1,8",
        "gatepress evaluate onnx/sst2",
    )
    + "\n\nExit codes: 0 done, 1 could not or a limit was missed, 2 wrong usage, 129 hung up, 130 interrupted, 143 "
    "terminated. Every verb takes --json.",
)


@app.callback()
def root(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Make a transformer encoder smaller while it learns your task.

    gatepress trains gates over the inner dimensions of an encoder together with the task, then cuts the
    closed ones out of the weights. What remains is an ordinary, smaller model that computes exactly what
    training produced.
    """


for verb in (train, prune, export, bench, evaluate, sweep, inspect, verify, report, demo):  # in the order of use
    command = getattr(verb, verb.__name__.rpartition(".")[2])
    app.command(cls=Verb, epilog=verb.EXAMPLES)(spread(command))


VERBS = [str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands]


def _stop(number: int, _frame: object) -> None:
    if DELIVERED.is_set():  # the command is at its end: a second object would spoil the first, and all is written
        return
    SIGNALS.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def main() -> NoReturn:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _stop)  # removes half-written output, as with Ctrl-C
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # the terminal was closed; nohup asks to ignore it
        signal.signal(signal.SIGHUP, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise shells asked to ignore it
        signal.signal(signal.SIGINT, _stop)
    mend_streams()
    try:
        app(prog_name="gatepress")  # also when started as `python -m gatepress`
    finally:
        for number in INTERRUPTS:  # everything is reported, and Python leaves a process at its end to the system
            if signal.getsignal(number) is _stop:
                signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


__all__ = ["app", "main"]
