"""A call in a process of its own: its memory is its own, its crash ends only itself, and it ends with its caller."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PATIENCE_S = 30.0  # for a call that is told to end: it writes what it has


class DiedError(Exception):
    """The other process ended before it answered; its only argument is the exit code."""


def called(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function`, which another process can import, returns there; raise what it raises.

    Raises `DiedError` if the process dies. If this one is interrupted, the other is interrupted too, and ends before
    the exception leaves here.
    """
    context = multiprocessing.get_context("spawn")
    answers, end = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, arguments, end))
    try:
        with _deaf_to_interrupts(), _of_no_script():
            process.start()
        end.close()
        answer = answers.recv()
    except EOFError:
        process.join()
        raise DiedError(process.exitcode) from None
    except BaseException:
        if process.pid is not None:  # it was started
            try:
                process.terminate()
                process.join(PATIENCE_S)
            finally:  # a second signal must not leave it behind
                process.kill()
        raise
    finally:
        if process.pid is not None:
            process.join()
        answers.close()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], end: "Connection[Any, Any]") -> None:
    """Send what the call returns, or its error; runs in the other process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: a checkpoint is written
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # libraries would write to a terminal that is not theirs
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = function(*arguments)
        except Exception as error:  # noqa: BLE001 - raised again in the process that asked
            error.add_note(traceback.format_exc())
            answer = error
        except KeyboardInterrupt:
            sys.exit(1)
    end.send(answer)


def _end_with_parent() -> None:
    """End this process if the one that asked is gone, killed without a chance to say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE_S)
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _of_no_script() -> Iterator[None]:
    """Let a process started in the block not run again what this one was started with: a caller's script, or a verb."""
    here = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = here


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let a process started in the block ignore Ctrl-C or a closed terminal from its first line on: its parent ends it.

    Blocked signals are inherited; those that arrive meanwhile reach this process when the block ends.
    """
    resource_tracker.ensure_running()  # otherwise the first process starts it, and it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
